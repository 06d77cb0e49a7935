"""Fixtures: an account in memory, and commands on it."""

from __future__ import annotations

import io

import httpx
import pytest

from deploy.api import Api, client
from deploy.console import Console
from deploy.context import Context
from deploy.environment import Redaction
from tests.unit.deploy.fakes import KEY, URL, FakeRunPod


class Terminal:
    """What a command has written."""

    def __init__(self) -> None:
        self.out, self.err = io.StringIO(), io.StringIO()
        self.console = Console(Redaction([KEY]), self.out, self.err)

    @property
    def result(self) -> str:
        return self.out.getvalue()

    @property
    def messages(self) -> str:
        return self.err.getvalue()


@pytest.fixture
def runpod() -> FakeRunPod:
    return FakeRunPod()


@pytest.fixture
def terminal() -> Terminal:
    return Terminal()


@pytest.fixture
def http(runpod: FakeRunPod) -> httpx.AsyncClient:
    return client(URL, KEY, httpx.MockTransport(runpod))


@pytest.fixture
def api(http: httpx.AsyncClient, terminal: Terminal) -> Api:
    return Api(http, terminal.console.log, wait_s=0)


@pytest.fixture
def context(http: httpx.AsyncClient, api: Api, terminal: Terminal) -> Context:
    return Context(http, api, terminal.console, timeout_s=5, poll_s=0.01)
