"""Runs the rendering of short requests in the event loop, and that of long ones in vLLM's thread.

vLLM hands each request's chat template and tokenization to a thread, so that a long prompt does not block the loop. For
a short one that costs more than the work itself: twice a request, the thread must wake up and wait for the GIL.
"""

from __future__ import annotations

from concurrent.futures import Executor, Future
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

# A body of this size is rendered in about a millisecond.
SHORT_BYTES = 4096

# Whether the request of this context is short.
SHORT: ContextVar[bool] = ContextVar("short", default=False)

_T = TypeVar("_T")


class InlineExecutor(Executor):
    """Runs the work of a short request at once, and submits all other work to another executor.

    Args:
        threads: the other executor.
    """

    def __init__(self, threads: Executor) -> None:
        self._threads = threads

    def submit(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> Future[_T]:
        """Run it, or submit it to the other executor."""
        if not SHORT.get():
            return self._threads.submit(fn, *args, **kwargs)
        future: Future[_T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 (the future's consumer gets it)
            future.set_exception(error)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Shut the other executor down."""
        self._threads.shutdown(wait=wait, cancel_futures=cancel_futures)
