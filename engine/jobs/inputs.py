"""Reads a job's input, in any of the accepted formats, as one request to vLLM's app."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictStr, TypeAdapter, ValidationError

from engine.backend import merging
from engine.backend.routes import FORMS, GET_ONLY, SERVING
from engine.errors import ExpiredError, InvalidInputError, RouteNotAllowedError, UnknownRouteError
from engine.jobs.proxied import ProxiedRequest
from engine.json_codec import decode
from engine.telemetry.job_times import is_traceparent

ACCEPTED_INPUTS = """\
{"openai_route": "/v1/chat/completions", "openai_input": {...}}  an OpenAI request
{"openai_route": "/v1/models"}  a GET
{"openai_route": "/v1/audio/transcriptions", "openai_input": {"file": "https://...", ...}}  one with a file
{"route": "/tokenize", "body": {...}}  the same, in worker-vllm's format
{"messages": [...], "sampling_params": {...}, "stream": false}  a chat
{"prompt": "...", "sampling_params": {...}, "stream": false}  a completion"""

JSON = "application/json"
# A path only: no scheme, no host, no empty, `.` or `..` segment, no escapes; a query may follow. A final slash is
# dropped, as vLLM redirects to the route without it.
_ROUTE = re.compile(r"(?P<path>(?:/(?!\.{1,2}(?:/|\?|$))[A-Za-z0-9._~-]+)+)/?(?:\?(?P<query>[!-~]*))?")

# Fields of worker-vllm's jobs that set the size of its batches.
BATCHING_FIELDS = {"batch_size", "max_batch_size", "min_batch_size", "batch_size_growth_factor"}
# Fields of a request that are also accepted at the top level of an input, where RunPod's LangChain package puts them.
SAMPLING_FIELDS = {
    "bad_words", "best_of", "chat_template_kwargs", "early_stopping", "frequency_penalty", "ignore_eos",
    "include_stop_str_in_output", "length_penalty", "logit_bias", "logprobs", "max_completion_tokens", "max_tokens",
    "min_p", "min_tokens", "n", "presence_penalty", "prompt_logprobs", "repetition_penalty", "response_format",
    "seed", "skip_special_tokens", "spaces_between_special_tokens", "stop", "stop_token_ids", "stream_options",
    "structured_outputs",
    "temperature", "tool_choice", "tools", "top_k", "top_logprobs", "top_p", "truncate_prompt_tokens",
    "use_beam_search", "user",
}  # fmt: skip
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


@dataclass(frozen=True, slots=True)
class Request:
    """One call of vLLM's app.

    Attributes:
        method: GET or POST.
        path: of the route.
        query: of the route, or empty.
        body: JSON or a form, or None for a GET.
        content_type: of the body.
        form: fields of a form that is not encoded yet (`engine.jobs.multipart`), or None.
        native: whether the job is in the top-level format, whose stream is dicts with the new text, not SSE text.
        warnings: what was ignored, for the client and the log.
        mergeable: whether vLLM may put several tokens into one event, as in a stream of plain text.
        proxied: whether the outputs are the answer as it is (`engine.jobs.proxied`).
        model: that the body names; a client's own word.
        wants_costs: whether the answer should say what the job cost (`engine.jobs.cost_report`).
        traceparent: of the client's trace.
    """

    method: str
    path: str
    query: str = ""
    body: bytes | None = None
    content_type: str = JSON
    form: dict[str, Any] | None = None
    native: bool = False
    warnings: tuple[str, ...] = ()
    mergeable: bool = False
    proxied: bool = False
    model: str | None = None
    wants_costs: bool = False
    traceparent: str | None = None


class UnreadableInput(str):
    """The reason why a job's input cannot be read; it replaces the input."""

    __slots__ = ()


