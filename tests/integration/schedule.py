"""Which process of `make integration` runs which test file (pytest-xdist): what takes longest is given out first.

So no process is left with a long file at the end. Files that share an engine of the session are given out together, to
one process; any other file by itself. A file that is not listed is given out after those that are.
"""

from __future__ import annotations

from pathlib import Path

from xdist.scheduler import LoadFileScheduling

HERE = Path(__file__).parent
# From five minutes down to half a minute. Engines compute and scripted workers mostly wait, so they alternate.
FIRST = (
    # With the worker and vLLM's server of the session.
    (
        "test_parity.py",
        "test_worker.py",
        "spirit/test_real_worker.py",
        "balancer/test_real_worker.py",
        "test_ending.py",
        "test_batch.py",
    ),
    ("test_nothing_lost.py",),
    ("test_bench.py",),
    ("emulator/test_docs.py",),
    ("emulator/spirit/test_stock_sdk.py",),
    ("test_parity_parsers.py",),
    ("emulator/test_stock_sdk.py",),
    ("test_imports.py",),
    ("emulator/test_own_worker.py",),
    ("emulator/test_control_plane.py",),
    ("test_start.py",),
    # With the emulated worker of the session.
    ("emulator/test_llm_clients.py", "emulator/test_third_party_payloads.py", "emulator/test_freeze.py"),
    ("emulator/spirit/test_stock_proxy.py",),
    ("test_caches.py",),
    ("test_fitness.py",),
    ("deploy/test_refusals.py",),
    ("test_command_line.py",),
    ("emulator/test_scaling.py",),
    ("test_parity_pooling.py",),
    ("test_model_download.py",),
    ("balancer/test_scripted_processes.py",),
)
_PLACES = {HERE / file: place for place, files in enumerate(FIRST) for file in files}


def place(path: Path) -> int:
    """Return when a file is given out: its place among the units of `FIRST`, or after them."""
    return _PLACES.get(path, len(FIRST))


class Schedule(LoadFileScheduling):  # type: ignore[misc]  # xdist is not typed
    """Gives out whole files in the order of the collection, and files that share an engine as one."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        at = place(self.config.rootpath / file)
        return FIRST[at][0] if at < len(FIRST) else file
