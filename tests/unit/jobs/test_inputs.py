"""Which job inputs are accepted, and which request to vLLM each becomes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.backend.routes import SERVING
from engine.errors import InvalidInputError, JobError, RouteNotAllowedError, UnknownRouteError
from engine.jobs.inputs import BATCHING_FIELDS, parse
from engine.jobs.proxied import ProxiedRequest
from engine.jobs.request import Request

MESSAGES = [{"role": "user", "content": "漢 😀"}]


def request_of(value: Any) -> Request:
    return parse({"id": "1", "input": value}, 2048)


def body_of(value: Any) -> dict[str, Any]:
    body = request_of(value).body
    assert body is not None
    document = json.loads(body)
    assert isinstance(document, dict)
    return document


def test_an_openai_input_is_posted_unchanged_to_its_route() -> None:
    sent = {"messages": MESSAGES, "x": [1.5, None, True]}

    request = request_of({"openai_route": "/v1/chat/completions", "openai_input": sent})

    assert (request.method, request.path, request.native) == ("POST", "/v1/chat/completions", False)
    assert request.body is not None
    assert json.loads(request.body) == sent


@pytest.mark.parametrize("extra", [{}, {"openai_input": None}])
def test_a_route_without_an_input_is_a_get(extra: dict[str, None]) -> None:
    assert request_of({"openai_route": "/v1/models", **extra}) == Request("GET", "/v1/models")


def test_an_empty_openai_input_is_still_a_post() -> None:
    assert request_of({"openai_route": "/v1/completions", "openai_input": {}}).method == "POST"


def test_a_query_is_separated_from_the_path() -> None:
    request = request_of({"openai_route": "/v1/messages?beta=true", "openai_input": {}})

    assert (request.path, request.query) == ("/v1/messages", "beta=true")


def test_top_level_messages_are_a_chat() -> None:
    request = request_of({"messages": MESSAGES, "sampling_params": {"temperature": 0}, "model": "m"})

    assert (request.path, request.native) == ("/v1/chat/completions", True)
    assert body_of({"messages": MESSAGES, "sampling_params": {"temperature": 0}, "model": "m"}) == {
        "messages": MESSAGES,
        "temperature": 0,
        "stream": False,
        "model": "m",
    }


def test_max_tokens_of_a_top_level_prompt_defaults_to_the_context_and_not_to_sixteen() -> None:
    assert body_of({"prompt": "x"})["max_tokens"] == 2048
    assert body_of({"prompt": "x", "sampling_params": {"max_tokens": 5}})["max_tokens"] == 5
    assert body_of({"prompt": "x", "sampling_params": {"max_tokens": None}})["max_tokens"] == 2048
    assert body_of({"prompt": "x", "sampling_params": {"max_tokens": 0}})["max_tokens"] == 0


def test_a_streamed_top_level_job_includes_usage_by_default() -> None:
    without_usage = {"include_usage": False}

    assert body_of({"prompt": "x", "stream": True})["stream_options"] == {"include_usage": True}
    assert body_of({"prompt": "x", "stream": True, "sampling_params": {"stream_options": without_usage}})[
        "stream_options"
    ] == without_usage  # fmt: skip


NOT_ROUTES = [
    "", "v1/models", "http://host/v1/models", "//host/v1/models", "/v1//models", "@host/v1", "/v1/../metrics",
    "/v1/./models", "/..", "/v1/models//", "/v1/%2e%2e/x", "/v1/models#x", "/v1/mo dels", "/v1\\models",
    "/v1/models\r\nx", "/v1/models?a=b c", "https:/v1", "/v1/chat/..?x", "\ud800", "/v1/modèles", "/a:b@host/", "*",
    "/\x00",
]  # fmt: skip


@pytest.mark.parametrize("route", NOT_ROUTES)
def test_a_route_that_is_not_a_plain_path_is_refused(route: str) -> None:
    with pytest.raises(InvalidInputError, match="not a route"):
        request_of({"openai_route": route})


@given(st.text(alphabet=st.sampled_from("/.?#@:%\\v1amodels \n"), max_size=30))
def test_every_accepted_route_is_a_plain_path(route: str) -> None:
    try:
        path = request_of({"openai_route": route}).path
    except JobError:
        return
    segments = path.split("/")
    assert segments[0] == ""
    assert all(segment not in ("", ".", "..") and segment.replace(".", "").isalnum() for segment in segments[1:])


@pytest.mark.parametrize(
    ("value", "expected_message"),
    [
        (None, "must be a JSON object"),
        ("text", "must be a JSON object"),
        ([], "must be a JSON object"),
        ({}, "none of the accepted formats"),
        ({"text": "x"}, "none of the accepted formats"),
        ({"openai_route": 5}, "openai_route: Input should be a valid string"),
        ({"openai_route": "/v1/models", "openai_input": "{}"}, "openai_input: Input should be a valid dictionary"),
        ({"openai_route": "/v1/models", "openai_input": []}, "openai_input: Input should be a valid dictionary"),
        ({"openai_route": "/v1/models", "method": "DELETE"}, "method: Extra inputs are not permitted"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": "hi"}, "messages: Input should be a valid list"),
        ({"messages": MESSAGES, "stream": "maybe"}, "stream: Input should be a valid boolean"),
        ({"messages": MESSAGES, "sampling_params": []}, "sampling_params: Input should be a valid dictionary"),
        ({"messages": MESSAGES, "max_token": 5}, "max_token: Extra inputs are not permitted"),
        ({"prompt": "x", "guided_jsn": {}}, "guided_jsn: Extra inputs are not permitted"),
        (
            {"prompt": "x", "sampling_params": {"guided_regex": "a", "structured_outputs": {"regex": "b"}}},
            "guided_regex and structured_outputs are both given",
        ),
        (
            {"openai_input": {"guided_regex": "a", "structured_outputs": {"regex": "b"}}},
            "guided_regex and structured_outputs",
        ),
        ({"openai_input": {"extra_body": "guided_json"}}, "extra_body must be a JSON object"),
        ({"prompt": "x", "extra_body": [1]}, "extra_body must be a JSON object"),
        ({"prompt": "x", "extra_body": {"prompt": "y"}}, "'prompt', which belongs at the top level"),
        ({"prompt": "x", "extra_body": {"stream": True}}, "'stream', which belongs at the top level"),
        (
            {"openai_route": "/v1/messages", "openai_input": {"guided_json": {}}},
            "/v1/messages has no structured outputs, so guided_json",
        ),
        ({"route": "/v1/embeddings", "body": {"guided_choice": ["a"]}}, "so guided_choice cannot be used"),
        ({"route": "/v1/models", "method": "PUT"}, "method: Input should be 'GET' or 'POST'"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": "x", "sampling_params": {"stream": True}}, "'stream', which belongs at the top level"),
        ({"prompt": "x", "sampling_params": {"prompt": "y"}}, "'prompt', which belongs at the top level"),
        ({"prompt": "half \ud83d"}, "half of a surrogate pair"),
        ({"prompt": "x", "sampling_params": {"temperature": float("nan")}}, "cannot be written as JSON"),
        ({"prompt": "x", "sampling_params": {"temperature": {1, 2}}}, "cannot be written as JSON"),
    ],
)
def test_an_invalid_input_is_an_error_that_says_what_is_wrong(value: Any, expected_message: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        request_of(value)

    assert expected_message in str(caught.value)
    json.loads(caught.value.output()["error"].encode())


def test_a_job_without_an_input_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="must be a JSON object"):
        parse({"id": "1"}, 2048)


def test_an_input_that_is_nested_too_deeply_is_refused() -> None:
    value: list[Any] = []
    for _ in range(200_000):
        value = [value]

    with pytest.raises(InvalidInputError, match="nested too deeply"):
        request_of({"prompt": "x", "sampling_params": {"extra": value}})
    while value:  # taken apart from outside in: freeing it in one go would recurse as deeply
        value = value.pop()


def test_an_openai_input_without_a_route_is_a_chat() -> None:
    assert request_of({"openai_input": {"messages": MESSAGES}}).path == "/v1/chat/completions"


@pytest.mark.parametrize(
    ("value", "method", "body"),
    [
        ({"route": "/tokenize", "body": {"prompt": "x"}}, "POST", b'{"prompt":"x"}'),
        ({"route": "/v1/models"}, "GET", None),
        ({"route": "/v1/models", "method": "get", "body": {}}, "GET", None),
        ({"route": "/tokenize", "method": "POST"}, "POST", b"{}"),
        ({"route": "/tokenize", "method": "Post"}, "POST", b"{}"),
        ({"route": "/v1/models", "method": None, "body": None}, "GET", None),
    ],
)
def test_the_input_format_of_worker_vllm_is_accepted(value: dict[str, Any], method: str, body: bytes | None) -> None:
    assert request_of(value) == Request(method, value["route"], body=body)


def test_a_prompt_with_apply_chat_template_is_a_chat() -> None:
    body = body_of({"prompt": "Hello!", "apply_chat_template": True, "sampling_params": {"max_tokens": 5}})

    assert body == {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 5, "stream": False}


@pytest.mark.parametrize("field", sorted(BATCHING_FIELDS))
@pytest.mark.parametrize(
    "value",
    [
        {"messages": MESSAGES},
        {"prompt": "x"},
        {"openai_route": "/v1/completions", "openai_input": {"prompt": "x"}},
        {"route": "/tokenize", "body": {"prompt": "x"}},
    ],
    ids=lambda value: next(iter(value)),
)
def test_a_batching_field_is_ignored_with_a_warning(value: dict[str, Any], field: str) -> None:
    request = request_of({**value, field: 3})

    assert replace(request, warnings=()) == request_of(value)
    assert request.warnings == (f"{field}: ignored, as BATCH_INTERVAL_MS of the worker sets the size of batches",)


CLOSED = ["/metrics", "/sleep", "/wake_up", "/v1/load_lora_adapter", "/start_profile", "/abort_requests", "/docs",
          "/openapi.json", "/collective_rpc", "/scale_elastic_ep", "/reset_prefix_cache", "/invocations", "/ping",
          "/server_info", "/v1/responses/resp_1", "/update_weights", "/pause", "/load"]  # fmt: skip


@pytest.mark.parametrize("route", CLOSED)
def test_administrative_routes_are_refused_unless_a_setting_allows_them(route: str) -> None:
    job = {"id": "1", "input": {"openai_route": route, "openai_input": {}}}

    with pytest.raises(RouteNotAllowedError, match=r"clients may not call .*\. Allowed: .*ALLOWED_ROUTES"):
        parse(job, 2048)
    assert parse(job, 2048, SERVING | {route}).path == route


# Pieces of attempts to write a closed route in another way.
PIECES = st.sampled_from(
    [*CLOSED, *sorted(SERVING), "/", "//", ".", "..", "/..", "/./", "%2e", "%2E%2E", "%2f", "%00", "?", "?x=/metrics",
     "#", ";", "\\", "@host", "http://host", "https:", ":8000", " ", "\t", "\n", "METRICS", "Sleep", "V1", "\u2025",
     "/"]
)  # fmt: skip


@given(st.lists(PIECES, max_size=5).map("".join) | st.text(max_size=30), st.sampled_from(["openai_route", "route"]))
def test_no_spelling_of_a_route_reaches_a_closed_one(route: str, field: str) -> None:
    """An accepted route equals an allowed one letter by letter: vLLM's router has nothing to normalize."""
    for more in ({}, {"openai_input": {}} if field == "openai_route" else {"body": {"a": 1}}):
        try:
            request = request_of({field: route, **more})
        except JobError:
            continue
        assert request.path in SERVING
        assert route.partition("?")[0].removesuffix("/") == request.path


