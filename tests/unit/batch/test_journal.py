"""A run's files after a kill at any point: what was written completely counts, and what was not does not."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batch.errors import JournalError
from batch.journal import Journal

IDS = ["a", "b", "c"]
ENDPOINT = "https://api.example/v2/ep"
HEADER = {"version": 1, "input_sha256": "hash", "endpoint": ENDPOINT, "errors": "out.errors.jsonl"}


def answer(custom_id: str) -> dict[str, Any]:
    return {"id": f"batch_req_{custom_id}", "custom_id": custom_id, "response": {"body": "é\n\x00"}, "error": None}


def open_journal(directory: Path, *, ids: list[str] = IDS, sha256: str = "hash", endpoint: str = ENDPOINT) -> Journal:
    journal = Journal(directory / "out.jsonl", directory / "out.errors.jsonl")
    journal.open(ids, sha256, endpoint)
    return journal


def run(directory: Path) -> None:
    """Do everything that is not done yet."""
    journal = open_journal(directory)
    for custom_id in IDS:
        if custom_id not in journal.answered:
            if custom_id not in journal.jobs:
                journal.sent(custom_id, f"job-{custom_id}")
            journal.answer(custom_id, answer(custom_id), failed=custom_id == "b")
    journal.close(complete=True)


def ids_in(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_bytes().splitlines()] if path.exists() else []


# The records of a run in the order in which they are written: file and line.
RECORDS: list[tuple[str, dict[str, Any]]] = [
    ("out.jsonl.journal", HEADER),
    ("out.jsonl.journal", {"custom_id": "a", "job": "job-a"}),
    ("out.jsonl.journal", {"custom_id": "b", "job": "job-b"}),
    ("out.jsonl", answer("a")),
    ("out.errors.jsonl", answer("b")),
    ("out.jsonl.journal", {"custom_id": "c", "job": "job-c"}),
    ("out.jsonl", answer("c")),
]
LINES = [(name, json.dumps(record).encode() + b"\n") for name, record in RECORDS]


def kills() -> Iterator[tuple[int, int]]:
    """Each point at which a run can be killed: the number of complete records, and the bytes of the next."""
    for complete, (_, line) in enumerate(LINES):
        yield from ((complete, size) for size in range(len(line)))
    yield len(LINES), 0


def test_a_run_that_was_killed_at_any_byte_continues_where_it_was(tmp_path: Path) -> None:
    for complete, torn in kills():
        directory = tmp_path / f"{complete}-{torn}"
        directory.mkdir()
        written = LINES[:complete] + ([(LINES[complete][0], LINES[complete][1][:torn])] if torn else [])
        for name, data in written:
            with (directory / name).open("ab") as file:
                file.write(data)

        journal = open_journal(directory)

        records = RECORDS[:complete]
        assert journal.answered == {it["custom_id"] for name, it in records if not name.endswith(".journal")}
        assert journal.failed == sum(name == "out.errors.jsonl" for name, _ in records)
        assert journal.jobs == {it["custom_id"]: it["job"] for _, it in records if "job" in it}
        journal.close()
        run(directory)
        assert sorted(ids_in(directory / "out.jsonl")) == ["a", "c"]
        assert ids_in(directory / "out.errors.jsonl") == ["b"]
        assert json.loads((directory / "out.jsonl.journal").read_bytes()) == HEADER


def test_a_journal_whose_header_is_torn_begins_again(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl.journal").write_bytes(b'{"version": 1, "inp')

    journal = open_journal(tmp_path)
    journal.sent("a", "job-a")
    journal.close()

    assert open_journal(tmp_path).jobs == {"a": "job-a"}


def test_a_tail_of_zeros_as_a_power_failure_leaves_it_is_cut_off(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    journal.answer("a", answer("a"), failed=False)
    journal.sent("b", "job-b")
    journal.close()
    for name in ("out.jsonl", "out.jsonl.journal"):
        with (tmp_path / name).open("ab") as file:
            file.write(b"\0" * 4096)

    journal = open_journal(tmp_path)
    journal.answer("b", answer("b"), failed=False)
    journal.close()

    assert ids_in(tmp_path / "out.jsonl") == ["a", "b"]


def test_any_answer_can_be_written_and_read(tmp_path: Path) -> None:
    document = {**answer("a"), "response": {"body": ["\ud83d", 10**40, 1e-300, "\x00\u2028"]}}
    journal = open_journal(tmp_path)
    journal.answer("a", document, failed=False)
    journal.close()

    assert open_journal(tmp_path).answered == {"a"}
    assert json.loads((tmp_path / "out.jsonl").read_bytes()) == document


def test_a_complete_run_is_complete_when_it_is_started_again(tmp_path: Path) -> None:
    run(tmp_path)

    journal = open_journal(tmp_path)

    assert (journal.answered, journal.failed, journal.jobs) == ({"a", "b", "c"}, 1, {})
    journal.close(complete=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.errors.jsonl", "out.jsonl", "out.jsonl.journal"]


def test_the_answers_of_a_complete_run_are_not_those_of_another_input_with_the_same_ids(tmp_path: Path) -> None:
    run(tmp_path)

    with pytest.raises(JournalError, match="is of another input file, or the input has changed"):
        open_journal(tmp_path, sha256="other")


def test_the_lines_of_an_errors_file_that_was_removed_are_to_be_sent(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "out.errors.jsonl").unlink()

    journal = open_journal(tmp_path)

    assert (journal.answered, journal.failed, journal.jobs) == ({"a", "c"}, 0, {})
    journal.close()


def test_a_run_that_ends_before_it_has_sent_anything_leaves_no_file(tmp_path: Path) -> None:
    open_journal(tmp_path).close()

    assert list(tmp_path.iterdir()) == []


def test_an_errors_file_that_had_a_torn_line_only_is_removed(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    journal.sent("a", "job-a")
    journal.close()
    (tmp_path / "out.errors.jsonl").write_bytes(b'{"id": "ba')

    journal = open_journal(tmp_path)
    for custom_id in IDS:
        journal.answer(custom_id, answer(custom_id), failed=False)
    journal.close(complete=True)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.journal"]


def test_only_one_process_may_run_a_batch(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)

    with pytest.raises(JournalError, match="in use: another process runs this batch"):
        open_journal(tmp_path)

    journal.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "other"}, "is of another input file, or the input has changed"),
        ({"endpoint": "https://api.example/v2/other"}, "is of the endpoint https://api.example/v2/ep"),
    ],
)
def test_another_input_or_endpoint_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    journal.sent("a", "job-a")
    journal.close()

    with pytest.raises(JournalError, match=message):
        open_journal(tmp_path, **changes)

    assert open_journal(tmp_path).jobs == {"a": "job-a"}


def test_another_errors_file_is_refused_and_not_changed(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "note.txt").write_text("not a complete line")

    with pytest.raises(JournalError, match=r"whose errors file is out\.errors\.jsonl: name it with --errors"):
        Journal(tmp_path / "out.jsonl", tmp_path / "note.txt").open(IDS, "hash", ENDPOINT)

    assert (tmp_path / "note.txt").read_text() == "not a complete line"


def test_a_run_continues_where_its_files_were_moved(tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    first = tmp_path / "first"
    for directory in (moved, first):
        directory.mkdir()
    run(first)
    for path in first.iterdir():
        path.rename(moved / path.name)

    assert open_journal(moved).answered == {"a", "b", "c"}


@pytest.mark.parametrize("name", ["out.jsonl", "errors.jsonl"])
def test_a_directory_that_does_not_exist_is_an_error_before_anything_is_sent(name: str, tmp_path: Path) -> None:
    paths = {one: tmp_path / ("gone" if one == name else ".") / one for one in ("out.jsonl", "errors.jsonl")}

    with pytest.raises(JournalError, match="gone is not a directory: create it, or name another"):
        Journal(*paths.values()).open(IDS, "hash", ENDPOINT)

    assert list(tmp_path.iterdir()) == []


def test_a_record_that_does_not_fit_on_the_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    """The limit of a file's size stands for a full disk: a write is cut short, and the next one fails."""
    journal = open_journal(tmp_path)
    journal.answer("a", answer("a"), failed=False)
    before = (tmp_path / "out.jsonl").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: .*out\.jsonl'"):
            journal.answer("b", answer("b"), failed=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert journal.answered == {"a"}
    journal.close()


@pytest.mark.parametrize("custom_id", ["a", "z"])
def test_files_of_others_are_refused_and_not_changed(custom_id: str, tmp_path: Path) -> None:
    """Also if they answer all lines: those of which input is not known."""
    content = json.dumps(answer(custom_id)) + "\nnot a complete line"
    for name in ("out.jsonl", "out.errors.jsonl"):
        (tmp_path / name).write_text(content)
        with pytest.raises(JournalError, match="exists already: remove it, or name another output"):
            open_journal(tmp_path, ids=["a"])
        assert (tmp_path / name).read_text() == content
        (tmp_path / name).unlink()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lines", [[answer("z")], [answer("a"), answer("a")], ["no answer"]])
def test_an_output_that_others_have_changed_is_refused(lines: list[Any], tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    journal.sent("a", "job-a")
    journal.close()
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    with pytest.raises(JournalError, match=r"out\.jsonl"):
        open_journal(tmp_path)


def test_a_damaged_line_in_the_journal_is_named(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl.journal").write_text(json.dumps(HEADER) + "\n{damaged\n")

    with pytest.raises(JournalError, match=r"out\.jsonl\.journal:2 is not a line of a batch's run"):
        open_journal(tmp_path)


def test_a_journal_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl.journal").write_text(json.dumps({**HEADER, "version": 2}) + "\n")

    with pytest.raises(JournalError, match="another version"):
        open_journal(tmp_path)
