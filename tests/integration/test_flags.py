"""VLLM's flags: variables set vLLM's configuration, and mistakes are reported in one line."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from engine.backend import vllm_args
from engine.config import environment
from engine.config.model import Model
from engine.config.settings import Settings
from engine.config.vllm_flags import UNSUPPORTED_FLAGS, Flags
from engine.config.worker_vllm import DEPRECATED, REMOVED
from engine.errors import ConfigurationError
from engine.startup import configure
from tests.integration.conftest import START_S
from tests.processes import VLLM_ENVIRONMENT, running

# Importing vLLM and torch issues deprecation warnings.
pytestmark = [pytest.mark.in_process, pytest.mark.filterwarnings("ignore")]

EFFECTIVE: list[tuple[dict[str, str], str, Any]] = [
    # Numbers.
    ({"MAX_MODEL_LEN": "1024"}, "model_config.max_model_len", 1024),
    ({"MAX_MODEL_LEN": "1k"}, "model_config.max_model_len", 1000),
    ({"MAX_MODEL_LEN": "1K"}, "model_config.max_model_len", 1024),
    ({"MAX_NUM_SEQS": "7"}, "scheduler_config.max_num_seqs", 7),
    ({"MAX_NUM_BATCHED_TOKENS": "4k"}, "scheduler_config.max_num_batched_tokens", 4000),
    ({"MAX_NUM_BATCHED_TOKENS": "0", "MAX_NUM_SEQS": "9"}, "scheduler_config.max_num_seqs", 9),
    ({"SEED": "11"}, "model_config.seed", 11),
    ({"MAX_LOGPROBS": "3"}, "model_config.max_logprobs", 3),
    ({"BLOCK_SIZE": "32"}, "cache_config.block_size", 32),
    ({"GPU_MEMORY_UTILIZATION": "0.5"}, "cache_config.gpu_memory_utilization", 0.5),
    ({"KV_CACHE_MEMORY_BYTES": "500M"}, "cache_config.kv_cache_memory_bytes", 500 << 20),
    ({"NUM_GPU_BLOCKS_OVERRIDE": "64"}, "cache_config.num_gpu_blocks_override", 64),
    ({"LONG_PREFILL_TOKEN_THRESHOLD": "100"}, "scheduler_config.long_prefill_token_threshold", 100),
    ({"STREAM_INTERVAL": "4"}, "scheduler_config.stream_interval", 4),
    ({"MM_PROCESSOR_CACHE_GB": "1.5"}, "model_config.multimodal_config", None),
    # Booleans, in each notation, on and off.
    ({"ENABLE_PREFIX_CACHING": "false"}, "cache_config.enable_prefix_caching", False),
    ({"ENABLE_PREFIX_CACHING": "1"}, "cache_config.enable_prefix_caching", True),
    ({"ENABLE_CHUNKED_PREFILL": "True"}, "scheduler_config.enable_chunked_prefill", True),
    ({"ENFORCE_EAGER": "false"}, "model_config.enforce_eager", False),
    ({"ENFORCE_EAGER": "on"}, "model_config.enforce_eager", True),
    ({"TRUST_REMOTE_CODE": "yes"}, "model_config.trust_remote_code", True),
    ({"SKIP_TOKENIZER_INIT": "true"}, "model_config.skip_tokenizer_init", True),
    ({"DISABLE_SLIDING_WINDOW": "TRUE"}, "model_config.disable_sliding_window", True),
    ({"ENABLE_PROMPT_EMBEDS": "true"}, "model_config.enable_prompt_embeds", True),
    ({"ASYNC_SCHEDULING": "no"}, "scheduler_config.async_scheduling", False),
    ({"USE_TQDM_ON_LOAD": "off"}, "load_config.use_tqdm_on_load", False),
    ({"DATA_PARALLEL_MULTI_PORT_EXTERNAL_LB": "false"}, "parallel_config.data_parallel_size", 1),
    # Choices.
    ({"DTYPE": "float32"}, "model_config.dtype", "torch.float32"),
    ({"LOAD_FORMAT": "dummy"}, "load_config.load_format", "dummy"),
    ({"RUNNER": "pooling", "CONVERT": "embed"}, "model_config.runner_type", "pooling"),
    ({"TOKENIZER_MODE": "slow"}, "model_config.tokenizer_mode", "slow"),
    ({"SCHEDULING_POLICY": "priority"}, "scheduler_config.policy", "priority"),
    ({"LOGPROBS_MODE": "processed_logprobs"}, "model_config.logprobs_mode", "processed_logprobs"),
    ({"PREFIX_CACHING_HASH_ALGO": "sha256_cbor"}, "cache_config.prefix_caching_hash_algo", "sha256_cbor"),
    ({"GENERATION_CONFIG": "vllm"}, "model_config.generation_config", "vllm"),
    ({"MODEL_IMPL": "transformers"}, "model_config.model_impl", "transformers"),
    # JSON.
    (
        {"SPECULATIVE_CONFIG": '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}'},
        "speculative_config.num_speculative_tokens",
        2,
    ),
    ({"HF_OVERRIDES": '{"rope_theta": 20000}'}, "model_config.hf_config.rope_theta", 20000),
    (
        {"OVERRIDE_GENERATION_CONFIG": '{"max_new_tokens": 512}'},
        "model_config.override_generation_config",
        {"max_new_tokens": 512},
    ),
    (
        {"STRUCTURED_OUTPUTS_CONFIG": '{"backend": "guidance"}'},
        "structured_outputs_config.backend",
        "guidance",
    ),
    ({"COMPILATION_CONFIG": '{"cudagraph_mode": "NONE"}'}, "compilation_config.cudagraph_mode.name", "NONE"),
    ({"ADDITIONAL_CONFIG": '{"mine": [1, 2]}'}, "additional_config", {"mine": [1, 2]}),
    # Lists.
    ({"IGNORE_PATTERNS": '["a/*", "b/*"]'}, "load_config.ignore_patterns", ["a/*", "b/*"]),
    ({"IGNORE_PATTERNS": "a/*,b/*"}, "load_config.ignore_patterns", ["a/*", "b/*"]),
    ({"LOGITS_PROCESSORS": "[]"}, "model_config.logits_processors", None),
    ({"LOGITS_PROCESSORS": "one:A two:B"}, "model_config.logits_processors", ["one:A", "two:B"]),
    # LoRA.
    ({"ENABLE_LORA": "true", "MAX_LORAS": "3"}, "lora_config.max_loras", 3),
    ({"ENABLE_LORA": "true", "MAX_LORA_RANK": "64"}, "lora_config.max_lora_rank", 64),
    # Names of worker-vllm, and command-line arguments.
    ({"TOKENIZER_NAME": "/a/tokenizer", "SKIP_TOKENIZER_INIT": "1"}, "model_config.tokenizer", "/a/tokenizer"),
    ({"MODEL_REVISION": "abc"}, "model_config.revision", "abc"),
    ({"VLLM_EXTRA_ARGS": "--max-num-seqs 3 --seed=5"}, "scheduler_config.max_num_seqs", 3),
    ({"VLLM_EXTRA_ARGS": "--max_num_seqs 3"}, "scheduler_config.max_num_seqs", 3),
    ({"VLLM_EXTRA_ARGS": "-tp 1 --no-enable-prefix-caching"}, "cache_config.enable_prefix_caching", False),
    ({"VLLM_EXTRA_ARGS": "-O1"}, "optimization_level.value", 1),
    ({"VLLM_EXTRA_ARGS": "-O=2 --seed 1"}, "optimization_level.value", 2),
    ({"VLLM_EXTRA_ARGS": "-O 3 --seed 1"}, "optimization_level.value", 3),
    ({"VLLM_EXTRA_ARGS": "-cc.cudagraph_mode NONE"}, "compilation_config.cudagraph_mode.name", "NONE"),
    (
        {"VLLM_EXTRA_ARGS": "--compilation-config.cudagraph_mode NONE --compilation-config.mode 0"},
        "compilation_config.mode.name",
        "NONE",
    ),
]

SERVED: list[tuple[dict[str, str], str, Any]] = [
    ({"TOOL_CALL_PARSER": "hermes", "ENABLE_AUTO_TOOL_CHOICE": "true"}, "tool_call_parser", "hermes"),
    ({"CUSTOM_CHAT_TEMPLATE": "{{ messages }}"}, "chat_template", "{{ messages }}"),
    ({"CHAT_TEMPLATE_CONTENT_FORMAT": "openai"}, "chat_template_content_format", "openai"),
    ({"RESPONSE_ROLE": "bot"}, "response_role", "bot"),
    ({"ENABLE_FORCE_INCLUDE_USAGE": "1"}, "enable_force_include_usage", True),
    ({"DISABLE_LOG_STATS": "false"}, "disable_log_stats", False),
    ({"DISABLE_LOG_STATS": "true"}, "disable_log_stats", True),
    ({"DEFAULT_CHAT_TEMPLATE_KWARGS": '{"a": true}'}, "default_chat_template_kwargs", {"a": True}),
    ({"MIDDLEWARE": "json.dumps,json.loads"}, "middleware", ["json.dumps", "json.loads"]),
    ({"ENABLE_LOG_REQUESTS": "false"}, "enable_log_requests", False),
    ({"ALLOWED_MEDIA_DOMAINS": "a.org, b.org"}, "allowed_media_domains", ["a.org", "b.org"]),
]


def flags_of(given: Mapping[str, str], tmp_path: Path | None = None) -> Flags:
    """Return the flags of an environment whose baked settings are in `tmp_path`, if a test has made them."""
    file = tmp_path / "settings.json" if tmp_path else None
    baked = {"BAKED_SETTINGS_FILE": str(file)} if file is not None and file.exists() else {}
    flags = vllm_args.flags()
    flags.load(environment.read({**given, **baked}), [name.upper() for name in Settings.model_fields])
    return flags


@pytest.mark.parametrize(("given", "path", "value"), EFFECTIVE, ids=lambda part: "" if part == {} else str(part)[:60])
def test_a_variable_sets_vllms_configuration(given: dict[str, str], path: str, value: Any, tiny_model: str) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    args = vllm_args.parse(flags_of(given), Model(tiny_model, ("tiny",)))
    effective = operator.attrgetter(path)(AsyncEngineArgs.from_cli_args(args).create_engine_config())

    assert effective == value or str(effective) == value


@pytest.mark.parametrize(("given", "name", "value"), SERVED, ids=lambda part: str(part)[:60])
def test_a_variable_sets_the_arguments_of_vllms_app(
    given: dict[str, str], name: str, value: Any, tiny_model: str
) -> None:
    args = vllm_args.parse(flags_of(given), Model(tiny_model, ("tiny",)))

    assert getattr(args, name) == value


def test_adapters_are_accepted_as_json_and_as_names_with_paths() -> None:
    as_json = flags_of({"LORA_MODULES": '[{"name": "a", "path": "/x"}, {"name": "b", "path": "org/b"}]'})
    as_words = flags_of({"LORA_MODULES": "a=/x b=org/b"})

    assert [(one.name, one.path) for one in as_json.value("lora_modules")] == [("a", "/x"), ("b", "org/b")]
    assert as_words.value("lora_modules") == as_json.value("lora_modules")


MISTAKES: list[tuple[dict[str, str], str]] = [
    ({"MAX_NUM_SEQS": "many"}, "MAX_NUM_SEQS='many' (environment) is not allowed: invalid int value: 'many'"),
    ({"MAX_MODEL_LEN": "lots"}, "MAX_MODEL_LEN='lots' (environment) is not allowed"),
    ({"MAX_MODEL_LEN": "25.6K"}, "Decimals are not allowed with binary suffixes like K. Did you mean to use 25.6k"),
    ({"DTYPE": "float9"}, "DTYPE='float9' (environment) is not allowed: invalid choice: 'float9' (choose from 'auto'"),
    (
        {"ENFORCE_EAGER": "perhaps"},
        "ENFORCE_EAGER='perhaps' (environment) is not allowed: it must be `true` or `false`",
    ),
    ({"GPU_MEMORY_UTILIZATION": "most"}, "GPU_MEMORY_UTILIZATION='most' (environment) is not allowed: invalid float"),
    ({"SPECULATIVE_CONFIG": "{method: ngram"}, "SPECULATIVE_CONFIG='{method: ngram' (environment) is not allowed"),
    ({"LORA_MODULES": '[{"name": "a"'}, 'LORA_MODULES=\'[{"name": "a"\' (environment) is not allowed: it is not JSON'),
    (
        {"GPU_MEMORY_UTILIZATION": "95"},
        "GPU_MEMORY_UTILIZATION='95' (environment) is not allowed: it should be less than",
    ),
    ({"MAX_NUM_SEQS": "0"}, "MAX_NUM_SEQS='0' (environment) is not allowed: it should be greater than or equal to 1"),
    (
        {"VLLM_EXTRA_ARGS": "--max-loras 0"},
        "'--max-loras 0' in VLLM_EXTRA_ARGS is not allowed: it should be greater than",
    ),
    ({"MAX_MODEL_LEN": "x"}, "it must be an integer, such as 8192, 8k (8000) or 8K (8192), or auto"),
    (
        {"LIMIT_MM_PER_PROMPT": "one"},
        "LIMIT_MM_PER_PROMPT='one' (environment) is not allowed: it is not JSON: Expecting",
    ),
    (
        {"VLLM_EXTRA_ARGS": "--limit-mm-per-prompt image=1"},
        "VLLM_EXTRA_ARGS is not allowed: it is not JSON: Expecting value",
    ),
    ({"COMPILATION_CONFIG": '{"cudagraph_mod": 1}'}, "is not allowed: cudagraph_mod: Unexpected keyword argument"),
    ({"NUM_GPU_BLOCKS_OVERRIDE": "x"}, "NUM_GPU_BLOCKS_OVERRIDE='x' (environment) is not allowed: invalid int value"),
    ({"LORA_MODULES": "adapter"}, "LORA_MODULES='adapter' (environment) is not allowed"),
    ({"TENSOR_PARALLEL_SIZE": "1.5"}, "TENSOR_PARALLEL_SIZE='1.5' (environment) is not allowed: invalid int value"),
    ({"CUDAGRAPH_CAPTURE_SIZES": "1 two"}, "CUDAGRAPH_CAPTURE_SIZES='1 two' (environment) is not allowed"),
    ({"MODEL_REVISION": "a", "SEED": "x"}, "SEED='x' (environment) is not allowed: invalid int value: 'x'"),
    (
        {"VLLM_EXTRA_ARGS": "--max-num-seq 3"},
        "'--max-num-seq' in VLLM_EXTRA_ARGS is not a flag of vLLM: did you mean --max-num-",
    ),
    ({"VLLM_EXTRA_ARGS": "--seed x"}, "'--seed x' in VLLM_EXTRA_ARGS is not allowed: invalid int value: 'x'"),
    ({"VLLM_EXTRA_ARGS": "'--seed"}, "VLLM_EXTRA_ARGS cannot be split into arguments: No closing quotation"),
    ({"VLLM_EXTRA_ARGS": "serve --seed 1"}, "'serve' in VLLM_EXTRA_ARGS is not a flag of vLLM"),
    ({"VLLM_CONFIG_FILE": "/nowhere.yaml"}, "VLLM_CONFIG_FILE='/nowhere.yaml' cannot be read"),
    (
        {"IGNORE_PATTERNS": "[]"},
        "IGNORE_PATTERNS='[]' (environment) is not allowed: vLLM does not support an empty list",
    ),
]


@pytest.mark.parametrize(("given", "expected_message"), MISTAKES, ids=lambda part: str(part)[:50])
def test_a_mistake_is_reported_in_one_line(given: dict[str, str], expected_message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        flags_of(given)

    (line,) = str(caught.value).splitlines()
    assert expected_message in line


SPECULATIVE = '{"method": "ngram", "num_speculative_tokens": 2}'


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("LIMIT_MM_PER_PROMPT", "image=1,video=0", {"image": 1, "video": 0}),
        ("LIMIT_MM_PER_PROMPT", "image=1, video=0", {"image": 1, "video": 0}),
        ("LIMIT_MM_PER_PROMPT", "'image=1'", {"image": 1}),
        ("LIMIT_MM_PER_PROMPT", '{"image": {"count": 2}}', {"image": {"count": 2}}),
        ("HF_OVERRIDES", "rope_theta=20000", {"rope_theta": 20000}),
        ("SPECULATIVE_CONFIG", f"'{SPECULATIVE}'", json.loads(SPECULATIVE)),
        ("SPECULATIVE_CONFIG", f'"{SPECULATIVE}"', json.loads(SPECULATIVE)),
        ("SPECULATIVE_CONFIG", json.dumps(SPECULATIVE), json.loads(SPECULATIVE)),
        ("IGNORE_PATTERNS", "'[\"a/*\"]'", ["a/*"]),
        ("DTYPE", "'half'", None),
    ],
)
def test_json_is_accepted_with_quotes_around_it(name: str, text: str, value: Any) -> None:
    """`docker --env-file` and copying leave quotes, and worker-vllm's documents have them."""
    if value is None:
        with pytest.raises(ConfigurationError):
            flags_of({name: text})
    else:
        assert flags_of({name: text}).value(name.lower()) == value


