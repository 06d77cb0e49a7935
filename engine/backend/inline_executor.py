"""Prepares short requests where they arrive, and long ones in a thread.

vLLM hands each request's template and tokenizer to a thread, so that a long prompt holds up nobody. For a short one
that costs more than the work itself: twice a request, the thread has to be woken and to wait for the interpreter.
"""

from __future__ import annotations

from concurrent.futures import Executor, Future
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

# So many bytes of a body are prepared in about a millisecond.
SHORT_BYTES = 4096

# Whether the request that is answered in this context is short.
SHORT: ContextVar[bool] = ContextVar("short", default=False)

_T = TypeVar("_T")


class InPlace(Executor):
    """Does a short request's work at once, and lets another executor do all else.

    Args:
        threads: the other one.
    """

    def __init__(self, threads: Executor) -> None:
        self._threads = threads

    def submit(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> Future[_T]:
        """Do it, or have it done."""
        if not SHORT.get():
            return self._threads.submit(fn, *args, **kwargs)
        future: Future[_T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 (it is raised where the result is asked for)
            future.set_exception(error)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Shut the other one down."""
        self._threads.shutdown(wait=wait, cancel_futures=cancel_futures)
