"""Client of the Hugging Face hub: lists and downloads the files of a repository, and explains its errors.

The token is only taken from `HF_TOKEN`, from its older name `HUGGING_FACE_HUB_TOKEN`, or from the build secret
`HF_TOKEN`.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import BinaryIO

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
    stop_when_event_set,
    wait_exponential_jitter,
)

from builder.errors import BuilderError, DiskSpaceError, HubError, HubUnreachableError, SettingError

SECRET = Path("/run/secrets/HF_TOKEN")
# The hub serves larger files only over the Xet protocol.
MAX_HTTP_BYTES = constants.MAX_HTTP_DOWNLOAD_SIZE
_MAX_WAIT_S = 60
_TRANSIENT_STATUSES = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        path: relative to the repository's root.
        size_bytes: its size.
        sha256: of its content, for files in LFS or Xet storage; else None.
        git_sha1: its git object id, for files in git; else None.
    """

    path: str
    size_bytes: int
    sha256: str | None
    git_sha1: str | None


@dataclass(frozen=True, slots=True)
class Repository:
    """A model repository at one commit."""

    name: str
    commit: str
    files: tuple[RemoteFile, ...]


def token() -> str | None:
    """Return the user's token: from the environment, else the build secret; None without one."""
    secret = SECRET.read_text(encoding="utf-8", errors="replace") if SECRET.is_file() else ""
    return token_of(os.environ) or token_of({"HF_TOKEN": secret})


def token_of(environment: Mapping[str, str]) -> str | None:
    """Return the token in an environment: `HF_TOKEN`, else the older `HUGGING_FACE_HUB_TOKEN`; None without one.

    Raises:
        SettingError: it has characters that an HTTP header cannot have.
    """
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        token = environment.get(name, "").strip()
        if token in ("", "None", "none", "null"):
            continue
        if not re.fullmatch(r"[!-~]+", token):
            raise SettingError(
                f"{name} has a space or a character that is not ASCII: copy the token from the hub again"
            )
        return token
    return None


def _endpoint() -> str:
    """Return the hub's URL; raise SettingError if HF_ENDPOINT is not a URL."""
    endpoint = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or constants.ENDPOINT
    if not re.match(r"https?://[^/\s]", endpoint):
        raise SettingError(f"HF_ENDPOINT={endpoint} is not a URL: set it to one such as https://huggingface.co")
    return endpoint


def repository(name: str, revision: str | None, attempts: int) -> Repository:
    """Return the repository at this branch, tag or commit; at the main branch by default.

    Raises:
        HubError: there is no such repository or revision, or the token gives no access.
        HubUnreachableError: the hub does not answer.
        SettingError: HF_ENDPOINT or HF_TOKEN is invalid.
    """
    with _translate_errors(name, revision):
        api = HfApi(_endpoint(), token=token() or False)
        info = _with_retries(attempts)(api.model_info, name, revision=revision, files_metadata=True)
    files = [
        RemoteFile(
            file.rfilename,
            file.size or 0,
            file.lfs.sha256 if file.lfs else None,
            None if file.lfs else file.blob_id,
        )
        for file in info.siblings or []
    ]
    if unsafe := [file.path for file in files if _escapes_directory(file.path)]:
        raise HubError(f"{name} has a file with an unsafe path: {unsafe[0]!r}")
    if info.sha is None:
        raise HubError(f"{_endpoint()} returned no commit of {name}")
    return Repository(info.id, info.sha, tuple(files))


def _escapes_directory(path: str) -> bool:
    return PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts


def fetch(
    repository: Repository, file: RemoteFile, target: BinaryIO, attempts: int, cancelled: threading.Event
) -> None:
    """Append to `target` the part of the file that it does not have yet.

    A broken connection is resumed. Transient errors (5xx, 429, timeouts) are retried with exponential backoff and
    jitter, until `cancelled` is set.

    Raises:
        HubError, HubUnreachableError, DiskSpaceError: the download failed; `target` has what was received.
    """
    disable_progress_bars()
    url = hf_hub_url(repository.name, file.path, revision=repository.commit, endpoint=_endpoint())
    headers = build_hf_headers(token=token() or False)
    with _translate_errors(repository.name, repository.commit):
        for attempt in _with_retries(attempts, cancelled):
            with attempt:
                received = _received_bytes(target, file)
                http_get(url, target, resume_size=received, headers=headers, expected_size=file.size_bytes)


