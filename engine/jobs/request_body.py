"""Reads the body of a request, as any client wrote it, in the fields that vLLM has today."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from engine.errors import InvalidInputError
from engine.telemetry.job_times import is_traceparent

# vLLM's names, until 0.12, for the fields of `structured_outputs`. Since then it ignores them silently.
GUIDED_FIELDS = {
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json": "json",
    "guided_json_object": "json_object",
    "guided_regex": "regex",
    "guided_whitespace_pattern": "whitespace_pattern",
}
STRUCTURED_ROUTES = {"/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions", "/v1/responses"}
# Fields that vLLM no longer has and ignores silently, where it answers requests for text.
REMOVED_FIELDS = {
    "best_of": "vLLM no longer has it: use n, and choose among the answers",
    "early_stopping": "vLLM no longer has it",
    "guided_decoding_backend": "STRUCTURED_OUTPUTS_CONFIG of the worker sets the backend",
}
_LENIENT_BOOL = TypeAdapter(bool)


@dataclass(frozen=True, slots=True)
class OwnFields:
    """The fields of a job's input, or of a request's body, that are the worker's own.

    Attributes:
        wants_costs: whether the answer should say what the request cost (`engine.jobs.cost_report`).
        traceparent: of the client's trace.
        warnings: what of the input or the body is ignored, for the client and the log.
    """

    wants_costs: bool = False
    traceparent: str | None = None
    warnings: tuple[str, ...] = ()


def read_body(
    path: str, body: dict[str, Any], request_id: str, outer: OwnFields = OwnFields()
) -> tuple[dict[str, Any], OwnFields]:
    """Return the fields for vLLM, and the worker's own.

    Args:
        path: of the route.
        body: as its client wrote it; the fields of its `extra_body` count as its own.
        request_id: names the request in vLLM.
        outer: the worker's fields beside the body, in a job's input.

    Raises:
        InvalidInputError: a field is not valid, or where it cannot be used.
    """
    fields = {name: part for name, part in body.items() if name != "extra_body"} | extra_body(body)
    fields, own = split_own_fields(fields, outer)
    fields, removed = _with_current_names(path, fields)
    return _with_id(path, fields, request_id), replace(own, warnings=(*own.warnings, *removed))


def split_own_fields(value: dict[str, Any], outer: OwnFields = OwnFields()) -> tuple[dict[str, Any], OwnFields]:
    """Return the fields that are not the worker's own, and those that are: these, or else those of `outer`.

    Raises:
        InvalidInputError: `include_costs` is no boolean.
    """
    if "include_costs" not in value and "traceparent" not in value:
        return value, outer
    wants_costs = as_bool(value.get("include_costs"))
    if wants_costs is not None and not isinstance(wants_costs, bool):
        raise InvalidInputError("include_costs must be true or false")
    traceparent, warnings = value.get("traceparent"), outer.warnings
    if traceparent is not None and not is_traceparent(traceparent):
        traceparent = None
        warnings += ("traceparent: ignored, as it has not the form of W3C's Trace Context",)
    own = OwnFields(
        outer.wants_costs if wants_costs is None else wants_costs, traceparent or outer.traceparent, warnings
    )
    return {name: part for name, part in value.items() if name not in ("include_costs", "traceparent")}, own


def extra_body(body: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `extra_body`, where OpenAI's own clients put fields that they do not know."""
    extra = body.get("extra_body")
    if extra is not None and not isinstance(extra, dict):
        raise InvalidInputError("extra_body must be a JSON object of more fields of the request")
    return extra or {}


def _with_current_names(path: str, body: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the body in the names that vLLM has today, and what of it is ignored.

    Raises:
        InvalidInputError: the route has no structured outputs, or they are given under both names.
    """
    guided = {name: part for name, part in body.items() if name in GUIDED_FIELDS and part is not None}
    if guided and path not in STRUCTURED_ROUTES:
        raise InvalidInputError(
            f"{path} has no structured outputs, so {', '.join(sorted(guided))} cannot be used. "
            f"Routes that have them: {', '.join(sorted(STRUCTURED_ROUTES))}"
        )
    if guided and body.get("structured_outputs") is not None:
        raise InvalidInputError(
            f"{', '.join(sorted(guided))} and structured_outputs are both given: the former is an old name for a part "
            "of the latter, so give only structured_outputs"
        )
    if "stream" in body:
        body = body | {"stream": as_bool(body["stream"])}
    removed = REMOVED_FIELDS.keys() & body.keys() if path in STRUCTURED_ROUTES else set()
    warnings = [f"{name}: ignored, as {REMOVED_FIELDS[name]}" for name in sorted(removed) if body[name] is not None]
    body = {name: part for name, part in body.items() if name not in GUIDED_FIELDS and name not in removed}
    if guided:
        body["structured_outputs"] = {GUIDED_FIELDS[name]: part for name, part in guided.items()}
    return body, warnings


def _with_id(path: str, body: dict[str, Any], request_id: str) -> dict[str, Any]:
    """Return the body with the request's id, if vLLM takes it from there and not from the header `X-Request-Id`.

    `VLLMEngine.pop_request_stats` finds the request by it. A client's own stays.
    """
    return {"request_id": f"resp_{request_id}", **body} if path == "/v1/responses" and request_id else body


def model_of(body: dict[str, Any]) -> str | None:
    """Return the model that a body names; None if it names none."""
    model = body.get("model")
    return model if isinstance(model, str) else None


def as_bool(value: Any) -> Any:
    """Return what vLLM, and a lenient form, read of a boolean: `"true"`, `1`; anything else unchanged."""
    try:
        return _LENIENT_BOOL.validate_python(value)
    except ValidationError:
        return value


def not_null(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields without `null`, which typed clients write for what is not given."""
    return {name: part for name, part in fields.items() if part is not None}


def encode_json(body: Any) -> bytes:
    """Return a request's body, or a field of its form, as strict JSON in UTF-8.

    Raises:
        InvalidInputError: it cannot be encoded.
    """
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"the input holds {error.object[error.start]!a}, half of a surrogate pair, which is not a character: "
            "send text as UTF-8, or escape characters beyond the Basic Multilingual Plane as both halves"
        ) from None
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"the input cannot be written as JSON: {error}") from None
    except RecursionError:
        raise InvalidInputError("the input is nested too deeply") from None
