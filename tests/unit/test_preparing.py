"""Short requests are prepared in place, long ones in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import pytest

from engine.dispatch import Message, Receive, Send
from engine.preparing import SHORT_BYTES, InPlace, telling_short_ones

pytestmark = pytest.mark.anyio


@pytest.fixture
def executor() -> Iterator[InPlace]:
    executor = InPlace(ThreadPoolExecutor(1))
    yield executor
    executor.shutdown()


class App:
    """Prepares each request with the executor, as vLLM does, and writes down in which threads."""

    def __init__(self, executor: InPlace) -> None:
        self.threads: dict[str, int] = {}
        self._executor = executor

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        del receive, send
        loop = asyncio.get_running_loop()
        self.threads[scope["path"]] = await loop.run_in_executor(self._executor, threading.get_ident)


async def receive() -> NoReturn:
    raise AssertionError("the body is not needed")


async def send(_: Message) -> NoReturn:
    raise AssertionError("there is no answer")


def request(path: str, length: bytes | None) -> Message:
    headers = [(b"host", b"worker")] + ([(b"content-length", length)] if length is not None else [])
    return {"path": path, "headers": headers}


async def test_each_request_is_prepared_where_its_length_says(executor: InPlace) -> None:
    app = App(executor)
    lengths = {
        "short": b"%d" % SHORT_BYTES,
        "long": b"%d" % (SHORT_BYTES + 1),
        "short again": b"0",
        "unknown": None,
        "odd": "²".encode(),
    }

    # In one task, so that one request's length would show in the next one.
    for path, length in lengths.items():
        await telling_short_ones(app)(request(path, length), receive, send)

    here = threading.get_ident()
    assert [path for path, thread in app.threads.items() if thread == here] == ["short", "short again"]
    assert app.threads.keys() == lengths.keys()


async def test_requests_side_by_side_do_not_mix_their_lengths(executor: InPlace) -> None:
    app = App(executor)
    told = telling_short_ones(app)
    paths = {f"{number}": b"1" if number % 2 else b"999999" for number in range(20)}

    await asyncio.gather(*(told(request(path, length), receive, send) for path, length in paths.items()))

    here = threading.get_ident()
    assert {path for path, thread in app.threads.items() if thread == here} == {str(n) for n in range(1, 20, 2)}


async def test_an_error_is_raised_where_the_result_is_asked_for(executor: InPlace) -> None:
    failures: list[Exception] = []

    def fail() -> None:
        raise ValueError("no such template")

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        del scope, receive, send
        future = executor.submit(fail)
        with pytest.raises(ValueError, match="no such template") as raised:
            future.result()
        failures.append(raised.value)

    await telling_short_ones(app)(request("/", b"10"), receive, send)

    assert failures


async def test_what_is_no_request_is_left_to_the_threads(executor: InPlace) -> None:
    future = executor.submit(threading.get_ident)
    assert await asyncio.wrap_future(future) != threading.get_ident()
