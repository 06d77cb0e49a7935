"""The engine's configuration equals that of `vllm serve` on the same GPU, value by value, whatever is set.

The GPUs are fake: vLLM is told of one only where it chooses the sizes of a step. Its choice is real.
"""

from __future__ import annotations

import dataclasses
import os
import re
from enum import Enum
from typing import Any, Literal

import pytest

from engine.backend import compat, startup_plan, vllm_args
from engine.config import environment
from engine.config.environment import Variable
from engine.config.model import Model
from engine.config.settings import Settings
from engine.startup import configure

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


# The value that differs between any two configurations.
RANDOM_VALUES = {"instance_id"}
# What users set, by worker variables and by the same flags of `vllm serve`; each changes how others are chosen.
SETTINGS: dict[str, tuple[dict[str, str], list[str]]] = {
    "none": ({}, []),
    "the image's with the default model": (
        {"DTYPE": "bfloat16", "QUANTIZATION": "fp8"},
        ["--dtype", "bfloat16", "--quantization", "fp8"],
    ),
    "sizes of a step": (
        {"MAX_NUM_SEQS": "64", "MAX_NUM_BATCHED_TOKENS": "4k", "MAX_MODEL_LEN": "1024", "BLOCK_SIZE": "32"},
        ["--max-num-seqs", "64", "--max-num-batched-tokens", "4000", "--max-model-len", "1024", "--block-size", "32"],
    ),
    "one size of a step": ({"MAX_NUM_SEQS": "7"}, ["--max-num-seqs", "7"]),
    "memory": (
        {"GPU_MEMORY_UTILIZATION": "0.5", "KV_CACHE_MEMORY_BYTES": "1G", "ENABLE_PREFIX_CACHING": "false"},
        ["--gpu-memory-utilization", "0.5", "--kv-cache-memory-bytes", str(GIB), "--no-enable-prefix-caching"],
    ),
    "no compilation": (
        {"ENFORCE_EAGER": "true", "ENABLE_CHUNKED_PREFILL": "false", "SEED": "7"},
        ["--enforce-eager", "--no-enable-chunked-prefill", "--seed", "7"],
    ),
    "compilation": (
        {"COMPILATION_CONFIG": '{"cudagraph_capture_sizes": [1, 2, 4]}', "OPTIMIZATION_LEVEL": "1"},
        ["--compilation-config", '{"cudagraph_capture_sizes": [1, 2, 4]}', "--optimization-level", "1"],
    ),
    "tools, reasoning and adapters": (
        {
            "ENABLE_AUTO_TOOL_CHOICE": "true",
            "TOOL_CALL_PARSER": "hermes",
            "REASONING_PARSER": "granite",
            "ENABLE_LORA": "true",
            "MAX_LORA_RANK": "32",
        },
        [
            *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "granite"),
            *("--enable-lora", "--max-lora-rank", "32"),
        ],
    ),
    "speculative decoding": (
        {"SPECULATIVE_CONFIG": '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}'},
        ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}'],
    ),
}


def of_vllm_serve(model: str, arguments: list[str]) -> tuple[Any, Any]:
    """Return the engine arguments and the configuration of `vllm serve MODEL`, made by the calls of its entry point."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    given = ["--model", model, "--served-model-name", "tiny", *arguments]
    args = AsyncEngineArgs.from_cli_args(compat.cli_args().make_arg_parser(FlexibleArgumentParser()).parse_args(given))
    return args, args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)


def of_this_worker(model: str, variables: dict[str, str]) -> tuple[Any, Any]:
    """Return the same of this worker with these variables."""
    flags = vllm_args.flags()
    flags.load(environment.read(variables), [name.upper() for name in Settings.model_fields])
    named = Model(model, ("tiny",))
    arguments, config = vllm_args.engine_config(flags, vllm_args.parse(flags, named), named)
    return arguments, config


def values(config: Any, path: str = "") -> dict[str, str]:
    """Return every value of a configuration, including nested ones, by dotted name; an object without its address."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type | Enum):
        parts = {field.name: getattr(config, field.name, None) for field in dataclasses.fields(config)}
    elif isinstance(config, dict):
        parts = {repr(key): value for key, value in config.items()}
    elif isinstance(config, list | tuple):
        parts = {str(index): value for index, value in enumerate(config)}
    else:
        return {path: re.sub(r" at 0x[0-9a-f]+", "", repr(config))}
    result = {path: f"{type(config).__name__} of {len(parts)}"}
    for name, value in parts.items():
        result |= values(value, f"{path}.{name}" if path else name)
    return result


