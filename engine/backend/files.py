"""Reads a file that a job names: by URL, in base64, or by its path on the network volume.

Nothing larger than the limit is read into memory, and the event loop is not blocked.
"""

from __future__ import annotations

import asyncio
import mimetypes
import os
import re
import stat
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import pybase64

from engine.errors import FileNotAllowedError, InvalidInputError

# Text that begins with `/` and is longer than any path of Linux is base64, as that of an MP3 file begins so too.
_MAX_PATH_CHARACTERS = 4096
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,30}):")
_MEDIA_TYPE = re.compile(r"[\w.+-]+/[\w.+-]+", re.ASCII)
_ANY_TYPE = "application/octet-stream"
_ACCEPTED = "Accepted: an http(s) URL, a data: URL or other base64, or the path of a file on the network volume"

Download = Callable[[str, int], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class File:
    """A file's content, with the name and the media type that an upload has."""

    name: str
    content_type: str
    data: bytes

    @classmethod
    def named(cls, path: str, data: bytes) -> File:
        """Return the file of a path or of a URL's path, which says its type."""
        # Half of a surrogate pair is no character that a form can hold.
        name = PurePosixPath(path).name.encode(errors="replace").decode() or "file"
        return cls(name, mimetypes.guess_type(name)[0] or _ANY_TYPE, data)


class Files:
    """Reads the files that jobs name.

    Args:
        volume: mount point of the network volume.
        max_bytes: of a file.
        limit: names the setting behind `max_bytes`, for messages.
        download: returns the content of a URL, of at most so many bytes.
    """

    def __init__(self, volume: Path, max_bytes: int, limit: str, download: Download) -> None:
        self._volume = volume
        self._max_bytes = max_bytes
        self._limit = limit
        self._download = download

    async def read(self, reference: str) -> File:
        """Return the file.

        Args:
            reference: a URL, base64, or a path.

        Raises:
            InvalidInputError: it is none of them, is too large, or cannot be read.
            FileNotAllowedError: the path is not on the network volume.
            JobError: the URL cannot be fetched.
        """
        match = _SCHEME.match(reference)
        scheme = match[1].lower() if match else ""
        if scheme in ("http", "https"):
            data = await self._download(reference, self._max_bytes)
            return File.named(_url_path(reference), data)
        if scheme == "file":
            return await asyncio.to_thread(self._read_path, _url_path(reference))
        if scheme == "data":
            return await asyncio.to_thread(self._decode_data_url, reference)
        if scheme:
            raise InvalidInputError(f"a file cannot be read from {scheme}: URLs. {_ACCEPTED}")
        if reference.startswith("/") and len(reference) <= _MAX_PATH_CHARACTERS:
            return await asyncio.to_thread(self._read_path, reference)
        return File("file", _ANY_TYPE, await asyncio.to_thread(self._decode, reference))

    def _read_path(self, text: str) -> File:
        try:
            path = Path(os.path.realpath(text))
            if not path.is_relative_to(os.path.realpath(self._volume)):
                raise FileNotAllowedError(self._volume)
            with open(path, "rb", opener=_open_at_once) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise InvalidInputError(f"{text!a} is not a file")
                self._check_size(status.st_size)
                data = file.read(self._max_bytes + 1)
            self._check_size(len(data))
            return File.named(text, data)
        except IsADirectoryError:
            raise InvalidInputError(f"{text!a} is not a file") from None
        except OSError as error:
            raise InvalidInputError(f"{text!a} cannot be read: {error.strerror}") from None
        except ValueError:
            raise InvalidInputError(f"{text!a} is not a path") from None

    def _decode_data_url(self, url: str) -> File:
        header, comma, text = url[len("data:") :].partition(",")
        media_type, *parameters = header.split(";")
        if not comma or parameters[-1:] != ["base64"]:
            raise InvalidInputError("a data: URL must be in base64: data:audio/wav;base64,…")
        data = self._decode(text)
        if not _MEDIA_TYPE.fullmatch(media_type):
            return File("file", _ANY_TYPE, data)
        return File("file" + (mimetypes.guess_extension(media_type) or ""), media_type, data)

    def _decode(self, text: str) -> bytes:
        self._check_size((len(text) - text.count("\n") - text.count("\r")) * 3 // 4 - 2)
        try:
            try:
                return pybase64.b64decode(text, validate=True)
            except ValueError:  # In lines, as `base64` and e-mail have it.
                return pybase64.b64decode("".join(text.split()), validate=True)
        except ValueError:
            raise InvalidInputError(f"the file is not base64. {_ACCEPTED}") from None

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self._max_bytes:
            raise InvalidInputError(
                f"the file has {size_bytes / 2**20:.1f} MiB, and {self._limit} of the worker allows "
                f"{self._max_bytes / 2**20:g} MiB"
            )


def _url_path(url: str) -> str:
    try:
        return unquote(urlsplit(url).path)
    except ValueError:
        raise InvalidInputError("the file's URL is not valid") from None


def _open_at_once(path: str, flags: int) -> int:
    """Open a file, also a pipe that nobody writes to."""
    return os.open(path, flags | os.O_NONBLOCK)
