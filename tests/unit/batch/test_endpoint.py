"""Which calls are made again, when, and for how long; in virtual time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise

import httpx
import pytest

from batch.endpoint import RUNS_PER_S, Endpoint
from batch.errors import RefusedError, RejectedError, UnreachableError
from tests.unit.batch.fake_platform import KEY, URL, FakePlatform
from tests.virtual_time import in_virtual_time

JOB = b'{"input": {"openai_route": "/v1/completions", "openai_input": {"prompt": "x"}}}'


def answers(*responses: httpx.Response | None) -> Callable[[str, int], httpx.Response | None]:
    """Return these responses in turn, the last one again and again; None serves the call."""
    return lambda _operation, before: responses[min(before, len(responses) - 1)]


def endpoint_of(platform: FakePlatform, reports: list[str] | None = None) -> Endpoint:
    report = (reports if reports is not None else []).append
    return Endpoint(URL, KEY, report, transport=platform.transport)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
@in_virtual_time
async def test_a_call_is_made_again_until_it_is_answered(status: int) -> None:
    platform = FakePlatform(refuses=answers(*[httpx.Response(status)] * 3, None))
    reports: list[str] = []

    async with endpoint_of(platform, reports) as endpoint:
        assert await endpoint.run(JOB) == "job-0"

    pauses = [later - earlier for earlier, later in pairwise(platform.calls["run"])]
    assert all(0.5 * 2**number <= pause < 0.5 * 2**number + 1.1 for number, pause in enumerate(pauses))
    assert reports[0].startswith(f"{URL}/run answered {status}")
    assert KEY not in reports[0]


@pytest.mark.parametrize("error", [httpx.ReadError, httpx.DecodingError])
@in_virtual_time
async def test_a_lost_connection_or_a_damaged_answer_is_made_again(error: type[httpx.RequestError]) -> None:
    attempts = 0

    async def serve(request: httpx.Request) -> httpx.Response:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            raise error("reset", request=request)
        return httpx.Response(200, json={"id": "j1"})

    async with Endpoint(URL, KEY, print, transport=httpx.MockTransport(serve)) as endpoint:
        assert await endpoint.run(JOB) == "j1"


@pytest.mark.parametrize("in_date", [False, True])
@in_virtual_time
async def test_retry_after_is_respected(in_date: bool) -> None:
    at = format_datetime(datetime.now(UTC) + timedelta(seconds=120), usegmt=True)
    refusal = httpx.Response(429, headers={"Retry-After": at if in_date else "120"})
    platform = FakePlatform(refuses=answers(refusal, None))

    async with endpoint_of(platform) as endpoint:
        await endpoint.run(JOB)

    first, second = platform.calls["run"]
    # A date has no fractions of a second.
    assert 115 < second - first < 125


@pytest.mark.parametrize("value", ["soon", "-3", "Mon, 99 Nov 2026"])
@in_virtual_time
async def test_a_retry_after_that_says_nothing_is_ignored(value: str) -> None:
    platform = FakePlatform(refuses=answers(httpx.Response(503, headers={"Retry-After": value}), None))

    async with endpoint_of(platform) as endpoint:
        await endpoint.run(JOB)

    first, second = platform.calls["run"]
    assert second - first < 5


@in_virtual_time
async def test_a_platform_that_does_not_answer_is_given_up() -> None:
    platform = FakePlatform(refuses=answers(httpx.Response(502, text="<h1>Bad gateway</h1>")))
    reports: list[str] = []

    async with endpoint_of(platform, reports) as endpoint:
        with pytest.raises(UnreachableError, match="answered 502: <h1>Bad gateway</h1>"):
            await endpoint.run(JOB)

    assert 900 <= time.monotonic() < 960
    assert 20 < len(reports) < 40
    assert all(later - earlier < 35 for earlier, later in pairwise(platform.calls["run"]))


@in_virtual_time
async def test_a_full_queue_is_waited_for_without_an_end() -> None:
    def refuses(_operation: str, _before: int) -> httpx.Response | None:
        return httpx.Response(429) if time.monotonic() < 7200 else None

    platform = FakePlatform(refuses=refuses)

    async with endpoint_of(platform) as endpoint:
        assert await endpoint.run(JOB) == "job-0"

    assert time.monotonic() > 7200


@in_virtual_time
async def test_a_call_that_has_waited_for_long_is_not_given_up_at_the_first_failure() -> None:
    def refuses(_operation: str, _before: int) -> httpx.Response | None:
        now = time.monotonic()
        return httpx.Response(429) if now < 7200 else httpx.Response(502) if now < 7300 else None

    async with endpoint_of(FakePlatform(refuses=refuses)) as endpoint:
        assert await endpoint.run(JOB) == "job-0"

    assert time.monotonic() > 7300


@in_virtual_time
async def test_a_job_that_the_platform_cannot_take_while_it_takes_others_is_rejected() -> None:
    async def serve(request: httpx.Request) -> httpx.Response:
        return httpx.Response(520 if b"poison" in request.content else 200, json={"id": "j1"})

    async with Endpoint(URL, KEY, print, transport=httpx.MockTransport(serve)) as endpoint:
        poisoned = asyncio.create_task(endpoint.run(b"poison"))
        await asyncio.sleep(100)
        await endpoint.run(JOB)

        with pytest.raises(RejectedError, match="answered 520") as caught:
            await poisoned
        assert caught.value.status == 520


@in_virtual_time
async def test_no_job_is_rejected_when_the_platform_goes_away_while_it_takes_others() -> None:
    async def serve(request: httpx.Request) -> httpx.Response:
        fails = b"first" in request.content or time.monotonic() > 30
        return httpx.Response(502 if fails else 200, json={"id": "j1"})

    async with Endpoint(URL, KEY, print, transport=httpx.MockTransport(serve)) as endpoint:
        first = asyncio.create_task(endpoint.run(b"first"))
        await asyncio.sleep(29)
        await endpoint.run(JOB)

        for call in (first, endpoint.run(JOB)):
            with pytest.raises(UnreachableError):
                await call


@pytest.mark.parametrize(
    ("response", "error", "message"),
    [
        (httpx.Response(401), RefusedError, "the platform refuses RUNPOD_API_KEY for this endpoint"),
        (httpx.Response(403), RefusedError, "the platform refuses RUNPOD_API_KEY for this endpoint"),
        (httpx.Response(404), RefusedError, "no such endpoint; check --endpoint and --base-url"),
        (httpx.Response(302), RefusedError, "answered 302: Found"),
        (httpx.Response(402, text="no funds"), RefusedError, "answered 402: no funds"),
        (httpx.Response(400, text="bad input"), RejectedError, "bad input"),
        (httpx.Response(413), RejectedError, "Request Entity Too Large"),
    ],
)
@in_virtual_time
async def test_a_refusal_is_an_error_at_once(response: httpx.Response, error: type[Exception], message: str) -> None:
    platform = FakePlatform(refuses=answers(response))

    async with endpoint_of(platform) as endpoint:
        with pytest.raises(error, match=message):
            await endpoint.run(JOB)

    assert len(platform.calls["run"]) == 1


@pytest.mark.parametrize("body", ["<html>", "[]", '{"detail": "x"}'])
@in_virtual_time
async def test_an_answer_that_is_not_the_platforms_is_an_error_that_asks_for_the_url(body: str) -> None:
    platform = FakePlatform(refuses=answers(httpx.Response(200, text=body)))

    async with endpoint_of(platform) as endpoint:
        with pytest.raises(UnreachableError, match=r"without 'jobs': is https://api.example/v2/ep the URL"):
            await endpoint.check()

    assert time.monotonic() < 15


@in_virtual_time
async def test_a_certificate_that_is_not_trusted_is_an_error_at_once() -> None:
    async def serve(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] unable to get local issuer", request=request)

    async with Endpoint(URL, KEY, print, transport=httpx.MockTransport(serve)) as endpoint:
        with pytest.raises(RefusedError, match="set SSL_CERT_FILE"):
            await endpoint.check()


@in_virtual_time
async def test_a_job_that_the_platform_does_not_know_is_none() -> None:
    async with endpoint_of(FakePlatform(refuses=answers(httpx.Response(404)))) as endpoint:
        assert await endpoint.status("j1") is None


@in_virtual_time
async def test_submissions_stay_below_the_platforms_rate_limit() -> None:
    platform = FakePlatform()

    async with endpoint_of(platform) as endpoint:
        for _ in range(300):
            await endpoint.run(JOB)

    calls = platform.calls["run"]
    assert all(later - earlier >= 0.99 / RUNS_PER_S for earlier, later in pairwise(calls))