def differences(ours: Any, theirs: Any) -> dict[str, tuple[str | None, str | None]]:
    """Return the values of two configurations that differ, by name; without those that any two differ in."""
    first, second = values(ours), values(theirs)
    return {
        name: (first.get(name), second.get(name))
        for name in first.keys() | second.keys()
        if first.get(name) != second.get(name) and name not in RANDOM_VALUES
    }


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_engines_configuration_equals_that_of_vllm_serve(gpu: str, settings: str, tiny_model: str) -> None:
    """Every flag and every effective value, with nothing set and with settings that change what vLLM chooses."""
    variables, arguments = SETTINGS[settings]
    our_args, ours = of_this_worker(tiny_model, variables)
    their_args, theirs = of_vllm_serve(tiny_model, arguments)

    if settings == "none":
        _, seqs, tokens = GPUS[gpu]
        scheduler = ours.scheduler_config
        assert (scheduler.max_num_seqs, scheduler.max_num_batched_tokens) == (seqs, tokens)
    assert len(values(our_args)) > 150
    assert len(values(ours)) > 400
    assert differences(our_args, their_args) == {}
    assert differences(ours, theirs) == {}


@pytest.mark.parametrize("gpu", ["NVIDIA H100 80GB HBM3"], indirect=True)
@pytest.mark.parametrize("settings", [name for name in SETTINGS if name != "none"])
@pytest.mark.usefixtures("gpu")
def test_a_setting_that_only_one_of_them_has_is_a_difference(settings: str, tiny_model: str) -> None:
    """The comparison sees each of these settings, in the flags and in what becomes of them."""
    our_args, ours = of_this_worker(tiny_model, SETTINGS[settings][0])
    their_args, theirs = of_vllm_serve(tiny_model, [])

    assert differences(our_args, their_args) != {}
    assert differences(ours, theirs) != {}


def test_the_worker_and_vllm_differ_where_the_worker_has_defaults_of_its_own(tiny_model: str) -> None:
    """On a CPU: there it does not compile, and its KV cache is small."""
    found = differences(of_this_worker(tiny_model, {})[1], of_vllm_serve(tiny_model, [])[1])

    assert found["model_config.enforce_eager"] == ("True", "False")
    assert "cache_config.kv_cache_memory_bytes" in found


def test_values_are_compared_within_lists_and_mappings_and_without_addresses() -> None:
    @dataclasses.dataclass
    class Config:
        sizes: list[int]
        more: dict[str, Any]

    ours, theirs = Config([1, 2], {"a": object()}), Config([1, 3], {"a": object(), "b": None})

    assert differences(ours, theirs) == {
        "sizes.1": ("2", "3"),
        "more": ("dict of 1", "dict of 2"),
        "more.'b'": (None, "None"),
    }


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


@pytest.mark.parametrize(("max_concurrency", "requests", "largest"), [(1, 32, 64), (8, 32, 64), (40, 40, 80)])
def test_graphs_for_a_few_jobs_are_those_of_vllm_for_as_many_requests(
    max_concurrency: int, requests: int, largest: int, gpu: str, tiny_model: str
) -> None:
    """At least those for 32 requests: one job may have that many, as with `n`."""
    del gpu
    sizes = graph_sizes(tiny_model, max_concurrency)

    assert sizes == graph_sizes(tiny_model, "auto", f"--max-num-seqs={requests}")
    assert sizes[-1] == largest


