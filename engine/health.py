"""Whether the worker is well, for whoever watches its container: `python -m engine.health` exits with 0 if it is.

While its loop turns and its engine lives, a worker touches a file now and then; it is well if that was not long ago.
The file is the user's own, and the worker's own where the platform names its workers (`RUNPOD_POD_ID`).
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

_BEAT_S = 5.0
_LATE_S = 30.0

_log = logging.getLogger(__name__)


def file() -> Path:
    """The file that this worker touches."""
    worker = re.sub(r"[^A-Za-z0-9_-]", "_", os.environ.get("RUNPOD_POD_ID", "worker"))
    return Path(tempfile.gettempdir()) / f"vllm-serverless-{os.getuid()}" / f"{worker}.alive"


async def heartbeat(failure: Callable[[], str | None]) -> None:
    """Say that all is well for as long as nothing is wrong for good.

    Where the file cannot be written, a line of the log says so, and the worker works on: nobody may be watching.

    Args:
        failure: what is wrong with the engine, if something is.
    """
    path, told = file(), False
    while failure() is None:
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            path.touch()
        except OSError as error:
            if not told:
                _log.warning(
                    "%s cannot be written, so `python -m engine.health` does not see this worker: %s", path, error
                )
            told = True
        await asyncio.sleep(_BEAT_S)


def main() -> int:
    """Return 0 if a worker has said lately that all is well, else 1."""
    try:
        late_s = time.time() - file().stat().st_mtime
    except FileNotFoundError:
        sys.stdout.write("no worker has started to take jobs yet\n")
        return 1
    sys.stdout.write(f"the worker was well {late_s:.0f} s ago\n")
    return int(late_s > _LATE_S)


if __name__ == "__main__":
    sys.exit(main())
