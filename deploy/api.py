"""A client of RunPod's REST API v2: its answers as the models of `runpod_api`, its refusals as one line each.

A call that may be repeated is repeated while the network or the API fails; 429 waits for as long as it says.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import tenacity
from pydantic import BaseModel, ValidationError

from deploy.errors import DeployError, OptionError, RefusedError, UnreachableError
from deploy.options import option_names
from runpod_api import models
from runpod_api.description import violations

URL = "https://api.runpod.io"
KEY_VARIABLE = "RUNPOD_API_KEY"
TIMEOUT_S = 60.0
_ATTEMPTS = 5
WAIT_S = 0.5
MAX_RETRY_AFTER_S = 300.0
# One window's state in the header `RateLimit`: remaining calls, and seconds until it resets.
_QUOTA = re.compile(r";\s*r=(\d+)\s*;\s*t=(\d+)")
# With fewer calls left than this, looks come at the pace of the window; each look makes up to so many calls.
_FEW_CALLS, _CALLS_A_LOOK = 100, 3
_FLASHBOOT_SUFFIX = " -fb"
_ENDPOINTS = "/v2/serverless"

_Answer = TypeVar("_Answer", bound=BaseModel)
_Result = TypeVar("_Result")


class NotFoundError(RefusedError):
    """There is no such endpoint, or something that the request names."""


_REFUSALS: dict[HTTPStatus, tuple[type[RefusedError], str]] = {
    HTTPStatus.UNAUTHORIZED: (
        RefusedError,
        (f"the API does not accept {KEY_VARIABLE} ({{detail}}): set it to a key of the console, Settings > API Keys"),
    ),
    HTTPStatus.FORBIDDEN: (
        RefusedError,
        (
            f"{KEY_VARIABLE} has no permission for this ({{detail}}): give the key write access to serverless "
            "endpoints in the console, Settings > API Keys"
        ),
    ),
    HTTPStatus.NOT_FOUND: (
        NotFoundError,
        (
            "not found ({detail}): check the endpoint's name with `status`, and the ids given by --volume, "
            "--data-center, --registry and --gpu"
        ),
    ),
}


class _PassingError(Exception):
    """A failure that may pass.

    Args:
        problem: what the user reads while it is tried again.
        advice: what the user reads after it if it does not pass.
        retry_after_s: how long the API asks to wait, if it does.
        lost: whether the request may have been carried out.
    """

    def __init__(self, problem: str, advice: str, retry_after_s: float | None = None, *, lost: bool = False) -> None:
        super().__init__(problem)
        self.error = UnreachableError(f"{problem}: {advice}")
        self.retry_after_s = retry_after_s
        self.lost = lost

    @property
    def is_worth_a_wait(self) -> bool:
        """Whether the API does not ask to wait for longer than a command should."""
        return self.retry_after_s is None or self.retry_after_s <= MAX_RETRY_AFTER_S


@dataclass(frozen=True)
class LogLine:
    """One line of a worker's log: `source` is `container` or `system`, `id` resumes the stream after it."""

    id: str
    source: str
    text: str
    time: str


