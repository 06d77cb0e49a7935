"""The worker's one engine: loaded once, shared by all jobs, ended with the process; and the loop around it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from typing import TYPE_CHECKING

from engine import children, diagnosis, health, models
from engine.admission import Admission
from engine.configuration import Configuration
from engine.errors import ConfigurationError

if TYPE_CHECKING:
    from engine.loop import Handler, Platform
    from engine.server import Server
    from engine.settings import Settings

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_server: Server | None = None


def server() -> Server:
    """The worker's engine; loaded by the first call, which takes as long as the model needs.

    Raises:
        ConfigurationError: the settings or the model do not let it start.
    """
    global _server  # noqa: PLW0603 (one worker, one engine: this is where it is)
    with _lock:
        if _server is None:
            from engine.server import Server

            begun = time.monotonic()
            children.end_with_this_process()
            configuration = Configuration.read()
            model = configuration.model
            model.download()
            models.stay_offline(model, configuration.flags)
            _log.info("Loading the engine; on a CPU this takes about half a minute")
            with diagnosis.noted_errors() as noted:
                try:
                    _server = Server(configuration)
                except ConfigurationError:
                    raise
                except Exception as error:
                    _log.debug("The engine does not start", exc_info=error)
                    raise ConfigurationError(diagnosis.explain(error, noted, model.path)) from error
            _log.info("Engine ready after %.1f s, serving %s", time.monotonic() - begun, ", ".join(model.names))
        return _server


def stop() -> None:
    """End the engine and its processes, if it was loaded."""
    global _server  # noqa: PLW0603
    with _lock:
        if _server is not None:
            _server.shutdown()
            _server = None


async def serve(platform: Platform, handler: Handler, server: Server, settings: Settings, limit: int) -> int:
    """Take jobs and run them until SIGTERM or SIGINT, or until the engine fails; a second signal ends at once.

    Args:
        platform: where jobs come from.
        handler: an async generator of a job's outputs.
        server: the engine.
        settings: the worker's.
        limit: most jobs at once.

    Returns:
        The exit status: 0 if it was told to stop, 1 if the engine has failed.
    """
    from engine.loop import JobLoop, Timeouts

    jobs = JobLoop(
        platform,
        handler,
        Admission(server.statistics, limit, server.cache_tokens),
        failure=server.failure,
        timeouts=Timeouts(drain_s=settings.drain_timeout_s, job_s=settings.job_timeout_s),
        tokens_of=server.tokens_of,
        log_inputs=settings.log_job_inputs,
    )

    told = False

    def stop() -> None:
        nonlocal told
        if told:
            os._exit(1)  # The engine's processes end with this one.
        told = True
        jobs.stop()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    server.statistics.changed = jobs.wake
    await server.app()
    beating = asyncio.create_task(health.beat(server.failure))
    try:
        return await jobs.run()
    finally:
        beating.cancel()
