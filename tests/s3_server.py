"""A real S3 server on the loopback interface, nanio, which checks each request's and each link's signature."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from emulator.free_port import free_port
from tests.processes import running

KEY_ID = "AKNOTAREALKEYID"
KEY = "notarealsecretaccesskey"
NAME = "results"


@dataclass(frozen=True)
class S3Server:
    """The server; it has one bucket.

    Attributes:
        url: of its API.
        directory: where the bucket's objects are, as files.
    """

    url: str
    directory: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a worker needs to use the bucket."""
        return {
            "BUCKET_ENDPOINT_URL": self.url,
            "BUCKET_NAME": NAME,
            "BUCKET_ACCESS_KEY_ID": KEY_ID,
            "BUCKET_SECRET_ACCESS_KEY": KEY,
        }


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Run the server during the block."""
    port = free_port()
    directory = folder / "s3" / NAME
    directory.mkdir(parents=True)
    command = ["-m", "nanio", "serve", "--host=127.0.0.1", f"--port={port}", f"--data-dir={directory.parent}"]
    keys = {"NANIO_ACCESS_KEY": KEY_ID, "NANIO_SECRET_KEY": KEY}
    url = f"http://127.0.0.1:{port}"
    with running(command, keys, folder / "s3.log") as process:
        process.wait_for(lambda: _answers(url))
        yield S3Server(url, directory)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == httpx.codes.FORBIDDEN
    except httpx.TransportError:
        return False
