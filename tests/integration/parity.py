"""The same request both ways in, and what of the two answers has to be equal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from tests.integration.parity_cases import Case
from tests.job_queue import JobQueue

TRIES = 3
# Statuses that another try may not get.
PASSING = {429, 502, 503, 504}
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
    """The value without times and without all of an id but its prefix."""
    if isinstance(value, dict):
        return {name: _without_digits(name, plain(part)) for name, part in value.items() if name not in TIMES}
    return [plain(part) for part in value] if isinstance(value, list) else value


def _without_digits(name: str, value: Any) -> Any:
    made = _PREFIX_OF_ID.fullmatch(value) if name in IDS and isinstance(value, str) else None
    return made[1] if made else value


class Both:
    """The queue, and vLLM's app behind HTTP."""

    def __init__(self, queue: JobQueue, client: httpx.Client) -> None:
        self._queue = queue
        self._client = client

    def queued(self, case: Case) -> Answer:
        """What comes out of the queue."""
        call = {"openai_route": case.route}
        job = self._queue.run(call if case.body is None else {**call, "openai_input": case.body})
        if job.status()["status"] == "FAILED":
            error = job.error()
            status = error.pop("status")
            if error["retryable"] == (status in PASSING):
                del error["retryable"]
            return Answer(status, error)
        if case.streams:
            whole = all(batch.endswith("\n\n") for batch in job.outputs)
            return Answer(200, "".join(job.outputs) if whole else job.outputs)
        (output,) = job.outputs
        return Answer(200, output)

    def pair(self, case: Case, read: Callable[[Any], Any] = plain) -> tuple[Answer, Answer]:
        """Both answers, queued and direct; asked for anew while they differ, `TRIES` times at most.

        Requests that come together are computed together or not, as time has it, which changes the last bits of a
        number, and with them sometimes a token. What differs for another reason does so every time.
        """
        for _ in range(TRIES):
            queued, direct = self.queued(case), self.direct(case)
            if queued.status == direct.status and read(queued.body) == read(direct.body):
                break
        return queued, direct

    def direct(self, case: Case) -> Answer:
        """What vLLM answers."""
        answer = self._client.request("GET" if case.body is None else "POST", case.route, json=case.body)
        is_json = answer.headers.get("content-type") == "application/json"
        return Answer(answer.status_code, answer.json() if is_json else answer.text)


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, parsed by the book: fields of a line each, a blank line after each event."""
    if not text.endswith("\n\n"):
        raise ValueError(f"the stream ends within an event: {text[-200:]!r}")
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        data = fields["data"]
        found.append({**fields, "data": data if data == "[DONE]" else plain(json.loads(data))})
    return found


def joined(text: str) -> list[Any]:
    """What a stream says: each choice's parts in their order, then all other events in theirs.

    Neighbours that say parts of one text are made one, and events lose their numbers.
    """
    choices: dict[int, _Choice] = {}
    others: list[dict[str, Any]] = []
    for event in events(text):
        data = event["data"]
        if isinstance(data, dict) and data.get("choices"):
            for choice in data["choices"]:
                choices.setdefault(choice["index"], _Choice()).add(data, choice)
        elif others and _subject(event) is not None and _subject(event) == _subject(others[-1]):
            others[-1] = _join("", others[-1], event)
        else:
            others.append(event)
    for event in others:
        if isinstance(event["data"], dict):
            event["data"].pop("sequence_number", None)
    return [*(choices[index].whole() for index in sorted(choices)), *others]


class _Choice:
    """What has been said of one choice."""

    def __init__(self) -> None:
        self._said: list[tuple[str, Any]] = []
        self._rest: dict[str, Any] = {}

    def add(self, event: dict[str, Any], choice: dict[str, Any]) -> None:
        parts = {"text": choice["text"]} if "text" in choice else choice["delta"]
        for name, value in _fields(parts):
            if self._said and self._said[-1][0] == name:
                self._said[-1] = (name, _join(name, self._said[-1][1], value))
            else:
                self._said.append((name, value))
        about = {name: value for name, value in choice.items() if name not in ("delta", "text")}
        self._rest = _join("", self._rest, {**event, "choices": None, "choice": about})

    def whole(self) -> Any:
        return self._said, self._rest


def _fields(parts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in parts.items():
        if name == "tool_calls":
            for call in value or []:
                yield f"tool call {call['index']}", call
        elif value:
            yield name, value


def _subject(event: dict[str, Any]) -> Any:
    """What an event adds to; None if it stands for itself."""
    data = event["data"]
    if not isinstance(data, dict) or "delta" not in data:
        return None
    delta = data["delta"]
    kind = {**delta, **dict.fromkeys(TEXTS & delta.keys())} if isinstance(delta, dict) else None
    return {**data, "delta": kind, "logprobs": None, "sequence_number": None}


def _join(name: str, first: Any, second: Any) -> Any:
    """Texts and lists one after the other; of all else the later, where there is one."""
    if first is None or second is None:
        return first if second is None else second
    if isinstance(first, dict) and isinstance(second, dict):
        return {key: _join(key, first.get(key), second.get(key)) for key in {**first, **second}}
    if isinstance(first, list) or (isinstance(first, str) and name in TEXTS):
        return first + second
    return second
