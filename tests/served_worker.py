"""The real worker on its queue, whose vLLM app is served over HTTP as well: the very app, called directly.

`HTTP_PORT` of the environment is the port, on the loopback interface.
"""

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

    class Quiet(uvicorn.Server):
        """Signals stay the worker's."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    serving = worker.current()

    async def serve(queue: JobQueue) -> int:
        app = await serving.engine.app()
        http = Quiet(uvicorn.Config(app, port=int(os.environ["HTTP_PORT"]), lifespan="off", log_level="warning"))
        listening = asyncio.create_task(http.serve())
        try:
            return await serving.serve(queue, handler)
        finally:
            http.should_exit = True
            await listening

    return runpod_client.serve(handler, serve, serving.max_concurrency, serving.engine.failure)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)
elif __name__ == "__mp_main__":  # a child that was spawned by vLLM
    from engine import child_processes

    child_processes.set_parent_death_signal()
