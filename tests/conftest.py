"""What all tests share."""

from __future__ import annotations

import os

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


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Async tests (`pytest.mark.anyio`) run on asyncio, as the SDK and vLLM do."""
    return "asyncio"
