"""An emulator in a thread: ready on entry, or an error."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from emulator import app
from emulator.app import Emulator, run_in_thread
from emulator.settings import EmulatorSettings

SETTINGS = EmulatorSettings.model_validate({"port": 0})


@pytest.mark.parametrize("responds_to_stop", [True, False])
def test_an_emulator_that_does_not_start_in_time_is_stopped_and_raises_a_timeout(
    monkeypatch: pytest.MonkeyPatch, responds_to_stop: bool
) -> None:
    stopped, released = threading.Event(), threading.Event()

    async def hang(emulator: Emulator, _ready: Callable[[], None]) -> None:
        await emulator._stop_requested.wait()
        stopped.set()
        if not responds_to_stop:
            await asyncio.to_thread(released.wait)
        emulator._socket.close()

    monkeypatch.setattr(Emulator, "run", hang)
    monkeypatch.setattr(app, "_STARTUP_TIMEOUT_S", 0.2)
    try:
        with pytest.raises(TimeoutError, match=r"did not start within 0\.2 s"), run_in_thread(SETTINGS):
            pytest.fail("it must not be ready")
        assert stopped.wait(5)
    finally:
        released.set()


def test_an_error_during_startup_is_raised_in_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(emulator: Emulator, _ready: Callable[[], None]) -> None:
        emulator._socket.close()
        raise OSError("no more sockets")

    monkeypatch.setattr(Emulator, "run", fail)
    with pytest.raises(OSError, match="no more sockets"), run_in_thread(SETTINGS):
        pytest.fail("it must not be ready")
