"""Imports during the start of the engine's processes: only in the main process, and never during a fork."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# As vLLM does it: the main process forks the engine's processes one after another, and each forks its workers.
FORKS = """
import os, threading, time
from multiprocessing import get_context
from engine import worker
from engine.backend import vllm_engine
from engine.config.settings import Settings

main, importing = os.getpid(), threading.Event()

def import_app():
    print("imports in", "main" if os.getpid() == main else "a fork", flush=True)
    importing.set()
    time.sleep(0.5)
    importing.clear()

def engine():
    print("forked during imports:", importing.is_set(), flush=True)
    for child in [get_context("fork").Process(target=time.sleep, args=(0,)) for _ in range(2)]:
        child.start()
        child.join()

vllm_engine.import_app = import_app
with worker._import_app_in_background(Settings()):
    engines = [get_context("fork").Process(target=engine) for _ in range(2)]
    for process in engines:
        process.start()
        importing.wait(0.2)
    for process in engines:
        process.join()
    print("exit codes", [process.exitcode for process in engines])
"""


def test_imports_run_once_in_the_main_process_and_later_forks_wait_for_them() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)

    lines = done.stdout.splitlines()
    assert sorted(lines) == ["exit codes [0, 0]", *["forked during imports: False"] * 2, "imports in main"]
