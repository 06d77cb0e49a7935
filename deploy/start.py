"""Watches workers start: their phases from states and logs, and the faults that waiting does not help."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress

from deploy.api import Api, LogLine
from deploy.console import Console, Progress
from deploy.errors import DeployError, WorkerError
from runpod_api.models import Worker

WORKER, IMAGE, START, LOAD, REQUEST = PHASES = ("worker", "image", "start", "load", "first token")
POLL_S = 2.0
_TAIL = 200

# Of the system's log: what the container runtime says of an image that cannot be pulled.
_NO_IMAGE = re.compile(
    r"pull access denied|manifest (?:for \S+ )?(?:not found|unknown)|repository .*(?:not exist|not found)|"
    r"invalid reference format|unauthorized|authentication required|toomanyrequests|"
    r"(?:error|fail\w*)\b.{0,40}\bpull|pull.{0,40}\bfail",
    re.IGNORECASE,
)
_NO_DISK = re.compile(r"no space left on device", re.IGNORECASE)
_STARTED = re.compile(r"start container\b", re.IGNORECASE)
# Of the container's: the worker's own last line, and what Python says of an image with another program.
_CANNOT_START = re.compile(r"The worker (?:cannot start|has failed): (?P<reason>.*)")
_EXITED = re.compile(r"exit(?:ed|s)? (?:with )?(?:exit )?code (?P<code>[1-9]\d*)")
# A worker that has exited as often would exit again.
_MAX_EXITS = 3
_READY_STATES = {"IDLE", "RUNNING"}
_LOADING = re.compile(r"Loading the engine")
_READY = re.compile(r"Engine ready after|Worker ready")


def fault_in(line: LogLine, image: str | None) -> str | None:
    """Return what a line of a worker's log says that waiting does not help, and what to change; None if nothing.

    Args:
        line: of the log.
        image: of the worker.
    """
    text = " ".join(line.text.split())
    if line.source == "system":
        if _NO_IMAGE.search(text):
            check = "check --image, and --registry if it is private"
            return f"the image {image or ''} cannot be pulled ({text[:200]}): {check}"
        if _NO_DISK.search(text):
            return f"the disk is full ({text[:200]}): enlarge --disk"
        return None
    if found := _CANNOT_START.search(text):
        return f"the worker cannot start: {found['reason'][:500]}"
    if _NO_DISK.search(text):
        return f"the disk is full ({text[:200]}): enlarge --disk"
    return None


class StartWatcher:
    """Follows the workers of an endpoint until it is cancelled, or one has a fault that waiting does not help.

    Args:
        api: of RunPod.
        endpoint_id: of the endpoint.
        console: for what may pass, such as missing capacity.
        progress: is moved on.
        version: only workers of this release or later are watched; None for all.
        poll_s: seconds between two looks at the workers.
    """

    def __init__(  # noqa: PLR0913 (all of one command's)
        self,
        api: Api,
        endpoint_id: str,
        console: Console,
        progress: Progress,
        *,
        version: int | None = None,
        poll_s: float = POLL_S,
    ) -> None:
        self._api = api
        self._endpoint_id = endpoint_id
        self._console = console
        self._progress = progress
        self._version = version
        self._poll_s = poll_s
        self._followed: dict[str, asyncio.Task[None]] = {}
        self._fault: str | None = None
        self._exits = 0
        self._last_line = ""
        self._fault_found = asyncio.Event()
        self._waiting_for_capacity = False
        self.gpu_type: str | None = None

    @property
    def waiting_for_capacity(self) -> bool:
        """Whether all workers were throttled at the last look."""
        return self._waiting_for_capacity

    async def watch(self) -> None:
        """Watch until cancelled.

        Raises:
            WorkerError: a worker cannot start.
            DeployError: the API refuses.
        """
        try:
            while True:
                workers = (await self._api.workers(self._endpoint_id)).workers
                self._look_at([one for one in workers if not self._is_old(one)])
                if self._fault is not None:
                    raise WorkerError(self._fault)
                self._progress.refresh()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._fault_found.wait(), self._api.pause_s(self._poll_s))
        finally:
            for task in self._followed.values():
                task.cancel()
            await asyncio.gather(*self._followed.values(), return_exceptions=True)

    def _is_old(self, worker: Worker) -> bool:
        return self._version is not None and worker.version is not None and worker.version < self._version

    def _look_at(self, workers: list[Worker]) -> None:
        states = {one.status for one in workers}
        self._tell_capacity(throttled=bool(workers) and states == {"THROTTLED"})
        for worker in workers:
            self.gpu_type = worker.gpu_type_id or self.gpu_type
            if worker.status != "THROTTLED" and worker.id not in self._followed:
                self._followed[worker.id] = asyncio.create_task(self._follow(worker))
        if states & {"INITIALIZING", "UNHEALTHY"}:
            self._progress.reach(IMAGE)
        if states & _READY_STATES:
            self._progress.reach(REQUEST)

    def _tell_capacity(self, *, throttled: bool) -> None:
        if throttled and not self._waiting_for_capacity:
            self._console.log(
                "no GPU of the endpoint's pools is free: waiting; to wait less, add pools with --gpu, allow other "
                "data centers, or a smaller --min-cuda"
            )
        self._waiting_for_capacity = throttled

    async def _follow(self, worker: Worker) -> None:
        """Read a worker's log until it ends."""
        with suppress(DeployError):  # the next look at the workers says more
            async for line in self._api.logs(self._endpoint_id, worker.id, tail=_TAIL, pause_s=self._poll_s):
                self._read(line, worker)

    def _read(self, line: LogLine, worker: Worker) -> None:
        is_starting = worker.status not in _READY_STATES  # What a worker has logged that serves all the same is past.
        if is_starting and (fault := fault_in(line, worker.image)) is not None:
            self._fault = self._fault or fault
            self._fault_found.set()
        if line.source == "system":
            if _STARTED.match(line.text):
                self._progress.reach(START)
            self._progress.reach(IMAGE, line.text)
            if is_starting:
                self._count_exit(line.text)
        else:
            self._progress.reach(START)
            self._last_line = line.text
        for phase, pattern in ((LOAD, _LOADING), (REQUEST, _READY)):
            if line.source == "container" and pattern.search(line.text):
                self._progress.reach(phase)
        self._progress.detail(line.text)

    def _count_exit(self, text: str) -> None:
        """Count a container that ended by itself with an error."""
        if (found := _EXITED.search(text)) is None:
            return
        self._exits += 1
        if self._exits == _MAX_EXITS and self._fault is None:
            last = f"; its last line: {' '.join(self._last_line.split())[:300]}" if self._last_line else ""
            self._fault = (
                f"the worker exits with {found['code']} again and again{last}: look at `logs {self._endpoint_id}`"
            )
            self._fault_found.set()
