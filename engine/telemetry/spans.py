"""Makes the spans of a job, and of the worker's start, from their times. A span's name is the same for all jobs."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind, StatusCode, TraceFlags, Tracer

from engine.telemetry import semantics

if TYPE_CHECKING:
    from opentelemetry.context import Context

    from engine.cold_start import ColdStart
    from engine.telemetry.job_times import JobTimes

# A batch of chats may have hundreds of requests.
_MAX_REQUESTS = 16


class JobIds(IdGenerator):
    """Gives the next span of a thread the ids that its job has had since it was taken; other spans get random ones."""

    def __init__(self) -> None:
        self._random = RandomIdGenerator()
        self._next = threading.local()

    def use(self, trace_id: int, span_id: int) -> None:
        """Use these ids for the next span of this thread."""
        self._next.trace_id, self._next.span_id = trace_id, span_id

    def generate_trace_id(self) -> int:
        """Return the id of a new trace."""
        return self._next.__dict__.pop("trace_id", None) or self._random.generate_trace_id()

    def generate_span_id(self) -> int:
        """Return the id of a new span."""
        return self._next.__dict__.pop("span_id", None) or self._random.generate_span_id()


class Spans:
    """Makes spans.

    Args:
        tracer: whose ids are from `ids`.
        ids: gives jobs their ids.
    """

    def __init__(self, tracer: Tracer, ids: JobIds) -> None:
        self._tracer = tracer
        self._ids = ids
        self._start: SpanContext | None = None

    def add_cold_start(self, cold_start: ColdStart) -> None:
        """Make a trace of the worker's start, with a span for each phase that has ended.

        Phases that run in the engine's processes are placed one after the other, as `engine.cold_start` reports them.
        """
        started_s = time.time() - (time.monotonic() - cold_start.started_at)
        root = self._tracer.start_span("cold start", start_time=_ns(started_s))
        context = trace.set_span_in_context(root)
        at_s = started_s
        for phase, seconds in cold_start.phases_s.items():
            span = self._tracer.start_span(phase, context, start_time=_ns(at_s))
            at_s += seconds
            span.end(_ns(at_s))
        root.end(_ns(at_s))
        self._start = root.get_span_context()

    def add_job(self, times: JobTimes, costs: Mapping[str, object]) -> None:
        """Make the spans of a job: queue, each request's time in the engine, and deliveries."""
        if not times.is_sampled or times.ended_at is None:
            return
        wall_s = times.taken_at_s - times.taken_at
        parent = parent_context(times)
        self._ids.use(times.trace_id, times.span_id)
        links = [Link(self._start)] if self._start is not None and times.share.start_s else []
        begun_s = times.taken_at_s if times.submitted_at_s is None else times.submitted_at_s
        attributes = {
            "worker.job.id": times.job_id,
            "worker.job.outcome": times.outcome,
            "worker.job.deliveries": times.delivery_count,
            **semantics.job_attributes(times),
            **{f"worker.job.{name}": value for name, value in costs.items() if isinstance(value, float)},
        }
        root = self._tracer.start_span(
            "job", parent, SpanKind.CONSUMER, attributes, links=links, start_time=_ns(min(begun_s, times.taken_at_s))
        )
        if times.outcome not in ("completed", "stopped"):
            root.set_status(StatusCode.ERROR, times.outcome)
        context = trace.set_span_in_context(root)

        def add(name: str, begun_at: float, ended_at: float) -> None:
            span = self._tracer.start_span(name, context, start_time=_ns(wall_s + begun_at))
            span.end(_ns(wall_s + max(begun_at, ended_at)))

        if times.queue_s:
            add("queue", times.taken_at - times.queue_s, times.taken_at)
        for request in times.requests[:_MAX_REQUESTS]:
            decode_at = request.finished_at - request.decode_s
            prefill_at = decode_at - request.prefill_s
            add("engine queue", prefill_at - request.queued_s, prefill_at)
            add("prefill", prefill_at, decode_at)
            add("decode", decode_at, request.finished_at)
        # A span each would cost a stream of short steps more than all else.
        for begun_at, ended_at in dict.fromkeys((*times.deliveries[:1], *times.deliveries[-1:])):
            add("deliver", begun_at, ended_at)
        root.end(_ns(wall_s + times.ended_at))


def parent_context(times: JobTimes) -> Context | None:
    """Return the client's span as OpenTelemetry has it; None for a job with a trace of its own."""
    if times.traceparent is None:
        return None
    flags = TraceFlags(int(times.is_sampled))
    remote = SpanContext(times.trace_id, int(times.traceparent[36:52], 16), is_remote=True, trace_flags=flags)
    return trace.set_span_in_context(NonRecordingSpan(remote))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