@pytest.mark.parametrize(
    ("value", "ignored"),
    [
        ({"messages": MESSAGES, "prompt": "x"}, "prompt"),
        ({"prompt": "x", "sampling_params": {"guided_decoding_backend": "outlines"}}, "guided_decoding_backend"),
        ({"prompt": "x", "extra_body": {"guided_decoding_backend": "outlines"}}, "guided_decoding_backend"),
        ({"messages": MESSAGES, "prompt": ""}, None),
        ({"messages": MESSAGES, "apply_chat_template": False}, "apply_chat_template"),
        ({"messages": MESSAGES, "apply_chat_template": True}, None),
        ({"prompt": "x", "best_of": 2}, "best_of"),
        ({"prompt": "x", "batch_size": None}, None),
        ({"messages": MESSAGES, "apply_chat_template": "false"}, "apply_chat_template"),
        ({"prompt": "x", "guided_json": {}, "guided_decoding_backend": "x"}, "guided_decoding_backend"),
        ({"prompt": "x", "sampling_params": {"best_of": None}}, None),
        ({"openai_input": {"messages": MESSAGES, "early_stopping": True}}, "early_stopping"),
        ({"openai_route": "/tokenize", "openai_input": {"prompt": "x", "best_of": 1}}, None),
    ],
    ids=json.dumps,
)
def test_ignored_fields_are_named_in_warnings(value: dict[str, Any], ignored: str | None) -> None:
    assert [warning.partition(":")[0] for warning in request_of(value).warnings] == ([ignored] if ignored else [])


