"""The packages import one another in one direction only, as docs/architecture.md draws it.

Imports are read from the source. One at the top level of a module runs when the module is imported; one in a function,
or under `TYPE_CHECKING`, does not, but couples the two modules all the same.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("batch", "builder", "deploy", "emulator", "engine", "runpod_api")
# A package of the worker may import itself and those after it. `engine` stands for the modules at its root.
ORDER = ("engine", "engine.queue", "engine.jobs", "engine.backend", "engine.telemetry", "engine.config")
# What is agreed with others: the parts that speak it may import it.
SPECIFICATIONS = {"runpod_api"}
# It is next to `engine.queue`: neither imports the other.
BESIDE = {"engine.server": "engine.queue"}
# All may import these, which import only each other.
SHARED = {"engine.child_processes", "engine.cold_start", "engine.errors", "engine.json_codec", "engine.run_clock"}
STARTUP_MAY_IMPORT = {"engine.backend", "engine.config"}
# The deployment uses the doctor; nothing imports the deployment.
MAY_IMPORT = {("deploy", "builder")}
ACROSS = {
    ("engine.startup.caches", "builder.layout"),
    ("engine.startup.model_store", "builder.layout"),
    ("engine.startup.weight_prefetch", "builder.layout"),
    ("handler", "emulator.cli"),
}


@dataclass(frozen=True)
class Import:
    """One module imports another; `runs` says whether at import time."""

    importer: str
    imported: str
    runs: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path.read_text(encoding="utf-8")
    for path in (ROOT / "handler.py", *(path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))))
}


def imports_of(importer: str, source: str) -> Iterator[Import]:
    """Each import of a module's source; of `from package import name`, the module `package.name` if there is one."""

    def walk(node: ast.AST, *, runs: bool) -> Iterator[Import]:
        match node:
            case ast.Import(names=names):
                yield from (Import(importer, alias.name, runs) for alias in names)
            case ast.ImportFrom(module=str(package), names=names):
                for alias in names:
                    name = f"{package}.{alias.name}"
                    yield Import(importer, name if name in SOURCES else package, runs)
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                for child in ast.iter_child_nodes(node):
                    yield from walk(child, runs=False)
            case _:
                inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                for child in ast.iter_child_nodes(node):
                    yield from walk(child, runs=runs and not inside)

    return walk(ast.parse(source), runs=True)


IMPORTS = [one for name, source in SOURCES.items() for one in imports_of(name, source)]


SUBPACKAGES = {f"engine.{path.parent.name}" for path in (ROOT / "engine").glob("*/__init__.py")}


def package_of(module: str) -> str:
    """The package that the order names: `engine.jobs` of `engine.jobs.inputs`, `engine` of `engine.worker`."""
    package = ".".join(module.split(".")[:2])
    return package if package in SUBPACKAGES else "engine"


def is_allowed(importer: str, imported: str) -> bool:
    """Whether a module of the worker may import another one."""
    source, target = package_of(importer), package_of(imported)
    if source == target or imported in SHARED:
        return True
    if importer in SHARED:
        return False
    if source == "engine.startup":
        return target in STARTUP_MAY_IMPORT
    if target == "engine.startup":
        return source == "engine"
    return ORDER.index(BESIDE.get(source, source)) < ORDER.index(BESIDE.get(target, target))


def test_the_workers_packages_import_in_one_direction() -> None:
    against = {
        (one.importer, one.imported)
        for one in IMPORTS
        if one.importer.split(".")[0] == one.imported.split(".")[0] == "engine"
        and not is_allowed(one.importer, one.imported)
    }

    assert against == set()


def test_only_the_backend_imports_vllm() -> None:
    importers = {one.importer for one in IMPORTS if one.imported.split(".")[0] == "vllm"}

    assert {package_of(name) for name in importers} == {"engine.backend"}


def test_only_the_queue_imports_the_sdk() -> None:
    importers = {one.importer for one in IMPORTS if one.imported.split(".")[0] == "runpod"}

    assert importers <= {"engine.queue.runpod_client", "engine.startup.fitness"}


def test_only_modules_for_spirit_import_its_sdk() -> None:
    importers = {one.importer for one in IMPORTS if one.imported.split(".")[0] == "spirit_gpu"}

    assert importers
    assert {name.removeprefix("engine.queue.").partition("_")[0] for name in importers} == {"spirit"}


def test_packages_do_not_import_each_other() -> None:
    tops = {*PACKAGES, "handler"}
    across = {
        (one.importer, one.imported)
        for one in IMPORTS
        if one.imported.split(".")[0] in tops - {one.importer.split(".")[0], *SPECIFICATIONS}
        and not (one.importer == "handler" and one.imported.startswith("engine"))
        and (one.importer.split(".")[0], one.imported.split(".")[0]) not in MAY_IMPORT
    }

    assert across <= ACROSS


def test_no_modules_import_each_other_in_a_circle() -> None:
    """At import time: which of them is imported first would decide whether it works."""
    targets: dict[str, set[str]] = {name: set() for name in SOURCES}
    for one in IMPORTS:
        if one.runs and one.imported in SOURCES:
            targets[one.importer].add(one.imported)
    # Take away what imports nothing that is left, as long as there is such a module: a circle remains.
    while free := {name for name, imported in targets.items() if not imported & targets.keys()}:
        targets = {name: imported for name, imported in targets.items() if name not in free}

    assert sorted(targets) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from engine import errors", Import("x", "engine.errors", runs=True)),
        ("from engine.errors import ConfigurationError", Import("x", "engine.errors", runs=True)),
        ("def f():\n    import vllm.envs", Import("x", "vllm.envs", runs=False)),
        ("if TYPE_CHECKING:\n    from engine import worker", Import("x", "engine.worker", runs=False)),
        ("class A:\n    import runpod", Import("x", "runpod", runs=True)),
    ],
)
def test_an_import_is_read_with_when_it_runs(source: str, expected: Import) -> None:
    assert list(imports_of("x", source)) == [expected]
