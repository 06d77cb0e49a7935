# ruff: noqa: INP001 (a directory for PYTHONPATH)
"""Records each module that a Python process imports from a file: with this directory in `PYTHONPATH`, at its start.

Each process, and each that it starts or forks, appends a line for each module to the file `IMPORT_LOG`: `Record`, as
JSON. It is written at once, as workers end without the interpreter's shutdown. It needs nothing but Python.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import threading
import time
from importlib.machinery import ExtensionFileLoader, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

VARIABLE = "IMPORT_LOG"
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class _Stack(threading.local):
    """The imports that this thread is in the middle of; each has the time and memory of those within it."""

    def __init__(self) -> None:
        self.imports: list[_Import] = []


class _Import:
    """One module's import, as a block."""

    def __init__(self, recorder: _Recorder, name: str) -> None:
        self._recorder, self._name = recorder, name
        self.compiled = False
        self.inner_s, self.inner_bytes = 0.0, 0

    def __enter__(self) -> None:
        self._recorder.stack.imports.append(self)
        self._memory_bytes, self._started_at = _memory_bytes(), time.perf_counter()

    def __exit__(self, *_: object) -> None:
        duration_s = time.perf_counter() - self._started_at
        grown_bytes = _memory_bytes() - self._memory_bytes
        imports = self._recorder.stack.imports
        imports.pop()
        if imports:
            imports[-1].inner_s += duration_s
            imports[-1].inner_bytes += grown_bytes
        self._recorder.write(
            {
                "process": os.getpid(),
                "module": self._name,
                "compiled": self.compiled,
                "own_s": round(duration_s - self.inner_s, 6),
                "own_bytes": grown_bytes - self.inner_bytes,
            }
        )


class _Recorder:
    def __init__(self, path: str) -> None:
        self._path = path
        self.stack = _Stack()

    def write(self, record: dict[str, Any]) -> None:
        # Opened each time: a process may close all files that it has inherited. A line is one write, so is whole.
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, json.dumps(record).encode() + b"\n")
        finally:
            os.close(descriptor)

    def install(self) -> None:
        """Record the imports of this process from now on: of source, of bytecode, and of extension modules."""
        recorder = self
        execute, compile_source = SourceFileLoader.exec_module, SourceFileLoader.source_to_code
        create = ExtensionFileLoader.create_module

        def exec_module(self: Any, module: ModuleType) -> None:
            with _Import(recorder, module.__name__):
                execute(self, module)

        def source_to_code(self: Any, *arguments: Any, **options: Any) -> CodeType:
            if recorder.stack.imports:
                recorder.stack.imports[-1].compiled = True
            return compile_source(self, *arguments, **options)

        def create_module(self: Any, spec: importlib.machinery.ModuleSpec) -> ModuleType:
            with _Import(recorder, spec.name):
                return create(self, spec)

        # Classes of Python's import system, which its own finders use; it has no hook that sees time or compilation.
        SourceFileLoader.exec_module = exec_module  # type: ignore[method-assign]
        SourceFileLoader.source_to_code = source_to_code  # type: ignore[method-assign]
        ExtensionFileLoader.create_module = create_module  # type: ignore[method-assign]


def _memory_bytes() -> int:
    """Return the resident memory of this process. Source: proc_pid_statm(5)."""
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 (pathlib would be imported by this module alone)
        return int(file.read().split()[1]) * _PAGE_BYTES


if _path := os.environ.get(VARIABLE):
    _Recorder(_path).install()
