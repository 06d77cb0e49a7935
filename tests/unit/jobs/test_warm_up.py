"""The request that warms a worker up: one that the model has, and never a reason not to serve."""

from __future__ import annotations

import asyncio
import json

import pytest

from engine.jobs import warm_up
from tests.scripted import ScriptedApp, chat_chunks

pytestmark = pytest.mark.anyio
ROUTES = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]


def requested(app: ScriptedApp) -> list[str]:
    return [str(scope["path"]) for scope, _ in app.requests]


async def test_a_chat_is_answered_to_its_end(caplog: pytest.LogCaptureFixture) -> None:
    app = ScriptedApp(chat_chunks("a", "b"), content_type="text/event-stream")
    with caplog.at_level("INFO"):
        await warm_up.run(app)

    assert requested(app) == ROUTES[:1]
    assert json.loads(app.requests[0][1])["max_tokens"] == 2
    assert app.completed.is_set()
    assert "Warm-up: /v1/chat/completions answered after" in caplog.text


async def test_a_model_without_the_route_gets_another_request() -> None:
    app = ScriptedApp(unknown_routes=frozenset(ROUTES[:2]))
    await warm_up.run(app)

    assert requested(app) == ROUTES[2:]


async def test_refused_requests_are_logged_and_the_worker_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    app = ScriptedApp((b'{"error": {"message": "no chat template"}}',), status=400)
    await warm_up.run(app)

    assert requested(app) == ROUTES
    (line,) = caplog.messages
    assert line.startswith("Warm-up: no request was answered (/v1/chat/completions: ")
    assert "no chat template" in line


async def test_a_model_that_has_none_of_the_requests_is_not_warmed_up(caplog: pytest.LogCaptureFixture) -> None:
    await warm_up.run(ScriptedApp(unknown_routes=frozenset(ROUTES)))

    assert caplog.messages == ["Warm-up: no request was answered (there is none for this kind of model)"]


async def test_a_request_without_an_end_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(warm_up, "TIMEOUT_S", 0.01)
    app = ScriptedApp((b"a", b"b"), pause_s=1000)
    await asyncio.wait_for(warm_up.run(app), 10)

    assert app.disconnects == 1
    assert "no answer within" in caplog.text
