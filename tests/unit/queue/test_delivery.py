"""Deliveries are in order, within the size limits, and retried until they arrive or are refused."""

from __future__ import annotations

import json
import time
from typing import Any

import msgspec
import pytest

from engine.errors import DeliveryError, EngineError, RefusedDeliveryError, RefusedOutputError, TooLargeError
from engine.json_codec import encode
from engine.queue import delivery
from engine.queue.delivery import JobDelivery
from engine.queue.protocol import PostKind
from tests.virtual_time import in_virtual_time

pytestmark = pytest.mark.anyio
NEVER = float("inf")


class FakePost:
    """Implements `JobQueue.post`: each call raises the next of `errors`; without one left, the body arrives."""

    def __init__(self, *errors: Exception | None) -> None:
        self.errors = list(errors)
        self.attempts: list[tuple[PostKind, Any]] = []
        self.arrived: list[tuple[PostKind, Any]] = []

    async def __call__(self, kind: PostKind, job_id: str, body: bytes) -> None:
        assert job_id == "job"
        # Decoded first: given bytes, `json` would accept half of a surrogate pair, which is not UTF-8.
        document = json.loads(body.decode())
        self.attempts.append((kind, document))
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        self.arrived.append((kind, document))


@pytest.fixture(autouse=True)
def _no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "_FIRST_WAIT_S", 0.0001)
    monkeypatch.setattr(delivery, "_MAX_WAIT_S", 0.0001)


async def test_outputs_arrive_in_order_and_the_result_has_them_all() -> None:
    post = FakePost()
    job = JobDelivery(post, "job", NEVER)

    await job.stream("漢")
    await job.stream({"text": "b"})
    await job.finish()

    assert post.arrived == [
        (PostKind.OUTPUT, {"output": "漢"}),
        (PostKind.OUTPUT, {"output": {"text": "b"}}),
        (PostKind.RESULT, {"output": ["漢", {"text": "b"}]}),
    ]


async def test_a_delivery_is_retried_until_it_arrives() -> None:
    post = FakePost(*[DeliveryError("status 503")] * 20)
    job = JobDelivery(post, "job", NEVER)

    await job.stream("a")

    assert len(post.attempts) == 21
    assert post.arrived == [(PostKind.OUTPUT, {"output": "a"})]


async def test_an_output_that_does_not_arrive_before_the_deadline_is_an_error() -> None:
    with pytest.raises(DeliveryError):
        await JobDelivery(FakePost(*[DeliveryError("down")] * 100_000), "job", time.monotonic() + 0.05).stream("a")


@pytest.mark.parametrize("outputs", [1, 5])
@in_virtual_time
async def test_all_deliveries_of_a_job_share_its_deadline_and_the_result_gets_at_least_ten_seconds(
    outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "_FIRST_WAIT_S", 1.0)
    monkeypatch.setattr(delivery, "_MAX_WAIT_S", 5.0)
    down = FakePost(*[DeliveryError("down")] * 1000)

    job = JobDelivery(down, "job", time.monotonic() + 60)
    for _ in range(outputs):
        with pytest.raises(DeliveryError):
            await job.stream("a")
    assert time.monotonic() == pytest.approx(60, abs=0.1)
    await job.finish()
    assert time.monotonic() == pytest.approx(70, abs=0.1)


@pytest.mark.parametrize(
    ("status", "error", "document_status"),
    [(None, RefusedOutputError, 500), (400, RefusedOutputError, 500), (409, RefusedOutputError, 500),
     (413, TooLargeError, 413)],
)  # fmt: skip
async def test_a_refused_output_is_an_error_that_gives_the_reason(
    status: int | None, error: type[RefusedOutputError | TooLargeError], document_status: int
) -> None:
    post = FakePost(RefusedDeliveryError(f"status {status}", status))

    with pytest.raises(error, match=r"the (platform refused the )?output.* has? 14 bytes|which has 14 bytes") as raised:
        await JobDelivery(post, "job", NEVER).stream("a")

    assert len(post.attempts) == 1
    assert raised.value.document()["status"] == document_status
    assert raised.value.document()["retryable"] is False


@pytest.mark.parametrize("status", [401, 403])
async def test_an_output_that_is_refused_for_a_temporary_reason_is_retried(status: int) -> None:
    post = FakePost(*[RefusedDeliveryError("no", status)] * 3)

    await JobDelivery(post, "job", NEVER).stream("a")

    assert post.arrived == [(PostKind.OUTPUT, {"output": "a"})]


async def test_an_output_above_the_stream_limit_arrives_only_with_the_result() -> None:
    post = FakePost()
    job = JobDelivery(post, "job", NEVER)
    large = {"data": "x" * 1_000_000}

    await job.stream(large)
    await job.finish()

    assert post.arrived == [(PostKind.RESULT, {"output": [large]})]


