"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# The same examples each time: a change is judged by what it does, not by what chance finds in what was there before it.
# `make fuzz` looks for others. How long an example takes says more of the machine than of the code.
settings.register_profile(
    "untimed",
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the environment back: vLLM writes into it, and the processes of later tests would inherit that."""
    before = dict(os.environ)
    yield
    monkeypatch.undo()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Async tests (`pytest.mark.anyio`) run on asyncio, as the SDK and vLLM do."""
    return "asyncio"