def test_a_trailing_slash_is_dropped() -> None:
    assert request_of({"openai_route": "/v1/models/?a=b"}) == Request("GET", "/v1/models", "a=b")


def test_a_closed_route_is_not_found_if_vllm_does_not_have_it_and_otherwise_not_allowed() -> None:
    job = {"input": {"openai_route": "/v1/models/tiny"}}

    with pytest.raises(UnknownRouteError, match="vLLM has no route /v1/models/tiny"):
        parse(job, 2048, has_route=lambda _: False)
    with pytest.raises(RouteNotAllowedError):
        parse(job, 2048, has_route=lambda _: True)


@pytest.mark.parametrize(
    ("value", "same_as"),
    [
        (
            {"prompt": "x", "sampling_params": None, "stream": None, "apply_chat_template": None, "model": None},
            {"prompt": "x"},
        ),
        ({"messages": MESSAGES, "prompt": None}, {"messages": MESSAGES}),
        ({"prompt": "x", "sampling_params": {"stream": None, "model": None, "prompt": None}}, {"prompt": "x"}),
        ({"prompt": "x", "stream": "true"}, {"prompt": "x", "stream": True}),
        (
            {"openai_input": {"messages": MESSAGES, "stream": "true"}},
            {"openai_input": {"messages": MESSAGES, "stream": True}},
        ),
        (
            {"prompt": "x", "max_completion_tokens": 5},
            {"prompt": "x", "sampling_params": {"max_tokens": 5, "max_completion_tokens": 5}},
        ),
        (
            {"prompt": "x", "temperature": 0, "sampling_params": {"temperature": None}},
            {"prompt": "x", "temperature": 0},
        ),
        ({"prompt": "x", "sampling_params": {"ignore_eos": None, "n": None}}, {"prompt": "x"}),
        (
            {"prompt": "x", "extra_body": {"top_k": 5}, "sampling_params": {"extra_body": {"min_p": 0.1}}},
            {"prompt": "x", "top_k": 5, "min_p": 0.1},
        ),
        (
            {"prompt": "x", "extra_body": {"top_k": 5}, "sampling_params": {"extra_body": None}},
            {"prompt": "x", "top_k": 5},
        ),
        (
            {"prompt": "x", "stream": True, "extra_body": {"stream_options": {"continuous_usage_stats": True}}},
            {"prompt": "x", "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        ),
        ({"prompt": "x", "extra_body": {"max_tokens": None}}, {"prompt": "x"}),
        ({"messages": MESSAGES, "stream": "False"}, {"messages": MESSAGES}),
        ({"prompt": "x", "apply_chat_template": "1"}, {"prompt": "x", "apply_chat_template": True}),
        ({"openai_input": {"messages": MESSAGES, "extra_body": None}}, {"openai_input": {"messages": MESSAGES}}),
        ({"messages": MESSAGES, "prompt": ""}, {"messages": MESSAGES}),
        ({"messages": MESSAGES, "prompt": "x", "apply_chat_template": True}, {"messages": MESSAGES}),
        ({"messages": None, "prompt": "x"}, {"prompt": "x"}),
        ({"openai_route": None, "openai_input": {"messages": MESSAGES}}, {"openai_input": {"messages": MESSAGES}}),
        ({"openai_route": "/v1/models", "openai_input": {}}, {"openai_route": "/v1/models"}),
        ({"openai_route": "/v1/models", "openai_input": None, "prompt": None}, {"openai_route": "/v1/models"}),
        (
            {"prompt": "x", "max_tokens": 5, "stop": ["a"]},
            {"prompt": "x", "sampling_params": {"max_tokens": 5, "stop": ["a"]}},
        ),
        (
            {"messages": MESSAGES, "temperature": 1, "sampling_params": {"temperature": 0}},
            {"messages": MESSAGES, "sampling_params": {"temperature": 0}},
        ),
        (
            {"prompt": "x", "extra_body": {"guided_choice": ["a"]}},
            {"prompt": "x", "sampling_params": {"structured_outputs": {"choice": ["a"]}}},
        ),
        (
            {"openai_input": {"messages": MESSAGES, "extra_body": {"guided_json": {}, "top_k": 1}}},
            {"openai_input": {"messages": MESSAGES, "top_k": 1, "structured_outputs": {"json": {}}}},
        ),
        (
            {"messages": MESSAGES, "guided_regex": "a+", "guided_whitespace_pattern": " ", "guided_choice": None},
            {
                "messages": MESSAGES,
                "sampling_params": {"structured_outputs": {"regex": "a+", "whitespace_pattern": " "}},
            },
        ),
        ({"openai_input": {"guided_decoding_backend": "outlines"}}, {"openai_input": {}}),
    ],
    ids=json.dumps,
)
def test_inputs_for_other_workers_become_the_same_request(value: dict[str, Any], same_as: dict[str, Any]) -> None:
    request, expected = request_of(value), request_of(same_as)

    assert json.loads(request.body or b"null") == json.loads(expected.body or b"null")
    assert replace(request, body=None, warnings=()) == replace(expected, body=None)


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        ({"openai_route": "/v1/responses", "openai_input": {"input": "hi"}}, "resp_job-1"),
        ({"openai_route": "/v1/responses", "openai_input": {"input": "hi", "request_id": "mine"}}, "mine"),
        (ProxiedRequest.of("POST", "/v1/responses", b'{"input": "hi"}'), "resp_job-1"),
        ({"openai_route": "/v1/completions", "openai_input": {"prompt": "hi"}}, None),
        (ProxiedRequest.of("POST", "/v1/completions", b'{"prompt": "hi"}'), None),
    ],
)
def test_a_response_has_the_jobs_id_in_its_body_where_vllm_takes_it_from(value: Any, sent: str | None) -> None:
    request = parse({"id": "job-1", "input": value}, 2048)

    assert json.loads(request.body or b"").get("request_id") == sent