def _received_bytes(target: BinaryIO, file: RemoteFile) -> int:
    """Return how much of the file `target` has; content longer than the file is discarded."""
    if target.seek(0, os.SEEK_END) > file.size_bytes:
        target.seek(0)
        target.truncate()
    return target.tell()


def _with_retries(attempts: int, cancelled: threading.Event | None = None) -> Retrying:
    """Return tenacity's retries of transient errors; after the last attempt its error is raised."""
    cancelled = cancelled or threading.Event()
    return Retrying(
        retry=retry_if_exception(_is_transient),
        stop=stop_after_attempt(attempts) | stop_when_event_set(cancelled),
        wait=_wait,
        sleep=sleep_using_event(cancelled),
        reraise=True,
    )


def _wait(state: RetryCallState) -> float:
    """Return the delay in seconds before the next attempt: the hub's Retry-After, else exponential backoff."""
    error = state.outcome.exception() if state.outcome else None
    retry_after = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    if retry_after.isdigit():
        return min(float(retry_after), _MAX_WAIT_S)
    return wait_exponential_jitter(initial=1, max=_MAX_WAIT_S)(state)


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status in _TRANSIENT_STATUSES or status >= HTTPStatus.INTERNAL_SERVER_ERROR
    if isinstance(error, OSError) and error.errno is not None:
        return False  # of this machine, such as a full disk
    # The client raises an OSError without errno for content of a wrong length.
    return isinstance(error, (httpx2.TransportError, OSError)) and not isinstance(error, OfflineModeIsEnabled)


@contextmanager
def _translate_errors(name: str, revision: str | None) -> Iterator[None]:
    """Raise a BuilderError that says what to do for each error of the client."""
    try:
        yield
    except BuilderError:
        raise
    except (HfHubHTTPError, HFValidationError, httpx2.HTTPError, OSError) as error:
        raise _to_builder_error(error, name, revision) from error
    except (ValueError, LookupError, TypeError) as error:
        raise HubError(
            f"{_endpoint()} does not answer as the hub does (a login page? an incompatible mirror?): set HF_ENDPOINT "
            "to the hub or to a mirror of it"
        ) from error


def _to_builder_error(error: Exception, name: str, revision: str | None) -> BuilderError:
    page = f"{_endpoint()}/{name}"
    is_set = token() is not None
    unset = "" if is_set else " (it is not set)"
    no_access = "HF_TOKEN gives no access to it" if is_set else "HF_TOKEN is not set"
    known: tuple[tuple[type[Exception], str], ...] = (
        (
            GatedRepoError,
            f"{name} is gated: ask for access at {page}, and set HF_TOKEN to a token of that account{unset}",
        ),
        (RevisionNotFoundError, f"{name} has no revision {revision}: see {page}/commits/main"),
        (RepositoryNotFoundError, f"there is no model {name} at {page}, or it is private and {no_access}"),
        (RemoteEntryNotFoundError, f"a file of {name} at {revision} no longer exists"),
        (HFValidationError, f"{name!r} is not a model name such as organization/name"),
        (OfflineModeIsEnabled, "HF_HUB_OFFLINE is set: unset it to download"),
    )
    for kind, text in known:
        if isinstance(error, kind):
            return HubError(text)
    if isinstance(error, HfHubHTTPError) and not _is_transient(error):
        status = error.response.status_code
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            return HubError(f"{page} answers {status}: {no_access}")
        return HubError(f"{page} answers {status}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskSpaceError("the disk is full: free some space and run the command again to resume")
    if isinstance(error, OSError) and error.errno is not None:
        return BuilderError(f"{error.filename or name}: {error.strerror}")
    reason = f"answers {error.response.status_code}" if isinstance(error, HfHubHTTPError) else _reason(error)
    return HubUnreachableError(f"{_endpoint()} {reason}: try again later")


def _reason(error: Exception) -> str:
    if isinstance(error, httpx2.ConnectError):
        return "cannot be reached"
    if isinstance(error, httpx2.TimeoutException):
        return "does not answer in time"
    return "closes the connection early"
