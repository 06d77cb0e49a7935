"""Runs one job on a worker that the emulator starts with the SDK's fitness checks enabled, and prints its status.

python -m tests.integration.fit_worker MODEL LOG
"""

from __future__ import annotations

import json
import sys
from typing import Any

from builder.tiny_model.corpus import example
from tests.integration.emulator.conftest import LLM_START_S, REPOSITORY, site_with
from tests.processes import VLLM_ENVIRONMENT


def main(model: str, log: str) -> None:
    checks = {"RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "false", "RUNPOD_LOG_LEVEL": "DEBUG", "RUNPOD_MIN_DISK_PERCENT": "0"}
    endpoint: dict[str, Any] = {
        # The emulator keeps only the last lines.
        "command": ["sh", "-c", 'exec "$0" handler.py >"$1" 2>&1', sys.executable, log],
        "cwd": str(REPOSITORY),
        "env": {**VLLM_ENVIRONMENT, "MODEL_NAME": model, **checks},
    }
    with site_with(**endpoint, workersMin=1) as site:
        job = site.submit({"messages": example("ok").messages, "sampling_params": {"temperature": 0}, "stream": True})
        sys.stdout.write(json.dumps(site.ended(job, LLM_START_S)) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
