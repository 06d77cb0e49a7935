"""Sends a request both through the queue and directly to vLLM, and reduces the answers to what must be equal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from tests.emulator_queue import EmulatorQueue
from tests.integration.parity_cases import Case

MAX_TRIES = 3
# Statuses of errors that may pass.
RETRYABLE_STATUSES = {429, 502, 503, 504}
TIMES = {"created", "created_at", "completed_at", "system_fingerprint"}
IDS = {"id", "item_id", "call_id", "request_id"}
TEXTS = {"content", "text", "reasoning", "refusal", "arguments", "delta", "partial_json", "thinking"}
_PREFIX_OF_ID = re.compile(r"((?:[a-z]+[-_])+?)[0-9a-f]{8}.*")


@dataclass(frozen=True)
class Answer:
    """A status and a body: parsed JSON, or text, which a stream is."""

    status: int
    body: Any


def plain(value: Any) -> Any:
    """Return the value without times, and with ids reduced to their prefixes."""
    if isinstance(value, dict):
        return {name: _id_prefix(name, plain(part)) for name, part in value.items() if name not in TIMES}
    return [plain(part) for part in value] if isinstance(value, list) else value


def _id_prefix(name: str, value: Any) -> Any:
    match = _PREFIX_OF_ID.fullmatch(value) if name in IDS and isinstance(value, str) else None
    return match[1] if match else value


class ParityClient:
    """Sends requests to the worker's queue and to a vLLM server.

    Args:
        queue: of the worker.
        client: of the server.
    """

    def __init__(self, queue: EmulatorQueue, client: httpx.Client) -> None:
        self._queue = queue
        self.client = client

    def queued(self, case: Case) -> Answer:
        """Return the answer from the queue."""
        call = {"openai_route": case.route}
        job = self._queue.run(call if case.body is None else {**call, "openai_input": case.body})
        if job.status()["status"] == "FAILED":
            error = job.error()
            status = error.pop("status")
            if error["retryable"] == (status in RETRYABLE_STATUSES):
                del error["retryable"]
            return Answer(status, error)
        if case.streams:
            complete = all(batch.endswith("\n\n") for batch in job.outputs)
            return Answer(200, "".join(job.outputs) if complete else job.outputs)
        (output,) = job.outputs
        return Answer(200, output)

    def pair(self, case: Case, read: Callable[[Any], Any] = plain) -> tuple[Answer, Answer]:
        """Return both answers, queued and direct; while they differ, the request is repeated, up to `MAX_TRIES` times.

        Whether concurrent requests are batched together depends on timing. That changes the last bits of a number, and
        sometimes a token. A difference with another cause occurs every time.
        """
        for _ in range(MAX_TRIES):
            queued, direct = self.queued(case), self.direct(case)
            if queued.status == direct.status and read(queued.body) == read(direct.body):
                break
        return queued, direct

    def direct(self, case: Case) -> Answer:
        """Return vLLM's answer."""
        return _answer(self.client.request("GET" if case.body is None else "POST", case.route, json=case.body))


def upload(
    client: httpx.Client, route: str, fields: dict[str, Any], files: dict[str, tuple[str, bytes, str]]
) -> Answer:
    """Return the answer to a multipart upload; of a file, the name, the content and the type."""
    texts = [(name, one) for name, value in fields.items() for one in (value if isinstance(value, list) else [value])]
    parts: list[tuple[str, Any]] = [(name, (None, str(one))) for name, one in texts]
    return _answer(client.post(route, files=[*parts, *files.items()]))


def _answer(answer: httpx.Response) -> Answer:
    is_json = answer.headers.get("content-type") == "application/json"
    return Answer(answer.status_code, answer.json() if is_json else answer.text)


def events(text: str) -> list[dict[str, Any]]:
    """Parse the events of a stream strictly: one field per line, a blank line after each event."""
    if not text.endswith("\n\n"):
        raise ValueError(f"the stream ends within an event: {text[-200:]!r}")
    parsed = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        data = fields["data"]
        parsed.append({**fields, "data": data if data == "[DONE]" else plain(json.loads(data))})
    return parsed


def joined(text: str) -> list[Any]:
    """Return the content of a stream: the parts of each choice in order, then all other events in order.

    Adjacent parts of one text are joined, and sequence numbers are dropped.
    """
    choices: dict[int, _Choice] = {}
    others: list[dict[str, Any]] = []
    for event in events(text):
        data = event["data"]
        if isinstance(data, dict) and data.get("choices"):
            for choice in data["choices"]:
                choices.setdefault(choice.get("index", 0), _Choice()).add(data, choice)
        elif others and _delta_target(event) is not None and _delta_target(event) == _delta_target(others[-1]):
            others[-1] = _join("", others[-1], event)
        else:
            others.append(event)
    for event in others:
        if isinstance(event["data"], dict):
            event["data"].pop("sequence_number", None)
    return [*(choices[index].content() for index in sorted(choices)), *others]


class _Choice:
    """The joined content of one choice."""

    def __init__(self) -> None:
        self._parts: list[tuple[str, Any]] = []
        self._rest: dict[str, Any] = {}

    def add(self, event: dict[str, Any], choice: dict[str, Any]) -> None:
        parts = {"text": choice["text"]} if "text" in choice else choice["delta"]
        for name, value in _fields(parts):
            if self._parts and self._parts[-1][0] == name:
                self._parts[-1] = (name, _join(name, self._parts[-1][1], value))
            else:
                self._parts.append((name, value))
        about = {name: value for name, value in choice.items() if name not in ("delta", "text")}
        self._rest = _join("", self._rest, {**event, "choices": None, "choice": about})

    def content(self) -> Any:
        return self._parts, self._rest


def _fields(parts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in parts.items():
        if name == "tool_calls":
            for call in value or []:
                yield f"tool call {call['index']}", call
        elif value:
            yield name, value


def _delta_target(event: dict[str, Any]) -> Any:
    """Return what an event appends to; None if it is complete by itself."""
    data = event["data"]
    if not isinstance(data, dict) or "delta" not in data:
        return None
    delta = data["delta"]
    kind = {**delta, **dict.fromkeys(TEXTS & delta.keys())} if isinstance(delta, dict) else None
    return {**data, "delta": kind, "logprobs": None, "sequence_number": None}


def _join(name: str, first: Any, second: Any) -> Any:
    """Concatenate texts and lists; of other values return the later one that is not None."""
    if first is None or second is None:
        return first if second is None else second
    if isinstance(first, dict) and isinstance(second, dict):
        return {key: _join(key, first.get(key), second.get(key)) for key in {**first, **second}}
    if isinstance(first, list) or (isinstance(first, str) and name in TEXTS):
        return first + second
    return second


def ask(client: httpx.Client, case: Case, path: str) -> Answer:
    """Return the answer to a case over HTTP, with its content type: `(content type, body)`."""
    response = client.request("GET" if case.body is None else "POST", path, json=case.body)
    kind = response.headers.get("content-type", "")
    return Answer(response.status_code, (kind, response.json() if kind == "application/json" else response.text))
