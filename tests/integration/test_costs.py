"""Regression limits with the real engine: imports of a start in all processes, and the use of threads."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from tests.processes import ROOT, VLLM_ENVIRONMENT

# There are 6,211 with vLLM 0.32 and the packages that it decodes audio with. Change the limit with its version.
MAX_MODULES = 6300
# Modules that only vLLM's OpenAI app and only the SDK import.
APP, SDK = "vllm.entrypoints.serve.middleware", "runpod.serverless.modules.rp_logger"


def imports(log: str) -> Counter[str]:
    """Count the imports of each module in a log with PYTHONPROFILEIMPORTTIME.

    It lists import statements: not the modules given to `importlib.import_module`, but those that these import.
    """
    return Counter(re.findall(r"import time:\s+\d+ \|\s+\d+ \|\s*(\S+)", log))


@pytest.mark.timeout(300)
def test_a_worker_imports_vllm_once_in_all_of_its_processes() -> None:
    environment = {**os.environ, **VLLM_ENVIRONMENT, "PYTHONPROFILEIMPORTTIME": "1"}
    environment.pop("VLLM_WORKER_MULTIPROC_METHOD", None)

    answer = subprocess.run(
        [sys.executable, "handler.py"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )

    imported = imports(answer.stderr)
    assert imported["torch"] == imported["transformers"] == imported["vllm.config"] == 1
    assert imported[APP] == 1
    assert sum(imported.values()) <= MAX_MODULES, sum(imported.values())


# Prints the work that is submitted to threads during a short chat, and then during a long one.
PROGRAM = """
import asyncio, json
from concurrent.futures import ThreadPoolExecutor

submit, submitted = ThreadPoolExecutor.submit, []

def record(pool, work, /, *args, **options):
    submitted.append(getattr(work, "func", work).__name__)
    return submit(pool, work, *args, **options)

ThreadPoolExecutor.submit = record
from engine import worker
from engine.jobs import pipeline

async def main():
    for user in ("short", "x" * 5000):
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "user": user}
        job = {"id": "1", "input": {"openai_route": "/v1/chat/completions", "openai_input": body}}
        submitted.clear()
        answers = [answer async for answer in pipeline.run(job, engine)]
        print(json.dumps({"submitted": submitted, "object": answers[0].get("object")}))

engine = worker.current().engine
try:
    asyncio.run(main())
finally:
    worker.shutdown()
"""


@pytest.mark.timeout(300)
def test_a_short_chat_uses_no_thread_and_a_long_one_does() -> None:
    environment = {**os.environ, **VLLM_ENVIRONMENT}

    answer = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, check=True)

    # The output also contains vLLM's log.
    short, long = (json.loads(line) for line in answer.stdout.splitlines() if line.startswith(b"{"))
    assert short == {"submitted": [], "object": "chat.completion"}
    assert long["object"] == "chat.completion"
    assert any("template" in work for work in long["submitted"]), long
    assert any("tokenize" in work for work in long["submitted"]), long