class ExpiredInput(UnreadableInput):
    """The reason why a job has expired; it replaces the input."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class _OwnFields:
    """The fields of an input, or of a request's body, that are the worker's own, and what of them is ignored."""

    wants_costs: bool = False
    traceparent: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Call:
    """A `Request` whose body is not encoded yet."""

    method: str
    path: str
    query: str = ""
    document: dict[str, Any] | None = None
    native: bool = False


# Fields at the top level of an input that belong into `sampling_params`.
_LIFTED_FIELDS = SAMPLING_FIELDS | GUIDED_FIELDS.keys() | REMOVED_FIELDS.keys()
# `"true"` as well as `true`: forms and templates quote what they fill in, and worker-vllm accepts it.
_LenientBool = Annotated[bool, Field(strict=False)]
_LENIENT_BOOL = TypeAdapter(bool)


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


class _Input(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    @abstractmethod
    def call(self, max_model_len: int) -> _Call:
        """Return the call that this input describes."""


class OpenAIInput(_Input):
    """An OpenAI request, as the platform makes it from `/v2/{endpoint}/openai/v1/...`."""

    openai_route: StrictStr = "/v1/chat/completions"
    openai_input: dict[str, Any] | None = None

    def call(self, max_model_len: int) -> _Call:
        """Return a POST of the input; a GET if there is no input, or the route takes none."""
        del max_model_len
        call = _openai_request("openai_route", self.openai_route, self.openai_input)
        return _Call("GET", call.path, call.query) if call.path in GET_ONLY and not self.openai_input else call


class RouteInput(_Input):
    """A call of any route, in worker-vllm's format."""

    route: StrictStr
    body: dict[str, Any] | None = None
    method: Annotated[Literal["GET", "POST"], BeforeValidator(_upper)] | None = None

    def call(self, max_model_len: int) -> _Call:
        """Return a POST of the body, or a GET without one, unless `method` says otherwise."""
        del max_model_len
        method = self.method or ("POST" if self.body else "GET")
        return _openai_request("route", self.route, (self.body or {}) if method == "POST" else None)


class _NativeInput(_Input):
    sampling_params: dict[str, Any] = {}
    stream: _LenientBool = False
    model: StrictStr | None = None

    def _post(self, path: str, field: str, value: Any, defaults: dict[str, Any]) -> _Call:
        body = defaults | _not_null(self.sampling_params)
        for name in (field, "stream", "model"):
            if name in body:
                raise InvalidInputError(f"sampling_params holds {name!r}, which belongs at the top level of the input")
        body |= {field: value, "stream": self.stream}
        if self.model is not None:
            body["model"] = self.model
        if self.stream:
            body["stream_options"] = {"include_usage": True, **_dict(body.get("stream_options"))}
        return _Call("POST", path, document=body, native=True)


class MessagesInput(_NativeInput):
    """A chat at the top level of the input, for clients that call `/run` directly."""

    messages: Annotated[list[Any], Field(min_length=1)]

    def call(self, max_model_len: int) -> _Call:
        """Return a POST to `/v1/chat/completions`; `max_tokens` defaults to the rest of the context there."""
        del max_model_len
        return self._post("/v1/chat/completions", "messages", self.messages, {})


class PromptInput(_NativeInput):
    """A prompt at the top level of the input, for clients that call `/run` directly."""

    prompt: StrictStr | Annotated[list[Any], Field(min_length=1)]
    apply_chat_template: _LenientBool = False

    def call(self, max_model_len: int) -> _Call:
        """Return a POST to `/v1/completions` whose `max_tokens` is the rest of the context; or a chat of this one turn.

        For vLLM even `null` means its default there, 16 tokens. It reduces a value that exceeds the context.
        """
        if self.apply_chat_template:
            turn = {"role": "user", "content": self.prompt}
            return self._post("/v1/chat/completions", "messages", [turn], {})
        # Completions have no `max_completion_tokens`, and vLLM would ignore it.
        limit = self.sampling_params.get("max_completion_tokens") or max_model_len
        return self._post("/v1/completions", "prompt", self.prompt, {"max_tokens": limit})


# The field that identifies each format, in order of precedence.
_INPUT_TYPES: dict[str, type[_Input]] = {
    "openai_route": OpenAIInput,
    "openai_input": OpenAIInput,
    "route": RouteInput,
    "messages": MessagesInput,
    "prompt": PromptInput,
}


