"""Requests to an endpoint itself: a first short one of the model's kind, streamed, and the worker's own cold start.

A queue is asked by a job, so that no connection has to last as long as a cold start. A load balancer is asked for the
worker's health until one is ready.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httpx

from deploy.errors import RefusedError, UnreachableError, WorkerError
from deploy.options import LOAD_BALANCER
from runpod_api.models import Endpoint, LoadBalancingRequestUrls, QueueBasedRequestUrls

_POLL_S = 0.25
_PATIENCE_S = 60.0
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")
# What a model without this kind of request answers: the next kind is tried.
_OTHER_KIND = (HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED)
# What a load balancer or its worker answers while other requests take all room, or between two workers.
_BUSY = (
    HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT
)  # fmt: skip
_TOKENS = 32
_TEXT = "Hello!"


@dataclass(frozen=True)
class Kind:
    """A kind of request: its route and body."""

    name: str
    route: str
    body: dict[str, Any]

    @property
    def streams(self) -> bool:
        """Whether the answer is streamed."""
        return bool(self.body.get("stream"))


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "chat",
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": _TEXT}], "max_tokens": _TOKENS, "temperature": 0, "stream": True},
        ),
        Kind(
            "completion", "/v1/completions", {"prompt": _TEXT, "max_tokens": _TOKENS, "temperature": 0, "stream": True}
        ),
        Kind("embedding", "/v1/embeddings", {"input": _TEXT}),
    )
}


@dataclass
class Answer:
    """The answer to the first request: its kind, its text, and the seconds until its first token."""

    kind: Kind
    text: str = ""
    first_token_s: float | None = None


class _OtherKindError(Exception):
    """The model does not answer this kind of request."""


class Site:
    """An endpoint, as its clients see it.

    Args:
        client: with the key.
        endpoint: as the API describes it.
    """

    def __init__(self, client: httpx.AsyncClient, endpoint: Endpoint) -> None:
        self._client = client
        self._job: str | None = None
        urls = endpoint.request_urls
        if isinstance(urls, LoadBalancingRequestUrls):
            self._base, self._health = str(urls.base).rstrip("/"), str(urls.health)
        elif isinstance(urls, QueueBasedRequestUrls):
            self._base, self._health = str(urls.run).removesuffix("/run"), ""
        elif endpoint.type == LOAD_BALANCER:  # the API may leave the URLs out
            self._base = f"https://{endpoint.id}.api.runpod.ai"
            self._health = f"{self._base}{(endpoint.env or {}).get('HEALTH_CHECK_PATH', '/ping')}"
        else:
            self._base, self._health = f"https://api.runpod.ai/v2/{endpoint.id}", ""
        self._is_balanced = endpoint.type == LOAD_BALANCER

    @property
    def openai_url(self) -> str:
        """The base URL for OpenAI's clients."""
        return f"{self._base}/v1" if self._is_balanced else f"{self._base}/openai/v1"

    async def ask(self, kinds: list[str]) -> Answer:
        """Send the first request, of the first kind that the model answers; return when its answer is complete.

        Raises:
            DeployError: it fails.
        """
        began = time.monotonic()
        reason = ""
        for name in kinds:
            kind = KINDS[name]
            answer = Answer(kind)
            send = self._balanced(kind) if self._is_balanced else self._queued(kind)
            parser = _Events()
            try:
                async for piece in send:
                    text = "".join(parser.texts(piece)) if kind.streams else piece
                    if text and answer.first_token_s is None:
                        answer.first_token_s = time.monotonic() - began
                    answer.text += text
            except _OtherKindError as error:
                reason = str(error)
                continue
            if kind.streams and not parser.has_found_any:
                raise WorkerError(
                    f"the answer to {kind.route} is no stream of OpenAI's events: is --image this worker's?"
                )
            return answer
        raise WorkerError(f"the model answers no request of the kinds {', '.join(kinds)}: {reason}")

    async def cold_start(self) -> dict[str, Any] | None:
        """Return how long the phases of the worker's start took, as the worker measured; None if it does not say."""
        with suppress(httpx.HTTPError, ValueError, LookupError, TypeError):
            if self._is_balanced:
                document = (await self._client.get(f"{self._base}/cold_start")).raise_for_status().json()
            else:
                body = {"input": {"openai_route": "/cold_start"}}
                document = (await self._client.post(f"{self._base}/runsync", json=body)).raise_for_status().json()
                document = document["output"]
                document = document[0] if isinstance(document, list) else document
                document = json.loads(document) if isinstance(document, str) else document
            if isinstance(document["phases_s"], dict):
                return dict(document)
        return None

    async def cancel(self) -> None:
        """Cancel the job that has not ended, so that no worker is started for it."""
        if self._job is not None:
            with suppress(httpx.HTTPError):
                await self._client.post(f"{self._base}/cancel/{self._job}")
            self._job = None

    async def _queued(self, kind: Kind) -> AsyncIterator[str]:
        """Run a job; yield its outputs as they come."""
        body = {"input": {"openai_route": kind.route, "openai_input": kind.body}}
        document = await self._json("POST", f"{self._base}/run", json=body)
        self._job = str(document["id"])
        outputs = 0
        while True:
            document = await self._json("GET", f"{self._base}/stream/{self._job}")
            for item in document.get("stream") or ():
                outputs += 1
                yield _as_text(item["output"])
            status = document.get("status")
            if status in _ENDED and not document.get("stream"):
                break
            if not document.get("stream"):
                await asyncio.sleep(_POLL_S)
        job, self._job = self._job, None
        if status != "COMPLETED":
            _raise_failure(status, await self._json("GET", f"{self._base}/status/{job}"))
        if not outputs:
            output = (await self._json("GET", f"{self._base}/status/{job}")).get("output")
            yield _as_text(output[0] if isinstance(output, list) and output else output)

    async def _json(self, method: str, url: str, **request: Any) -> dict[str, Any]:
        """Call the queue; failures that may pass are tried again for a while."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                response = await self._client.request(method, url, **request)
            except httpx.TransportError as error:
                # A job whose answer is lost may run; another one is cheap, and only its answer counts.
                problem = UnreachableError(f"{url} cannot be reached ({error}): check the network")
            else:
                if response.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
                    raise RefusedError(
                        f"the endpoint refuses RUNPOD_API_KEY ({response.status_code}): the key needs access to "
                        "api.runpod.ai for this endpoint (console, Settings > API Keys)"
                    )
                with suppress(ValueError):  # a proxy's page
                    document = response.json()
                    if response.is_success and isinstance(document, dict):
                        return document
                problem = UnreachableError(f"{url} answers {response.status_code}, not a job: try again later")
            if time.monotonic() > deadline:
                raise problem
            await asyncio.sleep(1)

    async def _balanced(self, kind: Kind) -> AsyncIterator[str]:
        """Wait until a worker is ready, and send it a request; yield the answer as it comes."""
        await self._until_healthy()
        url = f"{self._base}{kind.route}"
        deadline = time.monotonic() + _PATIENCE_S
        try:
            while True:
                async with self._client.stream("POST", url, json=kind.body) as response:
                    if response.is_success:
                        async for piece in response.aiter_text():
                            yield piece
                        return
                    text = (await response.aread()).decode(errors="replace")
                if response.status_code not in _BUSY or time.monotonic() > deadline:
                    _raise_error(response.status_code, text)
                await asyncio.sleep(1)
        except httpx.TransportError as error:
            raise UnreachableError(f"{url} cannot be reached ({error}): run the command again") from None

    async def _until_healthy(self) -> None:
        """Wait until a worker of the load balancer is ready; without one, a request may be held until it times out."""
        reached_at = time.monotonic()
        while True:
            try:
                health = await self._client.get(self._health)
            except httpx.ConnectError as error:
                if time.monotonic() > reached_at + _PATIENCE_S:
                    raise UnreachableError(f"{self._health} cannot be reached ({error}): check the network") from None
            except httpx.TransportError:
                reached_at = time.monotonic()
            else:
                reached_at = time.monotonic()
                if health.status_code == HTTPStatus.OK:
                    return
                if health.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
                    raise RefusedError(f"the endpoint refuses RUNPOD_API_KEY ({health.status_code}): check its access")
            await asyncio.sleep(1)


class _Events:
    """Finds the new text in a stream of OpenAI's events, which may be cut anywhere."""

    def __init__(self) -> None:
        self._rest = ""
        self.has_found_any = False

    def texts(self, piece: str) -> Iterator[str]:
        *lines, self._rest = (self._rest + piece).split("\n")
        for line in lines:
            name, _, value = line.partition(":")
            if name != "data" or value.strip() == "[DONE]":
                continue
            try:
                event = json.loads(value)
            except ValueError:
                continue
            if not isinstance(event, dict):
                continue
            self.has_found_any = True
            if "error" in event:
                raise WorkerError(f"the answer ends with an error: {_message(event)}")
            for choice in event.get("choices") or ():
                delta = choice.get("delta") or {}
                yield choice.get("text") or delta.get("content") or delta.get("reasoning") or ""


def _as_text(output: Any) -> str:
    return output if isinstance(output, str) else json.dumps(output)


def _raise_failure(status: str, document: dict[str, Any]) -> None:
    """Raise what a failed job's error says, which this worker writes as JSON."""
    text = str(document.get("error") or "")
    with suppress(ValueError):
        error = json.loads(text)
        if isinstance(error, dict):
            _raise_error(error.get("status") or (error.get("error") or {}).get("code"), text)
    raise WorkerError(f"the first request has the status {status}: {' '.join(text.split())[:500] or 'no reason given'}")


def _raise_error(status: Any, text: str) -> None:
    try:
        message = _message(json.loads(text))
    except ValueError:
        message = " ".join(text.split())[:500]
    if status in _OTHER_KIND:
        raise _OtherKindError(message)
    raise WorkerError(f"the first request fails with {status}: {message}")


def _message(document: Any) -> str:
    error = document.get("error", document) if isinstance(document, dict) else document
    message = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(message).split())[:500]
