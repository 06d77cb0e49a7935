"""Deliveries: in order, sized before they go, tried until they arrive or are refused."""

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
from tests import virtual_time

pytestmark = pytest.mark.anyio
NEVER = float("inf")


class Post:
    """The platform's side: each delivery meets the next of `fates`; without one left it arrives."""

    def __init__(self, *fates: Exception | None) -> None:
        self.fates = list(fates)
        self.tried: list[tuple[PostKind, Any]] = []
        self.arrived: list[tuple[PostKind, Any]] = []

    async def __call__(self, kind: PostKind, job_id: str, body: bytes) -> None:
        assert job_id == "job"
        # Decoded first: `json` would take half a surrogate pair in UTF-8, which is none.
        document = json.loads(body.decode())
        self.tried.append((kind, document))
        fate = self.fates.pop(0) if self.fates else None
        if fate is not None:
            raise fate
        self.arrived.append((kind, document))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "_FIRST_WAIT_S", 0.0001)
    monkeypatch.setattr(delivery, "_MAX_WAIT_S", 0.0001)


async def test_outputs_arrive_in_order_and_the_result_holds_them_all() -> None:
    post = Post()
    job = JobDelivery(post, "job", NEVER)

    await job.stream("漢")
    await job.stream({"text": "b"})
    await job.finish()

    assert post.arrived == [
        (PostKind.OUTPUT, {"output": "漢"}),
        (PostKind.OUTPUT, {"output": {"text": "b"}}),
        (PostKind.RESULT, {"output": ["漢", {"text": "b"}]}),
    ]


async def test_a_delivery_is_tried_until_it_arrives() -> None:
    post = Post(*[DeliveryError("status 503")] * 20)
    job = JobDelivery(post, "job", NEVER)

    await job.stream("a")

    assert len(post.tried) == 21
    assert post.arrived == [(PostKind.OUTPUT, {"output": "a"})]


async def test_an_output_that_cannot_arrive_in_time_is_an_error() -> None:
    with pytest.raises(DeliveryError):
        await JobDelivery(Post(*[DeliveryError("down")] * 100_000), "job", time.monotonic() + 0.05).stream("a")


@pytest.mark.parametrize("outputs", [1, 5])
def test_all_deliveries_of_a_job_share_its_time_and_its_result_has_ten_seconds_at_least(
    outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "_FIRST_WAIT_S", 1.0)
    monkeypatch.setattr(delivery, "_MAX_WAIT_S", 5.0)
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


@pytest.mark.parametrize(
    ("status", "error", "document_status"),
    [(None, RefusedOutputError, 500), (400, RefusedOutputError, 500), (409, RefusedOutputError, 500),
     (413, TooLargeError, 413)],
)  # fmt: skip
async def test_an_output_that_is_refused_ends_the_job_with_an_error_that_says_why(
    status: int | None, error: type[RefusedOutputError | TooLargeError], document_status: int
) -> None:
    post = Post(RefusedDeliveryError(f"status {status}", status))

    with pytest.raises(error, match=r"the (platform refused the )?output.* has? 14 bytes|which has 14 bytes") as raised:
        await JobDelivery(post, "job", NEVER).stream("a")

    assert len(post.tried) == 1
    assert raised.value.document()["status"] == document_status
    assert raised.value.document()["retryable"] is False


@pytest.mark.parametrize("status", [401, 403])
async def test_an_output_that_is_refused_for_a_reason_that_may_pass_is_tried_again(status: int) -> None:
    post = Post(*[RefusedDeliveryError("no", status)] * 3)

    await JobDelivery(post, "job", NEVER).stream("a")

    assert post.arrived == [(PostKind.OUTPUT, {"output": "a"})]


async def test_an_output_above_the_cap_comes_with_the_result_alone() -> None:
    post = Post()
    job = JobDelivery(post, "job", NEVER)
    large = {"data": "x" * 1_000_000}

    await job.stream(large)
    await job.finish()

    assert post.arrived == [(PostKind.RESULT, {"output": [large]})]


