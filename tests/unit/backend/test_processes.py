"""vLLM's processes are forked on a CPU, unless the user has set another start method."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine.backend import compat, ipc_directory, media, processes
from engine.backend.configuration import Configuration
from engine.backend.vllm_engine import VLLMEngine

pytestmark = pytest.mark.filterwarnings("ignore")


class Stopped(Exception):  # noqa: N818 (not an error: the test needs no engine)
    pass


class FakeConfiguration:
    """A configuration whose engine configuration sets the start method, as vLLM's does on a CPU."""

    settings = SimpleNamespace(
        allowed_routes=frozenset(),
        engine_stall_timeout_s=1.0,
        batch_interval_ms="auto",
        network_volume=Path("/none"),
        otel_exporter_otlp_endpoint=None,
    )
    args = SimpleNamespace(allowed_media_domains=None)
    flags = SimpleNamespace(value=lambda _: None)

    @property
    def engine_config(self) -> tuple[Any, Any]:
        os.environ[processes.START_METHOD] = "spawn"
        return SimpleNamespace(enable_log_requests=False, disable_log_stats=False), None


@pytest.mark.parametrize(("own", "preferred"), [(None, True), ("spawn", False), ("forkserver", False)])
def test_processes_are_forked_unless_the_user_has_set_another_start_method(
    own: str | None, preferred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    def stop(*_: object, **__: object) -> None:
        raise Stopped

    calls: list[None] = []
    monkeypatch.delenv(processes.START_METHOD, raising=False)
    if own is not None:
        monkeypatch.setenv(processes.START_METHOD, own)
    monkeypatch.setattr(processes, "prefer_fork", lambda: calls.append(None))
    for module, name in ((compat, "keep_deltas_separate"), (media, "install_public_media_connector")):
        monkeypatch.setattr(module, name, lambda: None)
    monkeypatch.setattr(AsyncLLM, "from_vllm_config", stop)

    with pytest.raises(Stopped):
        VLLMEngine(cast("Configuration", FakeConfiguration()))

    assert len(calls) == preferred
    assert ipc_directory.VARIABLE not in os.environ, "the directory of an engine that does not start is removed"
    monkeypatch.delenv(processes.START_METHOD, raising=False)
