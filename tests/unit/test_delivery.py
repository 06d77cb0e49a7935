"""Deliveries: in order, sized before they go, tried until they arrive or are refused."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from engine import delivery
from engine.delivery import JobDelivery
from engine.errors import DeliveryError, EngineError, RefusedDeliveryError
from engine.platform import Delivery
from tests import virtual_time

pytestmark = pytest.mark.anyio
NEVER = float("inf")


class Post:
    """The platform's side: each delivery meets the next of `fates`; without one left it arrives."""

    def __init__(self, *fates: Exception | None) -> None:
        self.fates = list(fates)
        self.tried: list[tuple[Delivery, Any]] = []
        self.arrived: list[tuple[Delivery, Any]] = []

    async def __call__(self, kind: Delivery, job_id: str, body: bytes) -> None:
        assert job_id == "job"
        document = json.loads(body)
        self.tried.append((kind, document))
        fate = self.fates.pop(0) if self.fates else None
        if fate is not None:
            raise fate
        self.arrived.append((kind, document))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "_FIRST_WAIT_S", 0.0001)
    monkeypatch.setattr(delivery, "_LONGEST_WAIT_S", 0.0001)


async def test_outputs_arrive_in_order_and_the_result_holds_them_all() -> None:
    post = Post()
    job = JobDelivery(post, "job", NEVER)

    await job.stream("漢")
    await job.stream({"text": "b"})
    await job.finish()

    assert post.arrived == [
        (Delivery.STREAM, {"output": "漢"}),
        (Delivery.STREAM, {"output": {"text": "b"}}),
        (Delivery.RESULT, {"output": ["漢", {"text": "b"}]}),
    ]


async def test_a_delivery_is_tried_until_it_arrives() -> None:
    post = Post(*[DeliveryError("status 503")] * 20)
    job = JobDelivery(post, "job", NEVER)

    await job.stream("a")

    assert len(post.tried) == 21
    assert post.arrived == [(Delivery.STREAM, {"output": "a"})]


async def test_an_output_that_cannot_arrive_in_time_is_an_error() -> None:
    with pytest.raises(DeliveryError):
        await JobDelivery(Post(*[DeliveryError("down")] * 100_000), "job", time.monotonic() + 0.05).stream("a")


@pytest.mark.parametrize("outputs", [1, 5])
def test_all_deliveries_of_a_job_share_its_time_and_its_result_has_ten_seconds_at_least(
    outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "_FIRST_WAIT_S", 1.0)
    monkeypatch.setattr(delivery, "_LONGEST_WAIT_S", 5.0)
    down = Post(*[DeliveryError("down")] * 1000)

    async def tried() -> float:
        job = JobDelivery(down, "job", time.monotonic() + 60)
        for _ in range(outputs):
            with pytest.raises(DeliveryError):
                await job.stream("a")
        assert time.monotonic() == pytest.approx(60, abs=0.1)
        await job.finish()
        return time.monotonic()

    with virtual_time.runner() as runner:
        assert runner.run(tried()) == pytest.approx(70, abs=0.1)


async def test_an_output_that_is_refused_is_not_tried_again() -> None:
    post = Post(RefusedDeliveryError("status 400"))

    with pytest.raises(RefusedDeliveryError):
        await JobDelivery(post, "job", NEVER).stream("a")
    assert len(post.tried) == 1


async def test_an_output_above_the_cap_comes_with_the_result_alone() -> None:
    post = Post()
    job = JobDelivery(post, "job", NEVER)
    large = {"data": "x" * 1_000_000}

    await job.stream(large)
    await job.finish()

    assert post.arrived == [(Delivery.RESULT, {"output": [large]})]


async def test_a_result_that_is_too_large_becomes_an_error_with_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "MAX_RESULT_BYTES", 100)
    post = Post()
    job = JobDelivery(post, "job", NEVER)

    await job.stream("x" * 200)
    await job.finish()

    error = json.loads(post.arrived[-1][1]["error"])
    assert error["status"] == 413
    assert "216 bytes" in error["error"]["message"]
    assert "100" in error["error"]["message"]


async def test_a_refused_result_is_followed_by_a_small_error() -> None:
    post = Post(None, RefusedDeliveryError("status 400: too large", 400))
    job = JobDelivery(post, "job", NEVER)

    await job.stream("a")
    assert await job.finish() == "failed"

    assert [kind for kind, _ in post.tried] == [Delivery.STREAM, Delivery.RESULT, Delivery.RESULT]
    error = json.loads(post.arrived[-1][1]["error"])
    assert "refused the result, which has 17 bytes: status 400: too large" in error["error"]["message"]
    # The same job would have the same result.
    assert error["retryable"] is False


async def test_a_result_that_the_platform_says_is_too_large_becomes_an_error_with_its_size() -> None:
    post = Post(RefusedDeliveryError("status 413", 413))

    assert await JobDelivery(post, "job", NEVER).finish() == "failed"

    error = json.loads(post.arrived[-1][1]["error"])
    assert (error["status"], error["retryable"]) == (413, False)
    assert "14 bytes" in error["error"]["message"]


@pytest.mark.parametrize("fate", [RefusedDeliveryError("status 404"), DeliveryError("down")])
async def test_what_cannot_be_delivered_is_in_the_log_with_the_jobs_id(
    fate: Exception, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "LEAST_RESULT_S", 0.05)

    assert await JobDelivery(Post(*[fate] * 100_000), "job", time.monotonic()).finish() == "undelivered"

    assert "Job job" in caplog.text


async def test_an_error_is_the_result_in_the_place_of_the_outputs() -> None:
    post = Post()
    job = JobDelivery(post, "job", NEVER)

    await job.stream("a")
    await job.finish(EngineError("broken"), replace_worker=True)

    (_, result) = post.arrived[-1]
    assert set(result) == {"error", "stopPod"}
    assert json.loads(result["error"])["retryable"] is True
