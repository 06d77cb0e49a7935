"""From raw arrivals to figures.

An *arrival* is a piece that the socket gave, if text became visible with it. Of an answer's arrivals:

- Time to first token (TTFT): from when the request was due to the first arrival.
- Inter-token latency (ITL), per token: the time from one arrival to the next, shared equally among the tokens of the
  latter. What a reader sees as speed, whatever the packaging: 10 tokens after 100 ms are ten times 10 ms.
- Gap: the time from one arrival to the next, once, however many tokens came. What stutters.
- Time in queue: from a job's submission until the worker takes it, as the emulator has it.
- Worker CPU: of all processes of the server but vLLM's engine core and the engine's workers. That is vLLM's API server;
  this worker and the SDK's ping; worker-vllm's proxy, its ping and its `vllm serve`. The emulator is not among them.
- Deliveries: POSTs of an output, the last one that ends the job left out; of the last 200 jobs of a measurement.
- Memory: PSS (shared pages count once) of all processes, engine included, after each measurement; the greatest is the
  peak.

Percentiles are over all tokens, gaps or requests of one measurement. Where the events do not say which tokens they
bring, an answer's tokens count as equally long. Tokens whose text is held back (half a character) count with the
arrival that shows it. An answer counts only if it is whole: status 200, `[DONE]` at its end if it streams, finish
reason `length`, as many tokens as were asked for. Any other is an error; errors are counted by kind.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from bench.clients import Exchange
from bench.scenarios import Scenario

_SHOWN = 200


class FaultyAnswerError(Exception):
    """An answer is not what it has to be; the message says how."""


@dataclass
class Answer:
    """What one exchange was.

    Args:
        took_s: from when it was due to its end.
        shown: when text became visible, in seconds from when it was due, and how many tokens it was.
        tokens: how many there were in all.
    """

    took_s: float
    shown: list[tuple[float, int]] = field(default_factory=list)
    tokens: int = 0

    def inter_token_s(self) -> Iterator[float]:
        """The time from one arrival to the next, shared equally among the latter's tokens: one value a token."""
        for (before, _), (at, tokens) in pairwise(self.shown):
            yield from [(at - before) / tokens] * tokens

    def gaps_s(self) -> Iterator[float]:
        """The time from one arrival to the next."""
        for (before, _), (at, _) in pairwise(self.shown):
            yield at - before


@dataclass
class Measurement:
    """One server under one load once.

    Args:
        figures: by the names of `FIGURES`; None where there is nothing to tell.
        errors: how many requests failed in which way.
    """

    figures: dict[str, float | None]
    errors: dict[str, int]