def parse(
    job: dict[str, Any],
    max_model_len: int,
    open_routes: frozenset[str] = SERVING,
    event_tokens: Callable[[str], int | None] = lambda _: None,
    has_route: Callable[[str], bool] = lambda _: True,
) -> Request:
    """Return the request that a job's `input` describes.

    Args:
        job: as it was taken.
        max_model_len: maximum tokens of prompt and output together.
        open_routes: the routes that clients may call.
        event_tokens: returns how many tokens an event of a stream of plain text should have on a route; None where each
            token must be an event of its own.
        has_route: returns whether vLLM has a route.

    Raises:
        InvalidInputError: the input is in none of the accepted formats; the message says what is wrong and what is
            accepted.
        RouteNotAllowedError: clients may not call the route.
        UnknownRouteError: vLLM has no such route.
        ExpiredError: the job waited for too long.
    """
    value = job.get("input")
    if isinstance(value, ExpiredInput):
        raise ExpiredError(value)
    if isinstance(value, UnreadableInput):
        raise InvalidInputError(f"the job's input cannot be read: {value}")
    if isinstance(value, ProxiedRequest):
        return _proxied(value, str(job.get("id", "")), open_routes, event_tokens, has_route)
    if not isinstance(value, dict):
        raise InvalidInputError(f"the job's input must be a JSON object. Accepted:\n{ACCEPTED_INPUTS}")
    warnings = list(_ignored(value))
    value, own = _without_own_fields(value)
    value = _normalized(value)
    form = next((_INPUT_TYPES[field] for field in _INPUT_TYPES if field in value), None)
    if form is None:
        raise InvalidInputError(f"the job's input is in none of the accepted formats:\n{ACCEPTED_INPUTS}")
    try:
        call = form.model_validate(value).call(max_model_len)
    except ValidationError as error:
        faults = "; ".join(f"{_field_path(fault['loc'])}: {fault['msg']}" for fault in error.errors())
        raise InvalidInputError(f"{faults}. Accepted:\n{ACCEPTED_INPUTS}") from None
    check_route(call.path, open_routes, has_route)
    if call.document is None:
        return Request(call.method, call.path, call.query, native=call.native, warnings=(*warnings, *own.warnings))
    body = {name: part for name, part in call.document.items() if name != "extra_body"} | _extra_body(call.document)
    body, own = _without_own_fields(body, own)
    document, removed = _with_current_names(call.path, body)
    if call.path in FORMS and has_route(call.path):
        return Request(
            call.method,
            call.path,
            call.query,
            form=document,
            warnings=(*warnings, *removed, *own.warnings),
            model=_model(document),
            wants_costs=own.wants_costs,
            traceparent=own.traceparent,
        )
    plain = merging.is_plain_text(call.path, document)
    tokens = event_tokens(call.path) if plain else None
    if tokens is not None and tokens > 1:
        document = {**document, "stream_interval": tokens}
    document = _with_id(call.path, document, str(job.get("id", "")))
    warnings += [*removed, *own.warnings]
    return Request(
        call.method,
        call.path,
        call.query,
        encode_json(document),
        native=call.native,
        warnings=tuple(warnings),
        mergeable=tokens is not None,
        model=_model(document),
        wants_costs=own.wants_costs,
        traceparent=own.traceparent,
    )


def check_route(path: str, open_routes: frozenset[str], has_route: Callable[[str], bool]) -> None:
    """Check that clients may call a route.

    Raises:
        RouteNotAllowedError: they may not.
        UnknownRouteError: vLLM has no such route.
    """
    if path not in open_routes:
        raise RouteNotAllowedError(path, sorted(open_routes)) if has_route(path) else UnknownRouteError(path)


def _proxied(
    value: ProxiedRequest,
    job_id: str,
    open_routes: frozenset[str],
    event_tokens: Callable[[str], int | None],
    has_route: Callable[[str], bool],
) -> Request:
    call = _openai_request("the request's URI", value["route"], None)
    check_route(call.path, open_routes, has_route)
    if value["content_type"].lower().startswith("multipart/form-data"):
        return Request(value["method"], call.path, call.query, value.content, value["content_type"], proxied=True)
    return http_request(value["method"], call.path, call.query, value.content, event_tokens, request_id=job_id)


def http_request(  # noqa: PLR0913 (all that a request has)
    method: str, path: str, query: str, body: bytes, event_tokens: Callable[[str], int | None], *, request_id: str = ""
) -> Request:
    """Return the request as its client wrote it, in today's names. Whether its body is valid is for vLLM to say.

    Args:
        method: any of HTTP's.
        path: of the route.
        query: of the route, or empty.
        body: as it came; it is only changed if it is a JSON object with fields that have another name today, or on a
            route that takes the id from it.
        event_tokens: as for `parse`.
        request_id: names the request in vLLM.

    Raises:
        InvalidInputError: fields of another name are where they cannot be used.
    """
    try:
        document = decode(body)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        return Request(method, path, query, body or None, proxied=True)
    given = {name: part for name, part in document.items() if name != "extra_body"} | _extra_body(document)
    given, own = _without_own_fields(given)
    current, removed = _with_current_names(path, given)
    current = _with_id(path, current, request_id)
    # Its client gets each token as an event, unless it is slower than the engine, as with vLLM's own server.
    mergeable = merging.is_plain_text(path, current) and event_tokens(path) is not None
    return Request(
        method,
        path,
        query,
        body if current == document else encode_json(current),
        warnings=(*removed, *own.warnings),
        mergeable=mergeable,
        proxied=True,
        model=_model(current),
        wants_costs=own.wants_costs,
        traceparent=own.traceparent,
    )


