"""The times of one job. Its log line, its costs and its spans are made from them."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypedDict

from engine.run_clock import CLOCK
from engine.telemetry.counters import COUNTERS
from engine.telemetry.worker_seconds import Share

# A long stream has thousands of deliveries: the first ones and the last are kept one by one, all are summed.
MAX_DELIVERIES = 8
OTHER = "other"
# https://www.w3.org/TR/trace-context/: version, trace id, parent id, flags; versions after 00 may have more behind.
_IDS = "(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
_TRACEPARENT = re.compile(rf"00-{_IDS}|(?!00|ff)[0-9a-f]{{2}}-{_IDS}(?:-.*)?")


@dataclass(frozen=True, slots=True)
class RequestStats:
    """What vLLM reports of a finished request (`FinishedRequestStats`).

    Attributes:
        prompt_tokens, output_tokens: their numbers.
        queued_s: waiting in the engine.
        prefill_s: from then to the first token.
        decode_s: from then to the last one.
        finished_at: when vLLM reported it, by `engine.run_clock`, which is soon after the last token.
    """

    prompt_tokens: int
    output_tokens: int
    queued_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    finished_at: float = field(default_factory=CLOCK.now, compare=False)


@dataclass(slots=True, eq=False)
class JobTimes:
    """The times of a job, from its submission to its end; instants by `engine.run_clock`, durations in seconds.

    Attributes:
        job_id: the platform's.
        submitted_at_s: when its client submitted it, in seconds since 1970, if the platform says so.
        taken_at: when it was taken.
        taken_at_s: the same in seconds since 1970.
        route: that it calls, once its input was read.
        model: that its client named; read it only if the engine has answered, as it is the client's word till then.
        served_model: the same once the engine has answered; `other` before, and for names beyond the first few.
        traceparent: of the client's trace.
        first_output_at: when its first output came.
        is_stream: whether that was the first piece of an answer; otherwise it was all of it.
        deliveries: begin and end of the first deliveries, and of the last.
        delivery_s: duration of all deliveries.
        requests: what the engine says of its requests that have finished.
        trace_id: of the client's trace, or of its own.
        span_id: of its span.
        has_span: whether the span is exported.
        engine_is_traced: whether vLLM exports spans of its own.
        is_recorded: returns whether OpenTelemetry's sampler lets its span be exported.
        ended_at: when its last delivery had ended.
        outcome: of the job loop.
        describe: returns where its time went and what it cost, as `Costs.document` has it.
        share: its share of the worker's seconds.
    """

    job_id: str
    submitted_at_s: float | None = None
    taken_at: float = field(default_factory=CLOCK.now)
    taken_at_s: float = field(default_factory=time.time)
    route: str | None = None
    model: str | None = None
    served_model: str = OTHER
    traceparent: str | None = None
    first_output_at: float | None = None
    is_stream: bool = False
    deliveries: list[tuple[float, float]] = field(default_factory=list)
    delivery_s: float = 0.0
    delivery_count: int = 0
    requests: list[RequestStats] = field(default_factory=list)
    trace_id: int = field(default_factory=lambda: secrets.randbits(128))
    span_id: int = field(default_factory=lambda: secrets.randbits(64))
    has_span: bool = False
    engine_is_traced: bool = False
    is_recorded: Callable[[JobTimes], bool] | None = None
    ended_at: float | None = None
    outcome: str = "undelivered"
    describe: Callable[[], dict[str, Any]] | None = None
    share: Share = field(default_factory=Share)

    @property
    def is_sampled(self) -> bool:
        """Whether the client's trace is recorded, as its flags say; a trace of its own is."""
        return self.traceparent is None or bool(int(self.traceparent[53:55], 16) & 1)

    def join(self, traceparent: str | None) -> None:
        """Make the job a part of the client's trace, if there is one; of a later version is read what 00 has."""
        if traceparent is not None:
            self.traceparent, self.trace_id = f"00{traceparent[2:55]}", int(traceparent[3:35], 16)

    @property
    def engine_traceparent(self) -> str | None:
        """The trace that vLLM's span of a request joins; None if vLLM exports none."""
        if not self.engine_is_traced:
            return None
        if not self.has_span:
            return self.traceparent
        is_recorded = self.is_sampled if self.is_recorded is None else self.is_recorded(self)
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{int(is_recorded):02x}"

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts of its requests that have finished."""
        return sum(request.prompt_tokens for request in self.requests)

    @property
    def output_tokens(self) -> int:
        """Tokens of their outputs."""
        return sum(request.output_tokens for request in self.requests)

    @property
    def queue_s(self) -> float | None:
        """Time in the platform's queue; None if the platform does not say when the job was submitted."""
        return None if self.submitted_at_s is None else max(self.taken_at_s - self.submitted_at_s, 0.0)

    @property
    def first_output_s(self) -> float | None:
        """Time from the take to the first output; None without output."""
        return None if self.first_output_at is None else self.first_output_at - self.taken_at

    @property
    def first_token_s(self) -> float | None:
        """Time to the first token: of a stream to its first output, of another answer within the engine, if known."""
        if self.is_stream:
            return self.first_output_s
        return self.requests[0].queued_s + self.requests[0].prefill_s if self.requests else None

    @property
    def duration_s(self) -> float:
        """Time from the take to the end of the last delivery, or until now."""
        return (CLOCK.now() if self.ended_at is None else self.ended_at) - self.taken_at

    def add_delivery(self, begun_at: float) -> None:
        """Add a delivery that ends now, by `engine.run_clock`."""
        now = CLOCK.now()
        COUNTERS.deliveries += 1
        self.delivery_count += 1
        self.delivery_s += now - begun_at
        if len(self.deliveries) == MAX_DELIVERIES:
            self.deliveries.pop()
        self.deliveries.append((begun_at, now))


class JobHooks(TypedDict, total=False):
    """What is called with the times of each job."""

    on_started: Callable[[JobTimes], None]
    on_ended: Callable[[JobTimes], None]


CURRENT: ContextVar[JobTimes | None] = ContextVar("CURRENT", default=None)
"""The times of the job that this task runs."""


def is_traceparent(text: object) -> bool:
    """Return whether this is a `traceparent` as W3C's Trace Context has it."""
    return isinstance(text, str) and _TRACEPARENT.fullmatch(text) is not None