@pytest.mark.parametrize(
    ("text", "names"),
    [("My Model", ["My Model"]), ("My Model, b", ["My Model", "b"]), ('["My Model", "b"]', ["My Model", "b"])],
)
def test_a_model_name_may_contain_spaces(text: str, names: list[str], tiny_model: str) -> None:
    flags = flags_of({"SERVED_MODEL_NAME": text})
    args = vllm_args.parse(flags, Model(tiny_model, (*names, tiny_model)))

    assert flags.value("served_model_name") == names
    assert args.served_model_name == [*names, tiny_model]


@pytest.mark.parametrize("none", ["None", "none", "null"])
def test_none_unsets_a_flag(none: str, tmp_path: Path) -> None:
    """Templates write optional fields so. It also removes what the image was built with."""
    (tmp_path / "settings.json").write_text('{"QUANTIZATION": "bitsandbytes", "MAX_MODEL_LEN": 8192, "SEED": 5}')
    names = ["QUANTIZATION", "MAX_MODEL_LEN", "TOKENIZER", "SERVED_MODEL_NAME", "ENABLE_LORA", "VLLM_EXTRA_ARGS"]

    flags = flags_of(dict.fromkeys(names, none), tmp_path)

    assert {name: flags.value(name.lower()) for name in names} == dict.fromkeys(names)
    assert flags.value("seed") == 5


