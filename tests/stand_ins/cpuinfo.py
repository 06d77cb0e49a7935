"""Stands for the package py-cpuinfo in processes that integration tests start: its directory is in their `PYTHONPATH`.

RunPod's SDK asks it for the processor's name at each import, for its debug log. The package measures the processor in a
process of its own, which takes a second of one core; the tests import the SDK some hundred times.
"""

from __future__ import annotations


def get_cpu_info() -> dict[str, str]:
    """Return what the SDK reads of it."""
    return {"brand_raw": "the processor of the tests"}
