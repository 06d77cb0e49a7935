"""An emulator without worker processes, and clients of its control plane."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from emulator.app import run_in_thread
from emulator.settings import EmulatorSettings
from tests.control_plane import ControlPlaneClient
from tests.unit.emulator.conftest import NO_CERTIFICATES

KEY, READ_KEY, NO_KEY = "a-key-of-the-tests", "a-key-that-reads", "a-key-without-rights"
StartPlane = Callable[..., ControlPlaneClient]


@pytest.fixture(scope="module")
def start_plane() -> Iterator[StartPlane]:
    """Return a function that starts an emulator with these settings of its control plane."""
    with ExitStack() as stack:

        def begin(**settings: Any) -> ControlPlaneClient:
            document = {
                "port": 0,
                "apiKeys": [KEY, READ_KEY, NO_KEY],
                "endpoints": [],
                "controlPlane": {
                    "permissions": {READ_KEY: "READ", NO_KEY: "NONE"},
                    "rateLimits": None,
                    "endpoint": {"longPoll": 0.3},
                    **settings,
                },
            }
            emulator = stack.enter_context(run_in_thread(EmulatorSettings.model_validate(document)))
            headers = {"Authorization": f"Bearer {KEY}"}
            client = httpx.Client(base_url=emulator.url, headers=headers, timeout=20, verify=NO_CERTIFICATES)
            return ControlPlaneClient(stack.enter_context(client))

        yield begin


@pytest.fixture(scope="module")
def plane(start_plane: StartPlane) -> ControlPlaneClient:
    return start_plane()
