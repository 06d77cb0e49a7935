"""Whether the worker is well, for whoever watches its container: `python -m engine.health` exits with 0 if it is.

While its loop turns and its engine lives, a worker touches a file now and then; it is well if that was not long ago.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

FILE = Path(tempfile.gettempdir()) / "vllm-serverless.alive"
_BEAT_S = 5.0
_LATE_S = 30.0


async def beat(failure: Callable[[], str | None]) -> None:
    """Say that all is well for as long as nothing is wrong for good.

    Args:
        failure: what is wrong with the engine, if something is.
    """
    while failure() is None:
        FILE.touch()
        await asyncio.sleep(_BEAT_S)


def main() -> int:
    """Return 0 if a worker has said lately that all is well, else 1."""
    try:
        late_s = time.time() - FILE.stat().st_mtime
    except FileNotFoundError:
        sys.stdout.write("no worker has started to take jobs yet\n")
        return 1
    sys.stdout.write(f"the worker was well {late_s:.0f} s ago\n")
    return int(late_s > _LATE_S)


if __name__ == "__main__":
    sys.exit(main())