def test_none_is_a_value_where_vllm_has_this_choice() -> None:
    assert flags_of({"CONVERT": "none", "PER_REQUEST_SPEC_DECODE_METRICS": "None"}).value("convert") == "none"


REFUSED: list[tuple[dict[str, str], str]] = [
    (
        {"TOOL_CALL_PARSER": "llama3json", "ENABLE_AUTO_TOOL_CHOICE": "true"},
        "TOOL_CALL_PARSER='llama3json' (environment) is not allowed: unknown parser. Allowed: apertus, ",
    ),
    (
        {"VLLM_EXTRA_ARGS": "--tool-call-parser llama3json"},
        "'--tool-call-parser llama3json' in VLLM_EXTRA_ARGS is not allowed: unknown parser. Allowed: ",
    ),
    (
        {"STRUCTURED_OUTPUTS_CONFIG": '{"reasoning_parser": "deepseek"}'},
        'STRUCTURED_OUTPUTS_CONFIG=\'{"reasoning_parser": "deepseek"}\' (environment) is not allowed: unknown parser',
    ),
    ({"REASONING_PARSER": "deepseek"}, "REASONING_PARSER='deepseek' (environment) is not allowed: unknown parser"),
    (
        {"LORA_MODULES": "a=/nowhere"},
        "LORA_MODULES='a=/nowhere' (environment) is not allowed: LoRA is not enabled: set ENABLE_LORA=true",
    ),
    (
        {"LORA_MODULES": "a=/nowhere", "ENABLE_LORA": "true"},
        "adapter a: /nowhere must be a directory with an adapter_config.json",
    ),
    (
        {"DEFAULT_MM_LORAS": '{"audio": "/nowhere"}', "ENABLE_LORA": "true"},
        'DEFAULT_MM_LORAS=\'{"audio": "/nowhere"}\' (environment) is not allowed: adapter audio: /nowhere',
    ),
    ({"CHAT_TEMPLATE": "/nowhere.jinja"}, "CHAT_TEMPLATE='/nowhere.jinja' (environment) is not allowed: The supplied"),
    (
        {"CHAT_TEMPLATE": "{% if %}"},
        "CHAT_TEMPLATE='{% if %}' (environment) is not allowed: invalid template: Exp",
    ),
    ({"MIDDLEWARE": "no.Thing"}, "MIDDLEWARE='no.Thing' (environment) is not allowed: no.Thing cannot be imported: No"),
    (
        {"ENABLE_LOG_OUTPUTS": "true"},
        "ENABLE_LOG_OUTPUTS='true' (environment) is not allowed: Error: --enable-log-outputs requires",
    ),
]


