"""A worker that takes jobs up to a fixed number, whatever its engine's cache holds: admission is compared with it."""

from __future__ import annotations

import sys

import handler
from engine import worker
from engine.queue import admission


class FixedLimit(admission.Admission):
    """Room for jobs up to the limit, and no look at the engine."""

    def room(self, held: int) -> int:
        """How many more jobs to take while `held` are held."""
        return max(self._limit - held, 0)


if __name__ == "__main__":
    vars(worker)["Admission"] = FixedLimit
    sys.exit(handler.main())