async def test_a_result_that_is_too_large_becomes_an_error_with_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "MAX_RESULT_BYTES", 100)
    post = Post()
    job = JobDelivery(post, "job", NEVER)

    await job.stream("x" * 200)
    await job.finish()

    error = json.loads(post.arrived[-1][1]["error"])
    assert error["status"] == 413
    assert "215 bytes" in error["error"]["message"]
    assert "100" in error["error"]["message"]


async def test_a_refused_result_is_followed_by_a_small_error() -> None:
    post = Post(None, RefusedDeliveryError("status 400: too large", 400))
    job = JobDelivery(post, "job", NEVER)

    await job.stream("a")
    assert await job.finish() == "failed"

    assert [kind for kind, _ in post.tried] == [PostKind.OUTPUT, PostKind.RESULT, PostKind.RESULT]
    error = json.loads(post.arrived[-1][1]["error"])
    assert "refused the result, which has 16 bytes: status 400: too large" in error["error"]["message"]
    # The same job would have the same result.
    assert error["retryable"] is False


async def test_a_result_that_the_platform_says_is_too_large_becomes_an_error_with_its_size() -> None:
    post = Post(RefusedDeliveryError("status 413", 413))

    assert await JobDelivery(post, "job", NEVER).finish() == "failed"

    error = json.loads(post.arrived[-1][1]["error"])
    assert (error["status"], error["retryable"]) == (413, False)
    assert "13 bytes" in error["error"]["message"]


@pytest.mark.parametrize("fate", [RefusedDeliveryError("status 404"), DeliveryError("down")])
async def test_what_cannot_be_delivered_is_in_the_log_with_the_jobs_id(
    fate: Exception, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "MIN_RESULT_TIMEOUT_S", 0.05)

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


@pytest.mark.parametrize("status", [401, 403, 409])
async def test_a_result_that_is_refused_for_a_reason_that_may_pass_is_tried_again(status: int) -> None:
    """A key that is being replaced, or a gateway's page, is not the platform's last word on a finished result."""
    post = Post(RefusedDeliveryError("no", status), RefusedDeliveryError("no", status))

    assert await JobDelivery(post, "job", NEVER).finish() == "completed"

    assert post.arrived == [(PostKind.RESULT, {"output": []})]


async def test_any_other_refusal_of_a_result_is_final() -> None:
    post = Post(RefusedDeliveryError("no", 400))

    assert await JobDelivery(post, "job", NEVER).finish() == "failed"

    assert [kind for kind, _ in post.tried] == [PostKind.RESULT] * 2


def test_a_result_that_stays_refused_is_given_up_though_the_job_has_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "_FIRST_WAIT_S", 0.5)
    monkeypatch.setattr(delivery, "_MAX_WAIT_S", 0.5)

    class Refusing(Post):
        async def __call__(self, kind: PostKind, job_id: str, body: bytes) -> None:
            self.fates = [RefusedDeliveryError("no", 403)]
            await super().__call__(kind, job_id, body)

    async def finish() -> None:
        begun = time.monotonic()
        assert await JobDelivery(Refusing(), "job", begun + 600).finish() == "undelivered"
        assert time.monotonic() - begun <= delivery.MIN_RESULT_TIMEOUT_S + 0.5

    with virtual_time.runner() as runner:
        runner.run(finish())


async def test_half_a_surrogate_pair_is_delivered_as_json_that_can_be_read() -> None:
    post = Post()
    job = JobDelivery(post, "job", NEVER)

    await job.stream("\ud83d")
    await job.stream({"\ude00": ["漢"]})
    await job.finish()

    outputs = ["\ud83d", {"\ude00": ["漢"]}]
    assert [document for _, document in post.arrived] == [*({"output": one} for one in outputs), {"output": outputs}]


async def test_an_output_is_encoded_once_though_it_is_delivered_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding 20 MB holds the event loop up, and every other stream with it."""
    encoded = []

    def noting(value: Any) -> bytes:
        encoded.append(value)
        return encode(value)

    monkeypatch.setattr(delivery, "encode", noting)
    post = Post()
    job = JobDelivery(post, "job", NEVER)
    output = {"data": [1.5, 2.5]}

    await job.stream(output)
    await job.finish()

    assert [document for _, document in post.arrived] == [{"output": output}, {"output": [output]}]
    assert encoded == [output, {"output": [msgspec.Raw(b'{"data":[1.5,2.5]}')]}]