@pytest.mark.parametrize(("given", "expected_message"), REFUSED, ids=lambda part: str(part)[:50])
def test_flags_that_vllms_server_refuses_are_refused_before_the_model_is_resolved(
    given: dict[str, str], expected_message: str
) -> None:
    """The model may not have been downloaded yet: nothing is downloaded for invalid settings."""
    with pytest.raises(ConfigurationError) as caught:
        configure.read(environment.read({"MODEL_NAME": "org/none", **given}))

    (line,) = str(caught.value).splitlines()
    assert expected_message in line


def test_all_flags_that_vllms_server_refuses_are_reported_at_once() -> None:
    wrong = {"TOOL_CALL_PARSER": "x", "ENABLE_AUTO_TOOL_CHOICE": "true", "REASONING_PARSER": "y", "MIDDLEWARE": "no.Z"}

    with pytest.raises(ConfigurationError) as caught:
        configure.read(environment.read({"MODEL_NAME": "org/none", "LORA_MODULES": "a=/nowhere", **wrong}))

    assert [line.partition("=")[0] for line in str(caught.value).splitlines()] == [
        "TOOL_CALL_PARSER",
        "REASONING_PARSER",
        "LORA_MODULES",
        "MIDDLEWARE",
    ]


WITH_MODEL: list[tuple[dict[str, str], str]] = [
    (
        {"TOOL_CALL_PARSER": "llama3_json", "ENABLE_AUTO_TOOL_CHOICE": "true"},
        "TOOL_CALL_PARSER='llama3_json' (environment) is not allowed: --tool-call-parser llama3_json cannot be used",
    ),
    ({"REASONING_PARSER": "deepseek_r1"}, "REASONING_PARSER='deepseek_r1' (environment) is not allowed: DeepSeekR1"),
    ({"CPU_OFFLOAD_GB": "-1"}, "CPU_OFFLOAD_GB='-1' (environment) is not allowed: it should be greater than or equal"),
    ({"MAX_MODEL_LEN": "100000"}, "MAX_MODEL_LEN is 100000, but the model's maximum length is 2048"),
    (
        {"LOAD_FORMAT": "bogus"},
        "LOAD_FORMAT='bogus' (environment) is not allowed: Load format `bogus` is not",
    ),
    ({"QUANTIZATION": "fp9"}, "QUANTIZATION='fp9' (environment) is not allowed: Unknown quantization method: fp9."),
    ({"TOKENIZER_NAME": "/nowhere"}, "there is no directory /nowhere: check TOKENIZER_NAME"),
    (
        {"MAX_NUM_SEQS": "300", "MAX_NUM_BATCHED_TOKENS": "100"},
        "MAX_NUM_SEQS='300' (environment) and MAX_NUM_BATCHED_TOKENS='100' (environment) are not allowed together: max",
    ),
]


