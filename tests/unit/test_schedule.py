"""The schedule of the integration tests lists files that exist, and keeps together those that share an engine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.integration.schedule import FIRST, HERE, Schedule, place

FILES = sorted(HERE.rglob("test_*.py"))


def test_each_listed_file_exists_and_is_listed_once() -> None:
    listed = [HERE / file for files in FIRST for file in files]

    assert set(listed) <= set(FILES)
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("engine", ["worker|vllm_server", "llm"])
def test_files_that_share_an_engine_of_the_session_are_one_unit(engine: str) -> None:
    session = re.compile(
        rf"def \w+\([^)]*\b(?:{engine}): (?:Process|httpx\.Client|Site)\b|usefixtures\(\"(?:{engine})\""
    )
    own = re.compile(rf"def (?:{engine})\(")
    texts = {file: file.read_text(encoding="utf-8") for file in FILES}

    users = {file for file, text in texts.items() if session.search(text) and not own.search(text)}

    assert len(users) > 1
    assert len({place(file) for file in users}) == 1
    assert place(users.pop()) < len(FIRST)


def test_a_unit_is_given_out_under_one_name_and_any_other_file_by_itself(pytestconfig: pytest.Config) -> None:
    schedule = object.__new__(Schedule)
    schedule.config = pytestconfig

    def scope(file: Path) -> str:
        return schedule._split_scope(f"{file.relative_to(pytestconfig.rootpath)}::test_it[a::b]")

    for files in FIRST:
        assert {scope(HERE / file) for file in files} == {files[0]}
    assert scope(HERE / "test_new.py") == "tests/integration/test_new.py"
