"""Runs one job, from its input to its last output: `inputs`, `asgi`, `event_batcher`, `deltas`."""

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

from engine.backend.app import App
from engine.backend.files import Files
from engine.errors import EngineResponseError, InternalError, InvalidInputError, JobError, WorkerShutdownError
from engine.jobs import asgi, deltas, inputs, multipart
from engine.jobs.cost_report import CostReport
from engine.jobs.event_batcher import MAX_OUTPUT_BYTES, EventBatcher
from engine.jobs.proxied import AnswerStart
from engine.jobs.request import Request
from engine.json_codec import decode, encode
from engine.telemetry.job_times import CURRENT, RequestStats

_log = logging.getLogger(__name__)


class Engine(Protocol):
    """What a job needs of the engine. `VLLMEngine` implements it; in tests, any ASGI app can replace it."""

    @property
    def max_model_len(self) -> int:
        """Maximum tokens of prompt and output together."""

    @property
    def batch_interval_s(self) -> float:
        """Minimum time between two outputs of a stream at the present load, in seconds."""

    @property
    def open_routes(self) -> frozenset[str]:
        """The routes that clients may call."""

    @property
    def files(self) -> Files:
        """Reads the files that jobs name."""

    def event_tokens(self, path: str) -> int | None:
        """Return how many tokens vLLM should put into an event of a stream of plain text that starts now on this route.

        None where each token must be an event of its own.
        """

    def has_route(self, path: str) -> bool:
        """Return whether the app has a route of this path; called once the app is made."""

    def failure(self) -> str | None:
        """Return what is wrong with the engine for good, or None."""

    def pop_request_stats(self, job_id: str) -> list[RequestStats]:
        """Return and forget what vLLM says of a job's requests that have finished."""

    async def app(self) -> App:
        """Return vLLM's OpenAI app."""


async def run(job: dict[str, Any], engine: Engine) -> AsyncGenerator[Any, None]:
    """Run a job and yield its outputs, ready for JSON.

    A streamed OpenAI job yields SSE text in runs of complete events; a streamed top-level job yields dicts
    (`engine.jobs.deltas`); a proxied job yields the answer as it is (`engine.jobs.proxied`), also if it is an error of
    the app; any other job yields one output. A job that fails yields `{"error": JSON text}` last
    (`engine.errors`), after its request has ended in the engine: the SDK reads nothing more after an error. Closing the
    generator aborts the request in the engine.

    Args:
        job: as it was taken: `{"id": ..., "input": {...}}`.
        engine: runs it.
    """
    failure: JobError | None
    try:
        app = await engine.app()
        request = inputs.parse(job, engine.max_model_len, engine.open_routes, engine.event_tokens, engine.has_route)
        for warning in request.warnings:
            _log.warning("Job %s: %s", job.get("id"), warning)
        costs = CostReport(str(job.get("id", "")), request, engine.pop_request_stats)
        request = await multipart.with_form(request, engine.files)
        async with asgi.stream(app, request, str(job.get("id", ""))) as response:
            if (times := CURRENT.get()) is not None:
                times.is_stream = response.content_type == "text/event-stream"
            answer = _answer(response, costs) if request.proxied else _outputs(response, engine, request, costs)
            async with aclosing(answer) as outputs:
                async for output in outputs:
                    yield output
    except JobError as error:
        failure = error
    except Exception:  # noqa: BLE001 (whatever it is, it ends this job and no other)
        _log.exception("Job %s failed in the worker", job.get("id"))
        failure = InternalError("internal worker error; see the worker's log")
    else:
        failure = None
    if (reason := engine.failure()) is not None:
        # Whatever the app made of it: vLLM ends streams with an error event then, as if the job were complete.
        failure = WorkerShutdownError(f"the worker has failed: {reason}")
    if failure is not None:
        yield failure.output()