@pytest.mark.parametrize(("given", "expected_message"), WITH_MODEL, ids=lambda part: str(part)[:50])
def test_settings_that_do_not_fit_the_model_are_refused_before_the_engine_loads(
    given: dict[str, str], expected_message: str, tiny_model: str
) -> None:
    configuration = configure.read(environment.read({"MODEL_NAME": tiny_model, "SEED": "1", **given}))

    with pytest.raises(ConfigurationError) as caught:
        configure.check_with_model(configuration)

    (line,) = str(caught.value).splitlines()
    assert expected_message in line


def test_an_adapter_that_the_engine_would_refuse_is_refused_before_it_loads(tiny_model: str, tmp_path: Path) -> None:
    adapter = {"r": 64, "lora_alpha": 8, "target_modules": ["qkv_proj"], "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    given = {"MODEL_NAME": tiny_model, "ENABLE_LORA": "true", "LORA_MODULES": f"a={tmp_path}"}
    configure.check_with_model(configure.read(environment.read({**given, "MAX_LORA_RANK": "64"})))

    with pytest.raises(
        ConfigurationError, match=f"adapter a in {tmp_path} cannot be used: LoRA rank 64 is greater than"
    ):
        configure.check_with_model(configure.read(environment.read(given)))


def test_contradictory_flags_are_refused_by_vllm(tiny_model: str) -> None:
    with pytest.raises(ConfigurationError, match="--enable-auto-tool-choice requires --tool-call-parser"):
        vllm_args.parse(flags_of({"ENABLE_AUTO_TOOL_CHOICE": "true"}), Model(tiny_model, ("tiny",)))


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("MAX_MODEL_LENGTH", "MAX_MODEL_LEN"),
        ("MODEL_NAMES", "MODEL_NAME"),
        ("TENSOR_PARALEL_SIZE", "TENSOR_PARALLEL_SIZE"),
        ("GPU_MEMORY_UTILISATION", "GPU_MEMORY_UTILIZATION"),
        ("ENABLE_PREFIX_CACHE", "ENABLE_PREFIX_CACHING"),
        ("DRAIN_TIMEOUT", "DRAIN_TIMEOUT_S"),
        ("MAX_CONCURENCY", "MAX_CONCURRENCY"),
        ("VLLM_EXTRA_ARG", "VLLM_EXTRA_ARGS"),
        ("HF_OVERRIDE", "HF_OVERRIDES"),
        ("TOKENIZERS_NAME", "TOKENIZER_NAME"),
    ],
)
def test_a_misspelt_variable_is_logged_with_a_suggestion(
    name: str, suggestion: str, caplog: pytest.LogCaptureFixture
) -> None:
    flags_of({name: "1"})

    assert caplog.messages == [f"{name} is not a setting (environment): did you mean {suggestion}?"]


