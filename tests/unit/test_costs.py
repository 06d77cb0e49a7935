"""Regression limits for the costs of a job: deliveries and events per token, memory per stream, imports.

They count instead of timing, so that the load of the machine does not matter. If you change a limit on purpose, say why
in docs/performance.md.
"""

from __future__ import annotations

import subprocess
import sys
import tracemalloc

from engine.backend.stream_interval import StreamInterval
from engine.jobs import pipeline
from engine.queue.delivery import JobDelivery
from engine.queue.protocol import PostKind
from tests.scripted import ScriptedApp, chat_chunks
from tests.virtual_time import in_virtual_time

TOKENS = 64
STEP_S = 0.009
# Modules that `import handler` loads, including Python's own. Each process that vLLM spawns imports them again.
MAX_HANDLER_MODULES = 150


class PostCounter:
    """Implements `JobQueue.post` and counts."""

    def __init__(self) -> None:
        self.outputs = 0
        self.posted_bytes = 0

    async def post(self, kind: PostKind, job_id: str, body: bytes) -> None:
        del job_id
        self.outputs += kind is PostKind.OUTPUT
        self.posted_bytes += len(body)


async def deliver(app: ScriptedApp, posts: PostCounter) -> None:
    """Run one streamed chat, from its input to its result."""
    delivery = JobDelivery(posts.post, "1", float("inf"))
    job = {"id": "1", "input": {"openai_route": "/v1/chat/completions", "openai_input": {"stream": True}}}
    async for output in pipeline.run(job, app):
        await delivery.stream(output)
    await delivery.finish()


def app_with(events: int, pause_s: float, streams: int = 1) -> ScriptedApp:
    """Return an app that answers with one event per token, on a worker that runs `streams` streams."""
    return ScriptedApp(
        chat_chunks(*["token "] * events),
        content_type="text/event-stream",
        pause_s=pause_s,
        batch_interval_s=StreamInterval().seconds(streams),
    )


@in_virtual_time
async def test_twenty_four_streams_need_at_most_a_delivery_for_five_tokens() -> None:
    posts = PostCounter()

    await deliver(app_with(TOKENS, STEP_S, 24), posts)

    assert posts.outputs / TOKENS <= 0.21


def test_twenty_four_streams_have_at_most_an_event_for_five_tokens() -> None:
    tokens = StreamInterval().tokens(24, STEP_S)

    assert (1 + -(-(TOKENS - 1) // tokens)) / TOKENS <= 0.21


@in_virtual_time
async def test_a_stream_needs_less_than_four_times_its_size_in_memory() -> None:
    """Measured: 3.6 times, for the outputs and for the result as text and as bytes."""
    app, posts = app_with(4000, 0.001), PostCounter()
    await deliver(app_with(1, 0.1), PostCounter())
    tracemalloc.start()
    try:
        await deliver(app, posts)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    stream_bytes = sum(map(len, app.body))
    assert posts.posted_bytes > 2 * stream_bytes
    assert peak_bytes < 4 * stream_bytes, peak_bytes / stream_bytes


def test_the_handler_imports_hardly_anything() -> None:
    program = "import handler, sys; print(len(sys.modules)); print(*sorted(n for n in sys.modules if '.' not in n))"
    output = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True, timeout=60).stdout

    count, names = output.decode().splitlines()
    assert not {"vllm", "torch", "runpod", "pydantic", "transformers", "aiohttp"} & set(names.split())
    assert int(count) <= MAX_HANDLER_MODULES, count
