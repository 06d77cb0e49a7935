"""Which streams vLLM may make larger events for: those of plain text, which nothing looks at token by token.

An event costs as much to make for one token as for ten, and on a busy worker several leave together anyway. But vLLM's
tool and reasoning parsers expect one token at a time, and log-probabilities, token ids and usage come with each event:
such a stream stays as vLLM makes it by itself, and its events are merged after that (`engine.jobs.event_batcher`).
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

ROUTES = {"/v1/chat/completions", "/v1/completions"}
# With any other field, what a stream's events hold may depend on where they are cut.
PLAIN_FIELDS = {
    "frequency_penalty", "ignore_eos", "max_completion_tokens", "max_tokens", "messages", "min_p", "min_tokens",
    "model", "n", "presence_penalty", "prompt", "repetition_penalty", "seed", "stream", "stream_options", "temperature",
    "top_k", "top_p", "user",
}  # fmt: skip
PLAIN_OPTIONS = {"include_usage"}
# Whether tokens of the request that is answered in this context may be merged before its stream is made.
MERGEABLE: ContextVar[bool] = ContextVar("mergeable", default=False)


def is_plain_text(path: str, body: dict[str, Any]) -> bool:
    """Whether the answer is a stream of plain text alone, as far as the request says.

    Args:
        path: the route.
        body: the request, as its client wrote it.
    """
    options = body.get("stream_options")
    return (
        path in ROUTES
        and body.get("stream") is True
        and _asked(body) <= PLAIN_FIELDS
        and (not isinstance(options, dict) or _asked(options) <= PLAIN_OPTIONS)
    )


def _asked(fields: dict[str, Any]) -> set[str]:
    """The fields that ask for something: clients write `null`, `false` and `[]` for what they do not want."""
    return {name for name, value in fields.items() if value is not None and value is not False and value != []}
