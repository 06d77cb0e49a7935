"""What is used of Spirit's SDK besides its loop: whether it has what the job loop needs, its heartbeats, its log."""

from __future__ import annotations

import inspect
import logging
import os
from threading import Lock
from typing import Any, Protocol

from engine.errors import ConfigurationError, safe_str

TESTED_VERSION = "0.1.0"
_HEARTBEAT_TIMEOUT_S = 3.0

_log = logging.getLogger(__name__)


class Concurrency(Protocol):
    """The tasks that heartbeats name: the SDK's `Concurrency`."""

    current_jobs: set[str]


def missing_interface() -> str | None:
    """Return what the SDK lacks of what the job loop needs; None if nothing is missing.

    The SDK itself is inspected: its version does not say what an upgrade has moved.
    """
    try:
        import spirit_gpu
        from spirit_gpu import concurrency, heartbeat, log, settings, task, utils, worker

        parsed = task.Task.parse({"headers": {"Ease-Request-Id": "id"}, "body": "e30="})
        fields = ("mode", "webhook", "request_id", "enqueue_at", "create_at", "ttl")
        inspect.signature(task.getStatus).bind(
            header=None, ts=0, webhook="", status="", queueDur=0, execDur=0, totalDur=0, msg=""
        )
        inspect.signature(spirit_gpu.start).bind({})
        inspect.signature(spirit_gpu.run).bind({}, None)
        inspect.signature(log.logger.info).bind("message", request_id="id")
        running = concurrency.Concurrency(None)
        beat = heartbeat.Heartbeat(running)
        checks = {
            "a task has data and a header": parsed.data == b"{}" and all(hasattr(parsed.header, one) for one in fields),
            "run is a coroutine function that start calls": (
                inspect.iscoroutinefunction(spirit_gpu.run) and spirit_gpu.run is worker.run
            ),
            "current_jobs is a set": running.current_jobs == set(),
            "a heartbeat has start, _do_heartbeat and a session": (
                callable(beat.start) and hasattr(beat, "_do_heartbeat") and callable(vars(beat)["_session"].request)
            ),
            "the agent's URL is text": isinstance(settings.SETTINGS.agent_url(), str),
            "the name of the health header is text": isinstance(settings.HEADER_HEALTH, str),
            "is_test_mode can be called": callable(utils.is_test_mode),
        }
    except (ImportError, AttributeError, LookupError, TypeError, ValueError) as error:
        return safe_str(error)
    return next((f"it does not hold that {what}" for what, is_so in checks.items() if not is_so), None)


def start_heartbeat() -> Concurrency | None:
    """Start the SDK's heartbeats, before the engine is loaded; return what names the tasks in them.

    The agent hears of the worker while the model loads. The thread makes no request and no import while a process is
    forked: the child would inherit their locks. The agent is never reached through a proxy, and a request ends in time.

    Returns:
        None if the SDK lacks what is needed: it then starts its own heartbeats, when it serves.

    Raises:
        ConfigurationError: the SDK's test mode is on, or the SDK is not installed.
    """
    try:
        from spirit_gpu import concurrency, heartbeat, utils
    except ImportError as error:
        raise ConfigurationError(
            f"Spirit's SDK cannot be imported ({error}): pip install --no-deps spirit-gpu=={TESTED_VERSION}"
        ) from None
    if utils.is_test_mode():
        raise ConfigurationError("EASE_TEST_MODE is set, but this worker has no test mode: unset it")
    if (missing := missing_interface()) is not None:
        _log.warning("Using the SDK's proxy mode, as spirit-gpu lacks what our job loop needs: %s", missing)
        return None

    forking = Lock()

    class Heartbeat(heartbeat.Heartbeat):  # type: ignore[misc]
        """The SDK's, which waits while a process is forked."""

        def _do_heartbeat(self) -> None:
            with forking:
                super()._do_heartbeat()

    os.register_at_fork(before=forking.acquire, after_in_parent=forking.release, after_in_child=forking.release)
    running: Concurrency = concurrency.Concurrency(None)
    beat = Heartbeat(running)
    session = vars(beat)["_session"]
    session.trust_env = False
    request = session.request

    def request_in_time(*arguments: Any, **options: Any) -> Any:
        return request(*arguments, **{"timeout": _HEARTBEAT_TIMEOUT_S, **options})

    session.request = request_in_time
    beat.start()
    return running


class SDKLogHandler(logging.Handler):
    """Writes the worker's log through the SDK's logger: one line of JSON each, with the id of the request.

    Lines about a job have its id in the attribute `job_id`, or begin with "Job %s".
    """

    def __init__(self) -> None:
        super().__init__()
        from spirit_gpu import logger

        self._write = {
            logging.DEBUG: logger.debug,
            logging.INFO: logger.info,
            logging.WARNING: logger.warning,
            logging.ERROR: logger.error,
            logging.CRITICAL: logger.critical,
        }

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        try:
            job_id = getattr(record, "job_id", None)
            if job_id is None and str(record.msg).startswith("Job %s") and isinstance(record.args, tuple):
                job_id = record.args[0]
            self._write.get(record.levelno, self._write[logging.INFO])(self.format(record), request_id=job_id)
        except Exception:  # noqa: BLE001 (as in each of logging's own handlers)
            self.handleError(record)


def log_through_sdk() -> None:
    """Write the worker's log through the SDK's logger from now on."""
    logger = logging.getLogger("engine")
    for handler in logger.handlers:
        logger.removeHandler(handler)
    logger.addHandler(SDKLogHandler())
    logger.propagate = False
