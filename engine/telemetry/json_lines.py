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
from pathlib import Path
from typing import IO, Any

# The last line of each stream. The end of the streams may come later: the SDK's ping has them open as well.
_END = b"\0end\n"
# How long the end of the worker waits for its last lines.
_FINISH_TIMEOUT_S = 1.0
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

_filter: subprocess.Popen[bytes] | None = None


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
            return {"level": fields["level"], **json.loads(message)}
        except ValueError:
            pass
    return {name: text for name, text in fields.items() if text is not None}


def redirect() -> None:
    """From now on, pass stdout and stderr of this process and its children through the filter."""
    global _filter  # noqa: PLW0603 (the streams are the process's)
    sys.stdout.flush()
    sys.stderr.flush()
    pipes = [os.pipe() for _ in range(2)]
    _filter = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, *(str(read) for read, _ in pipes)],
        pass_fds=[read for read, _ in pipes],
    )
    for (read, write), stream in zip(pipes, (1, 2), strict=True):
        os.close(read)
        os.dup2(write, stream)
        os.close(write)


def finish() -> None:
    """Let the filter write the last lines, and wait for it; nothing that is written later is seen."""
    if _filter is None:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    with suppress(BrokenPipeError, subprocess.TimeoutExpired):
        for stream in (1, 2):
            os.write(stream, _END)
        _filter.wait(_FINISH_TIMEOUT_S)


def _copy(source: IO[bytes], target: IO[bytes]) -> None:
    for raw in iter(source.readline, b""):
        is_end = raw.endswith(_END)
        # Of a progress bar, which a carriage return draws anew, the last state.
        line = raw.removesuffix(_END).decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]
        if line.strip():
            time = datetime.now(UTC).isoformat(timespec="milliseconds")
            target.write(json.dumps({"time": time, **record(line)}, ensure_ascii=False).encode() + b"\n")
            target.flush()
        if is_end:
            return


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
