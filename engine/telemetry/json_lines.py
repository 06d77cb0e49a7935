"""Makes each line of the log a JSON object, whoever wrote it: the worker, vLLM, the SDK, a library in C (`LOG_FORMAT`).

A small process of its own reads what this process and its children write to stdout and stderr. It runs this file, which
imports the standard library only, and ends when the last of them has ended.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, Any

# The last line of each stream. The end of the streams may come later: the SDK's ping has them open as well.
_END = b"\0end\n"
# How long the end of the worker waits for its last lines.
_FINISH_TIMEOUT_S = 1.0
# A longer line becomes several.
_MAX_LINE_BYTES = 1 << 20
_LEVELS = "DEBUG|INFO|WARN|WARNING|ERROR|CRITICAL|TRACE|TIP"
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# The worker's and the SDKs': `INFO   | message`.
_OWN = re.compile(rf"(?P<level>{_LEVELS})\s*\| (?P<message>.*)", re.DOTALL)
# vLLM's: `(EngineCore pid=123) INFO 11-30 17:45:12 [core.py:100] message`.
_VLLM = re.compile(
    rf"(?:\((?P<process>[^)]* pid=\d+)\) )?(?P<level>{_LEVELS}) \d\d-\d\d [\d:]{{8}} \[(?P<source>[^\]]+)\] ?"
    r"(?P<message>.*)",
    re.DOTALL,
)

_waiting: threading.Thread | None = None


def record(line: str) -> dict[str, Any]:
    """Return a line as an object: `level`, `message`, and what else its writer has put into it.

    A line, or a message, that is a JSON object keeps its fields.
    """
    line = _ESCAPES.sub("", line)
    found = _VLLM.fullmatch(line) or _OWN.fullmatch(line)
    fields = {"level": "INFO", "message": line} if found is None else found.groupdict()
    message = fields["message"]
    if message.startswith("{") and message.endswith("}"):
        try:
            own = json.loads(message)
            return {"level": fields["level"], **{name: own[name] for name in own if _has_type(name, own[name])}}
        except (ValueError, RecursionError):
            pass
    return {name: text for name, text in fields.items() if text is not None}


def _has_type(name: str, value: object) -> bool:
    """Return whether a field has the type that it has in all lines; a log's store may refuse another."""
    return name not in ("time", "level", "message") or isinstance(value, str)


def redirect() -> None:
    """From now on, pass stdout and stderr of this process and its children through the filter.

    If the filter ends, this process writes to its own streams again, as text.
    """
    global _waiting  # noqa: PLW0603 (the streams are the process's)
    sys.stdout.flush()
    sys.stderr.flush()
    own = [os.dup(stream) for stream in (1, 2)]
    pipes = [os.pipe() for _ in range(2)]
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, *(str(read) for read, _ in pipes)],
        pass_fds=[read for read, _ in pipes],
    )
    for (read, write), stream in zip(pipes, (1, 2), strict=True):
        os.close(read)
        os.dup2(write, stream)
        os.close(write)
    _waiting = threading.Thread(target=_restore, args=(process, own), name="wait for the log's filter", daemon=True)
    _waiting.start()


def _restore(process: subprocess.Popen[bytes], own: list[int]) -> None:
    """Wait for the filter's end; then writing to its pipes would fail."""
    process.wait()
    for original, stream in zip(own, (1, 2), strict=True):
        os.dup2(original, stream)


def finish() -> None:
    """Let the filter write the last lines, and wait for it; what this process writes later is text."""
    if _waiting is None:
        return
    with suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
        if _waiting.is_alive():
            for stream in (1, 2):
                os.write(stream, _END)
    _waiting.join(_FINISH_TIMEOUT_S)


def _copy(source: IO[bytes], target: IO[bytes]) -> None:
    """Copy a stream until its end, whatever it has: a worker whose lines nobody reads would block."""
    for raw in iter(partial(source.readline, _MAX_LINE_BYTES), b""):
        is_end = raw.endswith(_END)
        # Of a progress bar, which a carriage return draws anew, the last state.
        line = raw.removesuffix(_END).decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]
        if line.strip():
            with suppress(OSError):  # Whoever read this process' output has ended.
                target.write(_encoded(line))
                target.flush()
        if is_end:
            return


def _encoded(line: str) -> bytes:
    time = {"time": datetime.now(UTC).isoformat(timespec="milliseconds")}
    try:
        text = json.dumps(time | record(line), ensure_ascii=False, allow_nan=False)
        return text.encode() + b"\n"
    except (ValueError, RecursionError):  # A client's words: half a surrogate pair, NaN, too deep a nesting.
        return json.dumps(time | {"level": "INFO", "message": line}).encode() + b"\n"


def _main() -> None:
    """Copy the streams of the given numbers to stdout and stderr; signals are for those that write to them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sources = [Path(f"/dev/fd/{number}").open("rb") for number in sys.argv[1:]]  # noqa: SIM115 (until the process ends)
    targets = (sys.stdout.buffer, sys.stderr.buffer)
    threads = [threading.Thread(target=_copy, args=pair) for pair in zip(sources, targets, strict=True)]
    for number in sys.argv[1:]:
        os.close(int(number))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    _main()
