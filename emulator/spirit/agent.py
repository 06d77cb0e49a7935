"""The six calls of a worker to the agent beside it, as the SDK makes them (`manager.py`, `heartbeat.py`).

There is no authentication: the port says which worker it is.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from emulator.api.auth import context_of
from emulator.api.bodies import JSONResponse, describe_validation_error, parse_json, read_body
from emulator.api.fault_middleware import drop_connection
from emulator.api.ports import Ports
from emulator.core.faults import FaultKind, FaultRule, FaultTiming
from emulator.core.long_poll import client_disconnect, is_disconnected
from emulator.core.worker import TAKING_STATES
from emulator.errors import BadRequestError, ContentTooLargeError, NotFoundError
from emulator.integers import parse_integer
from emulator.spirit.endpoint import SpiritEndpoint
from emulator.spirit.relay import ClientGoneError, Head, Relay
from emulator.spirit.task import Task, TaskStatus
from emulator.spirit.task_queue import TASKS_QUEUED_TOPIC

Model = TypeVar("Model", bound=BaseModel)
# More than the base64 of any result.
_MAX_BODY_BYTES: Final = 100 * 1024 * 1024
_UNHEALTHY: Final = {"X-Agent-Health": "false"}
# Of the worker's POST, these are not headers of the answer.
_NOT_RELAYED: Final = frozenset(
    {b"host", b"user-agent", b"connection", b"proxy-connection", b"keep-alive", b"te", b"trailer", b"upgrade"}
    | {b"transfer-encoding", b"proxy-authenticate", b"proxy-authorization", b"expect"}
)


class Metric(BaseModel):
    """What is read of a metric (the SDK's `RequestStatus`)."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    status: TaskStatus
    message: str = ""


class Result(BaseModel):
    """What a handler's worker posts as its result; `data` is base64."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    statusCode: int  # noqa: N815 (the platform's name)
    message: str = ""
    data: str = ""


class Heartbeat(BaseModel):
    """The tasks that a worker runs."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    requestIDs: list[str]  # noqa: N815 (the platform's name)


async def take(request: Request) -> Response:
    """GET request: one task, or 404 if none waits."""
    endpoint, worker_id = _agent_of(request)
    worker = endpoint.fleet.on_poll(worker_id)
    was_stopping = endpoint.fleet.is_stopping(worker_id)
    rules: list[FaultRule] = request.state.faults
    unhealthy = [rule for rule in rules if rule.kind is FaultKind.UNHEALTHY]
    if any(rule.when is FaultTiming.BEFORE for rule in unhealthy):
        return JSONResponse({"error": "no task"}, HTTPStatus.NOT_FOUND, _UNHEALTHY)

    def poll() -> list[Task] | None:
        if worker.state not in TAKING_STATES:
            return [] if not was_stopping and endpoint.fleet.is_stopping(worker_id) else None
        if is_disconnected(request.state.transport):
            return []  # The answer could not be sent, even if uvicorn has not reported the disconnect yet.
        task = endpoint.duplicates.pop() if endpoint.duplicates else endpoint.queue.take(worker_id)
        return None if task is None else [task]

    async with client_disconnect(request.receive) as disconnect:
        hold_s = endpoint.settings.long_poll_s
        taken = await endpoint.long_poll.wait_for(TASKS_QUEUED_TOPIC, poll, hold_s, disconnect)
    headers = _UNHEALTHY if unhealthy else {}
    if not taken:
        return JSONResponse({"error": "no task"}, HTTPStatus.NOT_FOUND, headers)
    worker.jobs_taken += 1
    if any(rule.kind is FaultKind.DUPLICATE for rule in rules):
        endpoint.duplicates += taken
        endpoint.long_poll.notify(TASKS_QUEUED_TOPIC)
    return JSONResponse(_altered(taken[0].worker_document(), rules), headers=headers)


def _altered(document: dict[str, Any], rules: Iterable[FaultRule]) -> dict[str, Any]:
    """Return a task with the headers and the body of the rules that alter it."""
    for rule in rules:
        headers = {**document["headers"], **rule.headers}
        document["headers"] = {name: value for name, value in headers.items() if value is not None}
        if rule.body is not None:
            document["body"] = rule.body
    return document


async def acknowledge(request: Request) -> Response:
    """POST request-ack: the worker has done with a task, whatever came of it."""
    endpoint, _ = _agent_of(request)
    endpoint.queue.ack(request.path_params["task"])
    return JSONResponse({})


async def metric(request: Request) -> Response:
    """POST request-metric: a task's state."""
    endpoint, _ = _agent_of(request)
    update = await _read(request, Metric)
    endpoint.queue.metric(request.path_params["task"], update.status, update.message)
    return JSONResponse({})


async def heartbeat(request: Request) -> Response:
    """POST heartbeat: the tasks that the worker runs, whose lease it extends."""
    endpoint, worker = _agent_of(request)
    update = await _read(request, Heartbeat)
    endpoint.fleet.touch(worker)
    endpoint.queue.heartbeat(worker, update.requestIDs)
    return JSONResponse({})


async def result(request: Request) -> Response:
    """POST request-result: a handler's result. One above the limit can be had by webhook only."""
    endpoint, worker = _agent_of(request)
    update = await _read(request, Result)
    try:
        data = base64.b64decode(update.data, validate=True)
    except binascii.Error:
        raise BadRequestError("data is not base64") from None
    task = endpoint.queue.begin_answer(worker, request.path_params["task"], "request-result", update.statusCode)
    if task is not None:
        settings = endpoint.settings
        limit = settings.max_sync_result_bytes if task.mode == "sync" else settings.max_async_result_bytes
        too_large = f"the result exceeds {limit} bytes" if len(data) > limit else ""
        endpoint.queue.set_result(task, too_large or update.message, None if too_large else data)
    return JSONResponse({})


async def proxy(request: Request) -> Response:
    """POST request-proxy: the answer to a proxied request, whose body is passed on to the client piece by piece."""
    endpoint, worker = _agent_of(request)
    status = parse_integer(request.query_params.get("statusCode", ""))
    if status is None or not HTTPStatus.OK <= status < 600:  # noqa: PLR2004 (the last status)
        raise BadRequestError("statusCode: expected the status of an answer")
    task_id = request.path_params["task"]
    task = endpoint.queue.begin_answer(worker, task_id, "request-proxy", status)
    relay = endpoint.relays.get(task_id)
    if task is None or relay is None:
        if task is not None:
            return await _client_gone(request, endpoint)
        async for _ in request.stream():
            pass
        return JSONResponse({})
    relay.begin(Head(status, _relayed_headers(request)))
    try:
        await _relay_body(request, endpoint, task, relay)
    except ClientGoneError:
        return await _client_gone(request, endpoint)
    except ClientDisconnect:
        await relay.break_off()
        raise
    return JSONResponse({})


async def _relay_body(request: Request, endpoint: SpiritEndpoint, task: Task, relay: Relay) -> None:
    """Pass the body on.

    Raises:
        ClientGoneError: nobody reads it any more.
        ClientDisconnect: the worker closed the connection before its end.
    """
    more_body = True
    while more_body:
        message = await relay.unless_gone(request.receive())
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        more_body = message.get("more_body", False)
        if message.get("body"):
            endpoint.queue.add_output(task)
            await relay.send(message["body"])
    await relay.send(None)


async def _client_gone(request: Request, endpoint: SpiritEndpoint) -> Response:
    """Tell the worker that nobody reads its answer: by an early answer, or by closing the connection."""
    if not endpoint.settings.answer_early:
        await drop_connection(request.scope, request.receive)
    return JSONResponse({}, headers={"Connection": "close"})


def _relayed_headers(request: Request) -> list[tuple[bytes, bytes]]:
    headers = [(name.lower(), value) for name, value in request.headers.raw]
    return [(name, value) for name, value in headers if name not in _NOT_RELAYED and not name.startswith(b"accept")]


def _agent_of(request: Request) -> tuple[SpiritEndpoint, str]:
    """Return the endpoint and the worker of the agent that was asked.

    Raises:
        NotFoundError: the worker has exited.
    """
    agents: Ports = request.app.state.agents
    name, worker = agents.owner(request.scope["server"][1])
    endpoint = context_of(request).endpoints.get(name)
    if not isinstance(endpoint, SpiritEndpoint):
        raise NotFoundError("the worker of this agent has exited")
    return endpoint, worker


async def _read(request: Request, model: type[Model]) -> Model:
    """Return the body, which the SDK sends as JSON with any content type.

    Raises:
        BadRequestError: it is invalid.
    """
    try:
        return model.model_validate(parse_json(await read_body(request, _MAX_BODY_BYTES), allow_nan=True))
    except ContentTooLargeError as error:
        raise BadRequestError(str(error)) from None
    except ValidationError as error:
        raise BadRequestError(describe_validation_error(error)) from None


_ROOT: Final = "/apis/v1"

routes = [
    Route(_ROOT + "/request-proxy/{task}", proxy, methods=["POST"]),
    Route(_ROOT + "/request", take),
    Route(_ROOT + "/request-metric/{task}", metric, methods=["POST"]),
    Route(_ROOT + "/request-ack/{task}", acknowledge, methods=["POST"]),
    Route(_ROOT + "/request-result/{task}", result, methods=["POST"]),
    Route(_ROOT + "/heartbeat", heartbeat, methods=["POST"]),
]
