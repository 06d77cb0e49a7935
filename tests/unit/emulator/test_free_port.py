"""The free port: outside the range from which the system takes ports for outgoing connections, and not in use."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from emulator import free_port as module
from emulator.free_port import free_port


def test_it_can_be_bound_and_no_connection_gets_it() -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    port = free_port()
    assert port not in range(first, last + 1)
    socket.create_server(("127.0.0.1", port)).close()


def test_a_port_in_use_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = free_port()
    with socket.create_server(("127.0.0.1", taken)):
        free = free_port()
        monkeypatch.setattr(module, "_PORTS", [taken, free])
        assert {free_port() for _ in range(20)} == {free}
