"""What all tests share."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# The same examples each time: a change is judged by what it does, not by what chance finds in what was there before it.
# `make fuzz` looks for others.
settings.register_profile("repeatable", derandomize=True)
if "FUZZ_EXAMPLES" not in os.environ:
    settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Async tests (`pytest.mark.anyio`) run on asyncio, as the SDK and vLLM do."""
    return "asyncio"
