"""An open-loop load: streamed chats at a fixed pace, whether or not the earlier ones have ended.

    python -m tests.open_loop URL PER_SECOND     # RUNPOD_API_KEY is in the environment

loads until SIGTERM; then it prints how many were answered in full, and what went wrong with the others.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import httpx

PROMPT = "one two three four five six seven eight"


class Load:
    """The chats that were sent so far; each answer is a text, or raises what went wrong."""

    def __init__(self) -> None:
        self.answers: list[Future[str]] = []

    def texts(self) -> set[str]:
        """Return the answers, when all have ended."""
        return {answer.result().strip() for answer in self.answers}


def _ask(client: httpx.Client, url: str) -> str:
    body = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "stream": True}
    with client.stream("POST", f"{url}/chat/completions", json=body) as response:
        if response.is_error:
            response.read()
            raise RuntimeError(f"{response.status_code}: {response.text}")
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    if events[-1:] != ["[DONE]"]:
        raise RuntimeError(f"the stream ends with {events[-1:]}")
    return "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1])


@contextmanager
def open_loop(url: str, key: str, per_second: float) -> Iterator[Load]:
    """Load the OpenAI API at `url` during the block; at its end, wait for all answers."""
    load, stop = Load(), threading.Event()
    headers = {"Authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(headers=headers, timeout=120, limits=limits) as client, ThreadPoolExecutor(256) as pool:

        def send() -> None:
            while not stop.wait(1 / per_second):
                load.answers.append(pool.submit(_ask, client, url))

        sender = threading.Thread(target=send)
        sender.start()
        try:
            yield load
        finally:
            stop.set()
            sender.join()


def main() -> int:
    """Load until SIGTERM; return 1 if a request failed."""
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    with open_loop(sys.argv[1], os.environ["RUNPOD_API_KEY"], float(sys.argv[2])) as load:
        stopped.wait()
    errors = [str(error) for answer in load.answers if (error := answer.exception())]
    sys.stdout.write(f"{len(load.answers)} requests, {len(load.answers) - len(errors)} answered in full\n")
    sys.stdout.writelines(f"{error}\n" for error in errors[:5])
    return bool(errors)


if __name__ == "__main__":
    sys.exit(main())
