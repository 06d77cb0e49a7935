"""The input: OpenAI's batch file, one request a line.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "…", "messages": […]}}

Every line is checked before the first is sent, and a request's body is sent as it is written. Memory holds where the
lines are, not the lines, which are read again to be sent: a line that has changed meanwhile is an error.

Source: OpenAI's API reference, "The request input object"; `vllm run-batch` reads the same.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import msgspec

from batch.errors import InputChangedError, InputFileError

# The routes with a JSON body that a worker serves; OpenAI's batches have the first four.
URLS: Final = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/chat/completions/batch",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/rerank",
    "/v1/score",
    "/v2/embed",
    "/v2/rerank",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/classify",
    "/cohere/v2/chat",
    "/detokenize",
    "/generative_scoring",
    "/pooling",
    "/rerank",
    "/score",
    "/tokenize",
)
# The platform's "maximum payload size" of /run.
MAX_JOB_BYTES: Final = 10 * 1024 * 1024
_MAX_REPORTED = 20
_FORM = 'Each line is one request: {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {…}}'
_HALF_PAIR = "a text has half of a surrogate pair (such as \\ud83d without \\ude00), and so is cut within a character"


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Body(msgspec.Struct):
    model: str | None = None
    stream: bool | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One line of the file.

    Attributes:
        line: its number, from 1.
        custom_id: the client's name of the request, which no other line has.
        offset: where the line begins, in bytes.
        size_bytes: its length.
        hash: of its bytes, in this process.
    """

    line: int
    custom_id: str
    offset: int
    size_bytes: int
    hash: int


class RequestFile:
    """A checked batch file, open until `close`.

    Args:
        path: of the file.
        descriptor: of the open file.
        requests: its lines.
        sha256: of its content.
    """

    def __init__(self, path: Path, descriptor: int, requests: list[Request], sha256: str) -> None:
        self.path = path
        self.requests = requests
        self.sha256 = sha256
        self._descriptor = descriptor

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check a file, and keep it open.

        Raises:
            InputFileError: lines are invalid, or there are none; the message names each.
            OSError: the file cannot be read.
        """
        checker = _Checker(path)
        digest = hashlib.sha256()
        offset = 0
        with path.open("rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InputFileError(f"{path} is not a regular file: its lines are read again to be sent")
            for number, line in enumerate(file, 1):
                digest.update(line)
                begin = len(codecs.BOM_UTF8) if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
                if line[begin:].strip():
                    checker.check(number, line[begin:], offset + begin)
                offset += len(line)
            requests = checker.requests()
            return cls(path, os.dup(file.fileno()), requests, digest.hexdigest())

    def job(self, request: Request) -> bytes:
        """Return the body of /run for a request, read from the file.

        Raises:
            InputChangedError: the line is not the one that was checked.
        """
        text = os.pread(self._descriptor, request.size_bytes, request.offset)
        if hash(text) != request.hash:
            raise InputChangedError(f"{self.path}:{request.line} has changed since the start: restore the file")
        return _job(_LINE.decode(text))

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


_LINE = msgspec.json.Decoder(_Line)
_BODY = msgspec.json.Decoder(_Body)


def _job(line: _Line) -> bytes:
    return msgspec.json.encode({"input": {"openai_route": line.url, "openai_input": line.body}})


class _Checker:
    """Checks lines one by one, and collects what is wrong."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._requests: list[Request] = []
        self._errors: list[str] = []
        self._first_with_id: dict[str, int] = {}
        self._model: tuple[int, str | None] | None = None
        self._begins_otherwise = False

    def check(self, number: int, text: bytes, offset: int) -> None:
        """Check one line."""
        where = ""
        try:
            line = _LINE.decode(text)
            where = "body: "
            body = _BODY.decode(line.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            problem = _HALF_PAIR if _has_half_pair(text) else f"{where}{error}"
            self._errors.append(f"{self._path}:{number}: {problem}")
            self._begins_otherwise |= not self._requests and not where
            return
        problems = [*_problems(line, body), *self._conflicts(number, line, body)]
        self._errors += (f"{self._path}:{number}: {problem}" for problem in problems)
        self._requests.append(Request(number, line.custom_id, offset, len(text), hash(text)))

    def requests(self) -> list[Request]:
        """Return the checked lines.

        Raises:
            InputFileError: lines are invalid, or there are none.
        """
        errors = self._errors
        if not errors and not self._requests:
            errors = [f"{self._path}: the file has no requests"]
        if errors:
            more = [f"and {len(errors) - _MAX_REPORTED} more"] if len(errors) > _MAX_REPORTED else []
            form = [_FORM] if self._begins_otherwise else []
            raise InputFileError("\n".join([*errors[:_MAX_REPORTED], *more, *form]))
        return self._requests

    def _conflicts(self, number: int, line: _Line, body: _Body) -> list[str]:
        """Return how a line conflicts with earlier ones."""
        conflicts = []
        first = self._first_with_id.setdefault(line.custom_id, number)
        if first != number:
            conflicts.append(f"custom_id {line.custom_id!r} is that of line {first} too: each line needs its own")
        if self._model is None:
            self._model = (number, body.model)
        other_line, model = self._model
        if body.model != model:
            named, other = (f"model {name!r}" if name is not None else "no model" for name in (body.model, model))
            conflicts.append(f"{named}, but line {other_line} has {other}: a batch has one model")
        return conflicts


def _has_half_pair(text: bytes) -> bool:
    """Return whether a line is JSON but for half of a surrogate pair, which msgspec reports as truncated data."""
    try:
        json.dumps(json.loads(text), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    except (ValueError, RecursionError):
        return False
    return False


def _problems(line: _Line, body: _Body) -> list[str]:
    """Return what is wrong with one line alone."""
    problems = []
    if not line.custom_id:
        problems.append("custom_id is empty")
    if line.method != "POST":
        problems.append(f"method {line.method!r}: only POST is supported")
    if line.url not in URLS:
        problems.append(f"url {line.url!r} is not supported: {', '.join(URLS)}")
    if body.stream:
        problems.append("body has stream=true: a batch has complete answers only")
    if (size_bytes := len(_job(line))) > MAX_JOB_BYTES:
        problems.append(f"the job has {size_bytes:,} bytes, and the platform accepts at most {MAX_JOB_BYTES:,}")
    return problems
