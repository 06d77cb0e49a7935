"""Exports log records, with the job that they are about and its trace."""

from __future__ import annotations

import logging
import traceback
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from engine.telemetry.job_times import CURRENT

if TYPE_CHECKING:
    from opentelemetry.sdk._logs import LoggerProvider

_SEVERITIES = {
    logging.DEBUG: (SeverityNumber.DEBUG, "DEBUG"),
    logging.INFO: (SeverityNumber.INFO, "INFO"),
    logging.WARNING: (SeverityNumber.WARN, "WARN"),
    logging.ERROR: (SeverityNumber.ERROR, "ERROR"),
    logging.CRITICAL: (SeverityNumber.FATAL, "FATAL"),
}


class LogHandler(logging.Handler):
    """Passes records to a provider, which sends them in a thread of its own.

    Args:
        provider: of OpenTelemetry's loggers.
    """

    def __init__(self, provider: LoggerProvider) -> None:
        super().__init__(logging.INFO)
        self._provider = provider

    def emit(self, record: logging.LogRecord) -> None:
        """Pass on a record."""
        try:
            self._provider.get_logger(record.name).emit(_as_otel(record))
        except Exception:  # noqa: BLE001 (as all handlers: logging must not fail)
            self.handleError(record)


def _as_otel(record: logging.LogRecord) -> LogRecord:
    times = CURRENT.get()
    number, text = _SEVERITIES.get(record.levelno, (SeverityNumber.INFO, record.levelname))
    attributes: dict[str, str | int] = {"code.file.path": record.pathname, "code.line.number": record.lineno}
    if (job_id := getattr(record, "job_id", None) or (None if times is None else times.job_id)) is not None:
        attributes["worker.job.id"] = job_id
    if record.exc_info is not None and record.exc_info[0] is not None:
        attributes["exception.type"] = record.exc_info[0].__name__
        attributes["exception.stacktrace"] = "".join(traceback.format_exception(*record.exc_info))
    context = None
    if times is not None and times.job_id == job_id and times.has_span:
        flags = TraceFlags(int(times.is_sampled))
        span = NonRecordingSpan(SpanContext(times.trace_id, times.span_id, is_remote=False, trace_flags=flags))
        context = trace.set_span_in_context(span)
    return LogRecord(
        timestamp=int(record.created * 1e9),
        context=context,
        severity_number=number,
        severity_text=text,
        body=record.getMessage(),
        attributes=attributes,
    )
