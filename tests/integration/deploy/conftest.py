"""The deployment's command line on an emulator of RunPod whose created endpoints run scripted workers."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy import __main__ as command_line
from deploy.context import Context
from emulator.app import run_in_thread
from emulator.settings import EmulatorSettings
from tests.processes import ROOT

KEY = "rpa_notarealkey"
READ_KEY = "rpa_onlyforreading"
WORKER = [sys.executable, "-m", "tests.scripted_worker"]
# `up` of an endpoint that needs no doctor.
UP = ("up", "org/tiny", "--skip-doctor", "--gpu", "4090", "--image", "x/y:1")


@dataclass
class Ran:
    """A command that has run."""

    code: int
    out: str
    err: str


class Account:
    """An account on the emulator, whose commands run in this process."""

    def __init__(
        self, url: str, ca_file: Path | None, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch
    ) -> None:
        self.url = url
        self.ca_file = ca_file
        self.http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
        self._capsys = capsys
        self._patch = patch

    def run(self, *arguments: str, key: str | None = KEY, timeout_s: float = 60) -> Ran:
        """Run a command; return its exit code and what it wrote."""
        if key is None:
            self._patch.delenv("RUNPOD_API_KEY", raising=False)
        else:
            self._patch.setenv("RUNPOD_API_KEY", key)
        waits = ["--timeout", str(timeout_s)] if arguments[0] in ("up", "update", "rollback") else []
        code = command_line.main([*arguments, "--api-url", self.url, *waits])
        printed = self._capsys.readouterr()
        return Ran(code, printed.out, printed.err)

    def endpoints(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.http.get("/v2/serverless").raise_for_status().json()["endpoints"]
        return found

    def faults(self, *rules: dict[str, Any], **settings: Any) -> None:
        self.http.put("/faults", json={"rules": rules, **settings}).raise_for_status()


@pytest.fixture
def account(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Account]]:
    """Return a function that starts an emulator; `control_plane` and `endpoint` are its settings."""
    monkeypatch.setattr(command_line, "Context", functools.partial(Context, poll_s=0.05))
    monkeypatch.delenv("VLLM_SERVERLESS_IMAGE", raising=False)
    with ExitStack() as stack:

        def start(control_plane: dict[str, Any] | None = None, **endpoint: Any) -> Account:
            base = {"command": WORKER, "cwd": str(ROOT), "rateLimits": False, "grace": 5, **endpoint}
            document = {
                "port": 0,
                "apiKeys": [KEY, READ_KEY],
                "endpoints": [],
                "controlPlane": {
                    "endpoint": base, "rateLimits": None, "permissions": {READ_KEY: "READ"}, **(control_plane or {})
                },
            }  # fmt: skip
            emulator = stack.enter_context(run_in_thread(EmulatorSettings.model_validate(document)))
            made = Account(emulator.url, emulator.ca_file, capsys, monkeypatch)
            stack.callback(made.http.close)
            return made

        yield start
