"""Definitions of the metrics.

A *chunk* is one read from the client's socket that makes text visible. Times are the client's.

- Time to first token (TTFT): from when the request was due to the first chunk.
- Inter-token latency (ITL), per token: the time between two chunks, divided equally among the tokens of the later one.
  It is the speed that a reader sees, however tokens are batched: 10 tokens after 100 ms count as ten times 10 ms.
- Inter-chunk latency: the time between two chunks, however many tokens they bring. It shows how smooth a stream is.
- End-to-end latency: from when the request was due to the end of the response.
- Time in queue: from a job's submission until the worker takes it, as reported by the emulator.
- Worker CPU: of all processes of the system except vLLM's engine core and the engine's workers. These are: vLLM's API
  server; this worker and the SDK's ping; worker-vllm's proxy, its ping and its `vllm serve`. The emulator is excluded.
- Deliveries: POSTs of an output, without the last one that ends the job; of the last 200 jobs of a measurement.
- Memory: PSS (shared pages count once) of all processes, engine included, after each measurement; the maximum of the
  rounds is the peak.

Percentiles are over all tokens, chunks or requests of one measurement. If events do not list their token ids, all
characters of a response are assumed to be worth the same number of tokens. Tokens whose text is withheld (half a
character) count with the chunk that shows it. A response counts only if it is complete: status 200, `[DONE]` at the end
of a stream, finish reason `length`, and the requested number of tokens. Anything else is an error, counted by kind.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from bench.clients import RequestTrace
from bench.scenarios import Scenario

_EXCERPT_BYTES = 200


class InvalidResponseError(Exception):
    """A request failed or its response is incomplete; the message says why."""


class Chunk(NamedTuple):
    """Text that became visible: when, in seconds after the request was due, and how many tokens it is."""

    time_s: float
    tokens: int


@dataclass
class Response:
    """One parsed response.

    Args:
        latency_s: from when the request was due to the end of the response.
        chunks: of a stream, in order.
        tokens: output tokens in total.
    """

    latency_s: float
    chunks: list[Chunk] = field(default_factory=list)
    tokens: int = 0

    def inter_token_latencies_s(self) -> Iterator[float]:
        """Yield one value per token: the time between two chunks, divided equally among the later one's tokens."""
        for before, chunk in pairwise(self.chunks):
            yield from [(chunk.time_s - before.time_s) / chunk.tokens] * chunk.tokens

    def inter_chunk_latencies_s(self) -> Iterator[float]:
        """Yield the time between each two chunks."""
        for before, chunk in pairwise(self.chunks):
            yield chunk.time_s - before.time_s


@dataclass
class Measurement:
    """One system under one load, measured once.

    Args:
        metrics: by the names in `METRICS`; None if a metric does not apply.
        errors: the number of failed requests by kind.
    """

    metrics: dict[str, float | None]
    errors: dict[str, int]


METRICS: dict[str, str] = {
    "requests_per_s": "requests/s",
    "tokens_per_s": "tokens/s",
    "ttft_p50_ms": "TTFT p50, ms",
    "ttft_p95_ms": "TTFT p95, ms",
    "ttft_p99_ms": "TTFT p99, ms",
    "itl_p50_ms": "ITL per token p50, ms",
    "itl_p95_ms": "ITL per token p95, ms",
    "itl_p99_ms": "ITL per token p99, ms",
    "inter_chunk_p50_ms": "inter-chunk p50, ms",
    "inter_chunk_p95_ms": "inter-chunk p95, ms",
    "inter_chunk_p99_ms": "inter-chunk p99, ms",
    "e2e_p50_ms": "end-to-end p50, ms",
    "e2e_p95_ms": "end-to-end p95, ms",
    "e2e_p99_ms": "end-to-end p99, ms",
    "queue_p50_ms": "time in queue p50, ms",
    "queue_p95_ms": "time in queue p95, ms",
    "cpu_s_per_1000_tokens": "worker CPU s/1,000 tokens",
    "deliveries_per_token": "deliveries/token",
    "memory_mib": "memory, MiB",
    "client_cpu_cores": "client CPU, cores",
    "requests": "requests",
    "errors": "errors",
}
"""All metrics: the name in the JSON and the label in the table."""


