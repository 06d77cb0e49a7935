"""A worker with descendants: a child in its process group, and a grandchild in a session of its own.

All of them ignore SIGTERM. The file $PIDS gets the process ids of the launcher, the worker and its descendants.
With $EXITS_ON_SIGTERM, the worker itself exits on SIGTERM without its descendants.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

if "EXITS_ON_SIGTERM" not in os.environ:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
_IGNORE = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", _IGNORE])
# An orphan outside of the process group: the kind of process that is usually left running.
_START_ORPHAN = f"""
import subprocess, sys
options = dict(start_new_session=True, stdout=subprocess.DEVNULL)
print(subprocess.Popen([sys.executable, "-c", {_IGNORE!r}], **options).pid)
"""
orphan = int(subprocess.run([sys.executable, "-c", _START_ORPHAN], stdout=subprocess.PIPE, check=True).stdout)
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
