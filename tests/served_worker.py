"""The real worker, whose vLLM app is also served over HTTP: on the loopback interface, at port `HTTP_PORT`."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.queue.protocol import JobQueue


def main() -> int:
    import uvicorn

    from engine import worker
    from engine.queue import runpod_client
    from handler import handler

    class ServerWithoutSignals(uvicorn.Server):
        """Leaves signals to the worker."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    current = worker.current()

    async def serve(queue: JobQueue) -> int:
        app = await current.engine.app()
        http = ServerWithoutSignals(
            uvicorn.Config(app, port=int(os.environ["HTTP_PORT"]), lifespan="off", log_level="warning")
        )
        listening = asyncio.create_task(http.serve())
        try:
            return await current.serve(queue, handler)
        finally:
            http.should_exit = True
            await listening

    return runpod_client.serve(handler, serve, current.max_concurrency, current.engine.failure)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)
elif __name__ == "__mp_main__":  # a process that was spawned by vLLM
    from engine import child_processes

    child_processes.set_parent_death_signal()
