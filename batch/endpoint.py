"""The client of one queue endpoint: submits jobs and reads their status, within the platform's rate limits.

Source: docs.runpod.io, "Operation reference" and "Send API requests".
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, Final, Self

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_delay, wait_exponential_jitter

from batch.errors import RefusedError, RejectedError, ResultError, UnreachableError

# Four fifths of "1000 requests per 10 seconds" for /run and of 2000 for /status; the rest is for the endpoint's others.
RUNS_PER_S: Final = 80.0
STATUSES_PER_S: Final = 160.0
# Less than the limits of 200 concurrent calls of /run, and 400 of /status.
_MAX_CONNECTIONS: Final = 64
_CALL_TIMEOUT_S: Final = 60.0
_REPORT_INTERVAL_S: Final = 30.0
# Calls that are served so long after another one began to fail show that the platform is not away.
_OUTAGE_S: Final = 60.0
_BACKOFF = wait_exponential_jitter(multiplier=0.5, max=30.0)
# Another attempt cannot help where the request itself is refused.
_REJECTIONS = {
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.UNPROCESSABLE_ENTITY,
}
# What an answer has at least.
_FIELDS: Final = {"run": "id", "status": "status", "health": "jobs"}
_TRANSIENT = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}


class Pacer:
    """Spaces calls evenly, in the order in which they ask."""

    def __init__(self, calls_per_s: float) -> None:
        self._interval_s = 1 / calls_per_s
        self._next_at = 0.0

    async def wait(self) -> None:
        """Wait until the next call may be made."""
        now = time.monotonic()
        at = max(now, self._next_at)
        self._next_at = at + self._interval_s
        await asyncio.sleep(at - now)


class Endpoint:
    """A queue endpoint; an asynchronous context manager.

    Args:
        url: such as `https://api.runpod.ai/v2/ENDPOINT_ID`.
        key: the platform's API key.
        report: is told, now and then, why a call is made again.
        give_up_after_s: how long a call is tried that the platform does not answer. One that it answers with 429 is
            tried without an end, and from then on as long again.
        transport: replaces the network, for tests.
    """

    def __init__(
        self,
        url: str,
        key: str,
        report: Callable[[str], None],
        *,
        give_up_after_s: float = 900.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = url
        self._report = report
        self._report_at = 0.0
        self._served_at = dict.fromkeys(_FIELDS, -math.inf)
        self._give_up_after_s = give_up_after_s
        self._pacers = {"run": Pacer(RUNS_PER_S), "status": Pacer(STATUSES_PER_S), "health": Pacer(1.0)}
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(_CALL_TIMEOUT_S, pool=None),
            limits=httpx.Limits(max_connections=_MAX_CONNECTIONS, max_keepalive_connections=_MAX_CONNECTIONS),
            transport=transport,
        )
        # Without the platform's key.
        self._buckets = httpx.AsyncClient(timeout=_CALL_TIMEOUT_S, transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()
        await self._buckets.aclose()

    async def check(self) -> None:
        """Check URL and key, so that a wrong one is an error at once.

        Raises:
            RefusedError: the platform refuses the key, or has no such endpoint.
            UnreachableError: it does not answer.
        """
        await self._call("GET", "health", give_up_after_s=5.0)

    async def run(self, job: bytes) -> str:
        """Submit a job; return its id.

        If the platform's answer is lost, the job is submitted again, and both run.

        Args:
            job: the body of /run.

        Raises:
            RejectedError: the platform refuses this job, or answers it with 5xx while it takes others.
            RefusedError: the platform refuses the key, or has no such endpoint any more.
            UnreachableError: it does not answer.
        """
        document = await self._call("POST", "run", content=job)
        return str(document["id"])

    async def status(self, job: str) -> dict[str, Any] | None:
        """Return what the platform says of a job; None if it does not know it any more.

        Raises:
            RejectedError: the platform answers with 5xx for this job, but not for others.
            RefusedError: the platform refuses the key.
            UnreachableError: it does not answer.
        """
        try:
            return await self._call("GET", "status", job)
        except _NotFoundError:
            return None

    async def result(self, link: str) -> Any:
        """Return the result that a worker has stored in a bucket, as it is too large for the platform.

        Args:
            link: a presigned URL; it is a secret, and in no error.

        Raises:
            ResultError: the bucket does not answer, or with an error.
        """
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(UnreachableError), wait=_wait_s, stop=stop_after_delay(60.0), reraise=True
        )
        try:
            return await retrying(self._download, link)
        except UnreachableError as error:
            raise ResultError(str(error)) from None

    async def _download(self, link: str) -> Any:
        try:
            response = await self._buckets.get(link)
        except httpx.InvalidURL:
            raise ResultError("the link to the result is not a URL") from None
        except httpx.RequestError as error:
            raise UnreachableError(f"the bucket of the result cannot be reached: {type(error).__name__}") from None
        status = response.status_code
        answer = f"the bucket of the result answered {status}"
        if status in _TRANSIENT or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise UnreachableError(answer, status, _retry_after_s(response))
        if status != HTTPStatus.OK:
            raise ResultError(answer)
        try:
            return response.json()
        except ValueError:
            raise ResultError(f"{answer}, but not with JSON") from None

    async def _call(
        self,
        method: str,
        operation: str,
        job: str = "",
        *,
        content: bytes | None = None,
        give_up_after_s: float | None = None,
    ) -> dict[str, Any]:
        """Call an operation until it is answered; return the answer."""
        limit_s = self._give_up_after_s if give_up_after_s is None else give_up_after_s
        failing_since = math.inf

        def gives_up(state: RetryCallState) -> bool:
            nonlocal failing_since
            now = time.monotonic()
            failing_since = math.inf if _asks_to_wait(state) else min(failing_since, now)
            return now - failing_since >= limit_s

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(UnreachableError),
            wait=_wait_s,
            stop=gives_up,
            before_sleep=self._report_retry,
            reraise=True,
        )
        try:
            document: dict[str, Any] = await retrying(self._call_once, method, operation, job, content)
        except UnreachableError as error:
            if error.status is None or self._served_at[operation] < failing_since + _OUTAGE_S:
                raise
            raise RejectedError(error.status, str(error)) from None
        self._served_at[operation] = time.monotonic()
        return document

    async def _call_once(self, method: str, operation: str, job: str, content: bytes | None) -> dict[str, Any]:
        await self._pacers[operation].wait()
        headers = {"Content-Type": "application/json"} if content is not None else None
        url = f"{self.url}/{operation}/{job}".rstrip("/")
        try:
            response = await self._http.request(method, url, content=content, headers=headers)
        except httpx.RequestError as error:
            raise _request_error(error, self.url) from None
        return _document(response, operation, self.url)

    def _report_retry(self, state: RetryCallState) -> None:
        if time.monotonic() >= self._report_at:
            self._report_at = time.monotonic() + _REPORT_INTERVAL_S
            self._report(f"{_error_of(state)}; trying again")


class _NotFoundError(RefusedError):
    """The platform has no such endpoint or job."""


def _document(response: httpx.Response, operation: str, url: str) -> dict[str, Any]:
    """Return the body of an answer.

    Raises:
        _NotFoundError, RefusedError, RejectedError, UnreachableError: by its status.
    """
    status = response.status_code
    answer = f"{url}/{operation} answered {status}"
    if status in _TRANSIENT or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise UnreachableError(f"{answer}: {_excerpt(response)}", status, _retry_after_s(response))
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        raise RefusedError(f"{answer}: the platform refuses RUNPOD_API_KEY for this endpoint")
    if status == HTTPStatus.NOT_FOUND:
        raise _NotFoundError(f"{answer}: there is no such endpoint; check --endpoint and --base-url")
    if status in _REJECTIONS and operation == "run":
        raise RejectedError(status, _excerpt(response))
    if status != HTTPStatus.OK:
        raise RefusedError(f"{answer}: {_excerpt(response)}")
    try:
        document = response.json()
    except ValueError:
        document = None
    if not isinstance(document, dict) or _FIELDS[operation] not in document:
        raise UnreachableError(f"{answer}, but without {_FIELDS[operation]!r}: is {url} the URL of a queue endpoint?")
    return document


def _request_error(error: httpx.RequestError, url: str) -> RefusedError | UnreachableError:
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return RefusedError(f"{url}: {error}; set SSL_CERT_FILE to the file of its CA")
    return UnreachableError(f"{url} cannot be reached: {type(error).__name__}: {error}")


def _excerpt(response: httpx.Response) -> str:
    return " ".join(response.text[:500].split()) or response.reason_phrase


def _retry_after_s(response: httpx.Response) -> float | None:
    """Return the response's Retry-After, which is in seconds or a date."""
    value = response.headers.get("Retry-After", "")
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        at = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (at - datetime.now(UTC)).total_seconds()) if at.tzinfo else None


def _error_of(state: RetryCallState) -> UnreachableError | None:
    error = state.outcome.exception() if state.outcome is not None else None
    return error if isinstance(error, UnreachableError) else None


def _asks_to_wait(state: RetryCallState) -> bool:
    error = _error_of(state)
    return error is not None and error.status == HTTPStatus.TOO_MANY_REQUESTS


def _wait_s(state: RetryCallState) -> float:
    error = _error_of(state)
    backoff_s = _BACKOFF(state)
    return backoff_s if error is None or error.retry_after_s is None else error.retry_after_s