FIGURES: dict[str, str] = {
    "requests_per_s": "requests/s",
    "tokens_per_s": "tokens/s",
    "ttft_p50_ms": "TTFT p50, ms",
    "ttft_p95_ms": "TTFT p95, ms",
    "ttft_p99_ms": "TTFT p99, ms",
    "itl_p50_ms": "ITL per token p50, ms",
    "itl_p95_ms": "ITL per token p95, ms",
    "itl_p99_ms": "ITL per token p99, ms",
    "gap_p50_ms": "gap p50, ms",
    "gap_p95_ms": "gap p95, ms",
    "gap_p99_ms": "gap p99, ms",
    "answer_p50_ms": "whole answer p50, ms",
    "answer_p95_ms": "whole answer p95, ms",
    "answer_p99_ms": "whole answer p99, ms",
    "queue_p50_ms": "time in queue p50, ms",
    "queue_p95_ms": "time in queue p95, ms",
    "cpu_s_per_1000_tokens": "worker CPU s/1,000 tokens",
    "deliveries_per_token": "deliveries/token",
    "memory_mib": "memory, MiB",
    "client_cpu": "client CPU, cores",
    "requests": "requests",
    "errors": "errors",
}
"""What is measured, by its name in the JSON, and how the table calls it."""


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of them lies, interpolated between neighbours; `values` are sorted."""
    at = share * (len(values) - 1)
    low = math.floor(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (at - low) * (values[high] - values[low])


def measurement(exchanges: Sequence[Exchange], scenario: Scenario) -> Measurement:
    """The figures that the clients have seen; throughput is over the time from the first request to the last end."""
    answers: list[Answer] = []
    errors: Counter[str] = Counter()
    for exchange in exchanges:
        try:
            answers.append(read_answer(exchange, scenario))
        except FaultyAnswerError as error:
            errors[str(error)] += 1
    begun = min((exchange.due_s for exchange in exchanges), default=0.0)
    elapsed = max((exchange.ended_s for exchange in exchanges), default=0.0) - begun
    tokens = sum(answer.tokens for answer in answers)
    figures: dict[str, float | None] = dict.fromkeys(FIGURES)
    figures |= {"requests": len(answers), "errors": errors.total()}
    if elapsed:
        figures |= {"requests_per_s": len(answers) / elapsed, "tokens_per_s": tokens / elapsed}
    figures |= _percentiles("answer", [answer.took_s for answer in answers])
    figures |= _percentiles("ttft", [answer.shown[0][0] for answer in answers if answer.shown])
    figures |= _percentiles("itl", [time_s for answer in answers for time_s in answer.inter_token_s()])
    figures |= _percentiles("gap", [time_s for answer in answers for time_s in answer.gaps_s()])
    return Measurement(figures, dict(errors))


def platform_figures(jobs: Sequence[dict[str, Any]], scenario: Scenario) -> dict[str, float | None]:
    """What the platform knows: the time in its queue, and deliveries (POSTs of an output) for each token.

    Args:
        jobs: the completed jobs of one measurement as `GET /state` lists them (the last 200 submitted).
        scenario: what they were asked for.
    """
    jobs = [job for job in jobs if job["status"] == "COMPLETED"]
    if not jobs:
        return {}
    waits = _percentiles("queue", [job["delayTime"] / 1000 for job in jobs])
    deliveries = sum(job["outputs"] for job in jobs) / (len(jobs) * scenario.tokens)
    return {**{name: value for name, value in waits.items() if name in FIGURES}, "deliveries_per_token": deliveries}


def _percentiles(name: str, values_s: list[float]) -> dict[str, float | None]:
    values = sorted(values_s)
    return {f"{name}_p{share}_ms": 1000 * percentile(values, share / 100) if values else None for share in (50, 95, 99)}


def read_answer(exchange: Exchange, scenario: Scenario) -> Answer:
    """Understand what came.

    Raises:
        FaultyAnswerError: the request failed, or its answer is not whole.
    """
    if not exchange.arrivals:
        raise FaultyAnswerError(exchange.failure or "closed without an answer")
    pieces = list(_body(exchange.arrivals))
    status = exchange.arrivals[0][1].split(b" ", 2)[1].decode(errors="replace")
    if status != "200":
        raise FaultyAnswerError(f"status {status}: {_told(b''.join(data for _, data in pieces))}")
    if exchange.failure:
        raise FaultyAnswerError(exchange.failure)
    answer = Answer(exchange.ended_s - exchange.due_s)
    try:
        finish = _read_stream(exchange, pieces, answer) if scenario.streamed else _read_whole(pieces, answer)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise FaultyAnswerError(f"not understood: {type(error).__name__}") from None
    if finish != "length":
        raise FaultyAnswerError(f"finish reason {finish!r} instead of 'length'")
    if answer.tokens != scenario.tokens:
        raise FaultyAnswerError(f"{answer.tokens} tokens instead of {scenario.tokens}")
    return answer


def _read_stream(exchange: Exchange, pieces: list[tuple[float, bytes]], answer: Answer) -> str | None:
    """Fill the answer from server-sent events; return the finish reason."""
    finish: str | None = None
    done = False
    rest = b""
    hidden = told = 0
    shown: list[tuple[float, int]] = []
    for at, data in pieces:
        *events, rest = (rest + data).split(b"\n\n")
        text = 0
        for event in events:
            content = event.removeprefix(b"data: ")
            if content == b"[DONE]":
                done = True
                continue
            document = json.loads(content)
            if "error" in document:
                raise FaultyAnswerError(f"error event: {_told(content)}")
            told = (document.get("usage") or {}).get("completion_tokens", told)
            for choice in document["choices"]:
                hidden += len(choice.get("token_ids") or ())
                text += len(choice["delta"].get("content") or "")
                finish = choice.get("finish_reason") or finish
        if text:
            shown.append((at - exchange.due_s, text))
            if hidden:
                answer.shown.append((at - exchange.due_s, hidden))
                answer.tokens += hidden
                hidden = 0
    # What the end has brought and nothing has shown: half a character. It was made all the same.
    answer.tokens += hidden
    if not answer.tokens:
        answer.tokens, answer.shown = told, _shared(told, shown)
    if not done or rest:
        raise FaultyAnswerError("the stream does not end with [DONE]")
    return finish


def _shared(tokens: int, shown: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """An answer's tokens, shared among its arrivals by their characters; one that gets none counts with the next."""
    found: list[tuple[float, int]] = []
    total, characters, counted = sum(length for _, length in shown), 0, 0
    for at, length in shown:
        characters += length
        until = max(round(tokens * characters / total), 1)
        if until > counted:
            found.append((at, until - counted))
            counted = until
    return found


def _read_whole(pieces: list[tuple[float, bytes]], answer: Answer) -> str | None:
    """Fill the answer from one JSON document; return the finish reason."""
    document = json.loads(b"".join(data for _, data in pieces))
    answer.tokens = document["usage"]["completion_tokens"]
    finish: str | None = document["choices"][0]["finish_reason"]
    return finish


def _told(body: bytes) -> str:
    return " ".join(body[:_SHOWN].decode(errors="replace").split())


def _body(arrivals: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The body's bytes and when they came, out of an HTTP/1.1 answer, chunked or not."""
    head, rest = b"", b""
    left: int | None = None
    for at, data in arrivals:
        rest += data
        if not head:
            if b"\r\n\r\n" not in rest:
                continue
            head, _, rest = rest.partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" not in head.lower():
            yield at, rest
            rest = b""
            continue
        found = b""
        while rest:
            if left is None:
                size, end, after = rest.partition(b"\r\n")
                if not end:
                    break
                left, rest = int(size.partition(b";")[0], 16), after
            if len(rest) < left + 2:
                break
            found += rest[:left]
            # Two bytes end each chunk.
            rest = rest[left + 2 :]
            left = None
        if found:
            yield at, found
