"""Worker processes on a load-balancing endpoint, with a scripted engine: load, signals, death, a full engine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from emulator.free_port import free_port
from tests.integration.balancer.conftest import Site
from tests.integration.emulator.conftest import KEY, eventually
from tests.processes import Process, running

Start = Callable[..., Site]
StartWorker = Callable[..., tuple[Process, str]]


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[StartWorker]:
    """Return a function that starts a worker without a platform; it returns the process and the worker's URL."""
    with ExitStack() as stack:

        def begin(**variables: str) -> tuple[Process, str]:
            port = free_port()
            address = {"ENDPOINT_TYPE": "load_balancer", "PORT": str(port), "LISTEN_HOST": "127.0.0.1"}
            process = running(["-m", "tests.scripted_worker"], {**address, **variables}, tmp_path / "log")
            return stack.enter_context(process), f"http://127.0.0.1:{port}"

        yield begin


def ping(url: str) -> int | None:
    """Return the status of a health check on a connection of its own; None if it was refused."""
    try:
        return httpx.get(f"{url}/ping", timeout=30).status_code
    except httpx.ConnectError:
        return None


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


def words(client: httpx.Client, text: str) -> list[str]:
    """Return the text of a streamed answer, and its end."""
    with client.stream("POST", "/v1/chat/completions", json=chat(text, stream=True)) as response:
        assert response.status_code == 200, response.read()
        data = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    said = [json.loads(event)["choices"][0]["delta"]["content"].strip() for event in data[:-1]]
    return [*said, data[-1]]


async def talk(site: Site, path: str) -> str:
    """Say hello to a WebSocket; return its answer."""
    headers = {"Authorization": f"Bearer {KEY}"}
    async with aiohttp.ClientSession(headers=headers) as session, session.ws_connect(site.url + path) as one:
        await one.send_str("hello")
        return await one.receive_str()


def test_no_health_check_is_refused_from_the_first_204_through_the_handover_to_the_first_200s(
    worker: StartWorker,
) -> None:
    process, url = worker(LOAD_S="1")
    process.wait_for(lambda: ping(url) is not None)
    statuses: list[int] = []
    while statuses.count(200) < 50:
        statuses.append(ping(url) or 0)
    assert set(statuses) == {204, 200}
    assert statuses == sorted(statuses, reverse=True)


def test_a_request_while_the_worker_loads_is_told_to_come_back(worker: StartWorker) -> None:
    process, url = worker(LOAD_S="60")
    process.wait_for(lambda: ping(url) == 204)
    response = httpx.post(f"{url}/v1/chat/completions", json=chat("a"), timeout=30)
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")


def test_a_killed_worker_refuses_connections_at_once_although_a_process_that_it_forked_lives_on(
    worker: StartWorker,
) -> None:
    process, url = worker(FORKS="1")
    process.wait_for(lambda: ping(url) == 200)
    ((child,)) = [one for one in process.family() if one.pid != process.popen.pid]
    process.popen.kill()
    process.popen.wait()
    try:
        assert child.is_running()
        assert ping(url) is None
    finally:
        child.kill()


def test_the_health_check_can_have_a_port_of_its_own(worker: StartWorker) -> None:
    port = free_port()
    process, url = worker(PORT_HEALTH=str(port), HEALTH_CHECK_PATH="/up")
    health_url = f"http://127.0.0.1:{port}"
    process.wait_for(lambda: httpx.get(f"{health_url}/up").status_code == 200 if ping(health_url) else False)
    assert httpx.post(f"{health_url}/v1/chat/completions", json=chat("a")).status_code == 404
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    assert httpx.get(f"{health_url}/v1/realtime", headers=upgrade).status_code == 404
    assert httpx.post(f"{url}/v1/chat/completions", json=chat("a"), timeout=30).json() == {"said": "a"}


