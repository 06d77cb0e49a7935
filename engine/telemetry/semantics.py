"""OpenTelemetry's names for what a job does (semantic conventions for generative AI)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.telemetry.job_times import JobTimes

# https://opentelemetry.io/docs/specs/semconv/gen-ai/: gen_ai.operation.name
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
}


def job_attributes(times: JobTimes) -> dict[str, str | int]:
    """Return the attributes of a job's span."""
    attributes: dict[str, str | int] = dict(metric_attributes(times))
    if times.route is not None:
        attributes["http.route"] = times.route
    if times.requests:
        attributes["gen_ai.usage.input_tokens"] = times.prompt_tokens
        attributes["gen_ai.usage.output_tokens"] = times.output_tokens
    return attributes


def metric_attributes(times: JobTimes) -> dict[str, str]:
    """Return the attributes of a job's metrics: few values each."""
    attributes = {"gen_ai.provider.name": "vllm", "gen_ai.request.model": times.served_model}
    if (operation := _OPERATIONS.get(times.route or "")) is not None:
        attributes["gen_ai.operation.name"] = operation
    if times.outcome != "completed":
        attributes["error.type"] = times.outcome
    return attributes
