"""Waits between the calls of a long poll, so that a platform that fails or answers at once is not flooded."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from engine.errors import RateLimitedError, UnusableQueueError, safe_str
from engine.run_clock import CLOCK

# The SDK waits as long after status 429.
RATE_LIMIT_WAIT_S = 5.0
_FIRST_WAIT_S = 0.05
_MAX_ERROR_WAIT_S = 5.0
_MAX_IDLE_WAIT_S = 1.0
# An empty answer that came sooner was not a long poll: the next call could come back as quickly.
_MIN_LONG_POLL_S = 0.5

_log = logging.getLogger(__name__)


class PollBackoff:
    """The wait before the next call: none after a result or a full long poll, else longer with each call.

    Attributes:
        result: what the last call brought; set by the caller within `attempt`.
        wait_s: how long to wait before the next call, in seconds.
    """

    def __init__(self) -> None:
        self.result: Sequence[object] = ()
        self.wait_s = 0.0
        self._next_s = _FIRST_WAIT_S

    @contextmanager
    def attempt(self, failure: str) -> Iterator[None]:
        """Run one call; log its error after the text `failure`, and set `wait_s`.

        Raises:
            UnusableQueueError: no further call can succeed.
        """
        begun = CLOCK.now()
        self.result, self.wait_s = (), 0.0
        longest_s = _MAX_IDLE_WAIT_S
        try:
            yield
        except UnusableQueueError:
            raise
        except RateLimitedError as error:
            _log.warning("%s: %s; next attempt in %.0f s", failure, error, RATE_LIMIT_WAIT_S)
            self.wait_s = RATE_LIMIT_WAIT_S
            return
        except Exception as error:  # noqa: BLE001 (whatever it is, the next call may succeed)
            _log.warning("%s: %s", failure, safe_str(error))
            longest_s = _MAX_ERROR_WAIT_S
        else:
            if self.result or CLOCK.now() - begun > _MIN_LONG_POLL_S:
                self._next_s = _FIRST_WAIT_S
                return
        self.wait_s = min(self._next_s, longest_s) * random.uniform(0.5, 1.0)  # noqa: S311 (jitter)
        self._next_s = min(2 * self._next_s, _MAX_ERROR_WAIT_S)
