"""The run clock: what counts as a freeze, and what a deadline by it does after one."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import uvloop

from engine.run_clock import FREEZE_S, Clocks, RunClock
from tests.processes import ROOT

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, object]]:
    """Run the tests on uvloop, as the worker does: its clock is not the one that `machine` replaces."""
    return "asyncio", {"loop_factory": uvloop.new_event_loop}


@dataclass
class FakeMachine:
    """The clocks of a machine. The watching thread of `RunClock.watched` does not run: the test looks."""

    monotonic_s: float = 1000.0
    wall_s: float = 1_700_000_000.0
    boot_s: float = 1000.0
    busy_s: float = 5.0

    def read(self) -> Clocks:
        return Clocks(self.monotonic_s, self.wall_s, self.boot_s, self.busy_s)

    def advance(self, seconds: float, *, busy: float = 0.0, monotonic: bool = True, boot: bool = True) -> None:
        self.wall_s += seconds
        self.monotonic_s += seconds * monotonic
        self.boot_s += seconds * boot
        self.busy_s += seconds * busy


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    result = FakeMachine()
    monkeypatch.setattr("engine.run_clock.time.monotonic", lambda: result.monotonic_s)
    return result


class Watched:
    """A watched clock on this machine; `thaws` has the lengths of its freezes."""

    def __init__(self, machine: FakeMachine) -> None:
        self.thaws: list[float] = []
        self.clock = RunClock(machine.read)
        self.clock._last = machine.read()
        self.thawed = asyncio.Event()
        self.clock._on_thaw = self._on_thaw

    def _on_thaw(self, frozen_s: float) -> None:
        self.thaws.append(frozen_s)
        self.thawed.set()


def test_time_in_which_the_process_was_frozen_does_not_count(machine: FakeMachine) -> None:
    watched = Watched(machine)
    before = watched.clock.now()
    machine.advance(312)

    assert watched.clock.now() == before
    assert watched.thaws == [312]
    machine.advance(1)
    assert watched.clock.now() == before + 1
    assert watched.thaws == [312]


def test_a_long_computation_is_no_freeze(machine: FakeMachine) -> None:
    watched = Watched(machine)
    before = watched.clock.now()
    machine.advance(30, busy=0.9)

    assert watched.clock.now() == before + 30
    assert watched.thaws == []


def test_a_short_gap_is_no_freeze(machine: FakeMachine) -> None:
    watched = Watched(machine)
    before = watched.clock.now()
    machine.advance(FREEZE_S - 0.1)
    watched.clock.look()

    assert watched.clock.now() == before + FREEZE_S - 0.1
    assert watched.thaws == []


@pytest.mark.parametrize("boot", [False, True], ids=["only the wall clock", "the boot time too"])
def test_a_freeze_in_which_the_monotonic_clock_stood_still_is_noticed_and_skips_nothing(
    boot: bool, machine: FakeMachine
) -> None:
    watched = Watched(machine)
    before = watched.clock.now()
    machine.advance(600, monotonic=False, boot=boot)
    machine.advance(0.5)
    watched.clock.look()

    assert watched.clock.now() == before + 0.5
    assert watched.thaws == [600]


def test_a_wall_clock_that_is_set_back_is_no_freeze(machine: FakeMachine) -> None:
    watched = Watched(machine)
    machine.wall_s -= 3600
    watched.clock.look()

    assert watched.thaws == []


def test_the_time_goes_on_where_the_monotonic_clock_begins_again(machine: FakeMachine) -> None:
    """As for a process that is restored on another machine."""
    watched = Watched(machine)
    before = watched.clock.now()
    machine.advance(60)
    machine.monotonic_s = machine.boot_s = 3.0

    assert before <= watched.clock.now() <= before + 1
    assert len(watched.thaws) == 1


async def test_a_timer_that_came_due_during_a_freeze_waits_for_the_rest(machine: FakeMachine) -> None:
    """The event loop itself calls back: by its own clock, the time is over."""
    watched = Watched(machine)
    calls: list[float] = []
    expired = asyncio.Event()

    def on_timer() -> None:
        calls.append(watched.clock.now())
        expired.set()

    watched.clock.call_later(0.05, on_timer)
    begun = watched.clock.now()
    machine.advance(300)
    await watched.thawed.wait()
    assert calls == []

    machine.advance(0.05)
    await expired.wait()
    assert calls == [begun + 0.05]


async def test_a_wait_that_came_due_during_a_freeze_goes_on(machine: FakeMachine) -> None:
    watched = Watched(machine)
    future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    waiting = asyncio.ensure_future(watched.clock.wait([future], 0.05))
    await asyncio.sleep(0)
    machine.advance(300)
    await watched.thawed.wait()
    assert not waiting.done()
    future.set_result("an answer that came during the freeze")
    await waiting


FROZEN = """
import asyncio, sys, time, uvloop
from engine.run_clock import CLOCK

async def main():
    thawed = asyncio.Event()
    lengths = []
    def on_thaw(frozen_s):
        lengths.append(frozen_s)
        thawed.set()
    with CLOCK.watched(on_thaw):
        expired = []
        timer = CLOCK.call_later(1.5, lambda: expired.append(1))
        begun = CLOCK.now()
        if sys.argv[1] == "blocked":
            time.sleep(4)  # The event loop; other threads run.
        else:
            print("ready", flush=True)
            await thawed.wait()
        print(len(lengths), len(expired), round(CLOCK.now() - begun, 1), *(round(s, 1) for s in lengths), flush=True)

uvloop.run(main())
"""


def test_a_process_that_is_stopped_notices_it_before_any_of_its_timers() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", FROZEN, "frozen"], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(FREEZE_S + 1)
        os.kill(process.pid, signal.SIGCONT)
        freezes, expired, ran_s, frozen_s = process.stdout.readline().split()

    assert (freezes, expired) == ("1", "0")
    assert float(ran_s) < 1
    assert FREEZE_S < float(frozen_s) < FREEZE_S + 2


def test_a_blocked_event_loop_is_no_freeze() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FROZEN, "blocked"], stdout=subprocess.PIPE, text=True, check=True, timeout=60, cwd=ROOT
    )

    assert done.stdout.split()[0] == "0"


def test_uvloop_and_asyncio_have_the_clock_that_the_run_clock_reads() -> None:
    """The timers of `RunClock` are set on the loop, and judged by `time.monotonic`."""
    for factory in (uvloop.new_event_loop, asyncio.new_event_loop):
        loop = factory()
        assert abs(loop.time() - time.monotonic()) < 1
        loop.close()
