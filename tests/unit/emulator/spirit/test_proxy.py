"""Proxied requests over HTTP: the task that a worker sees, and its answer on its way to the client."""

from __future__ import annotations

import base64
import http.client
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.unit.emulator.conftest import KEY, wait_until
from tests.unit.emulator.spirit.conftest import ID, SpiritSite, Start


class Post:
    """A worker's proxy POST in pieces, as aiohttp sends a stream."""

    def __init__(self, site: SpiritSite, task_id: str, content_type: str) -> None:
        url = httpx.URL(site.agents[0])
        self.connection = http.client.HTTPConnection(url.host, url.port, timeout=10)
        self.connection.putrequest("POST", f"/apis/v1/request-proxy/{task_id}?statusCode=200")
        headers = {"Transfer-Encoding": "chunked", "Accept": "*/*", "Content-Type": content_type}
        for name, value in headers.items():
            self.connection.putheader(name, value)
        self.connection.endheaders()

    def send(self, piece: bytes) -> None:
        self.connection.send(b"%x\r\n%s\r\n" % (len(piece), piece))

    def end(self) -> int:
        self.connection.send(b"0\r\n\r\n")
        return self.connection.getresponse().status


@contextmanager
def streaming(site: SpiritSite, path: str = "/v1/chat/completions") -> Iterator[tuple[httpx.Response, Post, str]]:
    """A client's request, its response, and its worker's POST, of which the head has been sent."""
    with ThreadPoolExecutor(1) as pool:
        request = site.proxied.build_request("POST", path, json={"stream": True})
        response = pool.submit(site.proxied.send, request, stream=True)
        task_id = site.taken()["id"]
        post = Post(site, task_id, "text/event-stream")
        try:
            yield response.result(10), post, task_id
        finally:
            response.result(10).close()
            post.connection.close()


def test_the_worker_gets_the_whole_request_and_the_client_the_whole_answer(site: SpiritSite) -> None:
    with ThreadPoolExecutor(1) as pool:
        headers = [("X-Two", "1"), ("X-Two", "2"), ("Connection", "keep-alive")]
        sent = pool.submit(site.proxied.post, "/v1/embeddings?a=%20b", content=b"\xff body", headers=headers)
        task = site.taken()
        parsed = task["parsed"]
        assert parsed.keys() == {"method", "uri", "header", "body"}
        assert (parsed["method"], parsed["uri"]) == ("POST", "/v1/embeddings?a=%20b")
        assert base64.b64decode(parsed["body"]) == b"\xff body"
        assert parsed["header"]["X-Two"] == ["1", "2"]
        assert parsed["header"]["Authorization"] == [f"{ID}-{KEY}"]
        assert parsed["header"]["Content-Length"] == ["6"]
        assert not {"Host", "Connection"} & parsed["header"].keys()
        assert task["headers"]["Ease-Mode"] == "sync"

        answer = {"X-Answer": "yes", "Content-Type": "text/plain", "User-Agent": "aiohttp", "Accept": "*/*"}
        posted = site.agent.post(
            f"/request-proxy/{task['id']}?statusCode=418", content=b"short and stout", headers=answer
        )
        assert posted.status_code == 200
        response = sent.result(10)
    assert (response.status_code, response.content) == (418, b"short and stout")
    assert (response.headers["x-answer"], response.headers["content-type"]) == ("yes", "text/plain")
    assert response.headers["content-length"] == "15"
    assert not {"user-agent", "accept", "host"} & response.headers.keys()


def test_pieces_reach_the_client_one_by_one(site: SpiritSite) -> None:
    """The next piece is sent only when the client has the one before."""
    with streaming(site) as (response, post, _):
        assert response.headers["content-type"] == "text/event-stream"
        pieces = response.iter_raw()
        for number in range(3):
            post.send(b"data: %d\n\n" % number)
            assert next(pieces) == b"data: %d\n\n" % number
        assert post.end() == 200
        assert list(pieces) == []


def test_paths_below_api_are_proxied_too_and_others_are_not(site: SpiritSite) -> None:
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(site.proxied.get, "/api/tags")
        task = site.taken()
        assert (task["parsed"]["method"], task["parsed"]["uri"], task["parsed"]["body"]) == ("GET", "/api/tags", "")
        site.agent.post(f"/request-proxy/{task['id']}?statusCode=200", content=b"{}")
        assert sent.result(10).json() == {}
    assert site.proxied.get("/v2/models").status_code == 404


