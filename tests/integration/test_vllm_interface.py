"""The parts of vLLM that `engine/backend/` uses; after an upgrade, a failure here names what has changed."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine.backend import compat, vllm_args, vllm_engine
from engine.backend.configuration import Configuration
from engine.backend.inline_executor import SHORT, InlineExecutor
from engine.backend.merging import MERGEABLE
from engine.backend.routes import SERVING
from engine.errors import ConfigurationError

# Importing vLLM and torch issues deprecation warnings.
pytestmark = [pytest.mark.in_process, pytest.mark.filterwarnings("ignore")]

MOVED = "vLLM has changed what engine/backend/ uses: {}. See how `vllm serve` does it now, and do the same there."

USED = {
    "vllm.engine.arg_utils.AsyncEngineArgs.from_cli_args": ["args"],
    "vllm.engine.arg_utils.AsyncEngineArgs.create_engine_config": ["usage_context"],
    "vllm.usage.usage_lib.UsageContext": [],
    "vllm.v1.engine.async_llm.AsyncLLM.from_vllm_config": [
        "vllm_config",
        "stat_loggers",
        "enable_log_requests",
        "disable_log_stats",
    ],
    "vllm.sampling_params.SamplingParams": ["stream_interval"],
    "vllm.v1.engine.output_processor.RequestOutputCollector": ["output_kind", "request_id"],
    "vllm.v1.metrics.stats.RequestStateStats": ["num_generation_tokens"],
    "vllm.parser.ParserManager.get_parser": ["tool_parser_name", "reasoning_parser_name"],
    "vllm.v1.metrics.loggers.PrometheusStatLogger": ["vllm_config", "engine_indexes"],
    "vllm.v1.engine.async_llm.AsyncLLM.get_num_unfinished_requests": ["self"],
    "vllm.v1.engine.async_llm.AsyncLLM.get_supported_tasks": ["self"],
    "vllm.v1.engine.async_llm.AsyncLLM.shutdown": ["self"],
    "vllm.entrypoints.launchers.app.build_app": ["args", "supported_tasks", "model_config"],
    "vllm.entrypoints.launchers.api_server.app_state.init_app_state": [
        "engine_client",
        "state",
        "args",
        "supported_tasks",
    ],
    "vllm.multimodal.media.connector.MediaConnector.load_from_url_async": ["url", "media_io", "fetch_timeout"],
    "vllm.exceptions.GracefulHTTPError": ["message", "http_status"],
    "vllm.multimodal.media.base.MediaIO.get_max_bytes": ["self"],
    "vllm.entrypoints.serve.exception_handling.error_response.create_error_response": ["message"],
    "vllm.utils.argparse_utils.FlexibleArgumentParser": [],
    "vllm.platforms.current_platform.is_cpu": [],
    "vllm.v1.metrics.loggers.StatLoggerBase.record": [
        "scheduler_stats",
        "iteration_stats",
        "mm_cache_stats",
        "engine_idx",
    ],
    "vllm.v1.metrics.loggers.StatLoggerBase.log_engine_initialized": ["self"],
}


@pytest.mark.parametrize("name", USED)
def test_vllm_has_what_the_backend_uses(name: str) -> None:
    parameters = inspect.signature(_find(name)).parameters
    # A plugin of vLLM may have wrapped the function in one that passes everything on.
    wrapped = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    missing = [] if wrapped else [parameter for parameter in USED[name] if parameter not in parameters]
    assert not missing, MOVED.format(f"{name} no longer takes {', '.join(missing)}")


def test_vllm_has_its_command_line_where_the_worker_looks_for_it() -> None:
    arguments = compat.cli_args()

    assert [*inspect.signature(arguments.make_arg_parser).parameters] == ["parser"]
    assert [*inspect.signature(arguments.validate_parsed_serve_args).parameters] == ["args"]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("SchedulerStats", ["num_running_reqs", "num_waiting_reqs", "kv_cache_usage"]),
        ("IterationStats", ["num_prompt_tokens", "num_generation_tokens"]),
    ],
)
def test_vllms_statistics_have_what_the_backend_reads(name: str, fields: list[str]) -> None:
    statistics = _find(f"vllm.v1.metrics.stats.{name}")()

    missing = [field for field in fields if not hasattr(statistics, field)]
    assert not missing, MOVED.format(f"{name} has no {', '.join(missing)}")


@pytest.mark.anyio
async def test_vllms_rendering_executor_can_run_inline() -> None:
    from vllm.renderers.base import _SwappableExecutor

    executor = _SwappableExecutor(max_workers=1)
    executor._inner = InlineExecutor(executor._inner)
    threads: list[int] = []

    for short in (True, False):
        SHORT.set(short)
        threads.append(await asyncio.get_running_loop().run_in_executor(executor, threading.get_ident))
    executor.replace_inner()  # As vLLM does when a chat template hangs.

    assert (threads[0] == threading.get_ident(), threads[1] == threading.get_ident()) == (True, False)
    assert executor.submit(threading.get_ident).result() != threading.get_ident()
    executor.shutdown()


def output(token: int, *, finished: bool = False) -> Any:
    from vllm.outputs import CompletionOutput, RequestOutput

    completion = CompletionOutput(0, str(token), [token], None, None, finish_reason="stop" if finished else None)
    return RequestOutput("1", None, None, None, [completion], finished)


@pytest.fixture
def collectors(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Return vLLM's collector of a request's outputs, and ours that replaces it."""
    from vllm.v1.engine import async_llm

    theirs = async_llm.RequestOutputCollector
    monkeypatch.setattr(async_llm, "RequestOutputCollector", theirs)
    compat.keep_deltas_separate()
    return theirs, async_llm.RequestOutputCollector


