"""The SDK's fitness checks run before the engine loads, in a separate process; with the real SDK and worker."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from builder.tiny_model.corpus import example
from engine.startup.fitness import SWITCHES
from tests import online
from tests.emulator_queue import EmulatorQueue
from tests.integration.conftest import START_S
from tests.integration.emulator.conftest import REPOSITORY, alive, eventually, site_with
from tests.processes import ROOT, VLLM_ENVIRONMENT, running

ON = dict.fromkeys(SWITCHES, "false")
# No machine has that much memory.
BAD = {"RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "false", "RUNPOD_MIN_MEMORY_GB": "100000"}
LIMITED = "from engine.startup.fitness import Checks\nwith Checks(timeout_s=3) as checks: checks.wait()"
# The same, but not before the driver is asked, which takes longer on a busy machine.
ASKED = """
import os, sys, time
from engine.startup.fitness import Checks

with Checks(timeout_s=3) as checks:
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.02)
    checks.wait()
"""


def test_on_a_bad_machine_the_worker_ends_with_the_reason_before_the_engine_loads(
    job_queue: EmulatorQueue, tiny_model: str, tmp_path: Path
) -> None:
    environment = {**VLLM_ENVIRONMENT, **job_queue.environment, "MODEL_NAME": tiny_model, **BAD}
    with running(["handler.py"], environment, tmp_path / "log") as process:
        assert process.popen.wait(START_S) == 1

        last = process.log.splitlines()[-1]
        assert last.startswith("The worker cannot start: the fitness check _memory_check failed: RuntimeError: ")
        assert last.endswith("100000.0GB required")
        assert "Loading the engine" not in process.log
        assert "EngineCore" not in process.log


def test_a_bad_machine_is_reported_to_the_platform() -> None:
    """The endpoint's variables enable the checks, which the emulator disables by default."""
    command: dict[str, Any] = {"command": [sys.executable, "handler.py"], "cwd": str(REPOSITORY)}
    with site_with(**command, env={"MODEL_NAME": "/nowhere", **BAD}, workersMin=1) as site:
        (worker,) = eventually(lambda: [it for it in site.state()["workers"] if it["state"] == "unhealthy"])

        assert worker["reason"].startswith("_memory_check: RuntimeError: Insufficient memory")
        assert any("Fitness check failed: _memory_check" in line for line in worker["log"])


@pytest.mark.skipif(not online.is_available(), reason="this machine gives its users no network namespaces")
def test_a_good_machine_is_checked_once_and_not_in_the_serving_process(tiny_model: str, tmp_path: Path) -> None:
    run = online.command("tests.integration.fit_worker", tiny_model, str(tmp_path / "log"))

    end = json.loads(subprocess.run(run, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])

    assert "".join(output["text"] for output in end["output"]) == example("ok").answer
    log = (tmp_path / "log").read_text()
    messages = re.findall(r'(?:"message": "|\| )(.*?)(?:", "level"|$)', log, re.MULTILINE)
    order = ["Registered fitness check: _memory_check", "Executing fitness check: _network_check", "Loading the engine"]
    # The serving process, which starts the SDK's loop, registers no checks.
    order += ["System fitness checks disabled via environment (RUNPOD_SKIP_AUTO_SYSTEM_CHECKS)"]
    order += ["No fitness checks registered, skipping."]
    assert [message for message in messages if message in order] == order
    start = next(message for message in messages if message.startswith("Cold start "))
    assert "fitness" in json.loads(start.removeprefix("Cold start "))["phases_s"]


@pytest.fixture
def hanging_driver(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a machine whose `nvidia-smi` writes its process id and hangs."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        f"#!/bin/sh\necho $$ > {tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid\nexec sleep 600\n"
    )
    program.chmod(0o755)
    return {**ON, "RUNPOD_SKIP_GPU_CHECK": "true", "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_checks_that_hang_are_killed_with_all_their_processes(hanging_driver: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ASKED, str(tmp_path / "pid")],
        cwd=ROOT,
        env={**os.environ, **hanging_driver},
        capture_output=True,
        check=False,
    )

    assert done.returncode == 1
    assert (
        b"ConfigurationError: the fitness checks of the SDK have not ended after 3 s; its last log line: "
        in done.stderr
    )
    eventually(lambda: not alive(int((tmp_path / "pid").read_text())))


def test_sigterm_during_the_checks_ends_the_worker_at_once(
    job_queue: EmulatorQueue, hanging_driver: dict[str, str], tmp_path: Path
) -> None:
    environment = {**job_queue.environment, "MODEL_NAME": "/nowhere", **hanging_driver}
    with running(["handler.py"], environment, tmp_path / "log") as process:
        process.wait_for((tmp_path / "pid").exists)
        # The worker, the checks, and what they ask, whose own `mv` ends now.
        family = eventually(lambda: pids if len(pids := [member.pid for member in process.family()]) == 3 else [])

        process.popen.send_signal(signal.SIGTERM)

        assert process.popen.wait(10) == 0
        eventually(lambda: not any(map(alive, family)))


def test_an_sdk_without_these_checks_is_not_changed(tmp_path: Path) -> None:
    modules = tmp_path / "runpod" / "serverless" / "modules"
    modules.mkdir(parents=True)
    for directory in (modules, modules.parent, modules.parent.parent):
        (directory / "__init__.py").touch()
    program = f"import logging; logging.basicConfig()\n{LIMITED}\nimport os; print(os.environ['{SWITCHES[0]}'])"

    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **ON, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert "The fitness checks are left to the SDK" in done.stderr
    assert done.stdout == "false\n"