def _without_own_fields(value: dict[str, Any], outer: _OwnFields = _OwnFields()) -> tuple[dict[str, Any], _OwnFields]:
    """Return the fields that are not the worker's own, and those that are: these, or else those of `outer`.

    Raises:
        InvalidInputError: `include_costs` is no boolean.
    """
    if "include_costs" not in value and "traceparent" not in value:
        return value, outer
    wants_costs = _as_bool(value.get("include_costs"))
    if wants_costs is not None and not isinstance(wants_costs, bool):
        raise InvalidInputError("include_costs must be true or false")
    traceparent, warnings = value.get("traceparent"), outer.warnings
    if traceparent is not None and not is_traceparent(traceparent):
        traceparent, warnings = (
            None,
            (*warnings, "traceparent: ignored, as it has not the form of W3C's Trace Context"),
        )
    own = _OwnFields(
        outer.wants_costs if wants_costs is None else wants_costs, traceparent or outer.traceparent, warnings
    )
    return {name: part for name, part in value.items() if name not in ("include_costs", "traceparent")}, own


def _model(body: dict[str, Any]) -> str | None:
    model = body.get("model")
    return model if isinstance(model, str) else None


def _ignored(value: dict[str, Any]) -> Iterator[str]:
    """Yield what of the input is ignored, and why."""
    given = {name for name, part in value.items() if part is not None}
    if batching := ", ".join(sorted(BATCHING_FIELDS & given)):
        yield f"{batching}: ignored, as BATCH_INTERVAL_MS of the worker sets the size of batches"
    if "messages" in given:
        if value.get("prompt"):
            yield "prompt: ignored, as messages are given"
        if "apply_chat_template" in given and not _as_bool(value["apply_chat_template"]):
            yield "apply_chat_template: ignored, as messages always use the chat template"


def _normalized(value: dict[str, Any]) -> dict[str, Any]:
    """Return the input without ignored fields and without `null`, which typed clients write for what is not given.

    In the top-level format, all sampling fields move to `sampling_params`, from the top level and from `extra_body`.
    """
    given = {name: part for name, part in _not_null(value).items() if name not in BATCHING_FIELDS}
    if "messages" in given:  # As in worker-vllm, they override a prompt.
        given = {name: part for name, part in given.items() if name not in ("prompt", "apply_chat_template")}
    sampling = given.get("sampling_params", {})
    if given.keys() & _INPUT_TYPES.keys() <= {"messages", "prompt"} and isinstance(sampling, dict):
        lifted = {name: part for name, part in given.items() if name in _LIFTED_FIELDS}
        extra = _extra_body(given) | _extra_body(sampling)
        given = {name: part for name, part in given.items() if name not in (*lifted, "extra_body")}
        sampling = lifted | _not_null(sampling) | _not_null(extra)
        sampling.pop("extra_body", None)
        if sampling:
            given["sampling_params"] = sampling
    return given


def _not_null(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in fields.items() if part is not None}


def _as_bool(value: Any) -> Any:
    """Return what vLLM, and a lenient form, read of a boolean: `"true"`, `1`; anything else unchanged."""
    try:
        return _LENIENT_BOOL.validate_python(value)
    except ValidationError:
        return value


def _extra_body(body: dict[str, Any]) -> dict[str, Any]:
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
        body = body | {"stream": _as_bool(body["stream"])}
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


def _openai_request(field: str, route: str, body: dict[str, Any] | None) -> _Call:
    match = _ROUTE.fullmatch(route)
    if match is None:
        raise InvalidInputError(
            f"{field} is {_quote(route)}, which is not a route: give only the path, without a scheme or a host, "
            'as in "/v1/chat/completions"'
        )
    path, query = match["path"], match["query"] or ""
    return _Call("GET" if body is None else "POST", path, query, body)


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


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _field_path(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location) or "input"


def _quote(text: str, length: int = 100) -> str:
    """Return a client's text as it can be put into a message: short and escaped."""
    return ascii(text if len(text) <= length else text[:length] + "...")
