"""The official `openai` and `anthropic` clients, unmodified, against the real worker behind the gateway."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel

from builder.tiny_model.corpus import example
from tests.integration.emulator.conftest import KEY, Site, eventually
from tests.integration.emulator.test_own_worker import messages_of

STORY = example("count")
GREEDY = {"temperature": 0}
WEATHER: openai.types.chat.ChatCompletionFunctionToolParam = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a town",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "enum": ["Rome", "Oslo"]}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
}


class Verdict(BaseModel):
    """The response format that the model is constrained to."""

    good: bool
    colour: Literal["red", "green"]


@pytest.fixture
def client(llm: Site) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=llm.openai_url, api_key=KEY, max_retries=0, timeout=60) as api_client:
        yield api_client


@pytest.fixture
def claude(llm: Site) -> Iterator[anthropic.Anthropic]:
    url = llm.openai_url.removesuffix("/v1")
    with anthropic.Anthropic(base_url=url, auth_token=KEY, max_retries=0, timeout=60) as api_client:
        yield api_client


def test_a_chat_completion_is_returned(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=messages_of(STORY), temperature=0)

    assert answer.choices[0].message.content == STORY.answer
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0


def test_a_chat_streams_and_ends_with_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=messages_of(STORY),
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )

    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == STORY.answer
    assert chunks[-1].usage is not None
    assert chunks[-1].choices == []


def test_the_streaming_helper_assembles_the_response(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="tiny", messages=messages_of(STORY), temperature=0) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()

    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == STORY.answer


def test_a_completion_is_returned(client: openai.OpenAI) -> None:
    known = example("raw-months")

    answer = client.completions.create(model="tiny", prompt=known.prompt or "", temperature=0, max_tokens=200)

    assert answer.choices[0].text == known.answer


def test_several_choices_have_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=messages_of(STORY), n=2, logprobs=True, top_logprobs=2, seed=1, max_tokens=5
    )

    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert [len(token.top_logprobs) for token in choice.logprobs.content or []] == [2] * 5


def test_a_response_is_parsed_into_a_pydantic_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="tiny", messages=messages_of(STORY), response_format=Verdict, temperature=0
    )

    assert isinstance(answer.choices[0].message.parsed, Verdict)


@pytest.mark.parametrize("choice", ["required", "named"])
def test_a_tool_call_has_arguments_that_match_its_schema(choice: str, client: openai.OpenAI) -> None:
    named: openai.types.chat.ChatCompletionNamedToolChoiceParam = {"type": "function", "function": {"name": "weather"}}

    answer = client.chat.completions.create(
        model="tiny",
        messages=messages_of(STORY),
        tools=[WEATHER],
        tool_choice=named if choice == "named" else "required",
        temperature=0,
    )

    (call, *_) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["town"] in ("Rome", "Oslo")


def test_a_response_is_created_and_streamed(client: openai.OpenAI) -> None:
    question = STORY.messages[-1]["content"]

    complete = client.responses.create(model="tiny", input=question, temperature=0, max_output_tokens=200)
    events = list(
        client.responses.create(model="tiny", input=question, temperature=0, max_output_tokens=200, stream=True)
    )

    assert complete.output_text == STORY.answer
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == STORY.answer
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert "tiny" in [model.id for model in client.models.list()]


def test_errors_raise_the_clients_matching_exceptions(client: openai.OpenAI, llm: Site) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-5"):
        client.chat.completions.create(model="gpt-5", messages=messages_of(STORY))
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(model="tiny", messages=messages_of(STORY), temperature=-1, stream=stream)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model="tiny", prompt="fox " * 5000)
    with pytest.raises(openai.PermissionDeniedError, match="clients may not call"):
        client.post("/chat/completions/render", body={"messages": messages_of(STORY)}, cast_to=object)
    with pytest.raises(openai.NotFoundError, match="vLLM has no route /v1/models/tiny"):
        client.models.retrieve("tiny")
    with (
        openai.OpenAI(base_url=llm.openai_url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_disconnecting_a_stream_cancels_its_job(client: openai.OpenAI, llm: Site) -> None:
    def running_requests() -> int:
        (text,) = llm.ended(llm.submit({"route": "/metrics"}))["output"]
        found = re.search(r"^vllm:num_requests_running{.*} (\S+)$", text, re.MULTILINE)
        assert found is not None
        return int(float(found[1]))

    # Takes half a minute, so that the disconnect comes well before its end even on a busy machine.
    with client.chat.completions.create(
        model="tiny",
        messages=messages_of(STORY),
        stream=True,
        n=24,
        max_tokens=1900,
        temperature=1,
        extra_body={"ignore_eos": True},
    ) as stream:
        first = next(stream)
        eventually(lambda: running_requests() == 24)

    eventually(lambda: running_requests() == 0, 30)
    (status,) = [job["status"] for job in llm.state()["jobs"] if job["id"] in first.id]
    assert status == "CANCELLED"


def test_the_async_client_sends_concurrent_requests(llm: Site) -> None:
    known = [example("count"), example("ok"), example("python-game")]

    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=llm.openai_url, api_key=KEY, max_retries=0, timeout=60) as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(model="tiny", messages=messages_of(one), temperature=0)
                    for one in known
                )
            )
            stream = await client.chat.completions.create(
                model="tiny", messages=messages_of(STORY), temperature=0, stream=True
            )
            streamed = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return [*(answer.choices[0].message.content for answer in answers), "".join(streamed)]

    assert asyncio.run(ask()) == [*(one.answer for one in known), STORY.answer]


def test_anthropic_messages_are_returned_and_streamed(claude: anthropic.Anthropic) -> None:
    message: anthropic.types.MessageParam = {"role": "user", "content": STORY.messages[-1]["content"]}

    answer = claude.messages.create(model="tiny", max_tokens=200, messages=[message], extra_body=GREEDY)
    with claude.messages.stream(model="tiny", max_tokens=200, messages=[message], extra_body=GREEDY) as stream:
        text = "".join(stream.text_stream)
    count = claude.messages.count_tokens(model="tiny", messages=[message])

    assert answer.content[0].type == "text"
    assert answer.content[0].text == text == STORY.answer
    assert answer.stop_reason == "end_turn"
    assert count.input_tokens == answer.usage.input_tokens


def test_streams_say_what_they_cost(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    question = STORY.messages[-1]["content"]
    asked = {"include_costs": True}
    costs: list[dict[str, float]] = []

    for chunk in client.chat.completions.create(
        model="tiny", messages=messages_of(STORY), max_tokens=5, stream=True, extra_body=asked
    ):
        costs += [chunk.model_extra["costs"]] if chunk.model_extra and "costs" in chunk.model_extra else []
    with client.responses.stream(model="tiny", input=question, max_output_tokens=5, extra_body=asked) as answer:
        response = answer.get_final_response()
    costs.append((response.model_extra or {})["costs"])
    message: anthropic.types.MessageParam = {"role": "user", "content": question}
    with claude.messages.stream(model="tiny", max_tokens=5, messages=[message], extra_body=asked) as events:
        costs += [(event.model_extra or {})["costs"] for event in events if event.type == "message_delta"]
    events_as_sent = claude.messages.create(
        model="tiny", max_tokens=5, messages=[message], stream=True, extra_body=asked
    )
    costs += [(event.model_extra or {})["costs"] for event in events_as_sent if event.type == "message_delta"]

    assert len(costs) == 4
    assert all(one["worker_s"] > 0 and one["decode_s"] > 0 for one in costs)
    assert response.usage is not None
    assert events.get_final_message().usage.output_tokens == response.usage.output_tokens == 5


def test_errors_raise_the_anthropic_clients_matching_exceptions(claude: anthropic.Anthropic) -> None:
    message: anthropic.types.MessageParam = {"role": "user", "content": "hi"}

    with pytest.raises(anthropic.NotFoundError, match="gpt-5"):
        claude.messages.create(model="gpt-5", max_tokens=5, messages=[message])
    with pytest.raises(anthropic.BadRequestError):
        claude.messages.create(model="tiny", max_tokens=5, messages=[message], extra_body={"temperature": -1})


def test_embeddings_are_equal_in_both_encodings(embedder: Site) -> None:
    with openai.OpenAI(base_url=embedder.openai_url, api_key=KEY, max_retries=0, timeout=60) as client:
        plain = client.embeddings.create(model="tiny", input=["one", "two"], encoding_format="float")
        packed = client.embeddings.create(model="tiny", input=["one", "two"])  # encoded as base64

    assert [one.index for one in plain.data] == [0, 1]
    assert plain.data[0].embedding != plain.data[1].embedding
    for one, other in zip(plain.data, packed.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-4)
