"""The `openai` client, unmodified, against the gateway and a worker with the stock SDK."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest

from tests.integration.emulator.conftest import KEY, Site, Start, eventually


@pytest.fixture
def client(site: Site) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=site.openai_url, api_key=KEY, max_retries=0, timeout=30) as openai_client:
        yield openai_client


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_a_chat_completion_is_returned(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
    assert answer.choices[0].message.content == "echo: hi"


def test_a_completion_is_returned(client: openai.OpenAI) -> None:
    assert client.completions.create(model="tiny", prompt="hi").choices[0].text == "hi!"


def test_chat_chunks_arrive_in_order(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "COUNT x 40"}], stream=True
    )
    assert [chunk.choices[0].delta.content for chunk in stream] == [f"{number} " for number in range(40)]


def test_chat_chunks_arrive_while_the_job_runs(client: openai.OpenAI, site: Site) -> None:
    # Takes half an hour, so the first chunks arrive long before its end.
    with client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "COUNT x 100000"}], stream=True
    ) as stream:
        assert [next(stream).choices[0].delta.content for _ in range(2)] == ["0 ", "1 "]
        assert "IN_PROGRESS" in {job["status"] for job in site.state()["jobs"]}


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="`none` does not exist") as caught:
        client.chat.completions.create(model="none", messages=[{"role": "user", "content": "hi"}])
    assert caught.value.status_code == 404
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["type"] == "NotFoundError"


@pytest.mark.parametrize("stream", [False, True])
def test_an_invalid_parameter_is_a_bad_request_error(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens must be at least 1"):
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=0, stream=stream
        )


def test_a_wrong_key_is_an_authentication_error(site: Site) -> None:
    with (
        openai.OpenAI(base_url=site.openai_url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_an_exception_of_the_handler_is_an_internal_server_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="the handler broke"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "raise"}])


def test_an_exception_during_a_stream_ends_it_with_an_error(client: openai.OpenAI) -> None:
    contents: list[str | None] = []
    stream = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "raise later"}], stream=True
    )
    with pytest.raises(openai.APIError, match="the handler broke later"):
        contents.extend(chunk.choices[0].delta.content for chunk in stream)
    assert contents == ["0 "]


def test_v1_routes_accept_endpoint_and_key_together(site: Site) -> None:
    with openai.OpenAI(base_url=f"{site.url}/v1", api_key=f"ep-{KEY}", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]


def test_the_async_client_supports_all_operations(site: Site) -> None:
    async def use() -> None:
        async with openai.AsyncOpenAI(base_url=site.openai_url, api_key=KEY, max_retries=0) as client:
            assert [model.id async for model in client.models.list()] == ["tiny"]
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": str(number)}])
                    for number in range(8)
                )
            )
            assert [answer.choices[0].message.content for answer in answers] == [f"echo: {n}" for n in range(8)]
            stream = await client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "COUNT x 3"}], stream=True
            )
            assert [chunk.choices[0].delta.content async for chunk in stream] == ["0 ", "1 ", "2 "]
            assert (await client.completions.create(model="tiny", prompt="hi")).choices[0].text == "hi!"
            with pytest.raises(openai.NotFoundError):
                await client.completions.create(model="none", prompt="hi")
            with pytest.raises(openai.BadRequestError):
                await client.completions.create(model="tiny", prompt="hi", max_tokens=0)

    asyncio.run(use())


def test_disconnecting_a_stream_frees_the_worker(start: Start) -> None:
    site = start(env={"CONCURRENCY": "1", "PAUSE_S": "0.05"})
    with openai.OpenAI(base_url=site.openai_url, api_key=KEY, max_retries=0, timeout=60) as client:
        stream = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "COUNT x 100000"}], stream=True
        )
        next(iter(stream))
        stream.close()
        answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "next"}])
    assert answer.choices[0].message.content == "echo: next"
    jobs = eventually(lambda: site.state()["jobs"])
    assert [job["status"] for job in jobs] == ["COMPLETED", "CANCELLED"]
    # By the same worker: it stopped the first job and continued.
    assert {job["workerId"] for job in jobs} == {site.state()["workers"][0]["id"]}
    assert site.health()["jobs"]["retried"] == 0
