"""The client of Spirit's agent against the emulator: each task is answered exactly once, whatever fails."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import httpx
import pytest

from tests.unit.queue.spirit_site import SpiritSite, spirit_site

pytestmark = pytest.mark.anyio
Monkey = pytest.MonkeyPatch


def events(text: str) -> list[Any]:
    """Return the data of a stream's events; the last must be complete."""
    assert text.endswith("\n\n")
    data = [event.removeprefix("data: ") for event in text.split("\n\n")[:-1]]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


async def ask(site: SpiritSite, kind: str) -> None:
    """Send a request of one of three kinds; the answer must be right."""
    if kind == "result":
        response = await site.handled("a b")
        assert (response.status_code, response.json()) == (200, {"said": "a b"})
    elif kind == "answer":
        response = await site.proxied("a b")
        assert (response.status_code, response.json()) == (200, {"said": "a b"})
    else:
        response = await site.proxied("a b", stream=True)
        assert (response.status_code, events(response.text)) == (200, ["a", "b", "[DONE]"])


# Both kinds of task


async def test_both_kinds_of_task_are_answered_by_one_worker(monkeypatch: Monkey) -> None:
    async with spirit_site(monkeypatch) as site:
        await asyncio.gather(*(ask(site, kind) for kind in ("result", "answer", "stream") * 3))
        tasks = await site.ended(9)
    assert [(task["status"], task["answers"]) for task in tasks] == [("succeed", [200])] * 9


async def test_an_answer_has_the_apps_own_status_type_and_bytes(monkeypatch: Monkey) -> None:
    """Also an error of the app: it is not an error of the worker."""
    async with spirit_site(monkeypatch) as site:
        response = await site.proxied("fail")
        (task,) = await site.ended()
    assert (response.status_code, response.content) == (404, b'{"error":  {"message": "no such model"}}')
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    assert (task["status"], task["answers"]) == ("failed", [404])


async def test_a_stream_arrives_event_by_event(monkeypatch: Monkey) -> None:
    """Each is with the client before the app makes the next one."""
    async with spirit_site(monkeypatch) as site:
        site.engine.go = asyncio.Semaphore(0)
        async with site.stream("one two three") as response:
            arrived = []
            site.engine.go.release()
            async for line in response.aiter_lines():
                if line:
                    arrived.append(line)
                    site.engine.go.release()
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert arrived == ['data: "one"', 'data: "two"', 'data: "three"', "data: [DONE]"]


async def test_the_apps_request_has_the_tasks_id_and_no_header_of_the_client(monkeypatch: Monkey) -> None:
    async with spirit_site(monkeypatch) as site:
        await site.proxied("a")
        (task,) = await site.ended()
    ((headers, body),) = site.engine.requests
    assert headers == {
        "host": "worker",
        "content-type": "application/json",
        "content-length": str(len(body)),
        "x-request-id": task["id"],
    }


async def test_an_uploaded_form_reaches_the_app_byte_for_byte_with_its_boundary(monkeypatch: Monkey) -> None:
    content = bytes(range(256)) * 10
    async with spirit_site(monkeypatch) as site:
        upload = {"file": ("a.wav", content, "audio/wav")}
        form = httpx.Request("POST", "http://host", data={"model": "m"}, files=upload)
        await site.post_proxied(
            "/v1/audio/transcriptions", content=form.read(), content_type=form.headers["content-type"]
        )
    ((headers, body),) = site.engine.requests
    assert (headers["content-type"], body) == (form.headers["content-type"], form.content)


async def test_a_body_that_is_not_json_is_for_the_app_to_refuse(monkeypatch: Monkey) -> None:
    async with spirit_site(monkeypatch) as site:
        response = await site.post_proxied(content=b'{"half": \xff\x00')
    assert (response.status_code, response.json()) == (400, {"error": {"message": "not JSON"}})
    assert site.engine.requests[0][1] == b'{"half": \xff\x00'


