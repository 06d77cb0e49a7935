"""Reads a job's input, in any of the accepted formats, as one request to vLLM's app."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictStr, ValidationError

from engine.backend import merging
from engine.backend.routes import FORMS, GET_ONLY, SERVING
from engine.errors import ExpiredError, InvalidInputError
from engine.jobs.proxied import ProxiedRequest
from engine.jobs.request import Request, check_route, http_request
from engine.jobs.request_body import (
    GUIDED_FIELDS,
    REMOVED_FIELDS,
    as_bool,
    encode_json,
    extra_body,
    model_of,
    not_null,
    read_body,
    split_own_fields,
)

ACCEPTED_INPUTS = """\
{"openai_route": "/v1/chat/completions", "openai_input": {...}}  an OpenAI request
{"openai_route": "/v1/models"}  a GET
{"openai_route": "/v1/audio/transcriptions", "openai_input": {"file": "https://...", ...}}  one with a file
{"route": "/tokenize", "body": {...}}  the same, in worker-vllm's format
{"messages": [...], "sampling_params": {...}, "stream": false}  a chat
{"prompt": "...", "sampling_params": {...}, "stream": false}  a completion"""

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


class UnreadableInput(str):
    """The reason why a job's input cannot be read; it replaces the input."""

    __slots__ = ()


class ExpiredInput(UnreadableInput):
    """The reason why a job has expired; it replaces the input."""

    __slots__ = ()


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
        body = defaults | not_null(self.sampling_params)
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
    value, own = split_own_fields(value)
    value = _normalized(value)
    kind = next((_INPUT_TYPES[field] for field in _INPUT_TYPES if field in value), None)
    if kind is None:
        raise InvalidInputError(f"the job's input is in none of the accepted formats:\n{ACCEPTED_INPUTS}")
    try:
        call = kind.model_validate(value).call(max_model_len)
    except ValidationError as error:
        faults = "; ".join(f"{_field_path(fault['loc'])}: {fault['msg']}" for fault in error.errors())
        raise InvalidInputError(f"{faults}. Accepted:\n{ACCEPTED_INPUTS}") from None
    check_route(call.path, open_routes, has_route)
    if call.document is None:
        return Request(call.method, call.path, call.query, native=call.native, warnings=(*warnings, *own.warnings))
    body, own = read_body(call.path, call.document, str(job.get("id", "")), own)
    form = body if call.path in FORMS and has_route(call.path) else None
    tokens = event_tokens(call.path) if merging.is_plain_text(call.path, body) else None
    if tokens is not None and tokens > 1:
        body = {**body, "stream_interval": tokens}
    return Request(
        call.method,
        call.path,
        call.query,
        encode_json(body) if form is None else None,
        form=form,
        native=call.native,
        warnings=(*warnings, *own.warnings),
        mergeable=tokens is not None,
        model=model_of(body),
        wants_costs=own.wants_costs,
        traceparent=own.traceparent,
    )


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


def _ignored(value: dict[str, Any]) -> Iterator[str]:
    """Yield what of the input is ignored, and why."""
    given = {name for name, part in value.items() if part is not None}
    if batching := ", ".join(sorted(BATCHING_FIELDS & given)):
        yield f"{batching}: ignored, as BATCH_INTERVAL_MS of the worker sets the size of batches"
    if "messages" in given:
        if value.get("prompt"):
            yield "prompt: ignored, as messages are given"
        if "apply_chat_template" in given and not as_bool(value["apply_chat_template"]):
            yield "apply_chat_template: ignored, as messages always use the chat template"


def _normalized(value: dict[str, Any]) -> dict[str, Any]:
    """Return the input without ignored fields and without `null`, which typed clients write for what is not given.

    In the top-level format, all sampling fields move to `sampling_params`, from the top level and from `extra_body`.
    """
    given = {name: part for name, part in not_null(value).items() if name not in BATCHING_FIELDS}
    if "messages" in given:  # As in worker-vllm, they override a prompt.
        given = {name: part for name, part in given.items() if name not in ("prompt", "apply_chat_template")}
    sampling = given.get("sampling_params", {})
    if given.keys() & _INPUT_TYPES.keys() <= {"messages", "prompt"} and isinstance(sampling, dict):
        lifted = {name: part for name, part in given.items() if name in _LIFTED_FIELDS}
        extra = extra_body(given) | extra_body(sampling)
        given = {name: part for name, part in given.items() if name not in (*lifted, "extra_body")}
        sampling = lifted | not_null(sampling) | not_null(extra)
        sampling.pop("extra_body", None)
        if sampling:
            given["sampling_params"] = sampling
    return given


def _openai_request(field: str, route: str, body: dict[str, Any] | None) -> _Call:
    match = _ROUTE.fullmatch(route)
    if match is None:
        raise InvalidInputError(
            f"{field} is {_quote(route)}, which is not a route: give only the path, without a scheme or a host, "
            'as in "/v1/chat/completions"'
        )
    path, query = match["path"], match["query"] or ""
    return _Call("GET" if body is None else "POST", path, query, body)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _field_path(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location) or "input"


def _quote(text: str, length: int = 100) -> str:
    """Return a client's text as it can be put into a message: short and escaped."""
    return ascii(text if len(text) <= length else text[:length] + "...")
