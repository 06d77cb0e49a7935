"""No process is left running, however a worker or the emulator exits: worker, child, or orphaned grandchild."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.emulator.conftest import CommandLine, Start, alive, eventually, processes_named_in

PROCESS_TREE_WORKER = Path(__file__).with_name("process_tree_worker.py")
COMMAND = [sys.executable, str(PROCESS_TREE_WORKER)]
OPTIONS = ("--command", " ".join(COMMAND), "--workers-min", "1")
Begin = Callable[..., CommandLine]


def process_tree(pids: Path) -> list[int]:
    """Wait for the process ids of the launcher, the worker, its child and its grandchild, all running."""
    tree = eventually(lambda: processes_named_in(pids))
    assert len(tree) == 4
    assert all(alive(pid) for pid in tree)
    return tree


def test_no_process_is_left_after_sigterm(command_line: Begin, tmp_path: Path) -> None:
    emulator = command_line(*OPTIONS, "--grace", "0.5", PIDS=str(tmp_path / "pids"))
    tree = process_tree(tmp_path / "pids")
    emulator.process.send_signal(signal.SIGTERM)
    assert emulator.process.wait(20) == 0
    assert [pid for pid in tree if alive(pid)] == []


def test_no_process_is_left_after_sigkill(command_line: Begin, tmp_path: Path) -> None:
    emulator = command_line(*OPTIONS, PIDS=str(tmp_path / "pids"))
    tree = process_tree(tmp_path / "pids")
    emulator.process.kill()
    eventually(lambda: not any(alive(pid) for pid in tree), 30)


def test_a_second_sigint_kills_all_workers_at_once(command_line: Begin, tmp_path: Path) -> None:
    emulator = command_line(*OPTIONS, "--grace", "600", PIDS=str(tmp_path / "pids"))
    tree = process_tree(tmp_path / "pids")
    emulator.process.send_signal(signal.SIGINT)
    eventually(lambda: emulator.site.state()["workers"][0]["state"] == "stopping")
    emulator.process.send_signal(signal.SIGINT)
    assert emulator.process.wait(20) == 0
    assert [pid for pid in tree if alive(pid)] == []


def test_killing_a_worker_kills_its_descendants(start: Start, tmp_path: Path) -> None:
    site = start(command=COMMAND, workersMin=1, workersMax=1, env={"PIDS": str(tmp_path / "pids")}, grace=0.5)
    tree = process_tree(tmp_path / "pids")
    (worker,) = site.idle_workers(1)
    assert worker["pid"] == tree[1]
    assert site.root.post(f"/workers/{worker['id']}/kill").json() == {"id": worker["id"], "killed": True}
    eventually(lambda: not any(alive(pid) for pid in tree), 30)
    exited = eventually(
        lambda: [it for it in site.state()["gone"] + site.state()["workers"] if it["exitCode"] is not None]
    )
    assert (exited[0]["id"], exited[0]["exitCode"]) == (worker["id"], -9)


def test_the_descendants_of_a_worker_that_exits_are_killed(start: Start, tmp_path: Path) -> None:
    environment = {"PIDS": str(tmp_path / "pids"), "EXITS_ON_SIGTERM": "1"}
    start(command=COMMAND, workersMin=1, workersMax=1, env=environment, grace=60)
    tree = process_tree(tmp_path / "pids")
    os.kill(tree[1], signal.SIGTERM)
    eventually(lambda: not any(alive(pid) for pid in tree), 30)


def test_killing_the_launcher_kills_the_worker_and_its_process_group(start: Start, tmp_path: Path) -> None:
    site = start(command=COMMAND, workersMin=1, workersMax=1, env={"PIDS": str(tmp_path / "pids")}, grace=0.5)
    tree = process_tree(tmp_path / "pids")
    try:
        os.kill(tree[0], signal.SIGKILL)
        eventually(lambda: not any(alive(pid) for pid in tree[:3]), 30)
        eventually(lambda: any("exited with -9" in event["text"] for event in site.state()["events"]))
    finally:
        # Without the launcher, nothing can find the grandchild in a session of its own.
        os.kill(tree[3], signal.SIGKILL)


@pytest.mark.parametrize("command", ["no-such-command", "/"])
def test_a_command_that_cannot_be_started_is_an_unhealthy_worker_with_the_reason_in_its_log(
    start: Start, command: str
) -> None:
    site = start(command=[command], workersMin=1)
    workers = eventually(lambda: [it for it in site.state()["workers"] if it["state"] == "unhealthy"])
    assert workers[0]["log"][-1].startswith(f"{command} cannot be started: ")
    assert site.health()["workers"]["unhealthy"] == 1
