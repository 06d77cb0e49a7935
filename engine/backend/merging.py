"""Decides which streams may have several tokens in one event: those of plain text, which nothing parses token by token.

An event costs as much for one token as for ten, and on a busy worker several are delivered together anyway. But vLLM's
tool and reasoning parsers expect one token at a time, and log-probabilities, token ids and usage come with each event:
such a stream keeps the events that vLLM makes, and they are merged later (`engine.jobs.event_batcher`).
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

ROUTES = {"/v1/chat/completions", "/v1/completions"}
# With any other field, the content of an event may depend on where the stream is cut.
PLAIN_FIELDS = {
    "frequency_penalty", "ignore_eos", "max_completion_tokens", "max_tokens", "messages", "min_p", "min_tokens",
    "model", "n", "presence_penalty", "prompt", "repetition_penalty", "seed", "stream", "stream_options", "temperature",
    "top_k", "top_p", "user",
}  # fmt: skip
PLAIN_OPTIONS = {"include_usage"}
# Whether the tokens of the request of this context may be merged before vLLM makes its stream.
MERGEABLE: ContextVar[bool] = ContextVar("mergeable", default=False)


def is_plain_text(path: str, body: dict[str, Any]) -> bool:
    """Return whether the response is a stream of plain text only, as far as the request says.

    Args:
        path: the route.
        body: the request, as its client wrote it.
    """
    options = body.get("stream_options")
    return (
        path in ROUTES
        and body.get("stream") is True
        and _requested(body) <= PLAIN_FIELDS
        and (not isinstance(options, dict) or _requested(options) <= PLAIN_OPTIONS)
    )


def _requested(fields: dict[str, Any]) -> set[str]:
    """Return the fields that request something: clients write `null`, `false` and `[]` for what they do not want."""
    return {name for name, value in fields.items() if value is not None and value is not False and value != []}
