"""The regression gate with the real engine: what a start imports, in all of its processes, and what threads get."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from tests.processes import ROOT, VLLM_ENVIRONMENT

# There were 6,084 with vLLM 0.32. A new version of it may set it anew.
MODULES = 6150
# What vLLM's OpenAI app imports, and the SDK; nothing else does.
APP, SDK = "vllm.entrypoints.serve.middleware", "runpod.serverless.modules.rp_logger"


def imports(log: str) -> Counter[str]:
    """How often each module was imported, by what Python tells with PYTHONPROFILEIMPORTTIME.

    It tells of import statements, and so not of what `importlib.import_module` is called for, but of what that imports.
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
    assert sum(imported.values()) <= MODULES, sum(imported.values())


# What is handed to threads while a short chat is answered, and then a long one.
HANDED = """
import asyncio, json
from concurrent.futures import ThreadPoolExecutor

submit, handed = ThreadPoolExecutor.submit, []

def noting(pool, work, /, *args, **options):
    handed.append(getattr(work, "func", work).__name__)
    return submit(pool, work, *args, **options)

ThreadPoolExecutor.submit = noting
from engine import worker
from engine.jobs import pipeline

async def main():
    for user in ("short", "x" * 5000):
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "user": user}
        job = {"id": "1", "input": {"openai_route": "/v1/chat/completions", "openai_input": body}}
        handed.clear()
        answers = [answer async for answer in pipeline.run(job, engine)]
        print(json.dumps({"handed": handed, "object": answers[0].get("object")}))

engine = worker.current().engine
try:
    asyncio.run(main())
finally:
    worker.shutdown()
"""


@pytest.mark.timeout(300)
def test_a_short_chat_needs_no_thread_and_a_long_one_does() -> None:
    environment = {**os.environ, **VLLM_ENVIRONMENT}

    answer = subprocess.run([sys.executable, "-c", HANDED], cwd=ROOT, env=environment, capture_output=True, check=True)

    # vLLM's log is among it.
    short, long = (json.loads(line) for line in answer.stdout.splitlines() if line.startswith(b"{"))
    assert short == {"handed": [], "object": "chat.completion"}
    assert long["object"] == "chat.completion"
    assert any("template" in work for work in long["handed"]), long
    assert any("tokenize" in work for work in long["handed"]), long
