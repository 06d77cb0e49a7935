"""What this worker uses of vLLM that vLLM does not promise: versions tested, private attributes, log lines.

An upgrade of vLLM may move any of it. tests/integration/test_vllm_interface.py guards the attributes, and
tests/unit/backend/test_compat.py the patterns of log lines and errors, against vLLM's sources. Where an attribute is
missing, one log line says which optimisation is disabled, and the worker starts without it.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engine.backend.inline_executor import InlineExecutor
from engine.backend.merging import MERGEABLE

TESTED_VERSIONS = ("0.32.", "0.33.")
UNUSED_MIDDLEWARE = {"CORSMiddleware", "PrometheusInstrumentatorMiddleware"}

# Loggers of vLLM's processes that report why one could not start, and how long each step took.
STARTUP_LOGGERS = (
    "vllm.compilation.backends",
    "vllm.compilation.decorators",
    "vllm.compilation.monitor",
    "vllm.model_executor.model_loader.default_loader",
    "vllm.v1.core.kv_cache_utils",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.worker.gpu_model_runner",
)
# Log lines with the seconds that a part of a start took. COMPILED_IN is logged for loading compiled code too, and is
# part of ENGINE_INITIALIZED like GRAPHS_CAPTURED.
WEIGHTS_LOADED = re.compile(r"Loading weights took ([\d.]+) s")
COMPILED_IN = re.compile(r"torch\.compile (?:and initial profiling/warmup run together )?took ([\d.]+) s in total")
GRAPHS_CAPTURED = re.compile(r"Graph capturing finished in ([\d.]+) secs")
ENGINE_INITIALIZED = re.compile(r"init engine \(.*\) took ([\d.]+) s")
# A log line between the memory profile and the allocation of the KV cache.
KV_CACHE_SIZED = re.compile(r"KV cache size: \S+ tokens")
# Log lines when vLLM loads compiled code, fails to load it, and compiles.
COMPILED_CODE_LOADED = re.compile(r"Directly load (?:AOT compilation|the compiled graph)")
COMPILED_CODE_NOT_LOADED = re.compile(r"Compiling model again due to a load failure from \S+, reason: (.*)")
COMPILED = re.compile(r"(?:Compiling a graph|saved AOT compiled function)")
# Error messages, with the numbers that they report.
MODEL_LEN_EXCEEDS_MEMORY = r"estimated maximum model length is (\d+)"
NO_KV_CACHE_MEMORY = r"To serve at least one request|No available memory for the cache|leaving none for the KV cache"
NOT_ENOUGH_MEMORY = r"(?:OutOfMemoryError|out of memory|less than (?:desired|requested)[^.]*memory)"
MODEL_LEN_EXCEEDS_MODEL = r"max_model_len \((\d+)\) is greater than the derived max_model_len \(\w+=(\d+)"

_log = logging.getLogger(__name__)


def check_version() -> None:
    """Log a warning if this worker was not tested with the installed vLLM."""
    import vllm

    if not vllm.__version__.startswith(TESTED_VERSIONS):
        _log.warning(
            "This worker was not tested with vLLM %s, only with %s", vllm.__version__, ", ".join(TESTED_VERSIONS)
        )


def cli_args() -> Any:
    """Return vLLM's module of command-line arguments: `launchers.cli_args` in 0.32, `common.cli_args` in 0.33."""
    try:
        from vllm.entrypoints.common import cli_args
    except ImportError:
        from vllm.entrypoints.launchers import cli_args
    return cli_args


@contextmanager
def optional(what: str) -> Iterator[None]:
    """Skip the rest of the block, with one log line, if vLLM lacks something that it needs."""
    try:
        yield
    except (AttributeError, ImportError, TypeError) as error:
        _log.warning("Disabled, as this vLLM does not support it: %s (%s)", what, error)


def keep_deltas_separate() -> None:
    """Give a late consumer the outputs of its request one by one instead of merged into one.

    vLLM's collector merges the deltas of a stream that its consumer has not fetched in time, as happens when the event
    loop is busy. Many tool and reasoning parsers of vLLM fail when they get several tokens at once. Streams of plain
    text (`engine.backend.merging`) stay merged, which saves work when the loop is busy.
    """
    with optional("separate deltas for tool and reasoning parsers"):
        from vllm.outputs import RequestOutput
        from vllm.v1.engine import async_llm

        class SeparateOutputs(async_llm.RequestOutputCollector):  # type: ignore[misc]  # vLLM is not typed for --strict
            """A collector that queues outputs: at most one for each token of the request."""

            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **options)
                self._next: deque[Any] = deque()
                self._separate = self.aggregate and not MERGEABLE.get()

            def put(self, output: Any) -> None:
                if self._separate and isinstance(self.output, RequestOutput) and isinstance(output, RequestOutput):
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

        async_llm.RequestOutputCollector = SeparateOutputs


def render_short_requests_inline(engine: Any) -> None:
    """Render and tokenize short requests without vLLM's thread, if its tokenizer is safe to use in parallel to that."""
    with optional("rendering of short requests without a thread"):
        from vllm.tokenizers.hf import ThreadSafeHFTokenizerMixin

        if isinstance(engine.renderer.tokenizer, ThreadSafeHFTokenizerMixin):
            executor = engine.renderer._executor  # noqa: SLF001 (vLLM has no option for it)
            executor._inner = InlineExecutor(executor._inner)  # noqa: SLF001


def remove_unused_middleware(app: Any) -> None:
    """Remove the middleware for browsers and for metrics: both run for each event, without effect on a job's output."""
    with optional("removal of unused middleware"):
        app.user_middleware = [one for one in app.user_middleware if one.cls.__name__ not in UNUSED_MIDDLEWARE]
        app.middleware_stack = None  # The first request builds it again.


def list_one_name(state: Any) -> None:
    """Make `/v1/models` list the model once for each name, without its directory if it has another name.

    Requests may still use the directory, and the hub id as the hub writes it. In an error, vLLM would show the
    directory as `<path>`, which helps nobody.

    Args:
        state: the app's, after its initialisation.
    """
    with optional("a list of models without directories"):
        models = state.openai_serving_models  # It shares the list of names with its registry.
        accepted = frozenset(one.name for one in models.base_model_paths)
        models.registry.is_base_model = accepted.__contains__
        listed = {one.name.lower(): one for one in reversed(models.base_model_paths)}
        models.base_model_paths[1:] = [
            one for one in models.base_model_paths[1:] if one.name != one.model_path and listed[one.name.lower()] is one
        ]


def cache_variables() -> None:
    """Let vLLM read its environment variables once, as its engine's process does, and not for each token."""
    with optional("a cache of vLLM's environment variables"):
        from vllm import envs

        envs.enable_envs_cache()


def forget_variables() -> None:
    """Undo `cache_variables`."""
    with optional("a cache of vLLM's environment variables"):
        from vllm import envs

        envs.disable_envs_cache()


def output_tokens(engine: Any) -> int:
    """Return how many output tokens the engine's present requests have so far, in total."""
    return sum(state.stats.num_generation_tokens for state in engine.output_processor.request_states.values())


def parses_chats(state: Any) -> bool:
    """Return whether vLLM's app parses the deltas of every streamed chat, for tool calls or reasoning.

    Args:
        state: the app's, after its initialisation.
    """
    chat = getattr(state, "openai_serving_chat", None)
    return chat is not None and getattr(chat, "parser_cls", "unknown") is not None
