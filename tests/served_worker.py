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
    from engine.queue.job_loop import Platform


def main() -> int:
    import uvicorn

    from engine import worker
    from engine.config.settings import Settings
    from engine.queue import runpod_client
    from handler import handler

    class Quiet(uvicorn.Server):
        """Signals stay the worker's."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    server, settings = worker.server(), Settings.read()
    limit = server.max_num_seqs

    async def serve(queue: Platform) -> int:
        app = await server.app()
        http = Quiet(uvicorn.Config(app, port=int(os.environ["HTTP_PORT"]), lifespan="off", log_level="warning"))
        serving = asyncio.create_task(http.serve())
        try:
            return await worker.serve(queue, handler, server, settings, limit)
        finally:
            http.should_exit = True
            await serving

    return runpod_client.serve(handler, serve, limit, server.failure)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)
elif __name__ == "__mp_main__":  # a child that was spawned by vLLM
    from engine import child_processes

    child_processes.end_with_parent()
