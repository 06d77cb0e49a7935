"""With any input, a job ends with an answer or with an error that a client can parse."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.jobs import pipeline
from tests.scripted import ScriptedApp, chat_chunks

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ["openai_route", "openai_input", "messages", "prompt", "sampling_params", "stream", "model", "route", "x"]
ROUTES = st.sampled_from(["/v1/models", "/v1/chat/completions", "/v1/../x", "//a/b", "@host/", "/v1?x=y"])
INPUTS: st.SearchStrategy[Any] = JSON | st.dictionaries(
    st.sampled_from(FIELDS), JSON | ROUTES | st.just({}) | st.just([{}]), max_size=4
)
APP_KINDS = st.sampled_from(["json", "stream", "error", "broken", "empty"])


def app_of(kind: str) -> ScriptedApp:
    match kind:
        case "stream":
            return ScriptedApp(body=chat_chunks("a", "漢"), content_type="text/event-stream")
        case "error":
            return ScriptedApp(body=[b'{"error": {"message": "no", "type": "x", "code": 400}}'], status=400)
        case "broken":
            return ScriptedApp(body=[b'{"a":'], fails=True)
        case "empty":
            return ScriptedApp(body=[])
        case _:
            return ScriptedApp(body=[b'{"a": 1}'])


@settings(max_examples=5000, deadline=None)
@given(INPUTS, APP_KINDS, st.booleans())
def test_a_job_with_any_input_ends_with_an_answer_or_a_parseable_error(value: Any, kind: str, has_id: bool) -> None:
    job = {"id": "1", "input": value} if has_id else {"input": value}

    async def run() -> list[Any]:
        async with asyncio.timeout(10):
            return [output async for output in pipeline.run(job, app_of(kind))]

    outputs = asyncio.run(run())

    assert outputs
    assert not math.isnan(len(json.dumps(outputs)))
    if isinstance(outputs[-1], dict) and "error" in outputs[-1]:
        document = json.loads(outputs[-1]["error"])
        assert document["error"]["message"]
        assert isinstance(document["status"], int)
        assert isinstance(document["retryable"], bool)
