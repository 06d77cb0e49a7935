"""Sends many small POST requests at little cost: libcurl's transfers on asyncio's event loop.

libcurl does HTTP and TLS in C, and keeps connections open for later requests. The loop tells it which sockets are ready
and when its timer is due. Source: https://curl.se/libcurl/c/libcurl-multi.html, "multi_socket".
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Mapping
from functools import partial
from io import BytesIO
from typing import NamedTuple

import certifi
import pycurl

from engine.run_clock import CLOCK

_CONNECT_TIMEOUT_S = 10
_MAX_REDIRECTS = 10
# More than a worker has jobs, each of which has one request in progress. libcurl's own limit follows the requests in
# progress, and it would close connections whenever there are few.
_MAX_CONNECTIONS = 4096


class Response(NamedTuple):
    """What a server answered."""

    status: int
    body: bytes


class HTTPClient:
    """A client for POST requests on the running event loop.

    It trusts the certificates of the file in `SSL_CERT_FILE` and of the directory in `SSL_CERT_DIR`, or without these
    variables the system's. It uses no proxy. A redirect is followed with the same method and body.

    Args:
        headers: of all requests.
        timeout_s: maximum duration of a request, in seconds by `engine.run_clock`. libcurl's own limit would end
            requests that have been answered, if the process was frozen meanwhile.
    """

    def __init__(self, headers: Mapping[str, str], timeout_s: float) -> None:
        self._headers = dict(headers)
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._requests: dict[pycurl.Curl, asyncio.Future[None]] = {}
        self._idle: list[pycurl.Curl] = []
        self._timer: asyncio.Handle | None = None
        self._watched: dict[int, int] = {}
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_MAXCONNECTS, _MAX_CONNECTIONS)
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._watch_socket)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._set_timer)

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Response:
        """Send a request and return the response.

        Args:
            url: `https` or `http`.
            headers: in addition to those of all requests, or instead of one with the same name; values without line
                breaks.
            body: of any size.

        Raises:
            ConnectionError: no response came. Whether the request has arrived is not known.
        """
        received = BytesIO()
        transfer = self._idle.pop() if self._idle else self._new_transfer()
        transfer.setopt(pycurl.URL, url)
        lines = [f"{name}: {value}".encode() for name, value in {**self._headers, **headers}.items()]
        # With a large body, libcurl would send `Expect: 100-continue` and wait for the server's consent.
        transfer.setopt(pycurl.HTTPHEADER, [*lines, b"Expect:"])
        transfer.setopt(pycurl.POSTFIELDS, body)
        transfer.setopt(pycurl.WRITEDATA, received)
        try:
            self._multi.add_handle(transfer)
        except pycurl.error:
            raise ConnectionAbortedError("the client is closed") from None
        self._requests[transfer] = done = self._loop.create_future()
        overdue = ConnectionError(f"timed out: no answer within {self._timeout_s:g} s")
        timer = CLOCK.call_later(self._timeout_s, partial(self._end, transfer, overdue))
        try:
            await done
            return Response(transfer.getinfo(pycurl.RESPONSE_CODE), received.getvalue())
        finally:
            timer.cancel()
            if self._requests.pop(transfer, None) is not None:
                # If the request is not complete, this closes its connection.
                self._multi.remove_handle(transfer)
                transfer.setopt(pycurl.POSTFIELDS, b"")  # It would keep the body, which may be large.
                self._idle.append(transfer)

    def close(self) -> None:
        """Close all connections. Requests in progress fail."""
        while self._requests:
            transfer, done = self._requests.popitem()
            self._multi.remove_handle(transfer)
            if not done.done():
                done.set_exception(ConnectionAbortedError("the client was closed"))
        self._multi.close()
        if self._timer is not None:
            self._timer.cancel()

    def _new_transfer(self) -> pycurl.Curl:
        transfer = pycurl.Curl()
        transfer.setopt(pycurl.POST, 1)
        transfer.setopt(pycurl.PROXY, "")
        transfer.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1)
        transfer.setopt(pycurl.CONNECTTIMEOUT, _CONNECT_TIMEOUT_S)
        transfer.setopt(pycurl.FOLLOWLOCATION, 1)
        transfer.setopt(pycurl.MAXREDIRS, _MAX_REDIRECTS)
        transfer.setopt(pycurl.POSTREDIR, pycurl.REDIR_POST_ALL)
        transfer.setopt(pycurl.REDIR_PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS)
        trusted = ssl.get_default_verify_paths()
        if trusted.cafile is not None or trusted.capath is None:
            transfer.setopt(pycurl.CAINFO, trusted.cafile or certifi.where())
        else:
            transfer.unsetopt(pycurl.CAINFO)
        # With a directory as well, libcurl reads the file again for each connection: only if there is no other way.
        if trusted.capath is not None and (trusted.cafile is None or trusted.openssl_capath_env in os.environ):
            transfer.setopt(pycurl.CAPATH, trusted.capath)
        return transfer

    def _watch_socket(self, events: int, socket: int, _multi: pycurl.CurlMulti, _data: object) -> None:
        """Watch a socket for what libcurl waits for: `POLL_IN`, `POLL_OUT` or both, or nothing any more."""
        wanted = events & pycurl.POLL_INOUT if events != pycurl.POLL_REMOVE else 0
        changed = wanted ^ self._watched.pop(socket, 0)
        if wanted:
            self._watched[socket] = wanted
        if changed & pycurl.POLL_IN:
            if wanted & pycurl.POLL_IN:
                self._loop.add_reader(socket, self._act, socket, pycurl.CSELECT_IN)
            else:
                self._loop.remove_reader(socket)
        if changed & pycurl.POLL_OUT:
            if wanted & pycurl.POLL_OUT:
                self._loop.add_writer(socket, self._act, socket, pycurl.CSELECT_OUT)
            else:
                self._loop.remove_writer(socket)

    def _set_timer(self, timeout_ms: int) -> None:
        """Set the one timer of libcurl; -1 removes it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if timeout_ms == 0:
            self._timer = self._loop.call_soon(self._on_timer)
        elif timeout_ms > 0:
            self._timer = self._loop.call_later(timeout_ms / 1000, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._act(pycurl.SOCKET_TIMEOUT, 0)

    def _act(self, socket: int, events: int) -> None:
        """Let libcurl go on with what is ready, and end the requests that are complete."""
        self._multi.socket_action(socket, events)
        queued = 1
        while queued:
            queued, complete, failed = self._multi.info_read()
            for transfer in complete:
                self._end(transfer)
            for transfer, _code, message in failed:
                self._end(transfer, ConnectionError(message))

    def _end(self, transfer: pycurl.Curl, error: ConnectionError | None = None) -> None:
        done = self._requests.get(transfer)
        if done is None or done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)