@pytest.mark.parametrize(
    ("path", "status"), [("/v1/load_lora_adapter", 403), ("/v1/../sleep", 401), ("/api/tags", 403)]
)
async def test_a_route_that_clients_may_not_call_is_refused(path: str, status: int, monkeypatch: Monkey) -> None:
    async with spirit_site(monkeypatch) as site:
        response = await site.post_proxied(path, json={})
    assert response.status_code == status or response.status_code in (403, 404)
    assert site.engine.requests == []


async def test_a_streamed_handlers_task_is_one_text(monkeypatch: Monkey) -> None:
    """This kind of task has no stream."""
    async with spirit_site(monkeypatch) as site:
        response = await site.handled("a b", stream=True)
    assert events(response.json()) == ["a", "b", "[DONE]"]


async def test_a_failed_handlers_task_has_its_status_and_message(monkeypatch: Monkey) -> None:
    async with spirit_site(monkeypatch) as site:
        response = await site.handled("fail")
        (task,) = await site.ended()
    assert "vLLM" not in response.text
    assert response.json()["error"].endswith("no such model")
    assert (task["status"], task["answers"]) == ("failed", [404])


async def test_a_result_above_the_platforms_limit_is_an_error_that_says_so(monkeypatch: Monkey) -> None:
    monkeypatch.setattr("engine.queue.spirit_delivery.MAX_RESULT_BYTES", {"sync": 100, "async": 100})
    async with spirit_site(monkeypatch) as site:
        response = await site.handled("x" * 200)
        (task,) = await site.ended()
    assert "the result has 211 bytes, and the platform accepts at most 100" in response.json()["error"]
    assert task["answers"] == [413]


# Faults: each task is answered, once

FAULTS = [
    *({"kind": "error", "route": route, "when": when, "status": status, "times": 2}
      for route in ("request-result", "request-proxy", "request-ack", "request-metric")
      for when, status in (("before", 500), ("after", 503))),
    *({"kind": "drop", "route": route, "when": when, "times": 2}
      for route in ("request-result", "request-ack", "request-metric") for when in ("before", "after")),
    {"kind": "drop", "route": "request-proxy", "when": "after", "times": 2},
    {"kind": "error", "route": "request", "times": 2},
    {"kind": "error", "route": "request", "status": 429, "times": 1},
    {"kind": "drop", "route": "request", "times": 2},
    {"kind": "drop", "route": "heartbeat"},
    {"kind": "duplicate", "route": "request", "times": 1},
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: "-".join(str(value) for value in fault.values()))
async def test_a_failing_call_is_made_again(fault: dict[str, Any], monkeypatch: Monkey) -> None:
    """For each kind of task; a call that has had its effect, and whose answer was lost, is made again too."""
    monkeypatch.setattr("engine.queue.backoff.RATE_LIMIT_WAIT_S", 0.1)
    async with spirit_site(monkeypatch) as site:
        for count, kind in enumerate(("result", "answer", "stream"), 1):
            await site.faults(fault)
            await ask(site, kind)
            tasks = await site.ended(count)
    assert [set(task["answers"]) for task in tasks] == [{200}] * 3
    assert len(site.engine.requests) == 3


async def test_answers_wait_for_an_agent_that_is_away(monkeypatch: Monkey) -> None:
    async with spirit_site(monkeypatch) as site:
        site.engine.go = asyncio.Semaphore(0)
        asking = [asyncio.create_task(ask(site, kind)) for kind in ("result", "answer")]
        await asyncio.sleep(0.5)
        await site.faults({"kind": "drop", "route": "agent"})
        site.engine.go.release()
        site.engine.go.release()
        await asyncio.sleep(0.5)
        assert not any(one.done() for one in asking)
        await site.faults()
        await asyncio.gather(*asking)
        tasks = await site.ended(2)
    assert [(task["status"], task["answers"], task["retries"]) for task in tasks] == [("succeed", [200], 0)] * 2


