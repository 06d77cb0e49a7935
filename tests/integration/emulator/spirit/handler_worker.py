"""A worker with the stock SDK in its default mode, and a trivial handler; no model.

`input` is a script: {"echo": any} returns it, {"sleep": s} waits first, {"block": s} blocks the event loop, {"raise":
text} fails, {"yield": n} is a generator's input, {"cancel": true} raises CancelledError. `KIND` is the handler's kind.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import spirit_gpu


async def handler(request: dict[str, Any], _env: Any) -> Any:
    script = request["input"]
    await asyncio.sleep(script.get("sleep", 0))
    time.sleep(script.get("block", 0))  # noqa: ASYNC251 (that is what it is for)
    if "raise" in script:
        raise RuntimeError(script["raise"])
    if script.get("cancel"):
        raise asyncio.CancelledError
    return {"echo": script.get("echo"), "id": request["meta"]["requestID"]}


async def generator(request: dict[str, Any], _env: Any) -> AsyncIterator[Any]:
    for number in range(request["input"]["yield"]):
        yield number
    if "raise" in request["input"]:
        raise RuntimeError(request["input"]["raise"])


if __name__ == "__main__":
    concurrency = int(os.environ.get("CONCURRENCY", "1"))
    spirit_gpu.start(
        {
            "handler": generator if os.environ.get("KIND") == "generator" else handler,
            "concurrency_modifier": lambda _: concurrency,
        }
    )