@pytest.mark.parametrize(
    ("max_concurrency", "arguments"),
    [
        (300, ()),
        (8, ("--max-num-seqs=4",)),
        (8, ("--max-num-seqs=16",)),
        (8, ("--cudagraph-capture-sizes", "1", "100")),
        (8, ("--max-cudagraph-capture-size=96",)),
        (8, ("--compilation-config", "'{\"max_cudagraph_capture_size\": 96}'")),
        (8, ("--runner=pooling",)),
    ],
)
def test_graphs_are_left_to_vllm_where_it_has_fewer_or_the_user_says_which(
    max_concurrency: int, arguments: tuple[str, ...], gpu: str, tiny_model: str
) -> None:
    """Also for a pooling model, of which a single request is a step of many tokens."""
    del gpu

    assert graph_sizes(tiny_model, max_concurrency, *arguments) == graph_sizes(tiny_model, "auto", *arguments)


def test_graphs_of_a_diffusion_model_are_left_to_vllm(
    gpu: str, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request has several tokens in each step. The tiny model is no such model: only what vLLM says of it is."""
    from vllm.config import VllmConfig

    del gpu
    assert isinstance(VllmConfig.uniform_decode_query_len, property)
    monkeypatch.setattr(VllmConfig, "uniform_decode_query_len", property(lambda _: 17))

    assert graph_sizes(tiny_model, 8) == graph_sizes(tiny_model, "auto")


def test_graphs_of_speculative_decoding_are_left_to_vllm() -> None:
    """A request has several tokens in each step."""
    flags = vllm_args.flags()
    speculation = '{"method": "ngram", "num_speculative_tokens": 3}'
    flags.load({"SPECULATIVE_CONFIG": Variable(speculation, "environment")}, [])

    vllm_args.limit_graphs(flags, 8)

    assert flags.value("max_cudagraph_capture_size") is None


# Flags that are not in the hash of vLLM's startup plan either, and do not change what the KV cache may have of the
# GPU's memory: names, files, the network, the host's memory, and how requests are scheduled into steps.
NO_GPU_MEMORY = {
    "allowed_local_media_path", "allowed_media_domains", "async_scheduling", "collect_detailed_traces",
    "config_format", "cudagraph_metrics", "custom_histogram_buckets", "data_parallel_backend",
    "data_parallel_external_lb", "data_parallel_hybrid_lb", "data_parallel_rank", "data_parallel_rpc_port",
    "data_parallel_size_local", "disable_cascade_attn", "disable_hybrid_kv_cache_manager", "download_dir",
    "enable_layerwise_nvtx_tracing", "enable_logging_iteration_details", "enable_mamba_shared_prefix_checkpoint",
    "enable_mfu_metrics", "enable_prefix_caching", "enable_shm_tensor_arena", "ignore_patterns",
    "interleave_mm_strings", "io_processor_plugin", "jit_monitor_mode", "jit_monitor_verbose", "kv_cache_metrics",
    "kv_cache_metrics_sample", "long_prefill_token_threshold", "long_prefill_token_threshold_adaptive",
    "master_addr", "master_port", "max_cpu_loras", "max_num_active_seqs", "max_num_queued_reqs",
    "max_num_queued_tokens", "max_num_scheduled_tokens", "max_parallel_loading_workers",
    "mm_encoder_fp8_scale_save_margin", "mm_encoder_fp8_scale_save_path", "mm_hasher_algorithm",
    "mm_processor_cache_gb", "mm_processor_cache_type", "mm_shm_cache_max_object_size_mb", "nnodes", "node_rank",
    "num_gpu_blocks_override", "numa_bind", "numa_bind_cpus", "numa_bind_nodes", "otlp_traces_endpoint",
    "per_request_spec_decode_metrics", "prefill_schedule_interval", "prefix_cache_retention_interval",
    "prefix_caching_hash_algo", "prefix_match_unit", "pt_load_map_location", "ray_workers_use_nsight",
    "reasoning_parser", "reasoning_parser_plugin", "safetensors_load_strategy", "safetensors_prefetch_block_size",
    "safetensors_prefetch_num_threads", "scheduler_reserve_full_isl", "seed", "served_model_name",
    "show_hidden_metrics_for_version", "skip_tokenizer_init", "stream_interval", "swa_bounded_replay", "tokenizer",
    "tokenizer_mode", "tokenizer_revision", "use_tqdm_on_load", "watermark",
}  # fmt: skip
# vLLM makes no plan with the first, and with the second none that fits: it changes the hash by other values.
NO_PLAN = {"kv_cache_memory_bytes", "enforce_eager"}


def not_in_hash(config: Any) -> set[str]:
    """Return the values of a configuration, and of its parts, that do not change its hash: whatever they are."""
    whole, found = config.compute_hash(), set()
    for part in (getattr(config, field.name, None) for field in dataclasses.fields(config)):
        if not dataclasses.is_dataclass(part):
            continue
        for name in (field.name for field in dataclasses.fields(part)):
            before = getattr(part, name, None)
            object.__setattr__(part, name, "another value")
            try:
                if config.compute_hash() == whole:
                    found.add(name)
            except AttributeError:  # A part of the part, which is in the hash with its own values.
                pass
            finally:
                object.__setattr__(part, name, before)
    return found


def test_a_flag_that_is_not_in_the_hash_of_vllms_startup_plan_is_known(tiny_model: str) -> None:
    """With such a flag, a plan of another start would be used though it does not fit. A new vLLM may have more."""
    from vllm.config import MultiModalConfig

    config = of_this_worker(tiny_model, {})[1]
    multimodal = {field.name for field in dataclasses.fields(MultiModalConfig)} - {"language_model_only"}
    unknown = (not_in_hash(config) | multimodal) & vllm_args.flags().actions.keys()

    assert "gpu_memory_utilization" in unknown
    assert unknown - startup_plan.NOT_IN_HASH - NO_GPU_MEMORY - NO_PLAN == set()
    assert startup_plan.NOT_IN_HASH - vllm_args.flags().actions.keys() == set()


def test_a_plan_would_be_found_with_another_share_of_the_memory(tiny_model: str) -> None:
    """If vLLM's hash gets to include it, the worker can leave it out of its list."""
    config, other = (of_this_worker(tiny_model, one)[1] for one in ({}, {"GPU_MEMORY_UTILIZATION": "0.5"}))

    assert config.compute_hash() == other.compute_hash()


@pytest.mark.parametrize(
    ("variables", "enabled"),
    [
        ({}, "1"),
        ({"MAX_MODEL_LEN": "1024", "MAX_CONCURRENCY": "8"}, "1"),
        ({"GPU_MEMORY_UTILIZATION": "0.5"}, None),
        ({"VLLM_EXTRA_ARGS": "--limit-mm-per-prompt '{\"image\": 1}'"}, None),
    ],
)
def test_vllm_makes_and_uses_plans_only_where_they_fit(
    variables: dict[str, str], enabled: str | None, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(startup_plan.ENABLE, "x")  # So that it is restored.
    monkeypatch.delenv(startup_plan.ENABLE)

    configure.read(environment.read({"MODEL_NAME": tiny_model, **variables}))

    assert os.environ.get(startup_plan.ENABLE) == enabled


def test_what_the_user_says_of_plans_stands(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(startup_plan.ENABLE, "0")

    configure.read(environment.read({"MODEL_NAME": tiny_model}))

    assert os.environ[startup_plan.ENABLE] == "0"
