"""How a job's end becomes a line of the output file, a line of the errors file, or another attempt."""

from __future__ import annotations

import json
from typing import Any

import pytest

from batch.outcome import Outcome
from engine.errors import EngineResponseError, InvalidInputError, JobError, WorkerShutdownError

BODY = {"id": "chatcmpl-1", "object": "chat.completion", "choices": []}


def of(**document: Any) -> Outcome:
    return Outcome.of_job("j1", document)


def failed_with(error: JobError) -> Outcome:
    return of(status="FAILED", error=error.output()["error"])


@pytest.mark.parametrize("output", [[BODY], BODY, json.dumps(BODY), [json.dumps(BODY)]])
def test_an_answer_is_a_line_of_the_output_file(output: Any) -> None:
    outcome = of(status="COMPLETED", output=output)

    assert not outcome.failed
    assert not outcome.retryable
    assert outcome.document("a") == {
        "id": "batch_req_j1",
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": "j1", "body": BODY},
        "error": None,
    }


def test_a_list_of_answers_stays_a_list() -> None:
    assert of(status="COMPLETED", output=[1, 2]).body == [1, 2]


def test_an_error_of_vllm_is_a_response_with_its_status_and_body() -> None:
    body = {"error": {"message": "no such model", "type": "NotFoundError", "param": "model", "code": 404}}

    outcome = failed_with(EngineResponseError(404, body))

    assert outcome.failed
    assert not outcome.retryable
    assert outcome.document("a")["response"] == {"status_code": 404, "request_id": "j1", "body": body}
    assert outcome.document("a")["error"] is None


@pytest.mark.parametrize(
    ("outcome", "retryable"),
    [
        (failed_with(InvalidInputError("no")), False),
        (failed_with(WorkerShutdownError("the worker ends")), True),
        (failed_with(EngineResponseError(429, {"error": {}})), True),
        (failed_with(EngineResponseError(500, {"error": {}})), False),
        (of(status="FAILED", error=json.dumps({"error": {"message": "busy", "code": 503}})), True),
        (of(status="FAILED", error="job timed out after 1 retries"), True),
        (of(status="FAILED", error=json.dumps({"error_type": "KeyError", "error_message": "'x'"})), True),
        (of(status="FAILED"), True),
        (of(status="TIMED_OUT", error="ttl exceeded"), True),
        (of(status="CANCELLED"), False),
        (of(status="COMPLETED", output={"error": {"message": "no", "code": 400}}), False),
        (of(status="COMPLETED", output={"error": {"message": "busy", "code": 503}}), True),
        (of(status="COMPLETED"), False),
        (Outcome.of_job("j1", None), True),
        (Outcome.rejected(413, "too large"), False),
    ],
)
def test_what_may_succeed_on_another_attempt_is_tried_again(outcome: Outcome, retryable: bool) -> None:
    assert outcome.failed
    assert outcome.retryable is retryable


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (of(status="FAILED", error="job timed out after 1 retries"), "job_failed", "job timed out after 1 retries"),
        (of(status="FAILED", error='{"error_message": "boom"}'), "job_failed", "boom"),
        (of(status="TIMED_OUT", error="ttl exceeded"), "job_timed_out", "the job timed out: ttl exceeded"),
        (of(status="CANCELLED"), "job_cancelled", "the job was cancelled"),
        (of(status="COMPLETED", output=[]), "no_output", "the job completed without an output"),
    ],
)
def test_a_job_without_a_response_is_an_error_with_a_code(outcome: Outcome, code: str, message: str) -> None:
    document = outcome.document("a")

    assert document["response"] is None
    assert document["error"] == {"code": code, "message": message}


def test_a_refused_job_has_an_id_of_its_own() -> None:
    one, other = (Outcome.rejected(413, "too large").document("a") for _ in range(2))

    assert one["id"] != other["id"]
    assert one["response"]["status_code"] == 413
    assert one["response"]["body"]["error"]["message"] == "too large"


def test_a_response_of_v1_responses_has_a_field_error_and_is_an_answer() -> None:
    assert not of(status="COMPLETED", output={"id": "resp_1", "error": None, "output": []}).failed