@pytest.mark.parametrize(
    ("authorization", "status"),
    [("", 401), (KEY, 401), (f"{ID}-wrong", 401), (f"other-{KEY}", 401), (f"Bearer {ID}-{KEY}", 401)],
)
def test_the_authorization_header_alone_names_the_service(site: SpiritSite, authorization: str, status: int) -> None:
    response = site.proxied.get("/v1/models", headers={"Authorization": authorization})
    assert (response.status_code, site.take()) == (status, None)


def test_a_bearer_is_accepted_by_a_setting(start: Start) -> None:
    site = start(acceptBearer=True, firstByte=0.2)
    response = site.proxied.get("/v1/models", headers={"Authorization": f"Bearer {ID}-{KEY}"})
    assert (response.status_code, response.json()) == (408, {"error": "request timeout"})


def test_without_an_answer_in_time_the_client_gets_408_and_a_late_answer_is_for_nobody(start: Start) -> None:
    site = start(firstByte=0.3)
    assert site.proxied.get("/v1/models").json() == {"error": "request timeout"}
    task_id = site.taken()["id"]
    with pytest.raises(httpx.TransportError):
        site.agent.post(f"/request-proxy/{task_id}?statusCode=200", content=b"late")


def test_a_transfer_is_cut_at_its_time_limit(start: Start) -> None:
    site = start(transfer=0.4)
    with streaming(site) as (response, post, _):
        post.send(b"data: 0\n\n")
        with pytest.raises(httpx.TransportError):
            list(response.iter_raw())
        assert post.connection.sock.recv(1) == b""


@pytest.mark.parametrize("answer_early", [False, True])
def test_the_worker_learns_at_once_that_its_client_has_gone(start: Start, answer_early: bool) -> None:
    """Without sending another piece: by the end of its connection, or by an early 200."""
    site = start(answerEarly=answer_early)
    with streaming(site) as (response, post, _):
        post.send(b"data: 0\n\n")
        assert next(response.iter_raw()) == b"data: 0\n\n"
        response.close()
        if answer_early:
            assert post.connection.getresponse().status == 200
        else:
            with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
                post.connection.getresponse()


def test_a_post_that_breaks_off_cuts_the_client(site: SpiritSite) -> None:
    """The client must not take half an answer for a whole one."""
    with streaming(site) as (response, post, _):
        post.send(b"data: 0\n\n")
        pieces = response.iter_raw()
        assert next(pieces) == b"data: 0\n\n"
        post.connection.close()
        with pytest.raises(httpx.TransportError):
            list(pieces)


def test_a_second_answer_is_accepted_and_recorded_and_changes_nothing(site: SpiritSite) -> None:
    with streaming(site) as (response, post, task_id):
        second = site.agent.post(f"/request-proxy/{task_id}?statusCode=500", content=b'{"error": "x"}')
        assert second.status_code == 200
        post.send(b"data: 0\n\n")
        post.end()
        assert (response.status_code, response.read()) == (200, b"data: 0\n\n")
    task = site.endpoint.queue.task(task_id)
    assert task is not None
    assert [answer.status for answer in task.answers] == [200, 500]


def test_a_slow_client_slows_its_worker_down(site: SpiritSite) -> None:
    with streaming(site) as (response, post, _):
        sent: list[int] = []

        def send_all() -> None:
            piece = b"x" * 1_000_000
            for number in range(200):
                post.send(piece)
                sent.append(number)
            post.end()

        worker = threading.Thread(target=send_all)
        worker.start()
        wait_until(lambda: sent)
        threading.Event().wait(0.5)
        assert len(sent) < 150
        assert sum(map(len, response.iter_raw())) == 200_000_000
        worker.join()


def test_an_invalid_status_is_refused(site: SpiritSite) -> None:
    for status in ("", "abc", "99", "700"):
        assert site.agent.post(f"/request-proxy/x?statusCode={status}", content=b"").status_code == 400


def shown(site: SpiritSite) -> dict[str, Any]:
    endpoint: dict[str, Any] = site.root.get("/state").json()["endpoints"][0]
    return endpoint


def test_the_page_shows_proxied_requests_and_how_to_reach_the_service(site: SpiritSite) -> None:
    with streaming(site) as (_, post, task_id):
        post.send(b"data: 0\n\n")
        wait_until(lambda: shown(site)["jobs"][0]["outputs"] == 1)
        state = shown(site)
        assert (state["openaiPath"], state["authorization"], state["cancelPath"]) == ("/v1", f"{ID}-{{key}}", None)
        (job,) = state["jobs"]
        assert (job["id"], job["kind"], job["workerId"]) == (task_id, "/v1/chat/completions", "external-1")
        post.end()
