"""The model hub: what a repository holds, its files, and what its refusals mean.

The token comes from `HF_TOKEN`, from its older name `HUGGING_FACE_HUB_TOKEN`, or from the build secret `HF_TOKEN`, and
from nowhere else.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils.tqdm import disable_progress_bars
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    sleep_using_event,
    stop_after_attempt,
    wait_exponential_jitter,
)

from builder.errors import BuilderError, DiskSpaceError, HubError, HubUnreachableError

SECRET = Path("/run/secrets/HF_TOKEN")
ATTEMPTS = 8
# What the hub's client loads over plain HTTP: larger files come over the Xet protocol alone.
LARGEST_BYTES = constants.MAX_HTTP_DOWNLOAD_SIZE
_LONGEST_WAIT_S = 60

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        path: within the repository.
        size_bytes: its size.
        sha256: of its content, where the hub keeps one: for large files.
        git_sha1: the name of its git object, where the hub keeps the content itself: for small files.
    """

    path: str
    size_bytes: int
    sha256: str | None
    git_sha1: str | None


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository of models as it was at one commit."""

    name: str
    commit: str
    files: tuple[RemoteFile, ...]


def token() -> str | None:
    """The token that the user gave, if any."""
    given = token_of(os.environ)
    return given or (SECRET.read_text(encoding="utf-8").strip() if SECRET.is_file() else "") or None


def token_of(environment: Mapping[str, str]) -> str | None:
    """The token of an environment, if it has one: by its name, or by the older one that the hub's client knows too."""
    given = (environment.get(name, "").strip() for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
    return next((token for token in given if token not in ("", "None", "none", "null")), None)


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT


def repository(name: str, revision: str | None, attempts: int = ATTEMPTS) -> Repository:
    """What the hub has under this name, at this branch, tag or commit.

    Raises:
        HubError: there is no such repository or revision, or it is not for this token.
        HubUnreachableError: the hub did not answer.
    """
    with _told(name, revision):
        api = HfApi(_endpoint(), token=token() or False)
        info = _tried(lambda: api.model_info(name, revision=revision, files_metadata=True), attempts)
    files = [
        RemoteFile(
            file.rfilename,
            file.size or 0,
            file.lfs.sha256 if file.lfs else None,
            None if file.lfs else file.blob_id,
        )
        for file in info.siblings or []
    ]
    if outside := [file.path for file in files if _leads_outside(file.path)]:
        raise HubError(f"{name} has a file that would not stay in its directory: {outside[0]!r}")
    if info.sha is None:
        raise HubError(f"{_endpoint()} names no commit for {name}")
    return Repository(info.id, info.sha, tuple(files))


def _leads_outside(path: str) -> bool:
    return PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts


def fetch(source: Repository, file: RemoteFile, target: BinaryIO, attempts: int, stop: threading.Event) -> None:
    """Write what is missing of the file's content behind what `target` holds already.

    A broken connection goes on where it broke. What can pass (5xx, 429, time-outs) is tried again with exponential
    backoff and jitter; once `stop` is set, without waiting.

    Raises:
        HubError, HubUnreachableError, DiskSpaceError: it cannot be had; what has come so far is in `target`.
    """
    disable_progress_bars()
    url = hf_hub_url(source.name, file.path, revision=source.commit, endpoint=_endpoint())
    headers = build_hf_headers(token=token() or False)
    with _told(source.name, source.commit):
        _tried(
            lambda: http_get(
                url, target, resume_size=_kept_bytes(target, file), headers=headers, expected_size=file.size_bytes
            ),
            attempts,
            stop,
        )


def _kept_bytes(target: BinaryIO, file: RemoteFile) -> int:
    """How much of the file is there; what is longer than the file is not of it."""
    if target.seek(0, os.SEEK_END) > file.size_bytes:
        target.seek(0)
        target.truncate()
    return target.tell()


def _tried(call: Callable[[], T], attempts: int, stop: threading.Event | None = None) -> T:
    retrying = Retrying(
        sleep=sleep_using_event(stop or threading.Event()),
        retry=retry_if_exception(_may_pass),
        stop=stop_after_attempt(attempts),
        wait=_wait,
        reraise=True,
    )
    return retrying(call)


def _wait(state: RetryCallState) -> float:
    """What the hub asks for, else longer each time."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    if asked.isdigit():
        return min(float(asked), _LONGEST_WAIT_S)
    return wait_exponential_jitter(initial=1, max=_LONGEST_WAIT_S)(state)


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        passing = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)
        return status in passing or status >= HTTPStatus.INTERNAL_SERVER_ERROR
    if isinstance(error, OSError) and error.errno is not None:
        return False  # This machine's, such as a full disk
    # Also a length that is not the announced one: the client raises it as a bare OSError.
    return isinstance(error, (httpx2.TransportError, OSError)) and not isinstance(error, OfflineModeIsEnabled)


@contextmanager
def _told(name: str, revision: str | None) -> Iterator[None]:
    """Turn what the client raises into the line that says what to do."""
    try:
        yield
    except BuilderError:
        raise
    except (HfHubHTTPError, HFValidationError, httpx2.HTTPError, OSError) as error:
        raise _in_words(error, name, revision) from error
    except (ValueError, LookupError, TypeError) as error:
        raise HubError(
            f"{_endpoint()} answers with something that is not the hub's: see what is there (a login page? a mirror "
            "that does not speak the hub's protocol?), and set HF_ENDPOINT to the hub or to a mirror of it"
        ) from error


def _in_words(error: Exception, name: str, revision: str | None) -> BuilderError:
    page = f"{_endpoint()}/{name}"
    told = "HF_TOKEN" + ("" if token() else ", which is not set,")
    known: tuple[tuple[type[Exception], str], ...] = (
        (GatedRepoError, f"{name} is gated: ask for access at {page}, and set {told} to a token of that account"),
        (RevisionNotFoundError, f"{name} has no revision {revision}: see {page}/commits/main"),
        (RepositoryNotFoundError, f"there is no model {name} at {page}, or it is private and {told} does not open it"),
        (RemoteEntryNotFoundError, f"{name} at {revision} has no such file any more"),
        (HFValidationError, f"{name!r} is not the name of a model: it looks like organization/name"),
        (OfflineModeIsEnabled, "HF_HUB_OFFLINE is set, so the hub was not asked: unset it to download"),
    )
    for kind, text in known:
        if isinstance(error, kind):
            return HubError(text)
    if isinstance(error, HfHubHTTPError) and not _may_pass(error):
        status = error.response.status_code
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            return HubError(f"{page} answers {status}: {told} does not open it")
        return HubError(f"{page} answers {status}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskSpaceError("the disk is full: make room and run it again, it goes on from where it stopped")
    if isinstance(error, OSError) and error.errno is not None:
        return BuilderError(f"{error.filename or name}: {error.strerror}")
    why = f"answers {error.response.status_code}" if isinstance(error, HfHubHTTPError) else _reason(error)
    return HubUnreachableError(
        f"{_endpoint()} {why}, also after several tries: run it again later, it goes on from where it stopped"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, httpx2.ConnectError):
        return "cannot be reached"
    if isinstance(error, httpx2.TimeoutException):
        return "does not answer in time"
    return "breaks off its answers"
