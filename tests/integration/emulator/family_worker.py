"""A worker with a family: a child in its group, and a grandchild that went off into a session of its own.

All of them ignore SIGTERM. Their process ids, and that of the launcher above, are written to the file $PIDS.
With $OBEDIENT, the worker itself ends on SIGTERM, and leaves its family behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

if "OBEDIENT" not in os.environ:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
_IGNORE = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", _IGNORE])
# A process that has lost its parent and left its group: the kind that usually stays behind.
_ORPHAN = f"""
import subprocess, sys
apart = dict(start_new_session=True, stdout=subprocess.DEVNULL)
print(subprocess.Popen([sys.executable, "-c", {_IGNORE!r}], **apart).pid)
"""
orphan = int(subprocess.run([sys.executable, "-c", _ORPHAN], stdout=subprocess.PIPE, check=True).stdout)
pids = Path(os.environ["PIDS"])
pids.with_suffix(".new").write_text(f"{os.getppid()} {os.getpid()} {child.pid} {orphan}")
pids.with_suffix(".new").rename(pids)

poll = urllib.request.Request(  # noqa: S310 (the emulator's own URL)
    os.environ["RUNPOD_WEBHOOK_GET_JOB"].replace("$ID", os.environ["RUNPOD_POD_ID"]),
    headers={"Authorization": os.environ["RUNPOD_AI_API_KEY"]},
)
while True:
    try:
        urllib.request.urlopen(poll).read()  # noqa: S310 (the emulator's own URL)
    except OSError:
        time.sleep(0.1)
