"""With 23 other streams running, streams that vLLM parses equal those of its own server, event by event.

This tests each of vLLM's tool and reasoning parsers: many of them break when they get several tokens at once.
`tests/soak/test_parsers.py` repeats it with fewer and with more streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.parity import joined
from tests.parsers.cases import CASES, FAMILY_CASES, REASONING_CASES, TOOL_CASES
from tests.parsers.samples import NOT_HERE, REASONING_SAMPLES, TOOL_SAMPLES
from tests.parsers.sides import VLLMServer, both_sides

# Both sides make a hundred apps each. The warnings come from vLLM's imports.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]

CONCURRENT, AT_ONCE = 23, 16
# vLLM's own server does not parse these as their models intend.
STREAMS_NO_CALLS = {"tool phi4_mini_json", "family xlam granite"}
STREAMS_NO_REASONING = {"reasoning minimax_m2_append_think"}


@pytest.fixture(scope="module")
def streamed(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, str], VLLMServer]]:
    """Yield all streams of the worker, and vLLM's own server, which has answered the same requests."""
    with both_sides(Path(tiny_model), tmp_path_factory.mktemp("parsers")) as (worker, vllm):
        vllm.load_answers(CASES)
        yield worker.texts(CASES, CONCURRENT, AT_ONCE), vllm


def content_of(text: str) -> tuple[dict[str, str], dict[int, list[str]], str]:
    """Return the texts of a chat's first choice, its tool calls, and its finish reason."""
    parts, rest = joined(text)[0]
    texts: dict[str, str] = {}
    calls: dict[int, list[str]] = {}
    for name, value in parts:
        if name.startswith("tool call"):
            call = calls.setdefault(value["index"], ["", ""])
            function = value.get("function") or {}
            call[0] += function.get("name") or ""
            call[1] += function.get("arguments") or ""
        else:
            texts[name] = texts.get(name, "") + value
    return texts, calls, rest["choice"]["finish_reason"]


@pytest.mark.parametrize("name", CASES)
def test_a_stream_equals_vllms_while_others_run(name: str, streamed: tuple[dict[str, str], VLLMServer]) -> None:
    texts, vllm = streamed

    assert vllm.difference(name, CASES[name], texts[name]) is None


@pytest.mark.parametrize("name", [name for name in {**TOOL_CASES, **FAMILY_CASES} if name not in STREAMS_NO_CALLS])
def test_the_sample_is_streamed_as_tool_calls(name: str, streamed: tuple[dict[str, str], VLLMServer]) -> None:
    _, calls, reason = content_of(streamed[0][name])

    assert [call[0] for call in calls.values()] == ["weather"] * len(calls) != []
    assert all("Zürich" in call[1] or "東京" in call[1] for call in calls.values())
    assert reason == "tool_calls"


@pytest.mark.parametrize(
    "name", [name for name in {**REASONING_CASES, **FAMILY_CASES} if name not in STREAMS_NO_REASONING]
)
def test_the_sample_is_streamed_as_reasoning(name: str, streamed: tuple[dict[str, str], VLLMServer]) -> None:
    texts, _, _ = content_of(streamed[0][name])

    assert "Hm, 3 days < 4" in texts["reasoning"]
    assert "Hm" not in texts.get("content", "")


def test_each_parser_that_vllm_registers_has_a_sample_or_a_reason() -> None:
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    registered: dict[str, Any] = {
        "tool": set(ToolParserManager.list_registered()),
        "reasoning": set(ReasoningParserManager.list_registered()),
    }

    assert registered["tool"] == TOOL_SAMPLES.keys() | NOT_HERE["tool"].keys()
    assert registered["reasoning"] == REASONING_SAMPLES.keys() | NOT_HERE["reasoning"].keys()
