"""An engine that makes no steps has failed, except while the process was frozen."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from engine.backend.statistics import Statistics
from engine.backend.vllm_engine import VLLMEngine
from engine.run_clock import CLOCK
from tests.virtual_time import freeze, in_virtual_time, watched_for_freezes

STALL_S = 60.0


def engine() -> VLLMEngine:
    """Return an engine that has made one step and runs one request."""
    result = VLLMEngine.__new__(VLLMEngine)
    vars(result).update(
        _engine=SimpleNamespace(errored=False, get_num_unfinished_requests=lambda: 1),
        _stall_timeout_s=STALL_S,
        _idle_at=CLOCK.now(),
        statistics=Statistics(),
    )
    result.statistics.on_scheduler_stats(0, 1, 0, 0.1)
    result.statistics.on_step(0)
    return result


@in_virtual_time
async def test_a_frozen_engine_has_not_stalled() -> None:
    loop = asyncio.get_running_loop()
    with watched_for_freezes(loop, lambda _: None):
        await asyncio.sleep(1)
        checked = engine()
        freeze(loop, 10_000)
        assert checked.failure() is None
        await asyncio.sleep(STALL_S - 1)
        assert checked.failure() is None

        await asyncio.sleep(2)
        assert checked.failure() == f"no step for {STALL_S + 1:.0f} s while 1 requests run"
