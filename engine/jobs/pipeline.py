"""One job, from its input to its last output: payloads, dispatch, batching."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from http import HTTPStatus
from typing import Any, Protocol

from engine.errors import InternalError, InvalidInputError, JobError, RefusedError, StoppedError
from engine.jobs import asgi, deltas, inputs
from engine.jobs.event_batcher import MAX_OUTPUT_BYTES, EventBatcher
from engine.json_codec import decode

_log = logging.getLogger(__name__)


class Engine(Protocol):
    """What a job needs of the engine; `engine.backend.vllm_engine.Server` has it, and any ASGI app can stand in."""

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together."""

    @property
    def batch_interval_s(self) -> float:
        """Least time between two outputs of a stream as things are, in seconds."""

    @property
    def open_routes(self) -> frozenset[str]:
        """The routes that a job may call."""

    def event_tokens(self, path: str) -> int | None:
        """How many tokens an event should hold, in a stream of plain text that begins now on this route.

        None where each token has to be an event of its own.
        """

    def has_route(self, path: str) -> bool:
        """Whether the app has a route of this path; asked once the app is made."""

    def failure(self) -> str | None:
        """What is wrong with the engine for good, if something is."""

    async def app(self) -> asgi.App:
        """VLLM's OpenAI app, or another."""


async def run(job: dict[str, Any], engine: Engine) -> AsyncGenerator[Any, None]:
    """Run a job; yield its outputs, ready for JSON.

    A streamed OpenAI job yields SSE text, whole events at a time; a streamed top-level job yields dicts
    (`engine.jobs.deltas`); anything else is yielded once. A job that fails yields `{"error": JSON text}` last
    (`engine.errors`), when the engine has let go of it already: the SDK asks for nothing more after an error.
    Closing the generator ends the request in the engine.

    Args:
        job: what the queue gave: `{"id": ..., "input": {...}}`.
        engine: what answers it.
    """
    failure: JobError | None
    try:
        app = await engine.app()
        request = inputs.parse(job, engine.max_model_len, engine.open_routes, engine.event_tokens, engine.has_route)
        for warning in request.warnings:
            _log.warning("Job %s: %s", job.get("id"), warning)
        async with asgi.call(app, request, str(job.get("id", ""))) as response:
            await _check(response)
            if response.content_type == "text/event-stream":
                async with aclosing(_stream(response, engine, request)) as outputs:
                    async for output in outputs:
                        yield output
            else:
                document = _document(response.content_type, await response.body(), request.path)
                yield deltas.answer(document, request.warnings) if request.native else document
    except JobError as error:
        failure = error
    except Exception:  # noqa: BLE001 (whatever it is, it ends this job and no other)
        _log.exception("Job %s failed in the worker", job.get("id"))
        failure = InternalError("the worker failed; its log says why")
    else:
        failure = None
    if (reason := engine.failure()) is not None:
        # Whatever the app made of it: vLLM ends streams with an error event then, which looks like a job that is done.
        failure = StoppedError(f"the worker has failed: {reason}")
    if failure is not None:
        yield failure.output()


@asynccontextmanager
async def closing_with_consumer(outputs: AsyncGenerator[Any, None]) -> AsyncIterator[None]:
    """Close the generator with the block, or with the task that consumes it, whichever ends first.

    The stock loop's consumer is cancelled in the middle of a delivery and does not close its generator. Left to the
    garbage collector, the request would run on in the engine for as long as a traceback holds the consumer's frame.
    """
    loop = asyncio.get_running_loop()
    closings: set[asyncio.Task[None]] = set()

    def close(_: asyncio.Task[Any]) -> None:
        closings.add(loop.create_task(outputs.aclose()))

    consumer = asyncio.current_task()
    if consumer is None:
        raise RuntimeError("a job has to be run by a task")
    consumer.add_done_callback(close)
    try:
        yield
    finally:
        consumer.remove_done_callback(close)
        await (asyncio.wait(closings) if closings else outputs.aclose())


async def _stream(
    response: asgi.Response, engine: Engine, request: inputs.Request
) -> AsyncGenerator[str | deltas.Delta, None]:
    """The outputs of a streamed job.

    Raises:
        RefusedError: the stream has ended with an error of the engine's. An OpenAI job has given the whole of it, the
            error too: its client reads the stream, and would wait for the end of one that just stops.
    """
    error: JobError | None = None
    async with aclosing(_batches(response, engine, cut=not request.native)) as batches:
        async for batch in batches:
            if request.native:
                for delta in deltas.deltas(batch, request.warnings):
                    for part in deltas.split(delta, MAX_OUTPUT_BYTES):
                        yield part
            else:
                error = error or deltas.error_in(batch)
                yield batch
    if error is not None:
        raise error


async def _batches(response: asgi.Response, engine: Engine, *, cut: bool) -> AsyncGenerator[str, None]:
    """The batches of a streamed body: the first as soon as it is there, then no two within `batch_interval_s`.

    What comes in while the consumer is busy with a batch, or during the interval, leaves together.
    """
    batcher = EventBatcher(cut=cut)
    async for chunk in response.chunks():
        begun = time.monotonic()
        for batch in batcher.feed(chunk):
            yield batch
        await response.ended(within_s=engine.batch_interval_s - (time.monotonic() - begun))
    for batch in batcher.finish():
        yield batch


def _document(content_type: str, body: bytes, path: str) -> Any:
    if not body:
        return ""
    if content_type == "application/json":
        return decode(body)
    if content_type.startswith("text/"):
        return body.decode(errors="strict")
    raise InvalidInputError(f"{path} answers with {content_type}, which is not JSON or text and so no job output")


async def _check(response: asgi.Response) -> None:
    """Raise the engine's error answer; one that is no error body, as a router's "Not Found", is put into one."""
    status = response.status
    if status < HTTPStatus.MULTIPLE_CHOICES:
        return
    body = await response.body()
    try:
        document = json.loads(body)
    except ValueError:
        document = body.decode(errors="replace")
    if isinstance(document, dict) and "error" in document:
        raise RefusedError(status, document)
    phrase = http.client.responses.get(status, f"Status {status}")
    message = str(document.get("detail", document) if isinstance(document, dict) else document) or phrase
    raise RefusedError(status, {"error": {"message": message, "type": phrase, "param": None, "code": status}})
