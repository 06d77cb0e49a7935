"""Adds to an answer what its job cost, if the client asked for it with `include_costs`."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any

from engine.jobs.request import Request
from engine.json_codec import decode, encode
from engine.telemetry.job_times import CURRENT, RequestStats

_DONE = b"data: [DONE]\n\n"
# In streams without `[DONE]`, the last event with fields of its own: of Anthropic's messages, and of responses.
_LAST_EVENT = re.compile(
    rb"^event: (?:message_delta|response\.(?:completed|incomplete))\ndata: (\{.*\})$", re.MULTILINE
)
# vLLM's app may answer a few turns of the event loop before vLLM reports the request's times.
_MAX_TURNS = 50
_OBJECTS = {"/v1/chat/completions": "chat.completion.chunk", "/v1/completions": "text_completion"}


class CostReport:
    """The costs of one job, as its answer has them.

    Creating it also notes in the job's times which route and model its input names.

    Args:
        job_id: its id.
        request: that its input has described.
        pop_request_stats: returns and forgets what vLLM says of its requests that have finished.

    Attributes:
        wanted: whether the client asked for them, and they are counted: they are not under the SDK's own loop.
    """

    def __init__(self, job_id: str, request: Request, pop_request_stats: Callable[[str], list[RequestStats]]) -> None:
        self._job_id = job_id
        self._request = request
        self._pop_request_stats = pop_request_stats
        self._times = times = CURRENT.get()
        if times is not None:
            times.route, times.model = request.path, request.model
            times.join(request.traceparent)
        self.wanted = request.wants_costs and times is not None and times.describe is not None

    async def added_to(self, document: Any) -> Any:
        """Return a JSON object with the field `costs`; anything else, or if it is not wanted, unchanged."""
        if not self.wanted or not isinstance(document, dict):
            return document
        return document | {"costs": await self._document()}

    async def added_to_stream(self, events: bytes) -> bytes:
        """Return complete events with the costs, if the stream ends with them.

        Before `[DONE]`, they are a chunk without choices, like that of `stream_options.include_usage`, which clients
        accept. A stream without that has them as a field of an event: in `response` of `response.completed`, as in a
        response that is not streamed, and in Anthropic's `message_delta`, next to the usage.
        """
        if not self.wanted:
            return events
        if (last := _LAST_EVENT.search(events)) is not None:
            event = decode(last[1])
            event.get("response", event)["costs"] = await self._document()
            return events[: last.start(1)] + encode(event) + events[last.end(1) :]
        if not events.endswith(_DONE):
            return events
        chunk = {
            "id": self._job_id,
            "object": _OBJECTS.get(self._request.path, "costs"),
            "created": int(time.time()),
            "model": self._request.model or "",
            "choices": [],
            "costs": await self._document(),
        }
        return b"%bdata: %b\n\n%b" % (events.removesuffix(_DONE), encode(chunk), _DONE)

    async def _document(self) -> dict[str, Any]:
        times = self._times
        if times is None or times.describe is None:
            raise RuntimeError("the costs of this job are not counted")
        turns = 0
        while not (stats := self._pop_request_stats(self._job_id)) and turns < _MAX_TURNS:
            turns += 1
            await asyncio.sleep(0)
        times.requests += stats
        return times.describe()
