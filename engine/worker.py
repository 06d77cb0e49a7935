"""The worker's one engine: loaded once, shared by all jobs, ended with the process; and the loop around it."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from engine import child_processes, cold_start, health
from engine.backend import startup_errors, startup_logs, vllm_args
from engine.config import environment
from engine.config.settings import Settings
from engine.errors import ConfigurationError
from engine.queue.admission import Admission
from engine.startup import compile_cache, model_resolver, weight_prefetch
from engine.startup.configuration import Configuration

if TYPE_CHECKING:
    from engine.backend.vllm_engine import Server
    from engine.config.environment import Variable
    from engine.queue.job_loop import Handler, Platform
    from engine.startup.fitness import Checks

# vLLM prepares long requests in a thread. While it and the loop are both busy, each waits so long for the other to let
# go of the interpreter, several times a request; Python's own is 5 ms.
SWITCH_INTERVAL_S = 0.001
# Garbage is looked for when so many more objects have been made than are gone (Python's own: 700), and in what has been
# looked at before each twentieth time: 64 streams hold 20,000 objects that are no garbage.
GARBAGE_THRESHOLDS = (20_000, 20, 20)

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_server: Server | None = None


def server(given: Mapping[str, Variable] | None = None, checks: Checks | None = None) -> Server:
    """The worker's engine; loaded by the first call, which takes as long as the model needs.

    Args:
        given: the variables that say what to load; this process's, without them.
        checks: of the machine, which has to pass them first.

    Raises:
        ConfigurationError: the settings, the machine or the model do not let it start.
    """
    global _server  # noqa: PLW0603 (one worker, one engine: this is where it is)
    with _lock:
        if _server is None:
            start = cold_start.WORKER
            child_processes.end_with_this_process()
            given = environment.read() if given is None else given
            settings = Settings.read(given)
            environment.export_token(given)
            compile_cache.choose(settings.network_volume)
            if (directory := model_resolver.likely(settings, given)) is not None:
                weight_prefetch.begin(directory)
            with _no_garbage():
                from engine.backend import vllm_engine

                vllm_engine.import_engine()
            start.ended("imports")
            configuration = Configuration.read(given)
            start.ended("configuration")
            if checks is not None:
                checks.wait()
                start.ended("fitness")
            model = configuration.model
            model.download()
            vllm_args.download_adapters(configuration.flags, configuration.args, model)
            model_resolver.stay_offline(model, configuration.flags)
            start.ended("model_files")
            _log.info("Loading the engine")
            with startup_logs.taken() as noted, _importing_meanwhile(settings):
                try:
                    _server = vllm_engine.Server(configuration)
                except ConfigurationError:
                    raise
                except Exception as error:
                    _log.debug("The engine does not start", exc_info=error)
                    told = startup_errors.explain(error, noted.errors, model.path, configuration.flags)
                    raise ConfigurationError(told) from error
                start.engine_started(noted.lines)
                compile_cache.tell(noted.lines)
            _log.info("Engine ready after %.1f s, serving %s", start.total_s, ", ".join(model.names))
        return _server


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Imports make hardly any garbage, and looking for it takes a fifth of their time.

    What they have made is not looked at again, and so stays shared with the processes that are forked.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def _importing_meanwhile(settings: Settings) -> Iterator[None]:
    """Import what is needed once the engine runs, while its processes start: from when the first of them is forked.

    No process may be forked in the middle of an import: it would wait for ever as it imports the same. So a later fork,
    of a coordinator's engines as with data parallelism, first waits for the imports to end. Where processes are
    spawned, nothing is done.
    """

    def imports() -> None:
        from engine.backend import vllm_engine
        from engine.queue import runpod_client

        vllm_engine.import_app()
        if settings.on_platform:
            runpod_client.import_sdk()

    process = os.getpid()
    importing = threading.Thread(target=imports, daemon=True)
    pending = [importing]

    def begin() -> None:
        if pending and os.getpid() == process:  # The engine's processes inherit this, and fork their own.
            pending.pop().start()

    def finish() -> None:
        if importing.is_alive() and threading.current_thread() is not importing:
            importing.join()

    os.register_at_fork(before=finish, after_in_parent=begin)
    try:
        yield
    finally:
        if pending:
            pending.clear()
        else:
            importing.join()


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
    from engine.backend.vllm_engine import SHUTDOWN_TIMEOUT_S
    from engine.queue.job_loop import GIVE_UP_S, LAST_WORDS_S, JobLoop, Timeouts

    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.set_threshold(*GARBAGE_THRESHOLDS)
    jobs = JobLoop(
        platform,
        handler,
        Admission(server.statistics, limit, server.cache_tokens, server.max_model_len),
        failure=server.failure,
        timeouts=Timeouts(settings.drain_timeout_s, settings.delivery_timeout_s, settings.execution_timeout_s),
        tokens_of=server.pop_token_counts,
        log_inputs=settings.log_job_inputs,
        start=cold_start.WORKER,
    )
    cold_start.WORKER.ended("sdk")

    # What follows a signal takes no longer, whatever hangs: the platform kills a worker that does not end.
    most_s = settings.drain_timeout_s + LAST_WORDS_S + GIVE_UP_S + SHUTDOWN_TIMEOUT_S
    told = False

    def stop() -> None:
        nonlocal told
        if told:
            os._exit(1)  # The engine's processes end with this one.
        told = True
        jobs.stop()
        overdue = threading.Timer(most_s, _end_overdue, (most_s,))
        overdue.daemon = True
        overdue.start()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    server.statistics.changed = jobs.wake
    await server.app()
    cold_start.WORKER.ended("app")
    cold_start.WORKER.log("Cold start")
    jobs.supervise(health.beat(server.failure), "tell that all is well")
    return await jobs.run()


def _end_overdue(most_s: float) -> None:
    _log.error("The worker has not ended %.0f s after it was told to: it ends now", most_s)
    os._exit(1)
