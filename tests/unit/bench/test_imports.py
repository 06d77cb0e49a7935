"""The record of what a process imports, and its table."""

from __future__ import annotations

import compileall
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import imports
from bench.imports import Record

PROGRAM = """
import os, outer
if os.fork():
    os.wait()
else:
    os.closerange(3, 100)
    import later
"""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Packages without bytecode: one imports another."""
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "__init__.py").write_text("import time\nfrom outer import inner\ntime.sleep(0.1)\n")
    (tmp_path / "outer" / "inner.py").write_text("import time\ntime.sleep(0.3)\nblock = bytearray(30 << 20)\n")
    (tmp_path / "later.py").write_text("")
    return tmp_path


def recorded(packages: Path) -> dict[str, Record]:
    """Import them in a process that writes no bytecode, and forks another; return the records by module."""
    log = packages / "log"
    log.unlink(missing_ok=True)
    variables = imports.log_environment(log)
    variables["PYTHONPATH"] += f"{os.pathsep}{packages}"
    environment = {**os.environ, **variables, "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True)
    return {record.module: record for record in imports.read_log(log)}


def test_each_module_is_recorded_with_its_own_time_and_memory(packages: Path) -> None:
    found = recorded(packages)

    assert found["outer.inner"].own_s >= 0.3
    assert found["outer"].own_s >= 0.1
    assert found["outer"].own_s + found["outer.inner"].own_s >= 0.4
    assert found["outer.inner"].own_bytes >= 30 << 20 > found["outer"].own_bytes


def test_modules_that_a_forked_process_imports_are_recorded_as_its_own(packages: Path) -> None:
    """Also if it has closed all files that it has inherited."""
    found = recorded(packages)

    assert found["later"].process != found["outer"].process == found["outer.inner"].process


def test_a_module_without_valid_bytecode_is_recorded_as_compiled(packages: Path) -> None:
    assert all(recorded(packages)[name].compiled for name in ("outer", "outer.inner", "later"))

    compileall.compile_dir(packages, quiet=1)
    (packages / "later.py").write_text("changed = True")
    found = recorded(packages)

    assert not found["outer"].compiled
    assert not found["outer.inner"].compiled
    assert found["later"].compiled


def test_the_table_adds_up_packages_and_keeps_other_processes_apart() -> None:
    records = [
        Record(1, "torch", compiled=False, own_s=1.0, own_bytes=2 << 20),
        Record(1, "torch.nn", compiled=True, own_s=0.5, own_bytes=1 << 20),
        Record(1, "json", compiled=False, own_s=0.25, own_bytes=0),
        Record(2, "cpuinfo", compiled=False, own_s=3.0, own_bytes=0),
    ]

    assert [line.split() for line in imports.table(records, 1)[1:]] == [
        ["torch", "2", "1", "1500", "3.0"],
        ["json", "1", "0", "250", "0.0"],
        ["total", "3", "1", "1750", "3.0"],
        ["other", "processes", "1", "0", "3000", "0.0"],
    ]


def test_a_long_table_ends_with_the_sum_of_the_cheapest() -> None:
    records = [Record(1, f"p{number}", compiled=False, own_s=number / 1000, own_bytes=0) for number in range(40)]

    lines = [line.split() for line in imports.table(records, 1)]

    assert lines[1] == ["p39", "1", "0", "39", "0.0"]
    assert lines[-3] == ["10", "others", "10", "0", "45", "0.0"]