def test_unrelated_variables_are_ignored_silently(caplog: pytest.LogCaptureFixture) -> None:
    others = [
        "HOME",
        "PATH",
        "HOST",
        "PORT",
        "HOSTNAME",
        "CONFIG",
        "RUNPOD_POD_ID",
        "VLLM_USE_V1",
        "HF_HOME",
        "LOG_LEVEL",
    ]

    flags = flags_of(dict.fromkeys(others, "x"))

    assert flags.values == {}
    assert caplog.messages == []


def test_no_variable_of_vllm_is_taken_for_a_misspelt_one(caplog: pytest.LogCaptureFixture) -> None:
    import vllm.envs

    flags_of(dict.fromkeys(vllm.envs.environment_variables, "x"))

    assert [message for message in caplog.messages if "is not a setting" in message] == []


@pytest.mark.parametrize("name", sorted(REMOVED.keys() | DEPRECATED))
def test_a_deprecated_name_is_logged_with_its_replacement(name: str, caplog: pytest.LogCaptureFixture) -> None:
    flags_of({name: "1"})

    (message,) = caplog.messages
    assert message.startswith((f"{name} is ignored: ", f"{name} is deprecated: use "))
    if " use " in message:
        successor = message.partition(" use ")[2].split()[0].strip(":;").partition("=")[0]
        own = {name.upper() for name in Settings.model_fields}
        assert successor in {dest.upper() for dest in vllm_args.flags().actions} | own


def test_no_deprecated_name_is_a_flag_of_this_vllm() -> None:
    assert {name for name in REMOVED if name.lower() in vllm_args.flags().actions} == set()
    assert {
        name for name in UNSUPPORTED_FLAGS if name not in {action.dest for action in vllm_args.flags().parser._actions}
    } == set()


