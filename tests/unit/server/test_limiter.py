"""The limiter: requests start in order as the engine has room, and are refused if it has none for a second."""

from __future__ import annotations

import asyncio

import pytest

from engine.errors import EngineFullError
from engine.server.limiter import MAX_WAIT_S, Limiter
from tests.virtual_time import freeze, in_virtual_time, watched_for_freezes


class Room:
    """An engine that can run a number of requests."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.changed = asyncio.Event()

    def slots(self, running: int) -> int:
        return max(self.count - running, 0)


async def hold(limiter: Limiter, name: str, order: list[str], duration_s: float) -> None:
    async with limiter.slot():
        order.append(name)
        await asyncio.sleep(duration_s)


@in_virtual_time
async def test_requests_that_wait_start_in_the_order_in_which_they_came() -> None:
    limiter = Limiter(Room(1).slots, asyncio.Event())
    order: list[str] = []

    await asyncio.gather(*(hold(limiter, name, order, 0.1) for name in "abcde"))

    assert order == list("abcde")
    assert limiter.running == 0


@in_virtual_time
async def test_a_request_is_refused_when_no_slot_became_free_in_time() -> None:
    limiter = Limiter(Room(1).slots, asyncio.Event())
    order: list[str] = []
    begun = asyncio.get_running_loop().time()
    first = asyncio.create_task(hold(limiter, "first", order, 10))
    await asyncio.sleep(0)

    with pytest.raises(EngineFullError):
        await hold(limiter, "second", order, 0)

    assert asyncio.get_running_loop().time() - begun == pytest.approx(MAX_WAIT_S, abs=0.01)
    await first
    assert order == ["first"]
    await hold(limiter, "third", order, 0)
    assert (order, limiter.running) == (["first", "third"], 0)


@in_virtual_time
async def test_a_waiting_request_starts_when_the_engines_load_has_changed() -> None:
    room = Room(0)
    order: list[str] = []
    limiter = Limiter(room.slots, room.changed)
    running = asyncio.create_task(limiter.run())
    waiting = asyncio.create_task(hold(limiter, "one", order, 0))
    await asyncio.sleep(0.5)
    assert order == []

    room.count = 1
    room.changed.set()
    await waiting

    assert order == ["one"]
    running.cancel()


@in_virtual_time
async def test_a_request_that_is_cancelled_while_it_waits_takes_no_slot() -> None:
    limiter = Limiter(Room(1).slots, asyncio.Event())
    order: list[str] = []
    first = asyncio.create_task(hold(limiter, "first", order, 0.5))
    second = asyncio.create_task(hold(limiter, "second", order, 0))
    third = asyncio.create_task(hold(limiter, "third", order, 0))
    await asyncio.sleep(0)
    second.cancel()

    await asyncio.gather(first, third)

    assert order == ["first", "third"]
    assert limiter.running == 0


@in_virtual_time
async def test_a_slot_that_comes_just_as_its_request_is_cancelled_goes_to_the_next() -> None:
    room = Room(0)
    order: list[str] = []
    limiter = Limiter(room.slots, room.changed)
    first = asyncio.create_task(hold(limiter, "first", order, 0))
    second = asyncio.create_task(hold(limiter, "second", order, 0))
    await asyncio.sleep(0)
    room.count = 1
    limiter._start_waiting()
    first.cancel()

    await asyncio.gather(first, second, return_exceptions=True)

    assert order == ["second"]
    assert limiter.running == 0


@in_virtual_time
async def test_time_in_which_the_worker_was_frozen_takes_nothing_of_the_second() -> None:
    loop = asyncio.get_running_loop()
    limiter = Limiter(Room(1).slots, asyncio.Event())
    order: list[str] = []

    with watched_for_freezes(loop, lambda _: None):
        first = asyncio.create_task(hold(limiter, "first", order, 0.5))
        second = asyncio.create_task(hold(limiter, "second", order, 0))
        await asyncio.sleep(0.1)
        freeze(loop, 300)
        await asyncio.gather(first, second)

    assert order == ["first", "second"]
