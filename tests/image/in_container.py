"""Runs a worker in a container: `in_container.py BUILDAH... -- CONTAINER COMMAND...`.

Only the platform's variables are passed on from this environment.
"""

from __future__ import annotations

import os
import sys

PASSED_PREFIXES = ("RUNPOD_",)

if __name__ == "__main__":
    split = sys.argv.index("--")
    buildah, (container, *command) = sys.argv[1:split], sys.argv[split + 1 :]
    environment = [f"--env={name}={value}" for name, value in os.environ.items() if name.startswith(PASSED_PREFIXES)]
    run = [*buildah, "run", "--isolation=chroot", "--network=host", *environment, container, "--", *command]
    os.execvp(run[0], run)  # noqa: S606
