"""Beside 23 other streams, all that looks at a stream's deltas gives, event by event, what vLLM's own server streams.

That is each of vLLM's tool and reasoning parsers above all: many of them break when they are given several tokens at
once. `tests/soak/test_parsers.py` has the same beside fewer streams and more.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.parity import joined
from tests.parsers.cases import CASES, FAMILY_CASES, REASONING_CASES, TOOL_CASES
from tests.parsers.samples import NOT_HERE, REASONING_SAMPLES, TOOL_SAMPLES
from tests.parsers.sides import VllmAlone, both_sides

# Both sides start with a hundred apps each; the warnings are of what vLLM imports.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]

OTHERS, AT_ONCE = 23, 16
# What vLLM's own server makes of these is not what their models mean.
STREAMS_NO_CALLS = {"tool phi4_mini_json", "family xlam granite"}
STREAMS_NO_REASONING = {"reasoning minimax_m2_append_think"}


@pytest.fixture(scope="module")
def streamed(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, str], VllmAlone]]:
    """All streams of the worker, and vLLM's own server, which has answered the same."""
    with both_sides(Path(tiny_model), tmp_path_factory.mktemp("parsers")) as (worker, alone):
        alone.learn(CASES)
        yield worker.texts(CASES, OTHERS, AT_ONCE), alone


def said(text: str) -> tuple[dict[str, str], dict[int, list[str]], str]:
    """The texts of a chat's first choice, its calls and why it has ended."""
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
def test_beside_others_a_stream_is_what_vllm_streams(name: str, streamed: tuple[dict[str, str], VllmAlone]) -> None:
    texts, alone = streamed

    assert alone.difference(name, CASES[name], texts[name]) is None


@pytest.mark.parametrize("name", [name for name in {**TOOL_CASES, **FAMILY_CASES} if name not in STREAMS_NO_CALLS])
def test_the_sample_is_streamed_as_calls(name: str, streamed: tuple[dict[str, str], VllmAlone]) -> None:
    _, calls, reason = said(streamed[0][name])

    assert [call[0] for call in calls.values()] == ["weather"] * len(calls) != []
    assert all("Zürich" in call[1] or "東京" in call[1] for call in calls.values())
    assert reason == "tool_calls"


@pytest.mark.parametrize(
    "name", [name for name in {**REASONING_CASES, **FAMILY_CASES} if name not in STREAMS_NO_REASONING]
)
def test_the_sample_is_streamed_as_reasoning(name: str, streamed: tuple[dict[str, str], VllmAlone]) -> None:
    texts, _, _ = said(streamed[0][name])

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