@asynccontextmanager
async def aclosing_on_task_exit(outputs: AsyncGenerator[Any, None]) -> AsyncIterator[None]:
    """Close the generator at the end of the block or of the task that consumes it, whichever comes first.

    The consumer in the SDK's own loop is cancelled during a delivery and does not close its generator. Left to the
    garbage collector, the request would go on in the engine while a traceback keeps the consumer's frame alive.
    """
    loop = asyncio.get_running_loop()
    closings: set[asyncio.Task[None]] = set()

    def close(_: asyncio.Task[Any]) -> None:
        closings.add(loop.create_task(outputs.aclose()))

    consumer = asyncio.current_task()
    if consumer is None:
        raise RuntimeError("a job must run in a task")
    consumer.add_done_callback(close)
    try:
        yield
    finally:
        consumer.remove_done_callback(close)
        await (asyncio.wait(closings) if closings else outputs.aclose())


async def _answer(response: asgi.Response, costs: CostReport) -> AsyncGenerator[AnswerStart | bytes, None]:
    """Yield the app's answer: each event as soon as the app sends it."""
    yield AnswerStart(response.status, response.content_type_header)
    if costs.wanted and response.content_type == "application/json":
        yield encode(await costs.added_to(decode(await response.body())))
        return
    async for chunk in response.chunks():
        yield await costs.added_to_stream(chunk) if costs.wanted else chunk


async def _outputs(
    response: asgi.Response, engine: Engine, request: Request, costs: CostReport
) -> AsyncGenerator[Any, None]:
    """Yield the outputs of a job that is no proxied request.

    Raises:
        EngineResponseError: the app answered with an error, or the stream ended with one.
    """
    await _check(response)
    if response.content_type == "text/event-stream":
        async with aclosing(_stream(response, engine, request, costs)) as outputs:
            async for output in outputs:
                yield output
    else:
        document = await costs.added_to(_document(response.content_type, await response.body(), request.path))
        yield deltas.add_worker_vllm_fields(document, request.warnings) if request.native else document


async def _stream(
    response: asgi.Response, engine: Engine, request: Request, costs: CostReport
) -> AsyncGenerator[str | deltas.Delta, None]:
    """Yield the outputs of a streamed job.

    Raises:
        EngineResponseError: the stream ended with an error of the engine. The outputs of an OpenAI job include the
            error event: its client reads the stream, and would wait for the end of one that just stops.
    """
    error: JobError | None = None
    warnings = list(request.warnings)
    async with aclosing(_batches(response, engine, costs, native=request.native)) as batches:
        async for batch in batches:
            if request.native:
                for delta in deltas.from_events(batch):
                    if warnings:
                        delta["warnings"], warnings = warnings, []
                    for part in deltas.split(delta, MAX_OUTPUT_BYTES):
                        yield part
            else:
                error = error or deltas.error_in(batch)
                yield batch
    if error is not None:
        raise error
    if request.native and costs.wanted:
        yield await costs.added_to({})


async def _batches(
    response: asgi.Response, engine: Engine, costs: CostReport, *, native: bool
) -> AsyncGenerator[str, None]:
    """Yield a streamed body in batches: the first one at once, then one per `batch_interval_s`.

    What arrives while the consumer delivers a batch, or during the interval, is one batch.
    """
    batcher = EventBatcher(cut=not native)
    async for chunk in response.chunks():
        begun = time.monotonic()
        events = await costs.added_to_stream(chunk) if costs.wanted and not native else chunk
        for batch in batcher.feed(events):
            yield batch
        await response.wait_complete(engine.batch_interval_s - (time.monotonic() - begun))
    for batch in batcher.finish():
        yield batch


def _document(content_type: str, body: bytes, path: str) -> Any:
    if not body:
        return ""
    if content_type == "application/json":
        return decode(body)
    if content_type.startswith("text/"):
        return body.decode(errors="strict")
    raise InvalidInputError(f"{path} answers with {content_type}, but a job's output is JSON or text")


async def _check(response: asgi.Response) -> None:
    """Raise the engine's error response; if it has no error body, as a router's "Not Found", it gets one."""
    status = response.status
    if status < HTTPStatus.MULTIPLE_CHOICES:
        return
    body = await response.body()
    try:
        document = json.loads(body)
    except ValueError:
        document = body.decode(errors="replace")
    if isinstance(document, dict) and "error" in document:
        raise EngineResponseError(status, document)
    phrase = http.client.responses.get(status, f"Status {status}")
    message = str(document.get("detail", document) if isinstance(document, dict) else document) or phrase
    raise EngineResponseError(status, {"error": {"message": message, "type": phrase, "param": None, "code": status}})
