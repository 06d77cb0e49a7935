"""A worker that takes jobs up to a fixed limit, without regard to its engine's load; admission is compared with it."""

from __future__ import annotations

import sys

import handler
from engine import worker
from engine.queue import admission


class FixedLimit(admission.Admission):
    """Admits jobs up to the limit."""

    def available_slots(self, running: int) -> int:
        """Return how many more jobs to take while `running` are in progress."""
        return max(self._limit - running, 0)


if __name__ == "__main__":
    vars(worker)["Admission"] = FixedLimit
    sys.exit(handler.main())