class Api:
    """The API, for one user.

    Args:
        client: with the base URL and the key.
        log: is told why a call waits.
        wait_s: the first wait between two attempts, which then doubles.
    """

    def __init__(self, client: httpx.AsyncClient, log: Callable[[str], None], wait_s: float | None = None) -> None:
        self._client = client
        self._log = log
        self._wait_s = WAIT_S if wait_s is None else wait_s
        self._quotas: list[tuple[int, int]] = []

    def pause_s(self, least_s: float) -> float:
        """Return how long to wait between two looks at something, so that the API's rate limits are not used up."""
        few = [(left, reset_s) for left, reset_s in self._quotas if left < _FEW_CALLS]
        return max([least_s, *(min(_CALLS_A_LOOK / max(left, 1), 1) * reset_s for left, reset_s in few)])

    async def gpus(self, min_cuda: str, count: int = 1) -> list[models.GpuType]:
        """Return the GPU types, with what of them is free for serverless workers.

        Args:
            min_cuda: CUDA version that the machines' drivers have at least.
            count: GPUs of a worker.
        """
        query = {"include": "AVAILABILITY", "product": "SERVERLESS", "minCudaVersion": min_cuda, "count": count}
        return (await self._call("GET", "/v2/catalog/gpus", models.ListGpuTypesResponse, params=query)).gpus

    async def endpoints(self) -> list[models.Endpoint]:
        """Return all endpoints of the user."""
        return (await self._call("GET", _ENDPOINTS, models.ListEndpointsResponse)).endpoints

    async def endpoint(self, endpoint_id: str) -> models.Endpoint:
        """Return an endpoint."""
        return await self._call("GET", f"{_ENDPOINTS}/{endpoint_id}", models.Endpoint)

    async def create(self, body: dict[str, Any]) -> models.Endpoint:
        """Create an endpoint. If the answer is lost, an endpoint with this name is the answer.

        Raises:
            DeployError: one line that says why it was refused.
        """
        check("CreateEndpointRequest", body)

        async def attempt() -> models.Endpoint:
            try:
                return await self._once("POST", _ENDPOINTS, models.Endpoint, json=body)
            except _PassingError as error:
                if error.lost:
                    for one in await self.endpoints():
                        if same_name(one.name, body["name"]):
                            return one
                raise

        return await self._retrying(attempt)

    async def update(self, endpoint_id: str, body: dict[str, Any]) -> models.Endpoint:
        """Change the fields of an endpoint that the body has."""
        check("UpdateEndpointRequest", body)
        return await self._call("PATCH", f"{_ENDPOINTS}/{endpoint_id}", models.Endpoint, json=body)

    async def delete(self, endpoint_id: str) -> None:
        """Delete an endpoint; if an earlier attempt has, that is no error."""
        attempts = 0

        async def attempt() -> None:
            nonlocal attempts
            attempts += 1
            try:
                await self._send("DELETE", f"{_ENDPOINTS}/{endpoint_id}")
            except NotFoundError:
                if attempts == 1:
                    raise

        await self._retrying(attempt)

    async def workers(self, endpoint_id: str) -> models.ListEndpointWorkersResponse:
        """Return the workers of an endpoint."""
        return await self._call("GET", f"{_ENDPOINTS}/{endpoint_id}/workers", models.ListEndpointWorkersResponse)

    async def releases(self, endpoint_id: str) -> models.ListEndpointReleasesResponse:
        """Return the releases of an endpoint, newest first, and how far the newest is rolled out."""
        return await self._call("GET", f"{_ENDPOINTS}/{endpoint_id}/releases", models.ListEndpointReleasesResponse)

    async def logs(self, endpoint_id: str, worker_id: str, *, tail: int, pause_s: float) -> AsyncGenerator[LogLine]:
        """Yield the last `tail` lines of a worker's log, then new ones as they come, each once.

        A stream that ends is opened again after `pause_s`, where it ended. It is over when the worker is forgotten.

        Raises:
            DeployError: the API refuses, or cannot be reached several times in a row.
        """
        last_id, at_last_id, failures = "", set[str](), 0
        while True:
            try:
                async with aclosing(self._log_stream(endpoint_id, worker_id, tail, last_id)) as stream:
                    async for line in stream:
                        failures = 0
                        if line.id != last_id:
                            last_id, at_last_id = line.id, set()
                        elif line.text in at_last_id:
                            continue  # an id may be a time, at whose first line the stream goes on
                        at_last_id.add(line.text)
                        yield line
            except NotFoundError:
                return
            except _PassingError as error:
                failures += 1
                if failures == _ATTEMPTS:
                    raise error.error from None
            await asyncio.sleep(pause_s)

    async def _log_stream(self, endpoint_id: str, worker_id: str, tail: int, last_id: str) -> AsyncGenerator[LogLine]:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_id} if last_id else {})
        path = f"{_ENDPOINTS}/{endpoint_id}/workers/{worker_id}/logs"
        timeout = httpx.Timeout(TIMEOUT_S, read=None)
        try:
            async with self._client.stream(
                "GET", path, params={"tail": tail}, headers=headers, timeout=timeout
            ) as response:
                if response.is_error:
                    await response.aread()
                    raise self._refusal(response)
                async for line in _log_lines(response):
                    yield line
        except httpx.RequestError as error:
            raise self._unreachable(error) from None

    async def _call(self, method: str, path: str, answer: type[_Answer], **request: Any) -> _Answer:
        async def attempt() -> _Answer:
            return await self._once(method, path, answer, **request)

        return await self._retrying(attempt)

    async def _once(self, method: str, path: str, answer: type[_Answer], **request: Any) -> _Answer:
        response = await self._send(method, path, **request)
        try:
            return answer.model_validate_json(response.content)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "the body"
            raise DeployError(
                f"the answer to {method} {path} is not what the API's description says ({place}: {first['msg']}): "
                f"is {self._client.base_url} RunPod's API?"
            ) from None

    async def _send(self, method: str, path: str, **request: Any) -> httpx.Response:
        try:
            response = await self._client.request(method, path, **request)
        except httpx.RequestError as error:
            raise self._unreachable(error) from None
        if (quotas := _QUOTA.findall(response.headers.get("RateLimit", ""))) or response.is_success:
            self._quotas = [(int(left), int(reset_s)) for left, reset_s in quotas]
        if response.is_error:
            raise self._refusal(response)
        return response

    async def _retrying(self, attempt: Callable[[], Awaitable[_Result]]) -> _Result:
        """Run a call until it succeeds or fails for good; raises the error of the last attempt."""
        backoff = tenacity.wait_random_exponential(multiplier=self._wait_s, max=30)

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = error.retry_after_s if isinstance(error, _PassingError) else None
            return backoff(state) if asked is None else asked

        def say(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            seconds = state.next_action.sleep if state.next_action else 0
            self._log(f"{error}; trying again in {max(seconds, 1):.0f} s")

        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(_ATTEMPTS),
            wait=wait,
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, _PassingError) and error.is_worth_a_wait),
            before_sleep=say,
            reraise=True,
        )
        try:
            return await retrying(attempt)
        except _PassingError as error:
            raise error.error from None

    def _unreachable(self, error: httpx.RequestError) -> UnreachableError | _PassingError:
        """Return the error for a request without an answer; one of TLS does not pass."""
        base = f"{self._client.base_url}".rstrip("/")
        text = " ".join(str(error).split()) or type(error).__name__
        if "CERTIFICATE_VERIFY_FAILED" in text:
            return UnreachableError(
                f"the certificate of {base} is not trusted: set SSL_CERT_FILE to the file of its authority, "
                "or check RUNPOD_API_URL"
            )
        if "WRONG_VERSION_NUMBER" in text:
            return UnreachableError(
                f"{base} does not speak TLS: set RUNPOD_API_URL to a URL with http://, if it is the emulator's"
            )
        if isinstance(error, httpx.TimeoutException):
            text = f"no answer within {TIMEOUT_S:.0f} s"
        is_sent = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
        advice = "check the network, and --api-url or RUNPOD_API_URL"
        return _PassingError(f"{base} cannot be reached ({text})", advice, lost=is_sent)

    def _refusal(self, response: httpx.Response) -> DeployError | _PassingError:
        """Return the error for a response that is one."""
        status, detail = response.status_code, _detail(response)
        retry_after_s = _seconds(response.headers.get("Retry-After", ""))
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            advice = "run the command again when that window has ended"
            return _PassingError(f"too many requests ({detail})", advice, retry_after_s)
        if response.is_server_error:
            return _PassingError(f"the API fails with {status} ({detail})", "try again later", retry_after_s, lost=True)
        if status in (HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY):
            return OptionError(f"the API does not accept the request: {option_names(detail)}")
        is_problem = "problem+json" in response.headers.get("Content-Type", "")
        if status in _REFUSALS and (is_problem or status != HTTPStatus.NOT_FOUND):
            kind, text = _REFUSALS[HTTPStatus(status)]
            return kind(text.format(detail=detail))
        return DeployError(f"the API answers {status} ({detail}): is {self._client.base_url} RunPod's API?")


