"""Image pull, start and end of a worker's container, in virtual time."""

from __future__ import annotations

import asyncio
from typing import Any

from emulator.control_plane.container import PULL_RETRY_S, Host
from tests.unit.emulator.fakes import FakeProcess
from tests.virtual_time import in_virtual_time

IMAGE = "registry.example:5000/me/vllm:1"


class Worker:
    """A container with a fake process; also its listener."""

    def __init__(self, pull_s: float = 0, missing: set[str] | None = None, note: str | None = None) -> None:
        self.lines: list[str] = []
        self.log_lines: list[str] = []
        self.exits: list[int] = []
        self.processes: list[FakeProcess] = []
        self.missing = missing or set()
        host = Host(
            self._start,
            image=lambda: IMAGE,
            note=lambda: note,
            log=lambda worker, line: self.lines.append(f"{worker}: {line}"),
            pull_s=pull_s,
            is_missing=lambda image: image in self.missing,
        )
        self.container = host.start_worker(("worker",), {"RUNPOD_POD_ID": "w"}, None, self)

    def _start(self, *arguments: Any) -> FakeProcess:
        self.processes.append(FakeProcess(*arguments))
        return self.processes[-1]

    def on_log_line(self, line: str) -> None:
        self.log_lines.append(line)

    def on_exit(self, code: int) -> None:
        self.exits.append(code)


@in_virtual_time
async def test_an_image_that_is_there_starts_at_once() -> None:
    worker = Worker(note="a tiny model answers")
    (process,) = worker.processes
    assert worker.container.pid == 1
    assert worker.lines == [
        "w: a tiny model answers",
        f"w: create container {IMAGE}",
        f"w: Status: Image is up to date for {IMAGE}",
        f"w: start container for {IMAGE}: begin",
    ]
    process.listener.on_log_line("hello")
    worker.container.terminate()
    assert process.terminated
    process.listener.on_exit(-15)
    assert worker.log_lines == ["hello"]
    assert worker.lines[-3:] == [
        f"w: stop container {IMAGE}",
        "w: worker exited with exit code 143",
        f"w: remove container {IMAGE}",
    ]
    assert worker.exits == [-15]


@in_virtual_time
async def test_the_process_starts_when_the_pull_ends() -> None:
    worker = Worker(pull_s=30)
    await asyncio.sleep(29.9)
    assert worker.processes == []
    assert worker.container.pid is None
    await asyncio.sleep(0.2)
    assert len(worker.processes) == 1
    assert "w: 1 Pulling from registry.example:5000/me/vllm" in worker.lines
    assert f"w: Status: Downloaded newer image for {IMAGE}" in worker.lines


@in_virtual_time
async def test_a_missing_image_is_tried_again_until_it_is_there() -> None:
    worker = Worker(missing={IMAGE})
    await asyncio.sleep(2.5 * PULL_RETRY_S)
    errors = [line for line in worker.lines if line.startswith("w: error pulling image: ")]
    assert len(errors) == 3
    assert f"manifest for {IMAGE} not found" in errors[0]
    assert worker.processes == []
    worker.missing.clear()
    await asyncio.sleep(PULL_RETRY_S)
    assert len(worker.processes) == 1


@in_virtual_time
async def test_a_pull_ends_with_its_worker() -> None:
    for name in ("terminate", "kill"):
        worker = Worker(pull_s=30)
        getattr(worker.container, name)()
        getattr(worker.container, name)()
        await asyncio.sleep(60)
        assert len(worker.exits) == 1
        assert worker.processes == []
