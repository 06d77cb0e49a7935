"""The regression gate of the start: what is imported, counted over all of the worker's processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from tests.processes import ROOT, VLLM_ENVIRONMENT

# There were 6,199 with vLLM 0.32. A new version of it may set it anew.
MODULES = 6500


@pytest.mark.timeout(300)
def test_a_worker_imports_vllm_once_in_all_of_its_processes() -> None:
    environment = {**os.environ, **VLLM_ENVIRONMENT, "PYTHONPROFILEIMPORTTIME": "1"}
    environment.pop("VLLM_WORKER_MULTIPROC_METHOD", None)

    answer = subprocess.run(
        [sys.executable, "handler.py"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )

    imported = Counter(re.findall(r"import time:\s+\d+ \|\s+\d+ \|\s*(\S+)", answer.stderr))
    assert imported["torch"] == imported["transformers"] == imported["vllm.config"] == 1
    assert sum(imported.values()) <= MODULES, sum(imported.values())
