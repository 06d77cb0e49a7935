"""What is imported while the engine's processes start: in the main process alone, and never as one is forked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# As vLLM starts them: a main process forks processes of the engine one after another, and each forks its own workers.
FORKS = """
import os, threading, time
from multiprocessing import get_context
from engine import worker
from engine.backend import vllm_engine
from engine.config.settings import Settings

main, importing = os.getpid(), threading.Event()

def import_app():
    print("imports in", "main" if os.getpid() == main else "another", flush=True)
    importing.set()
    time.sleep(0.5)
    importing.clear()

def engine():
    print("forked amid imports:", importing.is_set(), flush=True)
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
    print("then", [process.exitcode for process in engines])
"""


def test_imports_run_once_in_the_main_process_and_a_later_fork_waits_for_them() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)

    lines = done.stdout.splitlines()
    assert sorted(lines) == ["forked amid imports: False"] * 2 + ["imports in main", "then [0, 0]"]