def same_name(name: str, wanted: str) -> bool:
    """Return whether an endpoint has this name; RunPod's console adds `-fb` to the names of those with FlashBoot."""
    return name.removesuffix(_FLASHBOOT_SUFFIX) == wanted.removesuffix(_FLASHBOOT_SUFFIX)


def check(schema: str, body: dict[str, Any]) -> None:
    """Check a request against the API's description.

    Raises:
        OptionError: it violates it; the message names options.
    """
    if found := violations(schema, body):
        raise OptionError("; ".join(option_names(line) for line in found))


def client(url: str, key: str | None, transport: httpx.AsyncBaseTransport | None = None) -> httpx.AsyncClient:
    """Return an HTTP client with the key, which also asks the endpoint itself. `SSL_CERT_FILE` is trusted too.

    The URL may end with `/v2`, as RunPod's own documents write it.

    Raises:
        OptionError: the URL is none of HTTP, or a proxy or the certificates of the environment cannot be used.
        RefusedError: the key has characters that an HTTP header cannot have.
    """
    if key and not re.fullmatch(r"[!-~]+", key):
        raise RefusedError(
            f"{KEY_VARIABLE} has a space, a line end or a character that is not ASCII: copy it from the console again"
        )
    url = url.strip().rstrip("/").removesuffix("/v2")
    try:
        port = urlsplit(url).port if re.fullmatch(r"https?://[^/\s]\S*", url) else 0
    except ValueError:
        port = 0
    if port == 0:
        raise OptionError(f"{url or 'nothing'} is not a URL: set --api-url or RUNPOD_API_URL to one such as {URL}")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        return httpx.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT_S, transport=transport)
    except OSError as error:
        raise OptionError(f"the file that SSL_CERT_FILE or SSL_CERT_DIR names cannot be read: {error}") from None
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise OptionError(
            f"a proxy of the environment cannot be used ({error}): set HTTPS_PROXY to one of HTTP, such as "
            "http://127.0.0.1:3128, and unset ALL_PROXY"
        ) from None


async def _log_lines(response: httpx.Response) -> AsyncIterator[LogLine]:
    """Read server-sent events: an `id` and a `data` of JSON each."""
    event_id = ""
    async for line in response.aiter_lines():
        name, _, value = line.partition(":")
        if name == "id":
            event_id = value.strip()
        elif name == "data":
            try:
                data = json.loads(value)
                yield LogLine(event_id, str(data["source"]), str(data["line"]), str(data["ts"]))
            except (ValueError, LookupError, TypeError):
                continue  # a comment of a proxy, or a line of another form


def _detail(response: httpx.Response) -> str:
    """Return what an error says, in one line: each place if it names them, else its text."""
    try:
        document = response.json()
        parts = [*map(str, document.get("errors") or [document.get("detail") or document.get("title") or ""])]
    except (ValueError, AttributeError, TypeError):
        parts = [response.text[:200]]
    return " ".join("; ".join(part for part in parts if part).split()) or response.reason_phrase


def _seconds(text: str) -> float | None:
    try:
        return max(float(text), 0.0)
    except ValueError:
        return None