@pytest.mark.anyio
async def test_a_slow_consumer_gets_each_delta_separately(collectors: tuple[Any, Any]) -> None:
    from vllm.sampling_params import RequestOutputKind

    got: list[list[list[int]]] = []
    for kind in collectors:
        collector = kind(RequestOutputKind.DELTA, "1")
        for token in (1, 2, 3):
            collector.put(output(token, finished=token == 3))
        tokens, finished = [], False
        while not finished:
            one = collector.get_nowait() or await collector.get()
            tokens.append(list(one.outputs[0].token_ids))
            finished = one.finished
        assert collector.get_nowait() is None
        got.append(tokens)

    assert got == [[[1, 2, 3]], [[1], [2], [3]]], MOVED.format(
        "its collector merges no deltas now, or ours does not work"
    )


@pytest.mark.anyio
async def test_a_slow_consumer_of_plain_text_gets_merged_deltas(collectors: tuple[Any, Any]) -> None:
    from vllm.sampling_params import RequestOutputKind

    MERGEABLE.set(True)
    collector = collectors[1](RequestOutputKind.DELTA, "1")
    for token in (1, 2, 3):
        collector.put(output(token, finished=token == 3))

    assert list((await collector.get()).outputs[0].token_ids) == [1, 2, 3]
    assert collector.get_nowait() is None


@pytest.mark.anyio
async def test_an_error_reaches_a_slow_and_a_waiting_consumer(collectors: tuple[Any, Any]) -> None:
    from vllm.sampling_params import RequestOutputKind

    slow = collectors[1](RequestOutputKind.DELTA, "1")
    slow.put(output(1))
    slow.put(output(2))
    slow.put(RuntimeError("dead"))
    with pytest.raises(RuntimeError, match="dead"):
        await slow.get()

    waiting = collectors[1](RequestOutputKind.DELTA, "1")
    getting = asyncio.create_task(waiting.get())
    await asyncio.sleep(0)
    waiting.put(RuntimeError("dead"))
    with pytest.raises(RuntimeError, match="dead"):
        await getting


@pytest.mark.anyio
async def test_cumulative_outputs_are_collected_as_vllm_does(collectors: tuple[Any, Any]) -> None:
    from vllm.sampling_params import RequestOutputKind

    collector = collectors[1](RequestOutputKind.CUMULATIVE, "1")
    collector.put(output(1))
    collector.put(output(2, finished=True))

    assert (await collector.get()).outputs[0].token_ids == [2]
    assert collector.get_nowait() is None


def test_an_optimization_that_vllm_does_not_allow_is_logged_and_skipped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm.v1.engine import async_llm

    monkeypatch.delattr(async_llm, "RequestOutputCollector")
    compat.keep_deltas_separate()
    compat.render_short_requests_inline(object())
    compat.remove_unused_middleware(object())

    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        "Disabled, as this vLLM does not support it: separate deltas for tool and reasoning parsers",
        "Disabled, as this vLLM does not support it: rendering of short requests without a thread",
        "Disabled, as this vLLM does not support it: removal of unused middleware",
    ]


def test_an_untested_version_of_vllm_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import vllm

    compat.check_version()
    assert caplog.text == ""
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    compat.check_version()
    assert "0.99.0" in caplog.text


