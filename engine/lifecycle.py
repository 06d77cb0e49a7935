"""The worker's one engine: loaded once, shared by all jobs, ended with the process."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from engine import children, models
from engine.settings import Settings

if TYPE_CHECKING:
    from engine.server import Server

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
            settings = Settings.read()
            model = models.choose(settings)
            _log.info("Loading the engine; on a CPU this takes about half a minute")
            _server = Server(settings, model)
            _log.info("Engine ready after %.1f s, serving %s", time.monotonic() - begun, ", ".join(model.names))
        return _server


def stop() -> None:
    """End the engine and its processes, if it was loaded."""
    global _server  # noqa: PLW0603
    with _lock:
        if _server is not None:
            _server.shutdown()
            _server = None
