"""All that this worker uses of vLLM which vLLM does not promise: what an upgrade may move.

Each is asked for in one place, and a test guards it (tests/integration/test_vllm_interface.py). Where vLLM lacks one, a
line of the log says what is left out, and the worker starts all the same.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engine.backend.inline_executor import InPlace
from engine.backend.merging import MERGEABLE

TESTED_VERSIONS = ("0.32.",)
UNSEEN_MIDDLEWARE = {"CORSMiddleware", "PrometheusInstrumentatorMiddleware"}

_log = logging.getLogger(__name__)


def check_version() -> None:
    """Tell of a vLLM that this worker was not tested with."""
    import vllm

    if not vllm.__version__.startswith(TESTED_VERSIONS):
        _log.warning("vLLM %s is not a version that this worker was tested with", vllm.__version__)


@contextmanager
def optional(what: str) -> Iterator[None]:
    """Do without what the block does, with a line in the log, where vLLM has not what the block needs."""
    try:
        yield
    except (AttributeError, ImportError, TypeError) as error:
        _log.warning("This vLLM does not allow %s, which is left out: %s", what, error)


def keep_deltas_apart() -> None:
    """Let a consumer that is late get the outputs of its request one by one, and not merged into one.

    vLLM's collector merges the deltas of a stream that its consumer has not fetched in time, as happens when the event
    loop is busy; many of its tool and reasoning parsers break when they are given several tokens at once. A stream of
    plain text (`engine.backend.merging`) stays merged: that is less to do for a loop that is busy.
    """
    with optional("deltas to be kept apart"):
        from vllm.outputs import RequestOutput
        from vllm.v1.engine import async_llm

        class Apart(async_llm.RequestOutputCollector):  # type: ignore[misc]  # vLLM is not typed for --strict
            """A collector whose outputs queue up: at most one for each token of the request."""

            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **options)
                self._next: deque[Any] = deque()
                self._apart = self.aggregate and not MERGEABLE.get()

            def put(self, output: Any) -> None:
                if self._apart and isinstance(self.output, RequestOutput) and isinstance(output, RequestOutput):
                    self._next.append(output)
                else:
                    super().put(output)

            async def get(self) -> Any:
                output = await super().get()
                self._fetch()
                return output

            def get_nowait(self) -> Any:
                output = super().get_nowait()
                self._fetch()
                return output

            def _fetch(self) -> None:
                if self._next and self.output is None:
                    super().put(self._next.popleft())

        async_llm.RequestOutputCollector = Apart


def prepare_in_place(engine: Any) -> None:
    """Let short requests be prepared without vLLM's thread, where its tokenizer may be used beside that."""
    with optional("short requests to be prepared without a thread"):
        from vllm.tokenizers.hf import ThreadSafeHFTokenizerMixin

        if isinstance(engine.renderer.tokenizer, ThreadSafeHFTokenizerMixin):
            executor = engine.renderer._executor  # noqa: SLF001 (vLLM has no option for it)
            executor._inner = InPlace(executor._inner)  # noqa: SLF001


def leave_out_middleware(app: Any) -> None:
    """Take off the middleware for browsers and for metrics: both look at each event, and no job's output shows it."""
    with optional("middleware to be left out"):
        app.user_middleware = [one for one in app.user_middleware if one.cls.__name__ not in UNSEEN_MIDDLEWARE]
        app.middleware_stack = None  # It is built anew with the first request.


def list_one_name(state: Any) -> None:
    """Let vLLM list a model once for each of its names, without its directory, if it has another name before that.

    It answers to the directory still, and to its hub id as the hub writes it. In an error vLLM would show the
    directory as `<path>`, which is nobody's name.

    Args:
        state: the app's, once it is initialised.
    """
    with optional("a model's directory to be left out of its names"):
        models = state.openai_serving_models  # It shares the list of names with its registry.
        answered = frozenset(one.name for one in models.base_model_paths)
        models.registry.is_base_model = answered.__contains__
        listed = {one.name.lower(): one for one in reversed(models.base_model_paths)}
        models.base_model_paths[1:] = [
            one for one in models.base_model_paths[1:] if one.name != one.model_path and listed[one.name.lower()] is one
        ]


def answer_tokens(engine: Any) -> int:
    """How many tokens the requests that the engine has now have been answered so far, in all."""
    return sum(state.stats.num_generation_tokens for state in engine.output_processor.request_states.values())


def parses_chats(state: Any) -> bool:
    """Whether vLLM's app looks at the deltas of every streamed chat, for tool calls or reasoning.

    Args:
        state: the app's, once it is initialised.
    """
    chat = getattr(state, "openai_serving_chat", None)
    return chat is not None and getattr(chat, "parser_cls", "unknown") is not None
