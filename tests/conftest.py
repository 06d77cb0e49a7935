"""Settings and fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# The same examples in each run, so that a failure comes from the change under test; `make fuzz` tries others. No
# deadline: the time of an example depends on the load of the machine.
settings.register_profile(
    "untimed",
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore the environment after a test: vLLM changes it, and processes of later tests would inherit that."""
    before = dict(os.environ)
    yield
    monkeypatch.undo()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run async tests (`pytest.mark.anyio`) on asyncio, which the SDK and vLLM use."""
    return "asyncio"
