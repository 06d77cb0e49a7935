"""Settings and fixtures for all tests."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
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

# What killed processes leave in the temporary directory, such as vLLM's sockets, goes at the end of the run. pytest's
# own directories stay elsewhere, for a look at the logs of tests that have failed.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    _temporary = tempfile.TemporaryDirectory(prefix="vllm-tests-", ignore_cleanup_errors=True)
    os.environ["TMPDIR"] = tempfile.tempdir = _temporary.name

# A background job of a shell ignores Ctrl-C, and so would the processes that tests start.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _process_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore what vLLM, and the code under test, change for the whole process, so that no test depends on another.

    That is the environment, which processes of later tests would inherit; the root logger's level, which imports of
    vLLM raise; and the offline mode of the hub's client, which reads the environment only once.
    """
    environment = dict(os.environ)
    logging.root.setLevel(logging.WARNING)
    yield
    monkeypatch.undo()
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    if (hub := sys.modules.get("huggingface_hub.constants")) is not None:
        vars(hub)["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run async tests (`pytest.mark.anyio`) on asyncio, which the SDK and vLLM use."""
    return "asyncio"
