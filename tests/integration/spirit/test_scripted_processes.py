"""Worker processes on Spirit, with the real SDK and a scripted engine: signals, deaths, many streams, proxy mode."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.emulator.conftest import REPOSITORY, eventually
from tests.integration.emulator.spirit.conftest import ID, KEY, Site, site_with
from tests.integration.emulator.spirit.test_stock_proxy import events

Start = Callable[..., Site]


@pytest.fixture
def start() -> Iterator[Start]:
    """Return a function that starts an emulator with scripted workers, with these variables and settings."""
    with ExitStack() as stack:

        def site(env: dict[str, str] | None = None, **endpoint: Any) -> Site:
            command = [sys.executable, "-m", "tests.scripted_worker"]
            variables = {"CONCURRENCY": "200", **(env or {})}
            settings = {"command": command, "cwd": str(REPOSITORY), "env": variables, "grace": 30, **endpoint}
            return stack.enter_context(site_with(Path("unused"), **settings))

        yield site


def words(site: Site, text: str, client: httpx.Client | None = None) -> list[str]:
    """Return the events of a streamed answer."""
    with (client or site.openai).stream("POST", "/chat/completions", json=site.chat(text, stream=True)) as response:
        assert response.status_code == 200, response.read()
        return [text.strip() for text in events(response.iter_lines())]


def exited(site: Site, count: int = 1) -> list[int]:
    """Wait until so many workers have exited; return their exit statuses."""

    def poll() -> list[int]:
        workers = [*site.state()["gone"], *site.state()["workers"]]
        statuses = [worker["exitCode"] for worker in workers if worker["exitCode"] is not None]
        return statuses if len(statuses) >= count else []

    return eventually(poll)


def test_sigterm_lets_running_requests_end_and_exits_with_0(start: Start) -> None:
    site = start({"PAUSE_S": "0.2"})
    worker = site.idle_worker()
    with ThreadPoolExecutor(2) as pool:
        stream = pool.submit(words, site, "a b c d e f g h")
        eventually(lambda: any(task["outputs"] for task in site.state()["jobs"]))
        os.kill(worker["pid"], signal.SIGTERM)
        late = pool.submit(words, site, "x")
        assert stream.result(60) == [*"abcdefgh", "[DONE]"]
        # The next worker takes it.
        assert late.result(60) == ["x", "[DONE]"]
    assert exited(site) == [0]
    assert {task["retries"] for task in site.ended(2)} == {0}


def test_a_dead_engines_requests_are_answered_and_the_worker_exits_with_1(start: Start) -> None:
    site = start({"FAILS_AFTER_S": "4", "PAUSE_S": "0.5"}, maxRetries=0)
    site.idle_worker()
    body = site.chat("word " * 100, stream=True)
    with site.openai.stream("POST", "/chat/completions", json=body) as response:
        text = response.read().decode()
    assert text.endswith("\n\ndata: [DONE]\n\n")
    assert '"status": 503' in text
    assert exited(site)[0] == 1


@pytest.mark.parametrize("kind", ["proxied", "handled"])
def test_a_killed_workers_task_is_answered_by_another(start: Start, kind: str) -> None:
    site = start({"PAUSE_S": "1.5"}, maxRetries=1)
    worker = site.idle_worker()
    value = {"openai_input": site.chat("a")}
    with ThreadPoolExecutor(1) as pool:
        asking = (
            pool.submit(site.openai.post, "/chat/completions", json=site.chat("a"))
            if kind == "proxied"
            else (pool.submit(site.sync, value))
        )
        eventually(lambda: site.state()["health"]["jobs"]["inProgress"])
        os.kill(worker["pid"], signal.SIGKILL)
        response = asking.result(60)
    assert (response.status_code, response.json()) == (200, {"said": "a"})
    (task,) = site.ended()
    assert (task["retries"], task["answers"]) == (1, [200])


@pytest.mark.parametrize("loop", ["own", "stock"])
def test_as_pid_1_sigterm_ends_the_worker_with_0(start: Start, loop: str) -> None:
    """The kernel ignores a signal to the first process of a container for which it has no handler."""
    unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    inner = [sys.executable, "-m", "tests.scripted_worker"]
    if os.system("unshare --user --map-root-user --pid --fork true 2>/dev/null"):  # noqa: S605, S607
        pytest.skip("no process namespaces here")
    site = start({"PAUSE_S": "0.1", "LOOP": loop}, command=[*unshare, *inner])
    worker = site.idle_worker()
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(words, site, "a b c d e f g h i j")
        eventually(lambda: any(task["outputs"] for task in site.state()["jobs"]))
        (pid,) = Path(f"/proc/{worker['pid']}/task/{worker['pid']}/children").read_text().split()
        os.kill(int(pid), signal.SIGTERM)
        assert stream.result(60) == [*"abcdefghij", "[DONE]"]
    assert exited(site)[0] == 0


def test_a_hundred_and_fifty_streams_run_at_once(start: Start) -> None:
    """The SDK's own session stops at 100."""
    site = start({"PAUSE_S": "1"})
    site.idle_worker()
    texts = [" ".join(f"{number}.{one}" for one in range(8)) for number in range(150)]
    limits, key = httpx.Limits(max_connections=None), {"Authorization": f"{ID}-{KEY}"}
    with (
        ThreadPoolExecutor(150) as pool,
        httpx.Client(base_url=f"{site.url}/v1", headers=key, limits=limits, timeout=60) as client,
    ):
        asking = [pool.submit(words, site, text, client) for text in texts]
        eventually(lambda: site.state()["health"]["jobs"]["inProgress"] == 150)
        answers = [one.result(60) for one in asking]
    assert answers == [[*text.split(), "[DONE]"] for text in texts]
    assert {tuple(task["answers"]) for task in site.ended(150)} == {(200,)}


def test_heartbeats_keep_the_lease_of_a_task_that_lasts(start: Start) -> None:
    site = start({"PAUSE_S": "0.5"}, lostAfter=2, heartbeatInterval=1)
    site.idle_worker()
    assert len(words(site, "a b c d e f g h i j")) == 11
    assert site.ended()[0]["retries"] == 0


# The SDK as it is, in its proxy mode: where its interface has changed


def test_where_the_sdks_interface_has_changed_its_proxy_mode_serves(start: Start) -> None:
    site = start({"LOOP": "stock", "PAUSE_S": "0.2"})
    worker = site.idle_worker()
    assert site.openai.post("/chat/completions", json=site.chat("a b")).json() == {"said": "a b"}
    assert site.openai.post("/load_lora_adapter", json={}).status_code == 403
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(words, site, f"{number} a b c d e") for number in range(4)]
        eventually(lambda: site.state()["health"]["jobs"]["inProgress"] == 4)
        os.kill(worker["pid"], signal.SIGTERM)
        answers = [stream.result(60) for stream in streams]
    assert answers == [[str(number), *"abcde", "[DONE]"] for number in range(4)]
    assert exited(site)[0] == 0
    assert any("Using the SDK's proxy mode" in line for line in site.log())


def test_a_dead_engine_ends_the_proxy_mode_with_1(start: Start) -> None:
    site = start({"LOOP": "stock", "FAILS_AFTER_S": "1"})
    assert exited(site)[0] == 1
