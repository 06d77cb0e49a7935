"""The client of the API: each refusal is one line that says what to change, and what may pass is tried again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from deploy import plan
from deploy.api import Api, client, same_name
from deploy.errors import DeployError, OptionError, RefusedError, UnreachableError
from deploy.gpus import Choice, Pool
from deploy.options import Options
from tests.unit.deploy.conftest import Terminal
from tests.unit.deploy.fakes import KEY, URL, FakeRunPod, problem

CHOICE = Choice((Pool("ADA_24", (), (), 1.1, None),), 1)


def body(**fields: Any) -> dict[str, Any]:
    return plan.create_request("tiny", "org/tiny", Options(image="x/y:1"), CHOICE, None) | fields


def answering(*responses: httpx.Response) -> list[Callable[[httpx.Request], httpx.Response | None]]:
    return [lambda _, response=response: response for response in responses]  # type: ignore[misc]


@pytest.mark.parametrize("key", ["rpa_abc\nrpa_def", "rpa_abcé", "rpa_abc def"])
def test_a_key_that_no_header_can_have_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(RefusedError, match="RUNPOD_API_KEY has a space, a line end") as raised:
        client(URL, key)

    assert "rpa_" not in str(raised.value)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://runpod.test", "http://", "", "http://h:99999", "http://[::1", "http://h/a b"]
)
def test_what_is_no_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(OptionError, match="is not a URL: set --api-url or RUNPOD_API_URL to one such as https://"):
        client(url, None)


@pytest.mark.parametrize(
    ("response", "error", "code", "says"),
    [
        (problem(400, "gpu.pools: unknown pool ADA_25"), OptionError, 2, "--gpu: unknown pool ADA_25"),
        (problem(401, "missing token"), RefusedError, 3, "RUNPOD_API_KEY (missing token): set it to a key"),
        (problem(403, "access denied"), RefusedError, 3, "give the key write access to serverless endpoints"),
        (problem(404, "volume not found"), RefusedError, 3, "(volume not found): check"),
        (
            problem(422, "Request validation failed.", ["$.workers.max: -1 is less than the minimum of 0"]),
            OptionError, 2, "--workers-max: -1 is less than the minimum of 0",
        ),
        (httpx.Response(404, json={"detail": "Not Found"}), DeployError, 1, "is https://runpod.test RunPod's API?"),
        (httpx.Response(418, text="teapot"), DeployError, 1, "is https://runpod.test RunPod's API?"),
        (httpx.Response(200, text="<html>"), DeployError, 1, "is https://runpod.test RunPod's API?"),
    ],
)  # fmt: skip
def test_a_refusal_is_one_line_that_says_what_to_change(  # noqa: PLR0913, PLR0917 (a table)
    api: Api, runpod: FakeRunPod, response: httpx.Response, error: type[DeployError], code: int, says: str
) -> None:
    runpod.script = answering(response)

    with pytest.raises(error) as raised:
        asyncio.run(api.create(body()))

    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == code
    assert runpod.requests == ["POST /v2/serverless"]


def test_too_many_requests_wait_for_as_long_as_the_api_says(
    api: Api, runpod: FakeRunPod, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    limited = problem(429, "rate limit exceeded for the minute window", headers={"Retry-After": "12"})
    runpod.script = answering(limited, limited)

    created = asyncio.run(api.create(body()))

    assert created.name == "tiny"
    assert waits == [12, 12]
    line = "deploy: too many requests (rate limit exceeded for the minute window); trying again in 12 s\n"
    assert terminal.messages == line * 2, "without the advice for when that does not help"


def test_what_fails_on_and_on_is_given_up(api: Api, runpod: FakeRunPod) -> None:
    runpod.script = answering(*(httpx.Response(503, text="upstream") for _ in range(9)))

    with pytest.raises(UnreachableError, match=r"503 \(upstream\): try again later"):
        asyncio.run(api.endpoints())

    assert len(runpod.requests) == 5


def test_a_lost_answer_creates_no_second_endpoint(api: Api, runpod: FakeRunPod) -> None:
    def lose(request: httpx.Request) -> httpx.Response:
        runpod.add(body())
        raise httpx.ReadError("connection reset", request=request)

    runpod.script = [lose]

    created = asyncio.run(api.create(body()))

    assert created.id == "ep1"
    assert list(runpod.endpoints) == ["ep1"]
    assert runpod.requests == ["POST /v2/serverless", "GET /v2/serverless"]


def test_a_request_that_never_arrived_is_sent_again(api: Api, runpod: FakeRunPod) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused", request=request)

    runpod.script = [refuse]

    assert asyncio.run(api.create(body())).id == "ep1"
    assert runpod.requests == ["POST /v2/serverless"] * 2


def test_an_answer_that_was_lost_before_the_endpoint_was_made_is_sent_again(api: Api, runpod: FakeRunPod) -> None:
    runpod.script = answering(httpx.Response(502))

    assert asyncio.run(api.create(body())).id == "ep1"
    assert runpod.requests == ["POST /v2/serverless", "GET /v2/serverless", "POST /v2/serverless"]


def test_a_deletion_whose_answer_was_lost_has_succeeded(api: Api, runpod: FakeRunPod) -> None:
    runpod.add(body())

    def lose(request: httpx.Request) -> httpx.Response:
        runpod.endpoints.clear()
        raise httpx.ReadTimeout("", request=request)

    runpod.script = [lose]

    asyncio.run(api.delete("ep1"))


def test_deleting_what_is_not_there_is_an_error(api: Api) -> None:
    with pytest.raises(RefusedError, match="not found"):
        asyncio.run(api.delete("ep9"))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (httpx.ConnectError("[Errno 111] Connection refused"), "https://runpod.test cannot be reached"),
        (httpx.ReadTimeout(""), "no answer within 60 s"),
        (
            httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"),
            "is not trusted: set SSL_CERT_FILE",
        ),
        (
            httpx.ConnectError("[SSL: WRONG_VERSION_NUMBER] wrong version number"),
            "does not speak TLS: set RUNPOD_API_URL",
        ),
        (httpx.DecodingError("Error -3 while decompressing data"), "https://runpod.test cannot be reached"),
    ],
)
def test_a_network_error_says_where_to_look(api: Api, runpod: FakeRunPod, error: Exception, says: str) -> None:
    def fail(_: httpx.Request) -> httpx.Response:
        raise error

    runpod.script = [fail] * 5

    with pytest.raises(UnreachableError) as raised:
        asyncio.run(api.endpoints())

    assert says in str(raised.value)
    assert raised.value.exit_code == 6


def test_a_request_that_violates_the_description_is_not_sent(api: Api, runpod: FakeRunPod) -> None:
    with pytest.raises(OptionError, match="--workers-max: -1 is less than"):
        asyncio.run(api.create(body(workers={"min": 0, "max": -1})))

    assert runpod.requests == []


def test_a_wait_for_longer_than_a_command_should_take_is_left_to_the_user(api: Api, runpod: FakeRunPod) -> None:
    limited = problem(429, "rate limit exceeded for the day window", headers={"Retry-After": "40000"})
    runpod.script = answering(limited)

    with pytest.raises(UnreachableError, match="run the command again when that window has ended"):
        asyncio.run(api.endpoints())

    assert len(runpod.requests) == 1


def test_looks_come_at_the_pace_of_a_rate_limit_that_is_nearly_used_up(api: Api, runpod: FakeRunPod) -> None:
    def paced(headers: dict[str, str]) -> float:
        runpod.script = answering(httpx.Response(200, json={"endpoints": []}, headers=headers))
        asyncio.run(api.endpoints())
        return api.pause_s(2)

    assert api.pause_s(2) == 2
    assert paced({"RateLimit": '"minute";r=59;t=60, "hour";r=2800;t=1812'}) == pytest.approx(3 * 60 / 59)
    assert paced({"RateLimit": '"minute";r=6;t=50'}) == 25
    assert paced({"RateLimit": '"minute";r=0;t=12'}) == 12
    assert paced({}) == 2


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"ALL_PROXY": "socks5://127.0.0.1:1"}, "a proxy of the environment cannot be used"),
        ({"HTTPS_PROXY": "foo://127.0.0.1:1"}, "a proxy of the environment cannot be used"),
        ({"SSL_CERT_FILE": "/nonexistent"}, "the file that SSL_CERT_FILE or SSL_CERT_DIR names cannot be read"),
    ],
)
def test_an_environment_that_httpx_cannot_use_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(OptionError, match=says):
        client(URL, KEY)


@pytest.mark.parametrize("url", [f"{URL}/v2", f"{URL}/v2/", f" {URL}/\n"])
def test_the_url_may_be_written_as_in_runpods_own_documents(runpod: FakeRunPod, url: str) -> None:
    async def run() -> None:
        async with client(url, KEY, httpx.MockTransport(runpod)) as http:
            await Api(http, lambda _: None).endpoints()

    asyncio.run(run())

    assert runpod.requests == ["GET /v2/serverless"]


def test_the_catalogue_is_asked_for_as_many_gpus_as_a_worker_has(api: Api, runpod: FakeRunPod) -> None:
    """Of most types, fewer machines have 4 free than one."""
    asked: list[str] = []

    def read(request: httpx.Request) -> None:
        asked.append(request.url.query.decode())

    runpod.script = [read]
    asyncio.run(api.gpus("13.0", 4))

    assert "count=4" in asked[0]


@pytest.mark.parametrize("name", ["tiny", "tiny -fb"])
@pytest.mark.parametrize("wanted", ["tiny", "tiny -fb"])
def test_an_endpoint_is_found_by_the_name_that_the_console_shows(name: str, wanted: str) -> None:
    assert same_name(name, wanted)
    assert not same_name(name, "tiny-fb")
