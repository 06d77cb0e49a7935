"""The sockets of the server: addresses of both families, and what is said of one that is not available."""

from __future__ import annotations

import socket

import pytest

from emulator.free_port import free_port
from engine.config.settings import Settings
from engine.errors import ConfigurationError
from engine.server.listeners import Listeners


def settings(host: str, port: int) -> Settings:
    return Settings.model_validate({"listen_host": host, "port": port})


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="the machine has no IPv6")
def test_all_addresses_of_ipv6_are_also_those_of_ipv4(port: int) -> None:
    listeners = Listeners.open(settings("::", port))
    try:
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, port), timeout=10).close()
    finally:
        listeners.close()


@pytest.mark.parametrize(
    ("host", "reason"), [("no host", "no address"), ("8.8.8.8", "Cannot assign requested address")]
)
def test_an_address_that_is_not_the_machines_is_refused_with_the_reason(host: str, reason: str, port: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"cannot listen on {host}:{port} \({reason}\)"):
        Listeners.open(settings(host, port))
