"""The header `X-Runpod-Worker-Id` of a request: which worker it prefers, or must have.

Source: docs.runpod.io, "Worker affinity".
"""

from __future__ import annotations

from dataclasses import dataclass

HEADER = b"x-runpod-worker-id"
_STRICT = ("strict", "strict-resume")


@dataclass(frozen=True)
class Affinity:
    """What the header says.

    Args:
        worker: id of the worker; empty without preference.
        is_strict: whether no other worker will do.
        resumes: whether the worker is started again if it was scaled down.
    """

    worker: str = ""
    is_strict: bool = False
    resumes: bool = False

    @classmethod
    def parse(cls, value: str) -> Affinity:
        """Return what a value of the header says; `ID`, `strict ID` or `strict-resume ID`."""
        mode, _, worker = value.strip().partition(" ")
        if mode in _STRICT and worker.strip():
            return cls(worker.strip(), is_strict=True, resumes=mode == "strict-resume")
        return cls(value.strip())
