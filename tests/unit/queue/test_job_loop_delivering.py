"""The job loop runs jobs: it streams their outputs, delivers their results, and logs them."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from engine.errors import RefusedDeliveryError
from tests.fake_job_queue import Fault
from tests.unit.queue.fakes import LoopHarness, error_in

pytestmark = pytest.mark.anyio


def job_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Return the JSON lines of the log: one for a job's start, one for its end."""
    return [json.loads(line) for line in caplog.messages if line.startswith("{")]


async def test_outputs_are_streamed_and_the_result_has_them_all() -> None:
    harness = LoopHarness()
    async with harness.running():
        harness.submit("1")

        assert await harness.queue.result("1") == {"output": ["a", "b"]}
        assert harness.queue.outputs == [("1", "a"), ("1", "b")]


async def test_an_answer_with_an_error_field_is_an_output_and_the_job_completes() -> None:
    harness = LoopHarness()
    answer = {"object": "response", "error": {"message": "cut"}}
    async with harness.running():
        harness.submit("1", words=[answer, {"error": {"message": "no text"}}])

        assert await harness.queue.result("1") == {"output": [answer, {"error": {"message": "no text"}}]}


async def test_an_error_that_the_handler_yields_is_the_result_unchanged() -> None:
    harness = LoopHarness()
    async with harness.running():
        harness.submit("1", error='{"error": 5}')

        assert await harness.queue.result("1") == {"error": '{"error": 5}'}


async def test_a_handler_that_raises_fails_its_job_with_a_parseable_error() -> None:
    harness = LoopHarness()
    async with harness.running():
        harness.submit("1", fails=True)

        assert error_in(await harness.queue.result("1"))["status"] == 500


async def test_a_refused_output_closes_the_handler_and_fails_the_job() -> None:
    harness = LoopHarness()
    harness.queue.post_faults.append(Fault(before=RefusedDeliveryError("status 400: not in progress")))
    async with harness.running():
        harness.submit("1", waits=True)

        assert "refused the output" in error_in(await harness.queue.result("1"))["error"]["message"]
        assert harness.handler.closed == ["1"]


async def test_a_job_whose_result_was_refused_is_logged_as_undelivered(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    harness = LoopHarness()
    harness.queue.post_faults.extend([Fault(before=RefusedDeliveryError("status 404"))] * 2)
    async with harness.running():
        harness.submit("1", words=[])
        await harness.handler.closes.wait()
    assert '"status": "undelivered"' in caplog.text
    assert "completed" not in caplog.text


async def test_the_log_names_the_batch_of_a_job(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    harness = LoopHarness()
    async with harness.running():
        harness.queue.submit({"id": "1", "input": {}, "batchId": "batch-7"})
        await harness.queue.result("1")
    assert [(line["job"], line["batchId"]) for line in job_lines(caplog)] == [("1", "batch-7")] * 2


async def test_a_job_whose_input_is_nested_too_deeply_for_the_log_runs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    harness = LoopHarness(log_inputs=True)
    value: dict[str, Any] = {}
    for _ in range(5000):
        value = {"deeper": value}
    async with harness.running():
        harness.submit("1", words=["a"], deep=value)
        assert await harness.queue.result("1") == {"output": ["a"]}
    assert '"input": "nested too deeply"' in caplog.text
    while value:  # taken apart from outside in: freeing it in one go would recurse as deeply
        value = value.pop("deeper", {})


@pytest.mark.parametrize(
    ("value", "route"),
    [
        ({"openai_route": "/v1/models?key=my-words"}, "/v1/models"),
        ({"route": "/tokenize"}, "/tokenize"),
        ({"openai_route": ["my-words"]}, None),
        ({"openai_route": "/my-words" * 20}, None),
        ({"prompt": "my-words"}, "native"),
        ("my-words", None),
    ],
)
async def test_the_log_shows_a_plain_route_and_nothing_else_of_the_input(
    value: Any, route: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def answer(_job: dict[str, Any]) -> AsyncGenerator[Any, None]:
        yield "a"

    harness = LoopHarness(answer)
    async with harness.running():
        harness.queue.submit({"id": "1", "input": value})
        await harness.queue.result("1")
    assert [line["route"] for line in job_lines(caplog)] == [route, route]
    assert "my-words" not in caplog.text
