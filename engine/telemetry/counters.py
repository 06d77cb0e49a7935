"""What the worker has done so far, counted. Plain numbers: an export reads them, and counting costs nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Counts since the start.

    Attributes:
        takes, failed_takes: polls for jobs that were answered, or failed.
        jobs_taken: jobs that were started.
        full: times that no job was taken as the engine had no room.
        slots: how many more jobs the engine had room for when it was last asked.
        deliveries: outputs and results that were delivered.
        retries: deliveries that were tried again.
        refused: those that the platform has refused for good.
        lost: jobs that ended without a delivered result.
        drains: times that the worker was asked to stop.
        dropped: jobs whose telemetry was dropped.
    """

    takes: int = 0
    failed_takes: int = 0
    jobs_taken: int = 0
    full: int = 0
    slots: int = 0
    deliveries: int = 0
    retries: int = 0
    refused: int = 0
    lost: int = 0
    drains: int = 0
    dropped: int = 0


COUNTERS = Counters()
"""This worker's."""
