"""Repeats `tests/integration/test_parity_parsers.py` with 0, 5, 23 and 63 concurrent streams."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parsers.cases import CASES
from tests.parsers.sides import VLLMServer, Worker, both_sides
from tests.soak.conftest import Show

REPETITIONS = 3


@pytest.fixture(scope="module")
def sides(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Worker, VLLMServer]]:
    with both_sides(Path(tiny_model), tmp_path_factory.mktemp("parsers")) as (worker, vllm):
        vllm.load_answers(CASES)
        yield worker, vllm


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("concurrent", "at_once"), [(0, 1), (5, 1), (23, 8), (63, 8)])
def test_a_stream_equals_vllms_at_any_load(
    concurrent: int, at_once: int, sides: tuple[Worker, VLLMServer], show: Show
) -> None:
    worker, vllm = sides
    different: list[str] = []
    for _ in range(REPETITIONS):
        texts = worker.texts(CASES, concurrent, at_once)
        different += [name for name, case in CASES.items() if vllm.difference(name, case, texts[name])]

    show(
        f"{len(CASES)} streams, {REPETITIONS} times, with {concurrent} others: {len(different)} different: {different}"
    )
    assert not different