async def test_a_result_that_is_too_large_becomes_an_error_with_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "MAX_RESULT_BYTES", 100)
    post = FakePost()
    job = JobDelivery(post, "job", NEVER)

    await job.stream("x" * 200)
    await job.finish()

    error = json.loads(post.arrived[-1][1]["error"])
    assert error["status"] == 413
    assert "215 bytes" in error["error"]["message"]
    assert "100" in error["error"]["message"]


async def test_a_refused_result_is_followed_by_a_small_error() -> None:
    post = FakePost(None, RefusedDeliveryError("status 400: too large", 400))
    job = JobDelivery(post, "job", NEVER)

    await job.stream("a")
    assert await job.finish() == "failed"

    assert [kind for kind, _ in post.attempts] == [PostKind.OUTPUT, PostKind.RESULT, PostKind.RESULT]
    error = json.loads(post.arrived[-1][1]["error"])
    assert "refused the result, which has 16 bytes: status 400: too large" in error["error"]["message"]
    # The same job would have the same result.
    assert error["retryable"] is False


async def test_a_result_that_the_platform_refuses_as_too_large_becomes_an_error_with_its_size() -> None:
    post = FakePost(RefusedDeliveryError("status 413", 413))

    assert await JobDelivery(post, "job", NEVER).finish() == "failed"

    error = json.loads(post.arrived[-1][1]["error"])
    assert (error["status"], error["retryable"]) == (413, False)
    assert "13 bytes" in error["error"]["message"]


@pytest.mark.parametrize("error", [RefusedDeliveryError("status 404"), DeliveryError("down")])
async def test_an_undelivered_result_is_logged_with_the_jobs_id(
    error: Exception, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "MIN_RESULT_TIMEOUT_S", 0.05)

    assert await JobDelivery(FakePost(*[error] * 100_000), "job", time.monotonic()).finish() == "undelivered"

    assert "Job job" in caplog.text


async def test_an_error_replaces_the_outputs_in_the_result() -> None:
    post = FakePost()
    job = JobDelivery(post, "job", NEVER)

    await job.stream("a")
    await job.finish(EngineError("broken"), replace_worker=True)

    (_, result) = post.arrived[-1]
    assert set(result) == {"error", "stopPod"}
    assert json.loads(result["error"])["retryable"] is True


@pytest.mark.parametrize("status", [401, 403, 409])
async def test_a_result_that_is_refused_for_a_temporary_reason_is_retried(status: int) -> None:
    """A key may be in rotation, or a gateway may answer instead of the platform."""
    post = FakePost(RefusedDeliveryError("no", status), RefusedDeliveryError("no", status))

    assert await JobDelivery(post, "job", NEVER).finish() == "completed"

    assert post.arrived == [(PostKind.RESULT, {"output": []})]


async def test_any_other_refusal_of_a_result_is_not_retried() -> None:
    post = FakePost(RefusedDeliveryError("no", 400))

    assert await JobDelivery(post, "job", NEVER).finish() == "failed"

    assert [kind for kind, _ in post.attempts] == [PostKind.RESULT] * 2


@in_virtual_time
async def test_a_result_that_stays_refused_is_abandoned_before_the_jobs_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(delivery, "_FIRST_WAIT_S", 0.5)
    monkeypatch.setattr(delivery, "_MAX_WAIT_S", 0.5)

    post = FakePost(*[RefusedDeliveryError("no", 403)] * 1000)

    begun = time.monotonic()
    assert await JobDelivery(post, "job", begun + 600).finish() == "undelivered"
    assert time.monotonic() - begun <= delivery.MIN_RESULT_TIMEOUT_S + 0.5


async def test_half_of_a_surrogate_pair_is_delivered_as_valid_json() -> None:
    post = FakePost()
    job = JobDelivery(post, "job", NEVER)

    await job.stream("\ud83d")
    await job.stream({"\ude00": ["漢"]})
    await job.finish()

    outputs = ["\ud83d", {"\ude00": ["漢"]}]
    assert [document for _, document in post.arrived] == [*({"output": one} for one in outputs), {"output": outputs}]


async def test_an_output_that_is_delivered_twice_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding 20 MB blocks the event loop, and with it every other stream."""
    encoded = []

    def record(value: Any) -> bytes:
        encoded.append(value)
        return encode(value)

    monkeypatch.setattr(delivery, "encode", record)
    post = FakePost()
    job = JobDelivery(post, "job", NEVER)
    output = {"data": [1.5, 2.5]}

    await job.stream(output)
    await job.finish()

    assert [document for _, document in post.arrived] == [{"output": output}, {"output": [output]}]
    assert encoded == [output, {"output": [msgspec.Raw(b'{"data":[1.5,2.5]}')]}]