def test_later_sources_override_earlier_ones(tmp_path: Path) -> None:
    """In order: defaults, the image's settings, the config file, the environment, extra arguments."""
    file = tmp_path / "vllm.yaml"
    steps: list[tuple[dict[str, str], tuple[int | None, str | None]]] = [
        ({}, (None, None)),
        ({"settings.json": '{"MAX_NUM_SEQS": 1}'}, (1, str(tmp_path / "settings.json"))),
        ({"VLLM_CONFIG_FILE": str(file)}, (2, str(file))),
        ({"MAX_NUM_SEQS": "3"}, (3, "environment")),
        ({"VLLM_EXTRA_ARGS": "--max-num-seqs 4"}, (4, "VLLM_EXTRA_ARGS")),
    ]
    file.write_text("max-num-seqs: 2\nenforce_eager: true\nhf-overrides: {rope_theta: 5}\n")
    environment: dict[str, str] = {}
    for step, (value, source) in steps:
        if "settings.json" in step:
            (tmp_path / "settings.json").write_text(step["settings.json"])
        else:
            environment |= step
        flags = flags_of(environment, tmp_path)

        given = flags.values.get("max_num_seqs")
        assert (flags.value("max_num_seqs"), given and given.source) == (value, source)
    assert (flags.value("enforce_eager"), flags.value("hf_overrides")) == (True, {"rope_theta": 5})


@pytest.mark.parametrize(
    ("given", "dest", "value"),
    [
        ({"MODEL": "/b", "MODEL_NAME": "org/a"}, "model", "org/a"),
        ({"REVISION": "b", "MODEL_REVISION": "a"}, "revision", "a"),
        ({"TOKENIZER": "/b", "TOKENIZER_NAME": "/a"}, "tokenizer", "/a"),
        ({"SERVED_MODEL_NAME": "b", "OPENAI_SERVED_MODEL_NAME_OVERRIDE": "a"}, "served_model_name", ["a"]),
        ({"CHAT_TEMPLATE": "b", "CUSTOM_CHAT_TEMPLATE": "a"}, "chat_template", "a"),
    ],
)
def test_an_alias_takes_precedence_over_the_flags_name_as_in_worker_vllm(
    given: dict[str, str], dest: str, value: Any
) -> None:
    assert flags_of(given).value(dest) == value
    assert flags_of(dict(reversed(given.items()))).value(dest) == value


