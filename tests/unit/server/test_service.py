"""How long a server that drains serves what still comes: until the balancer has noticed. In virtual time."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from engine.errors import JobError
from engine.server.health_check import Health, HealthCheck
from engine.server.service import Service
from tests.virtual_time import freeze, in_virtual_time, watched_for_freezes


@dataclass
class App:
    """What the service sees of its app."""

    running: dict[str, Any] = field(default_factory=dict)
    last_request_at: float = 0.0
    refusal: JobError | None = None


async def accepting_s(
    app: App, health: HealthCheck, drain_s: float, *, every_s: float = 0, checks_s: float = 0
) -> float:
    """Return how long the server accepts requests after `stop`.

    Args:
        app: of the service.
        health: what the balancer asks.
        drain_s: the drain time.
        every_s: the time between two requests, if any.
        checks_s: the time between two health checks, if any.
    """
    service = Service(cast("Any", app), health, cast("Any", None), lambda: None, drain_s)
    begun = time.monotonic()
    app.last_request_at = begun
    service.stop()
    assert health.state is Health.DRAINING
    ending = asyncio.create_task(service._end_requests())
    tick = 0
    while app.refusal is None:
        await asyncio.sleep(0.01)
        tick += 1
        if every_s and tick % round(every_s * 100) == 0:
            app.last_request_at = time.monotonic()
        if checks_s and tick % round(checks_s * 100) == 0:
            health.drain_answers += 1
    refused_at = time.monotonic()
    await ending
    return refused_at - begun


@pytest.mark.parametrize(
    ("drain_s", "every_s", "checks_s", "expected_s"),
    [
        (25, 0, 0.3, 1.0),  # Two checks, and a quiet second.
        (25, 0, 1.5, 3.0),
        (25, 0.1, 0.3, 5.0),  # Requests still come: it has not noticed.
        (25, 0, 0, 5.0),  # Nobody asks.
        (2, 0, 0, 2.0),
        (0, 0, 0.3, 0.0),
    ],
)
def test_requests_are_accepted_until_the_balancer_has_noticed(
    drain_s: float, every_s: float, checks_s: float, expected_s: float
) -> None:
    @in_virtual_time
    async def run() -> None:
        took_s = await accepting_s(App(), HealthCheck("/ping"), drain_s, every_s=every_s, checks_s=checks_s)
        assert took_s == pytest.approx(expected_s, abs=0.12)

    run()


@in_virtual_time
async def test_running_requests_have_the_whole_drain_time_and_are_then_aborted() -> None:
    aborted: list[tuple[float, JobError]] = []

    class Request:
        def abort(self, error: JobError) -> None:
            aborted.append((time.monotonic(), error))
            app.running.clear()

    app = App({"one": Request()})
    begun = time.monotonic()
    await accepting_s(app, HealthCheck("/ping"), 10)

    ((at, error),) = aborted
    assert at - begun == pytest.approx(10, abs=0.1)
    assert (error.status, error.retryable) == (503, True)


@in_virtual_time
async def test_time_in_which_the_worker_was_frozen_takes_nothing_of_the_drain() -> None:
    aborted: list[float] = []
    loop = asyncio.get_running_loop()

    class Request:
        def abort(self, error: JobError) -> None:
            del error
            aborted.append(time.monotonic())
            app.running.clear()

    app = App({"one": Request()})
    with watched_for_freezes(loop, lambda _: None):
        begun = time.monotonic()
        loop.call_later(4, freeze, loop, 300)
        await accepting_s(app, HealthCheck("/ping"), 10)

    assert aborted == [pytest.approx(begun + 310, abs=0.1)]
