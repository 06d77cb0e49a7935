"""The container's health check: `python -m engine.health` exits with 0 if the worker is healthy.

While its event loop runs and its engine is alive, a worker touches a file every few seconds. It is healthy if that was
less than 30 s ago, or does it within the next few seconds: it may just have been thawed. There is a file for each user
and each worker (`RUNPOD_POD_ID`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HEARTBEAT_INTERVAL_S = 5.0
STALE_AFTER_S = 30.0

_log = logging.getLogger(__name__)


def file() -> Path:
    """Return the path of the file that this worker touches."""
    worker = re.sub(r"[^A-Za-z0-9_-]", "_", os.environ.get("RUNPOD_POD_ID", "worker"))
    return Path(tempfile.gettempdir()) / f"vllm-serverless-{os.getuid()}" / f"{worker}.alive"


async def heartbeat(failure: Callable[[], str | None]) -> None:
    """Touch the file at regular intervals until the engine has failed.

    If the file cannot be written, this logs one warning and the worker continues: there may be no health check.

    Args:
        failure: returns what is wrong with the engine for good, or None.
    """
    path, warned = file(), False
    while failure() is None:
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            path.touch()
        except OSError as error:
            if not warned:
                _log.warning(
                    "%s cannot be written, so the health check will report this worker as unhealthy: %s", path, error
                )
            warned = True
        await asyncio.sleep(HEARTBEAT_INTERVAL_S)


def _age_s() -> float:
    return time.time() - file().stat().st_mtime


def main() -> int:
    """Return the exit status: 0 if the last heartbeat is recent, else 1."""
    try:
        age_s = _age_s()
        if age_s > STALE_AFTER_S:
            time.sleep(1.5 * HEARTBEAT_INTERVAL_S)
            age_s = _age_s()
    except FileNotFoundError:
        sys.stdout.write("no heartbeat: no worker has started to take jobs\n")
        return 1
    sys.stdout.write(f"last heartbeat {age_s:.0f} s ago\n")
    return int(age_s > STALE_AFTER_S)


if __name__ == "__main__":
    sys.exit(main())