async def test_a_task_that_was_answered_is_only_acknowledged_when_it_comes_again(monkeypatch: Monkey) -> None:
    """Its acknowledgement was lost for so long that its lease ended."""
    async with spirit_site(monkeypatch, lostAfter=2, heartbeatInterval=1, delivery_s=0.1) as site:
        monkeypatch.setattr("engine.queue.spirit_delivery.MIN_RESULT_TIMEOUT_S", 0.3)
        await site.faults({"kind": "error", "route": "request-ack"})
        await ask(site, "answer")
        await site.until(lambda: retried(site))
        await site.faults()
        (task,) = await site.ended()
    assert (task["answers"], task["retries"], len(site.engine.requests)) == ([200], 1, 1)


async def retried(site: SpiritSite) -> list[Any]:
    return [task for task in (await site.state())["jobs"] if task["retries"]]


def altered(text: bytes) -> dict[str, str]:
    return {"body": base64.b64encode(text).decode()}


@pytest.mark.parametrize(
    "change",
    [
        altered(b'{"the prompt, cut'),
        altered(b"\xff\xfe"),
        altered(b"[]"),
        altered(b"{}"),
        altered(b'{"method": 1, "uri": "/v1/models"}'),
        altered(b'{"method": "GET", "uri": "/v1/models", "body": 5}'),
        altered(b'{"method": "GET", "uri": "http://169.254.169.254/latest"}'),
        {"body": "a"},
    ],
)
@pytest.mark.parametrize("kind", ["proxied", "handled"])
async def test_a_task_that_cannot_be_read_is_answered(
    change: dict[str, Any], kind: str, monkeypatch: Monkey, caplog: pytest.LogCaptureFixture
) -> None:
    """With 400, or what the gateway makes of it; and the prompt is not in the log."""
    async with spirit_site(monkeypatch) as site:
        await site.faults({"kind": "alter", "route": "request", **change})
        response = await (site.proxied("a") if kind == "proxied" else site.handled("a"))
        (task,) = await site.ended()
    assert response.status_code == (400 if kind == "proxied" else 500)
    # Nothing tells which kind of answer is right. The emulator drops the wrong one once, and its client has an answer.
    assert (task["status"], set(task["answers"])) == ("failed", {400})
    assert "the prompt" not in caplog.text


@pytest.mark.parametrize(
    "headers",
    [
        {"Ease-Time-To-Live": ""},
        {"Ease-Enqueue-At": "soon", "Ease-Create-At": None},
        {"Ease-Enqueue-At": None, "Ease-Time-To-Live": None},
        {"Ease-Enqueue-At": "0"},
        {"Ease-Mode": None},
    ],
)
async def test_odd_or_missing_headers_lose_no_task(headers: dict[str, Any], monkeypatch: Monkey) -> None:
    async with spirit_site(monkeypatch) as site:
        await site.faults({"kind": "alter", "route": "request", "headers": headers})
        await asyncio.gather(*(ask(site, kind) for kind in ("result", "answer", "stream")))
        tasks = await site.ended(3)
    assert [(task["status"], task["answers"]) for task in tasks] == [("succeed", [200])] * 3


@pytest.mark.parametrize("kind", ["proxied", "handled"])
async def test_an_expired_task_is_answered_with_408_and_not_run(kind: str, monkeypatch: Monkey) -> None:
    async with spirit_site(monkeypatch) as site:
        headers = {"Ease-Enqueue-At": "1000", "Ease-Time-To-Live": "5"}
        await site.faults({"kind": "alter", "route": "request", "headers": headers})
        response = await (site.proxied("a") if kind == "proxied" else site.handled("a"))
        (task,) = await site.ended()
    assert response.status_code == 408
    assert (task["status"], task["answers"], site.engine.requests) == ("failed", [408], [])


async def test_a_client_that_hides_its_id_in_meta_changes_nothing(monkeypatch: Monkey) -> None:
    async with spirit_site(monkeypatch) as site:
        value = {"openai_input": site.chat("a")}
        response = await site.native("sync", {"input": value, "meta": {"requestID": "mine"}})
        (task,) = await site.ended()
    assert response.json() == {"said": "a"}
    assert site.engine.requests[0][0]["x-request-id"] == task["id"]
