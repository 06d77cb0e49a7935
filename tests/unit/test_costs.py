"""The regression gate: what a job and a token cost, counted and not timed, so that no machine's mood decides.

The bounds are what was counted when they were set, and a tenth more. Set one that is broken on purpose anew, and say
why in docs/performance.md.
"""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import FrameType
from typing import Any

from engine.backend.stream_interval import interval_s, interval_tokens
from engine.jobs import pipeline
from engine.queue.delivery import JobDelivery
from engine.queue.protocol import PostKind
from tests import virtual_time
from tests.scripted import ScriptedApp, chat_chunks

ENGINE = str(Path(pipeline.__file__).parents[1])
TOKENS = 64
STEP_S = 0.009
# There were 139 for a job with one event, and 21 for each event more.
CALLS_PER_JOB = 150
CALLS_PER_EVENT = 22
# Modules that `import handler` loads, Python's own among them; what vLLM spawns pays for each of them.
HANDLER_MODULES = 150


class Posts:
    """A platform that takes everything at once."""

    def __init__(self) -> None:
        self.streamed = 0
        self.posted_bytes = 0

    async def post(self, kind: PostKind, job_id: str, body: bytes) -> None:
        del job_id
        self.streamed += kind is PostKind.OUTPUT
        self.posted_bytes += len(body)


async def deliver(app: ScriptedApp, posts: Posts) -> None:
    """One streamed chat, from its input to its result."""
    delivery = JobDelivery(posts.post, "1", float("inf"))
    job = {"id": "1", "input": {"openai_route": "/v1/chat/completions", "openai_input": {"stream": True}}}
    async for output in pipeline.run(job, app):
        await delivery.stream(output)
    await delivery.finish()


def script(events: int, pause_s: float, streams: int = 1) -> ScriptedApp:
    """An answer of so many tokens, an event each, on a worker that runs so many streams."""
    return ScriptedApp(
        chat_chunks(*["token "] * events),
        content_type="text/event-stream",
        pause_s=pause_s,
        batch_interval_s=interval_s(0.02, streams),
    )


def calls(events: int) -> int:
    """Calls of the worker's own functions for a job of so many tokens, one at a time; a coroutine's turns count."""
    counted = 0

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal counted
        counted += event == "call" and frame.f_code.co_filename.startswith(ENGINE)

    with virtual_time.runner() as runner:
        runner.run(deliver(script(1, 0.1), Posts()))  # What is done once a process is not what is counted.
        sys.setprofile(count)
        try:
            runner.run(deliver(script(events, 0.1), Posts()))
        finally:
            sys.setprofile(None)
    return counted


def test_a_job_and_its_events_take_no_more_calls_than_they_did() -> None:
    one, many = calls(1), calls(1001)

    assert one <= CALLS_PER_JOB, one
    assert (many - one) / 1000 <= CALLS_PER_EVENT, (many - one) / 1000


def test_twenty_four_streams_need_at_most_eight_deliveries_for_a_hundred_tokens() -> None:
    posts = Posts()
    with virtual_time.runner() as runner:
        runner.run(deliver(script(TOKENS, STEP_S, 24), posts))

    assert posts.streamed / TOKENS <= 0.08


def test_twenty_four_streams_have_at_most_eight_events_for_a_hundred_tokens() -> None:
    tokens = interval_tokens(0.02, 24, STEP_S)

    assert (1 + -(-(TOKENS - 1) // tokens)) / TOKENS <= 0.08


def test_a_stream_is_held_as_its_outputs_and_while_it_is_posted_as_the_result() -> None:
    """3.6 times when it was counted: the outputs, and the result as text and as bytes."""
    app, posts = script(4000, 0.001), Posts()
    with virtual_time.runner() as runner:
        runner.run(deliver(script(1, 0.1), Posts()))
        tracemalloc.start()
        try:
            runner.run(deliver(app, posts))
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

    stream_bytes = sum(map(len, app.body))
    assert posts.posted_bytes > 2 * stream_bytes
    assert peak_bytes < 4 * stream_bytes, peak_bytes / stream_bytes


def test_the_handler_imports_next_to_nothing() -> None:
    program = "import handler, sys; print(len(sys.modules)); print(*sorted(n for n in sys.modules if '.' not in n))"
    output = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True, timeout=60).stdout

    count, names = output.decode().splitlines()
    assert not {"vllm", "torch", "runpod", "pydantic", "transformers", "aiohttp"} & set(names.split())
    assert int(count) <= HANDLER_MODULES, count