@pytest.mark.anyio
async def test_an_app_whose_lifespan_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lifespan runs in a separate task, where an exception would be lost."""
    from fastapi import FastAPI
    from vllm.entrypoints.launchers import app as launcher
    from vllm.entrypoints.launchers.api_server import app_state

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        raise RuntimeError("the app cannot start")
        yield

    async def nothing(*_: object) -> None:
        pass

    monkeypatch.setattr(launcher, "build_app", lambda *_: FastAPI(lifespan=lifespan))
    monkeypatch.setattr(app_state, "init_app_state", nothing)
    engine = object.__new__(vllm_engine.VLLMEngine)  # Its constructor would load the engine.
    engine._app_lock, engine._app, engine.open_routes = asyncio.Lock(), None, frozenset()
    args = SimpleNamespace(served_model_name=(), trust_request_chat_template=True, model="org/model")
    engine._configuration = cast("Configuration", SimpleNamespace(args=args, flags=vllm_args.flags()))
    engine._engine = SimpleNamespace(get_supported_tasks=nothing, model_config=None, errored=False)

    for _ in range(2):
        with pytest.raises(ConfigurationError, match="the app cannot start"):
            await engine.app()
    # Under the SDK's own loop, only the watch of the engine notices it.
    assert "the app cannot start" in str(engine.failure())


def test_a_model_is_listed_once_per_name_and_accepts_all_its_names() -> None:
    """Its directory is not listed, and neither is its hub id in another case."""
    from vllm.entrypoints.openai.models.protocol import BaseModelPath

    names = ["org/tiny-chat", "Org/Tiny-Chat", "another", "/a/directory"]
    paths = [BaseModelPath(name, "/a/directory") for name in names]
    state = SimpleNamespace(openai_serving_models=SimpleNamespace(base_model_paths=paths, registry=SimpleNamespace()))

    compat.list_one_name(state)

    assert [one.name for one in paths] == ["org/tiny-chat", "another"]
    assert all(map(state.openai_serving_models.registry.is_base_model, names))
    assert not state.openai_serving_models.registry.is_base_model("yet-another")


@pytest.mark.parametrize(
    ("own", "tokens"), [(3000, 3000), (None, 4096)], ids=["a hybrid model, by vLLM's own count", "a vLLM without one"]
)
def test_the_size_of_the_kv_cache_is_vllms_own_count(own: int | None, tokens: int) -> None:
    """In a hybrid model a request takes blocks of several groups: fewer tokens fit than the blocks could hold."""
    from vllm.config import CacheConfig

    assert hasattr(CacheConfig(), "kv_cache_size_tokens"), MOVED.format("its cache has no kv_cache_size_tokens")
    cache = SimpleNamespace(num_gpu_blocks=256, block_size=16, kv_cache_size_tokens=own)
    engine = object.__new__(vllm_engine.VLLMEngine)
    engine._engine = SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache))

    assert engine.cache_tokens == tokens


CLOSED = {
    "documentation": {"/docs", "/docs/oauth2-redirect", "/openapi.json", "/redoc"},
    "of the process, not of a request": {"/kv_event_sources", "/load", "/metrics", "/ping"},
    "administration": {"/inference/v1/abort_requests", "/is_scaling_elastic_ep", "/scale_elastic_ep"},
    "any other route under one name": {"/invocations"},
    "half of a request": {
        "/inference/v1/generate",
        "/v1/chat/completions/derender",
        "/v1/chat/completions/render",
        "/v1/completions/derender",
        "/v1/completions/render",
        "/v1/messages/render",
        "/v1/responses/render",
    },
    "of a request that another worker has": {"/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel"},
    "a connection that stays": {"/v1/realtime"},
    "experimental, and of few models": {"/v1/systemone"},
}
# Ours, and one that vLLM has only with the package `cohere`.
NOT_VLLMS = {"/cold_start", "/cohere/v2/chat"}
# vLLM has it since 0.33: `ALLOWED_ROUTES` opens it until 0.32 is dropped.
NEW = {"/v1/decisions"}


def test_every_route_of_vllm_is_allowed_or_closed_for_a_reason() -> None:
    from vllm.entrypoints.launchers.app import build_app
    from vllm.tasks import FRONTEND_TASKS, GENERATION_TASKS, POOLING_TASKS

    class AnyModel:
        """A model that has every kind of route."""

        def get_pooling_task(self, _: object) -> str:
            return "embed"

    args = vllm_args.flags().parser.parse_args(["--enable-tokenizer-info-endpoint"])
    app = build_app(args, (*GENERATION_TASKS, *POOLING_TASKS, *FRONTEND_TASKS), AnyModel())
    closed = set[str]().union(*CLOSED.values())

    assert {one.cls.__name__ for one in app.user_middleware} >= compat.UNUSED_MIDDLEWARE, (
        "no middleware to remove was found"
    )
    routes = {route.path for route in app.routes}
    assert routes - NEW == (SERVING - NOT_VLLMS) | closed, "vLLM's routes have changed"
    assert not SERVING & closed


def _find(name: str) -> Any:
    """Return the object of a dotted name: the longest existing module, then its attributes."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found: Any = import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        try:
            for part in parts[length:]:
                found = getattr(found, part)
        except AttributeError:
            pytest.fail(MOVED.format(f"there is no {name}"))
        return found
    pytest.fail(MOVED.format(f"there is no {name}"))
