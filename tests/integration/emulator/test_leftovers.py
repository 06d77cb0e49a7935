"""Nothing is left behind, however a worker or the emulator ends: the worker, its child, its runaway grandchild."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.emulator.conftest import CommandLine, Start, alive, eventually, processes_named_in

FAMILY = Path(__file__).with_name("family_worker.py")
COMMAND = [sys.executable, str(FAMILY)]
Begin = Callable[..., CommandLine]


def family_of(pids: Path) -> list[int]:
    """The launcher, the worker, its child and its grandchild, all running."""
    family = eventually(lambda: processes_named_in(pids))
    assert len(family) == 4
    assert all(alive(pid) for pid in family)
    return family


def test_nothing_is_left_after_sigterm(command_line: Begin, tmp_path: Path) -> None:
    emulator = command_line(
        "--command", f"{sys.executable} {FAMILY}", "--workers-min", "1", "--grace", "0.5", PIDS=str(tmp_path / "pids")
    )
    family = family_of(tmp_path / "pids")
    emulator.process.send_signal(signal.SIGTERM)
    assert emulator.process.wait(20) == 0
    assert [pid for pid in family if alive(pid)] == []


def test_nothing_is_left_after_sigkill(command_line: Begin, tmp_path: Path) -> None:
    emulator = command_line(
        "--command", f"{sys.executable} {FAMILY}", "--workers-min", "1", PIDS=str(tmp_path / "pids")
    )
    family = family_of(tmp_path / "pids")
    emulator.process.kill()
    eventually(lambda: not any(alive(pid) for pid in family), 10)


def test_a_second_sigint_ends_all_at_once(command_line: Begin, tmp_path: Path) -> None:
    emulator = command_line(
        "--command", f"{sys.executable} {FAMILY}", "--workers-min", "1", "--grace", "600", PIDS=str(tmp_path / "pids")
    )
    family = family_of(tmp_path / "pids")
    emulator.process.send_signal(signal.SIGINT)
    eventually(lambda: emulator.site.state()["workers"][0]["state"] == "stopping")
    emulator.process.send_signal(signal.SIGINT)
    assert emulator.process.wait(20) == 0
    assert [pid for pid in family if alive(pid)] == []


def test_a_worker_that_is_killed_takes_its_family_with_it(start: Start, tmp_path: Path) -> None:
    site = start(command=COMMAND, workersMin=1, workersMax=1, env={"PIDS": str(tmp_path / "pids")}, grace=0.5)
    family = family_of(tmp_path / "pids")
    (worker,) = site.idle_workers(1)
    assert worker["pid"] == family[1]
    assert site.root.post(f"/workers/{worker['id']}/kill").json() == {"id": worker["id"], "killed": True}
    eventually(lambda: not any(alive(pid) for pid in family), 10)
    gone = eventually(
        lambda: [it for it in site.state()["gone"] + site.state()["workers"] if it["exitCode"] is not None]
    )
    assert (gone[0]["id"], gone[0]["exitCode"]) == (worker["id"], -9)


def test_a_worker_that_ends_by_itself_takes_its_family_with_it(start: Start, tmp_path: Path) -> None:
    environment = {"PIDS": str(tmp_path / "pids"), "OBEDIENT": "1"}
    start(command=COMMAND, workersMin=1, workersMax=1, env=environment, grace=60)
    family = family_of(tmp_path / "pids")
    os.kill(family[1], signal.SIGTERM)
    eventually(lambda: not any(alive(pid) for pid in family), 10)


def test_a_launcher_that_is_killed_takes_the_worker_and_its_group_with_it(start: Start, tmp_path: Path) -> None:
    site = start(command=COMMAND, workersMin=1, workersMax=1, env={"PIDS": str(tmp_path / "pids")}, grace=0.5)
    family = family_of(tmp_path / "pids")
    try:
        os.kill(family[0], signal.SIGKILL)
        eventually(lambda: not any(alive(pid) for pid in family[:3]), 10)
        eventually(lambda: any("exited with -9" in event["text"] for event in site.state()["events"]))
    finally:
        # Without the launcher, nobody knows of the one that went off into a session of its own.
        os.kill(family[3], signal.SIGKILL)


@pytest.mark.parametrize("command", ["no-such-command", "/"])
def test_a_command_that_cannot_be_started_is_an_unhealthy_worker_that_says_why(start: Start, command: str) -> None:
    site = start(command=[command], workersMin=1)
    workers = eventually(lambda: [it for it in site.state()["workers"] if it["state"] == "unhealthy"])
    assert workers[0]["log"][-1].startswith(f"{command} cannot be started: ")
    assert site.health()["workers"]["unhealthy"] == 1
