"""A fake model hub on loopback for the real `huggingface_hub` client, with fault injection.

It serves the routes that the client uses: `GET /api/models/REPO/revision/REV`, and `GET` and `HEAD
/REPO/resolve/REV/PATH`. Large files are redirected to another origin, as the real hub does.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
LARGE_BYTES = 64 * 1024
_PIECE_BYTES = 64 * 1024
_POLL_INTERVAL_S = 0.02


@dataclass(frozen=True)
class Fault:
    """What happens to one request.

    Attributes:
        status: answer with this status.
        headers: of that answer.
        cut_at: close the connection after this many bytes of the content.
        piece_s: delay before each piece of 64 KiB.
        flip: send the content with its last bit flipped.
        until: wait until this returns True.
        pause_at: wait after this many bytes of the content instead of before the answer.
        body: answer with this HTML page.
    """

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_at: int | None = None
    piece_s: float = 0.0
    flip: bool = False
    until: Callable[[], bool] = lambda: True
    pause_at: int = 0
    body: bytes | None = None


@dataclass
class Repository:
    """A repository: its files, and who may read them.

    Attributes:
        files: content by path.
        commit: of the main branch.
        token: required to read the files; None for a public repository.
        gated: without the token the answer is 401 or 403 instead of "not found".
        faults: for the next requests of a path, one each.
        always: fault for all requests of a path.
        sizes: announced sizes in bytes that differ from the real ones.
    """

    files: dict[str, bytes]
    commit: str = COMMIT
    token: str | None = None
    gated: bool = False
    faults: dict[str, deque[Fault]] = field(default_factory=dict)
    always: dict[str, Fault] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, directory: Path) -> Repository:
        paths = [path for path in directory.rglob("*") if path.is_file()]
        return cls({str(path.relative_to(directory)): path.read_bytes() for path in paths})

    def fault(self, path: str) -> Fault:
        queued = self.faults.get(path)
        return queued.popleft() if queued else self.always.get(path, Fault())


@dataclass
class Hub:
    """A running hub."""

    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    tokens_at_cdn: list[str] = field(default_factory=list)
    sent_bytes: int = 0
    closed: threading.Event = field(default_factory=threading.Event)
    _counting: threading.Lock = field(default_factory=threading.Lock)

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which a client in another process uses this hub, with long timeouts."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "300",
        }

    def count(self, size: int) -> None:
        """Add to `sent_bytes`; thread-safe."""
        with self._counting:
            self.sent_bytes += size

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds or the hub is closed."""
        while not condition() and not self.closed.wait(_POLL_INTERVAL_S):
            pass


@contextmanager
def running() -> Iterator[Hub]:
    """Run a hub at a free port of loopback."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.hub = hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closed.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    hub: Hub


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def log_message(self, *_: object) -> None:
        """Stay silent."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path):
            self._model(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/cdn/(.+?)//(.+)", path):
            if token := self.headers.get("Authorization"):
                self.hub.tokens_at_cdn.append(token)
            self._content(self.hub.repositories[match[1]], match[2], {})
        else:
            self._refuse(404, "", "no such page")

    def _repository(self, name: str, revision: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        allowed = repository and self.headers.get("Authorization") == f"Bearer {repository.token}"
        if repository is None or (repository.token and not repository.gated and not allowed):
            self._refuse(401, "RepoNotFound", "Repository not found")
        elif revision not in ("main", repository.commit):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repository
        return None

    def _model(self, name: str, revision: str) -> None:
        repository = self._repository(name, revision)
        if repository is None:
            return
        if self._apply(repository.fault("")):
            return
        siblings = [_sibling(path, content, repository.sizes.get(path)) for path, content in repository.files.items()]
        self._answer(200, json.dumps({"id": name, "sha": repository.commit, "siblings": siblings}).encode())

    def _file(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name, revision)
        if repository is None:
            return
        if repository.gated and self.headers.get("Authorization") != f"Bearer {repository.token}":
            self._refuse(403 if "Authorization" in self.headers else 401, "GatedRepo", "Access is restricted")
        elif path not in repository.files:
            self._refuse(404, "EntryNotFound", "Entry not found")
        elif len(repository.files[path]) >= LARGE_BYTES:
            elsewhere = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{name}//{path}"
            self._answer(302, b"", {"Location": elsewhere, **_metadata(repository, path)})
        else:
            self._content(repository, path, _metadata(repository, path))

    def _content(self, repository: Repository, path: str, headers: Mapping[str, str]) -> None:
        fault = repository.fault(path)
        if self._apply(fault):
            return
        content = repository.files[path]
        if fault.flip:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
            headers = {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self.send_response(206 if start else 200)
        for name, value in {**headers, "Content-Length": str(len(content) - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        end = len(content) if fault.cut_at is None else min(len(content), start + fault.cut_at)
        for at in range(start, end, _PIECE_BYTES):
            time.sleep(fault.piece_s)
            if at - start >= fault.pause_at:
                self.hub.wait(fault.until)
            piece = content[at : min(at + _PIECE_BYTES, end)]
            # Counted first: the client may check the count as soon as it has the piece.
            self.hub.count(len(piece))
            try:
                self.wfile.write(piece)
            except OSError:  # the client has closed the connection
                self.hub.count(-len(piece))
                self.close_connection = True
                return
        self.close_connection = end < len(content)

    def _apply(self, fault: Fault) -> bool:
        """Apply a fault that replaces the answer; return whether it did."""
        if fault.status or fault.body is not None:
            self.hub.wait(fault.until)
        if fault.status:
            self._refuse(fault.status, "", "broken", fault.headers)
        elif fault.body is not None:
            self._answer(200, fault.body, {"Content-Type": "text/html"})
        return bool(fault.status) or fault.body is not None

    def _refuse(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        details = {"X-Error-Code": code, "X-Error-Message": message} if code else {}
        self._answer(status, json.dumps({"error": message}).encode(), {**details, **(headers or {})})

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _sibling(path: str, content: bytes, announced_bytes: int | None) -> dict[str, object]:
    size = len(content) if announced_bytes is None else announced_bytes
    sibling: dict[str, object] = {"rfilename": path, "size": size, "blobId": _git_sha1(content)}
    if size >= LARGE_BYTES:
        sibling["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 130}
    return sibling


def _metadata(repository: Repository, path: str) -> dict[str, str]:
    content = repository.files[path]
    if len(content) < LARGE_BYTES:
        return {"X-Repo-Commit": repository.commit, "ETag": f'"{_git_sha1(content)}"'}
    digest = hashlib.sha256(content).hexdigest()
    return {"X-Repo-Commit": repository.commit, "X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{digest}"'}


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
