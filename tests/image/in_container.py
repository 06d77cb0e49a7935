"""Runs a worker in a container: `in_container.py BUILDAH... -- CONTAINER COMMAND...`.

What the platform tells its workers is handed on; nothing else of this environment is.
"""

from __future__ import annotations

import os
import sys

HANDED_ON = ("RUNPOD_",)

if __name__ == "__main__":
    split = sys.argv.index("--")
    buildah, (container, *command) = sys.argv[1:split], sys.argv[split + 1 :]
    told = [f"--env={name}={value}" for name, value in os.environ.items() if name.startswith(HANDED_ON)]
    run = [*buildah, "run", "--isolation=chroot", "--network=host", *told, container, "--", *command]
    os.execvp(run[0], run)  # noqa: S606