def test_the_environment_overrides_extra_arguments_of_the_image(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text('{"VLLM_EXTRA_ARGS": "--seed 1 --max-num-seqs 1", "MAX_NUM_SEQS": 3}')

    flags = flags_of({"SEED": "2"}, tmp_path)

    assert (flags.value("seed"), flags.value("max_num_seqs")) == (2, 1)
    assert flags.values["max_num_seqs"].source == str(tmp_path / "settings.json")


@pytest.mark.parametrize("how", ["arguments", "file"])
@pytest.mark.parametrize(("model", "used"), [("org/Another", False), ("org/baked", True)])
def test_baked_settings_are_not_used_for_another_model_whichever_source_names_it(
    how: str, model: str, used: bool, tmp_path: Path
) -> None:
    (tmp_path / "settings.json").write_text('{"MODEL_NAME": "org/Baked", "QUANTIZATION": "bitsandbytes", "SEED": 5}')
    file = tmp_path / "vllm.yaml"
    file.write_text(f"model: {model}\n")
    named = {"VLLM_EXTRA_ARGS": f"--model {model}"} if how == "arguments" else {"VLLM_CONFIG_FILE": str(file)}

    flags = flags_of({**named, "SEED": "6"}, tmp_path)

    assert flags.value("model") == model
    assert flags.value("quantization") == ("bitsandbytes" if used else None)
    assert flags.value("seed") == 6


def test_an_alias_in_the_environment_overrides_a_variable_of_the_image(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps({"MODEL_NAME": "baked", "SERVED_MODEL_NAME": ["a", "b"]}))

    assert flags_of({}, tmp_path).value("model") == "baked"
    assert flags_of({}, tmp_path).value("served_model_name") == ["a", "b"]
    assert flags_of({"MODEL_NAME": "own"}, tmp_path).value("model") == "own"


@pytest.mark.parametrize(
    ("text", "expected_message"),
    [
        ("max-num-sequ: 2", "max-num-sequ in {} is not a flag of vLLM: did you mean --max-num-seqs?"),
        ("- a", "VLLM_CONFIG_FILE='{}' must be a mapping of flags to values"),
        ("a: [", "VLLM_CONFIG_FILE='{}' cannot be read"),
        ("seed: x", "seed='x' ({}) is not allowed: invalid int value"),
    ],
)
def test_a_mistake_in_the_config_file_is_reported(text: str, expected_message: str, tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text(text)

    with pytest.raises(ConfigurationError) as caught:
        flags_of({"VLLM_CONFIG_FILE": str(file)})

    assert expected_message.format(file) in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"VLLM_EXTRA_ARGS": "--hf-tokn=hf_verysecret --seed hf_verysecret"},
        {"VLLM_EXTRA_ARGS": "--api-kye=sk-verysecret"},
        {"VLLM_EXTRA_ARGS": "--api-kye sk-verysecret"},
        {"VLLM_EXTRA_ARGS": '--kv-transfer-config \'{"api_key": "sk-verysecret"\''},
        {"VLLM_EXTRA_ARGS": "--api-key sk-verysecret --seed x"},
        {"KV_TRANSFER_CONFIG": '{"kv_connector_extra_config": {"password": "verysecret"}'},
    ],
)
def test_no_error_shows_a_secret(given: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        flags_of(given)

    assert "verysecret" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "expected_message"),
    [
        ("--hf-token hf_x", "--hf-token in VLLM_EXTRA_ARGS is ignored: set HF_TOKEN instead"),
        ("--port 80", "--port in VLLM_EXTRA_ARGS is ignored: the worker runs no HTTP server"),
    ],
)
def test_flags_of_the_http_server_are_ignored_and_logged(
    arguments: str, expected_message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert flags_of({"VLLM_EXTRA_ARGS": arguments}).values == {}
    assert caplog.messages == [expected_message]


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        flags_of({"SEED": "x", "DTYPE": "y", "VLLM_EXTRA_ARGS": "--sed 1"})

    assert len(str(caught.value).splitlines()) == 3


def test_the_hubs_older_name_of_its_token_is_accepted_and_secret() -> None:
    configuration = configure.read(
        environment.read({"MODEL_NAME": "org/none", "HUGGING_FACE_HUB_TOKEN": "hf_verysecret"})
    )

    assert "HF_TOKEN=(hidden)  (environment, HUGGING_FACE_HUB_TOKEN)" in configuration.lines()
    assert "verysecret" not in "\n".join(configuration.lines()) + str(configuration.settings)


def test_the_effective_configuration_is_printed_with_its_sources_and_without_secrets(
    tiny_model: str, tmp_path: Path
) -> None:
    (tmp_path / "settings.json").write_text('{"SERVED_MODEL_NAME": "baked", "DRAIN_TIMEOUT_S": 7}')
    environment = {
        **VLLM_ENVIRONMENT,
        "BAKED_SETTINGS_FILE": str(tmp_path / "settings.json"),
        "MODEL_NAME": tiny_model,
        "MAX_MODEL_LEN": "1k",
        "HF_TOKEN": "hf_verysecret",
        "API_KEY": "sk-verysecret",
        "VLLM_API_KEY": "sk-verysecret",
        "VLLM_EXTRA_ARGS": "--max-num-seqs 4 --hf-token hf_alsosecret --api-key sk-one-secret sk-two-secret",
        "ADDITIONAL_CONFIG": '{"store": {"accessKey": "verysecret", "password": "\\"verysecret"}, "shown": 1}',
        "LONG_PREFILL_TOKEN_THRESHOLD": "100",
        "TOKENIZER_NAME": tiny_model,
        "KV_TRANSFER_CONFIG": "",
        "BATCH_SIZE_GROWTH_FACTOR": "3",
    }

    with running(["handler.py", "--print-config"], environment, tmp_path / "log") as process:
        assert process.popen.wait(START_S) == 0
        lines = process.log.splitlines()

    for line in [
        f"DRAIN_TIMEOUT_S=7.0  ({tmp_path / 'settings.json'})",
        "BATCH_INTERVAL_MS=auto  (default)",
        "HF_TOKEN=(hidden)  (environment)",
        f"MODEL={tiny_model}  (environment, MODEL_NAME)",
        f"SERVED_MODEL_NAME=baked,{tiny_model}  ({tmp_path / 'settings.json'})",
        "MAX_MODEL_LEN=1000  (environment)",
        "MAX_NUM_SEQS=4  (VLLM_EXTRA_ARGS)",
        "ENFORCE_EAGER=True  (worker's default)",
        "SEED=0  (default)",
        f"TOKENIZER={tiny_model}  (environment, TOKENIZER_NAME)",
        "TOKENIZER_MODE=auto  (default)",
        "LONG_PREFILL_TOKEN_THRESHOLD=100  (environment)",
        "ADDITIONAL_CONFIG={'store': {'accessKey': (hidden), 'password': (hidden)}, 'shown': 1}  (environment)",
        "VLLM_EXTRA_ARGS=--max-num-seqs 4 --hf-token (hidden) --api-key (hidden)  (environment)",
    ]:
        assert line in lines
    assert "secret" not in process.log.replace("without secrets", "")
    assert any("BATCH_SIZE_GROWTH_FACTOR is ignored: use BATCH_INTERVAL_MS" in line for line in lines)


def test_data_parallelism_is_refused_with_an_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_PARALLEL_SIZE", "2")

    with pytest.raises(ConfigurationError, match=r"DATA_PARALLEL_SIZE is 2.*more workers") as caught:
        configure.read()
    assert "\n" not in str(caught.value)
