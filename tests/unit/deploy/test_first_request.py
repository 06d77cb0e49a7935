"""The first request: of a kind that the model answers, by a job or through a load balancer."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from deploy import first_request
from deploy.api import client
from deploy.errors import RefusedError, UnreachableError, WorkerError
from deploy.first_request import KINDS, Answer, Site
from deploy.options import LOAD_BALANCER
from runpod_api.models import Endpoint
from tests.unit.deploy.fakes import KEY, URL, FakeRunPod
from tests.unit.deploy.test_api import body

CHAT = [
    'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\ndata: {"choi',
    'ces": [{"delta": {"content": "Hel"}}]}\n\n',
    'data: {"choices": [{"delta": {"content": "lo"}}]}\n\ndata: [DONE]\n\n',
]
NO_CHAT = json.dumps({"error": {"message": "no chat template"}, "status": 400, "retryable": False})


class Queue:
    """The queue of an endpoint whose worker answers some routes, and fails jobs of the others."""

    def __init__(self, answers: dict[str, list[Any]], error: str = NO_CHAT) -> None:
        self.answers, self.error = answers, error
        self.routes: list[str] = []
        self.pending: list[Any] = []
        self.cancelled: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        action = request.url.path.split("/")[3]
        if action in ("run", "runsync"):
            route = json.loads(request.content)["input"]["openai_route"]
            self.routes.append(route)
            self.pending = list(self.answers.get(route, []))
            if action == "runsync":
                return httpx.Response(200, json={"id": "j", "status": "COMPLETED", "output": self.pending})
            return httpx.Response(200, json={"id": "j", "status": "IN_QUEUE"})
        status = "COMPLETED" if self.routes[-1] in self.answers else "FAILED"
        if action == "stream":
            outputs = [{"output": self.pending.pop(0)}] if self.pending else []
            return httpx.Response(200, json={"status": "IN_PROGRESS" if outputs else status, "stream": outputs})
        if action == "cancel":
            self.cancelled.append(request.url.path)
            return httpx.Response(200, json={"id": "j", "status": "CANCELLED"})
        return httpx.Response(200, json={"id": "j", "status": status, "error": self.error})


def ask(handler: Any, kinds: list[str], kind: str = "QUEUE") -> tuple[Answer, dict[str, Any] | None]:
    endpoint = Endpoint.model_validate(FakeRunPod().add(body(type=kind)))

    async def run() -> tuple[Answer, dict[str, Any] | None]:
        async with client(URL, KEY, httpx.MockTransport(handler)) as http:
            site = Site(http, endpoint)
            return await site.ask(kinds), await site.cold_start()

    return asyncio.run(run())


def test_a_chat_is_put_together_from_events_that_are_cut_anywhere() -> None:
    answer, _ = ask(Queue({"/v1/chat/completions": CHAT}), list(KINDS))

    assert (answer.kind.name, answer.text) == ("chat", "Hello")
    assert answer.first_token_s is not None


def test_a_model_without_chats_is_asked_for_a_completion_and_then_for_an_embedding() -> None:
    queue = Queue({"/v1/embeddings": ['{"data": []}']})

    answer, _ = ask(queue, list(KINDS))

    assert queue.routes[:3] == ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    assert (answer.kind.name, answer.text) == ("embedding", '{"data": []}')


def test_a_model_that_answers_nothing_says_why() -> None:
    with pytest.raises(WorkerError, match="answers no request of the kinds chat, completion: no chat template"):
        ask(Queue({}), ["chat", "completion"])


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (json.dumps({"error": {"message": "out of memory"}, "status": 500}), "fails with 500: out of memory"),
        ("the worker was killed", "has the status FAILED: the worker was killed"),
        ("", "has the status FAILED: no reason given"),
    ],
)
def test_a_job_that_fails_says_why(error: str, says: str) -> None:
    with pytest.raises(WorkerError, match=says):
        ask(Queue({}, error), list(KINDS))


def test_the_workers_own_cold_start_is_read() -> None:
    phases = {"total_s": 1.5, "phases_s": {"imports": 1.0}}
    queue = Queue({"/v1/chat/completions": CHAT, "/cold_start": [json.dumps(phases)]})

    assert ask(queue, ["chat"])[1] == phases
    assert ask(Queue({"/v1/chat/completions": CHAT}), ["chat"])[1] is None


def test_a_key_without_access_to_the_endpoint_is_told() -> None:
    with pytest.raises(RefusedError, match="the endpoint refuses RUNPOD_API_KEY"):
        ask(lambda _: httpx.Response(403), ["chat"])


def test_a_load_balancer_is_asked_when_a_worker_is_ready() -> None:
    requests: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(f"{request.method} {request.url}")
        if request.url.path == "/ping":
            return httpx.Response(200)
        if request.url.path == "/cold_start":
            return httpx.Response(200, json={"total_s": 1, "phases_s": {}})
        return httpx.Response(200, text="".join(CHAT))

    found, cold_start = ask(answer, ["chat"], LOAD_BALANCER)

    assert found.text == "Hello"
    assert cold_start == {"total_s": 1, "phases_s": {}}
    assert requests == [
        "GET https://ep1.api.runpod.test/ping",
        "POST https://ep1.api.runpod.test/v1/chat/completions",
        "GET https://ep1.api.runpod.test/cold_start",
    ]


def test_a_page_of_a_proxy_is_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_request, "_PATIENCE_S", -1.0)

    with pytest.raises(UnreachableError, match="answers 200, not a job: try again later"):
        ask(lambda _: httpx.Response(200, text="<html>wait</html>"), ["chat"])


def test_a_load_balancer_whose_urls_the_api_leaves_out_is_found() -> None:
    document = FakeRunPod().add(body(type=LOAD_BALANCER))
    del document["requestUrls"]

    async def run() -> list[str]:
        asked: list[str] = []

        def answer(request: httpx.Request) -> httpx.Response:
            asked.append(str(request.url))
            return httpx.Response(200, text="".join(CHAT))

        async with client(URL, KEY, httpx.MockTransport(answer)) as http:
            await Site(http, Endpoint.model_validate(document)).ask(["chat"])
        return asked

    assert asyncio.run(run()) == ["https://ep1.api.runpod.ai/ping", "https://ep1.api.runpod.ai/v1/chat/completions"]


@pytest.mark.parametrize("status", [429, 502, 503])
def test_a_busy_load_balancer_is_asked_again(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    async def sleep(_: float) -> None:
        pass

    monkeypatch.setattr(asyncio, "sleep", sleep)
    busy = [httpx.Response(status)] * 2

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "POST" and busy:
            return busy.pop()
        return httpx.Response(200, text="".join(CHAT))

    assert ask(answer, ["chat"], LOAD_BALANCER)[0].text == "Hello"


def test_a_load_balancer_that_cannot_be_reached_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_request, "_PATIENCE_S", -1.0)

    def refuse(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("Name or service not known")

    with pytest.raises(UnreachableError, match=r"ping cannot be reached \(Name or service not known\): check"):
        ask(refuse, ["chat"], LOAD_BALANCER)


@pytest.mark.parametrize("output", ["data: hello\n\n", {"text": "hello"}, "hello"])
def test_the_answer_of_another_program_is_an_error_that_names_the_image(output: Any) -> None:
    with pytest.raises(WorkerError, match="is no stream of OpenAI's events: is --image this worker's"):
        ask(Queue({"/v1/chat/completions": [output]}), ["chat"])