def test_a_port_in_use_ends_the_worker_with_a_line_that_says_what_to_set(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        variables = {"ENDPOINT_TYPE": "load_balancer", "PORT": str(port), "LISTEN_HOST": "127.0.0.1"}
        with running(["handler.py"], variables, tmp_path / "log") as process:
            assert process.popen.wait(60) == 1
    assert f"PORT={port}: the worker cannot listen on 127.0.0.1:{port} (Address already in use)" in process.log


def test_sigterm_makes_the_worker_unhealthy_and_loses_no_request(start: Start) -> None:
    site = start(env={"PAUSE_S": "0.2"}, workersMin=2)
    workers = site.idle_workers(2)
    with ThreadPoolExecutor(2) as pool:
        streams = [pool.submit(words, site.client, "a b c d e f g h") for _ in range(2)]
        eventually(lambda: len(site.workers("running")) == 2)
        os.kill(workers[0]["pid"], signal.SIGTERM)
        late = [words(site.client, "x") for _ in range(10)]
        assert [stream.result(60) for stream in streams] == [[*"abcdefgh", "[DONE]"]] * 2
    assert late == [["x", "[DONE]"]] * 10
    assert site.exited(workers[0]["id"]) == 0


def test_a_drain_ends_what_takes_longer_with_an_error(worker: StartWorker) -> None:
    process, url = worker(PAUSE_S="0.2", DRAIN_TIMEOUT_S="1")
    process.wait_for(lambda: ping(url) == 200)
    body = chat("word " * 500, stream=True)
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        process.popen.send_signal(signal.SIGTERM)
        *_, error, done = [line.removeprefix("data: ") for line in lines if line]
    assert json.loads(error)["error"]["code"] == 503
    assert done == "[DONE]"
    assert process.popen.wait(30) == 0


def test_a_worker_without_health_checks_drains_for_five_seconds_at_most(worker: StartWorker) -> None:
    """And serves what still comes meanwhile: it cannot know that nothing is on its way."""
    process, url = worker()
    process.wait_for(lambda: ping(url) == 200)
    process.popen.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    assert httpx.post(f"{url}/v1/chat/completions", json=chat("a"), timeout=30).json() == {"said": "a"}
    assert process.popen.wait(30) == 0
    assert time.monotonic() - begun >= 4


def test_a_dead_engine_makes_the_worker_unhealthy_and_end_with_1(start: Start) -> None:
    site = start(env={"FAILS_AFTER_S": "3", "PAUSE_S": "0.2"}, workersMin=1, workersMax=1)
    (worker,) = site.idle_workers(1)
    body = chat("word " * 100, stream=True)
    with site.client.stream("POST", "/v1/chat/completions", json=body) as response:
        text = response.read().decode()
    assert text.endswith("data: [DONE]\n\n")
    assert '"error"' in text
    assert site.exited(worker["id"]) == 1


def test_more_than_the_engine_can_run_is_refused_with_retry_after(start: Start) -> None:
    site = start(env={"CONCURRENCY": "2", "PAUSE_S": "0.3"}, workersMin=1, workersMax=1)
    site.idle_workers(1)
    body = chat("word " * 500, stream=True)
    with ExitStack() as streams:
        opened = [site.client.stream("POST", "/v1/chat/completions", json=body) for _ in range(2)]
        lines = [streams.enter_context(one).iter_lines() for one in opened]
        assert all(next(one) for one in lines)
        refused = site.client.post("/v1/chat/completions", json=chat("a"))
        with pytest.raises(aiohttp.WSServerHandshakeError) as websocket:
            asyncio.run(talk(site, "/v1/realtime"))
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert websocket.value.headers is not None
    assert (websocket.value.status, websocket.value.headers["retry-after"]) == (429, "1")
    # Its clients have left.
    site.idle_workers(1)
    assert words(site.client, "a b") == ["a", "b", "[DONE]"]


def test_a_websocket_reaches_its_open_route_only(start: Start) -> None:
    site = start(workersMin=1)
    site.idle_workers(1)

    assert asyncio.run(talk(site, "/v1/realtime")) == "hello"
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        asyncio.run(talk(site, "/sleep"))
    assert refused.value.status == 403


def test_an_endpoint_scales_from_zero_for_a_request_that_waits(start: Start) -> None:
    site = start(workersMin=0, workersMax=1, env={"LOAD_S": "0.5"})
    assert words(site.client, "a b") == ["a", "b", "[DONE]"]
    assert any("healthy: cold start" in event["text"] for event in site.state()["events"])