def percentile(values: Sequence[float], share: float) -> float:
    """Return the percentile `share` (0 to 1) of sorted values, interpolated linearly between neighbours."""
    position = share * (len(values) - 1)
    low = math.floor(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (position - low) * (values[high] - values[low])


def summarize(traces: Sequence[RequestTrace], scenario: Scenario) -> Measurement:
    """Return the clients' metrics; throughput is over the time from the first request to the last response's end."""
    responses: list[Response] = []
    errors: Counter[str] = Counter()
    for trace in traces:
        try:
            responses.append(parse_response(trace, scenario))
        except InvalidResponseError as error:
            errors[str(error)] += 1
    start_s = min((trace.due_s for trace in traces), default=0.0)
    elapsed_s = max((trace.ended_s for trace in traces), default=0.0) - start_s
    tokens = sum(response.tokens for response in responses)
    metrics: dict[str, float | None] = dict.fromkeys(METRICS)
    metrics |= {"requests": len(responses), "errors": errors.total()}
    if elapsed_s:
        metrics |= {"requests_per_s": len(responses) / elapsed_s, "tokens_per_s": tokens / elapsed_s}
    metrics |= _percentiles("e2e", [response.latency_s for response in responses])
    metrics |= _percentiles("ttft", [response.chunks[0].time_s for response in responses if response.chunks])
    metrics |= _percentiles("itl", [it for response in responses for it in response.inter_token_latencies_s()])
    metrics |= _percentiles("inter_chunk", [it for response in responses for it in response.inter_chunk_latencies_s()])
    return Measurement(metrics, dict(errors))


def platform_metrics(jobs: Sequence[dict[str, Any]], scenario: Scenario) -> dict[str, float | None]:
    """Return the platform's metrics: time in queue, and deliveries (POSTs of an output) per token.

    Args:
        jobs: the jobs of one measurement as listed by the emulator's `GET /state` (the last 200 submitted).
        scenario: the load that they were part of.
    """
    jobs = [job for job in jobs if job["status"] == "COMPLETED"]
    if not jobs:
        return {}
    waits = _percentiles("queue", [job["delayTime"] / 1000 for job in jobs])
    deliveries = sum(job["outputs"] for job in jobs) / (len(jobs) * scenario.tokens)
    return {**{name: value for name, value in waits.items() if name in METRICS}, "deliveries_per_token": deliveries}


def _percentiles(name: str, values_s: list[float]) -> dict[str, float | None]:
    values = sorted(values_s)
    return {f"{name}_p{share}_ms": 1000 * percentile(values, share / 100) if values else None for share in (50, 95, 99)}


def parse_response(trace: RequestTrace, scenario: Scenario) -> Response:
    """Parse the recorded bytes of a response.

    Raises:
        InvalidResponseError: the request failed, or its response is incomplete.
    """
    if not trace.received:
        raise InvalidResponseError(trace.error or "connection closed without a response")
    try:
        body = list(_decode_body(trace.received))
        status = trace.received[0][1].split(b" ", 2)[1].decode(errors="replace")
    except (ValueError, IndexError) as error:
        raise InvalidResponseError(f"malformed response: {type(error).__name__}") from None
    if status != "200":
        raise InvalidResponseError(f"status {status}: {_excerpt(b''.join(data for _, data in body))}")
    if trace.error:
        raise InvalidResponseError(trace.error)
    response = Response(trace.ended_s - trace.due_s)
    try:
        finish_reason = _parse_stream(trace, body, response) if scenario.streamed else _parse_json(body, response)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise InvalidResponseError(f"malformed response: {type(error).__name__}") from None
    if finish_reason != "length":
        raise InvalidResponseError(f"finish reason {finish_reason!r} instead of 'length'")
    if response.tokens != scenario.tokens:
        raise InvalidResponseError(f"{response.tokens} tokens instead of {scenario.tokens}")
    return response


def _parse_stream(trace: RequestTrace, body: list[tuple[float, bytes]], response: Response) -> str | None:
    """Fill in the response from server-sent events; return the finish reason."""
    finish_reason: str | None = None
    pending_tokens = usage_tokens = 0
    visible: list[tuple[float, int]] = []
    for received_s, events in _read_events(body):
        time_s = received_s - trace.due_s
        characters = 0
        for data in events:
            event = json.loads(data)
            if "error" in event:
                raise InvalidResponseError(f"error event: {_excerpt(data)}")
            usage_tokens = (event.get("usage") or {}).get("completion_tokens", usage_tokens)
            for choice in event["choices"]:
                pending_tokens += len(choice.get("token_ids") or ())
                characters += len(choice["delta"].get("content") or "")
                finish_reason = choice.get("finish_reason") or finish_reason
        if characters:
            visible.append((time_s, characters))
            if pending_tokens:
                response.chunks.append(Chunk(time_s, pending_tokens))
                response.tokens += pending_tokens
                pending_tokens = 0
    # Tokens that no later text has shown (half a character at the end) were generated nevertheless.
    response.tokens += pending_tokens
    if not response.tokens:
        response.tokens, response.chunks = usage_tokens, _divide_tokens(usage_tokens, visible)
    return finish_reason


def _read_events(body: list[tuple[float, bytes]]) -> Iterator[tuple[float, list[bytes]]]:
    """Yield for each piece of the body its time and the data of the server-sent events that it completes.

    Raises:
        InvalidResponseError: the stream does not end with `[DONE]`.
    """
    rest = b""
    done = False
    for received_s, piece in body:
        *events, rest = (rest + piece).split(b"\n\n")
        data = [event.removeprefix(b"data: ") for event in events]
        done = done or b"[DONE]" in data
        yield received_s, [it for it in data if it != b"[DONE]"]
    if rest or not done:
        raise InvalidResponseError("the stream does not end with [DONE]")


def _divide_tokens(tokens: int, visible: list[tuple[float, int]]) -> list[Chunk]:
    """Divide a response's tokens among its chunks in proportion to their characters.

    Args:
        tokens: of the complete response.
        visible: time and number of characters of each chunk; one whose share rounds to 0 tokens is left out.
    """
    chunks: list[Chunk] = []
    total, characters, counted = sum(length for _, length in visible), 0, 0
    for time_s, length in visible:
        characters += length
        until = max(round(tokens * characters / total), 1)
        if until > counted:
            chunks.append(Chunk(time_s, until - counted))
            counted = until
    return chunks


def _parse_json(body: list[tuple[float, bytes]], response: Response) -> str | None:
    """Fill in the response from one JSON document; return the finish reason."""
    document = json.loads(b"".join(data for _, data in body))
    response.tokens = document["usage"]["completion_tokens"]
    finish_reason: str | None = document["choices"][0]["finish_reason"]
    return finish_reason


def _excerpt(body: bytes) -> str:
    return " ".join(body[:_EXCERPT_BYTES].decode(errors="replace").split())


def _decode_body(received: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Yield the body's bytes and when they arrived, from an HTTP/1.1 response with or without chunked encoding."""
    head, rest = b"", b""
    left: int | None = None
    for received_s, data in received:
        rest += data
        if not head:
            if b"\r\n\r\n" not in rest:
                continue
            head, _, rest = rest.partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" not in head.lower():
            yield received_s, rest
            rest = b""
            continue
        piece = b""
        while rest:
            if left is None:
                size, end, after = rest.partition(b"\r\n")
                if not end:
                    break
                left, rest = int(size.partition(b";")[0], 16), after
            if len(rest) < left + 2:
                break
            piece += rest[:left]
            # Each chunk ends with CRLF.
            rest = rest[left + 2 :]
            left = None
        if piece:
            yield received_s, piece
