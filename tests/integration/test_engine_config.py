"""The engine's configuration equals that of `vllm serve` on the same GPU. The GPUs are fake; vLLM's choice is real."""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any, Literal

import pytest

from engine.backend import compat, vllm_args
from engine.config.environment import Variable
from engine.config.model import Model

pytestmark = [pytest.mark.in_process, pytest.mark.filterwarnings("ignore")]
GIB = 1 << 30
GPUS = {
    "NVIDIA H100 80GB HBM3": (80 * GIB - 1, 1024, 8192),
    "NVIDIA H200": (140 * GIB, 1024, 8192),
    "NVIDIA L40S": (45 * GIB, 256, 2048),
    "NVIDIA A100-SXM4-80GB": (80 * GIB - 1, 256, 2048),
    "NVIDIA B200": (179 * GIB, 1024, 16384),
}
"""GPU memory in bytes, and the maximum requests and tokens per step that `vllm serve` 0.32 chooses for it."""


class FakeGpuPlatform:
    """A vLLM platform that reports a GPU; all else is delegated to the real platform."""

    def __init__(self, real: Any, name: str) -> None:
        self._real, self._name = real, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def is_cpu(self) -> bool:
        return False

    def get_device_name(self, _device: int = 0) -> str:
        return self._name

    def get_device_total_memory(self, _device: int = 0) -> int:
        return GPUS[self._name][0]


@pytest.fixture(params=GPUS)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Fake a GPU where vLLM chooses the sizes of a step; elsewhere vLLM would need CUDA."""
    from vllm.engine import arg_utils

    name: str = request.param
    choose = arg_utils.EngineArgs.get_batch_defaults

    def choose_for_gpu(world_size: int) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(arg_utils, "current_platform", FakeGpuPlatform(arg_utils.current_platform, name))
            return choose(world_size)

    monkeypatch.setattr(arg_utils.EngineArgs, "get_batch_defaults", staticmethod(choose_for_gpu))
    # The worker has its own defaults only on a CPU.
    monkeypatch.setattr(vllm_args, "_defaults", lambda _: [])
    return name


def config_of_vllm_serve(model: str) -> Any:
    """Return the configuration of `vllm serve MODEL`, made by the calls of its entry point."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = ["--model", model, "--served-model-name", "tiny"]
    args = compat.cli_args().make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    return AsyncEngineArgs.from_cli_args(args).create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)


def values(config: Any, path: str = "") -> dict[str, Any]:
    """Return every value of a configuration, including nested ones, by dotted name."""
    if not dataclasses.is_dataclass(config) or isinstance(config, Enum):
        return {path: repr(config)}
    result: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        result |= values(getattr(config, field.name, None), f"{path}.{field.name}" if path else field.name)
    return result


# Values that differ between any two configurations.
RANDOM_VALUES = ("instance_id", "_port", "_ip")


def test_the_engines_configuration_equals_that_of_vllm_serve(gpu: str, tiny_model: str) -> None:
    _, seqs, tokens = GPUS[gpu]
    flags, model = vllm_args.flags(), Model(tiny_model, ("tiny",))
    _, config = vllm_args.engine_config(flags, vllm_args.parse(flags, model), model)

    assert (config.scheduler_config.max_num_seqs, config.scheduler_config.max_num_batched_tokens) == (seqs, tokens)
    ours, theirs = values(config), values(config_of_vllm_serve(tiny_model))
    assert len(ours) > 200
    assert {
        name: (ours.get(name), theirs.get(name))
        for name in ours.keys() | theirs.keys()
        if ours.get(name) != theirs.get(name)
        and not name.endswith(RANDOM_VALUES)
        and " at 0x" not in ours.get(name, "")
    } == {}


def graph_sizes(tiny_model: str, max_concurrency: int | Literal["auto"], *arguments: str) -> list[int]:
    """Return the sizes of CUDA graphs that vLLM would capture on a GPU."""
    from vllm.config import CUDAGraphMode

    flags, model = vllm_args.flags(), Model(tiny_model, ("tiny",))
    flags.load({"VLLM_EXTRA_ARGS": Variable(" ".join(arguments), "environment")}, [])
    vllm_args.limit_graphs(flags, max_concurrency)
    args = vllm_args.parse(flags, model)
    arguments_of_engine, config = vllm_args.engine_config(flags, args, model)
    compilation = config.compilation_config
    compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    compilation.max_cudagraph_capture_size = arguments_of_engine.max_cudagraph_capture_size
    compilation.cudagraph_capture_sizes = arguments_of_engine.cudagraph_capture_sizes
    config.model_config.enforce_eager = False
    config._set_cudagraph_sizes()
    sizes: list[int] = compilation.cudagraph_capture_sizes
    return sizes


def test_graphs_for_a_few_jobs_are_those_of_vllm_for_as_many_requests(gpu: str, tiny_model: str) -> None:
    del gpu

    assert graph_sizes(tiny_model, 8) == graph_sizes(tiny_model, "auto", "--max-num-seqs=8") == [1, 2, 4, 8, 16]


@pytest.mark.parametrize(
    ("max_concurrency", "arguments"),
    [
        (300, ()),
        (8, ("--max-num-seqs=4",)),
        (8, ("--cudagraph-capture-sizes", "1", "100")),
        (8, ("--max-cudagraph-capture-size=64",)),
        (8, ("--compilation-config", "'{\"max_cudagraph_capture_size\": 64}'")),
        (8, ("--runner=pooling",)),
    ],
)
def test_graphs_are_left_to_vllm_where_it_has_fewer_or_the_user_says_which(
    max_concurrency: int, arguments: tuple[str, ...], gpu: str, tiny_model: str
) -> None:
    """Also for a pooling model, of which a single request is a step of many tokens."""
    del gpu

    assert graph_sizes(tiny_model, max_concurrency, *arguments) == graph_sizes(tiny_model, "auto", *arguments)


def test_graphs_of_speculative_decoding_are_left_to_vllm() -> None:
    """A request has several tokens in each step."""
    flags = vllm_args.flags()
    speculation = '{"method": "ngram", "num_speculative_tokens": 3}'
    flags.load({"SPECULATIVE_CONFIG": Variable(speculation, "environment")}, [])

    vllm_args.limit_graphs(flags, 8)

    assert flags.value("max_cudagraph_capture_size") is None
