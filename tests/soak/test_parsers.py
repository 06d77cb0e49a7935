"""What `tests/integration/test_parity_parsers.py` holds beside 23 streams: alone and beside 5, 23 and 63, repeated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parsers.cases import CASES
from tests.parsers.sides import VllmAlone, Worker, both_sides
from tests.soak.conftest import Show

REPETITIONS = 3


@pytest.fixture(scope="module")
def sides(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Worker, VllmAlone]]:
    with both_sides(Path(tiny_model), tmp_path_factory.mktemp("parsers")) as (worker, alone):
        alone.learn(CASES)
        yield worker, alone


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("others", "at_once"), [(0, 1), (5, 1), (23, 8), (63, 8)])
def test_a_stream_is_what_vllm_streams_at_any_load(
    others: int, at_once: int, sides: tuple[Worker, VllmAlone], show: Show
) -> None:
    worker, alone = sides
    unequal: list[str] = []
    for _ in range(REPETITIONS):
        texts = worker.texts(CASES, others, at_once)
        unequal += [name for name, case in CASES.items() if alone.difference(name, case, texts[name])]

    show(f"{len(CASES)} streams, {REPETITIONS} times, beside {others} others: {len(unequal)} unequal: {unequal}")
    assert not unequal
