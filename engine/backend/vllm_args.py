"""The arguments of `vllm serve`: vLLM's own parser, and the checks of vLLM's server before it loads anything.

Parts of vLLM that are used here are not a public interface; `make test` reports those that an upgrade moves.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args

from pydantic import ConfigDict, TypeAdapter

from engine.backend import compat, startup_errors
from engine.config.model import Model
from engine.config.vllm_flags import Flags, error_message
from engine.errors import ConfigurationError

GIB_BYTES = 1 << 30
# On a CPU, vLLM's default KV cache is most of the machine's memory.
CPU_KV_CACHE_BYTES = 1 * GIB_BYTES
_STEP_TIMEOUT_S = 7 * 24 * 3600

# The largest CUDA graph that vLLM captures by default, in tokens (0.32, `VllmConfig._set_cudagraph_sizes`).
_MAX_GRAPH_SIZE = 512
# One job may be many requests: with `n`, beams, or a list of prompts. Graphs up to this size are few.
_MIN_GRAPH_LIMIT = 64
_GRAPH_SIZE = "max_cudagraph_capture_size"
# Flags that say which CUDA graphs are captured, or how many tokens a request has in a step.
_GRAPH_FLAGS = {
    "compilation_config",
    "cudagraph_capture_sizes",
    _GRAPH_SIZE,
    "spec_method",
    "spec_model",
    "spec_tokens",
    "speculative_config",
}

_log = logging.getLogger(__name__)
T = TypeVar("T")


class _FlagsError(ValueError):
    """Flags whose values cannot be used; `errors` has the flag and the reason of each."""

    def __init__(self, errors: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(reason for _, reason in errors))
        self.errors = errors


def set_environment() -> None:
    """Set the variables that vLLM reads when it is imported, unless the user has set them."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # vLLM takes a step that is not over after 300 s for a failure, also if its processes were frozen for as long. That
    # an engine makes no steps is noticed by `VLLMEngine.failure`, which knows of freezes.
    os.environ.setdefault("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", str(_STEP_TIMEOUT_S))
    # vLLM's app would require this key of the worker's own calls; clients authenticate with the platform.
    os.environ.pop("VLLM_API_KEY", None)


def flags() -> Flags:
    """Return the flags that vLLM has, none of them set."""
    set_environment()
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]  # vLLM is not typed for --strict
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    return Flags(compat.cli_args().make_arg_parser(Parser(exit_on_error=False, allow_abbrev=False)), _check_value)


def limit_graphs(flags: Flags, max_concurrency: int | Literal["auto"]) -> None:
    """Let vLLM capture no CUDA graphs for many more requests than the worker runs at once, unless flags say which.

    vLLM itself captures graphs of up to twice `max_num_seqs` tokens, and at most 512; this is the same for a smaller
    number of requests, but at least 64 tokens. With speculative decoding a request has several tokens in a step: that
    is left to vLLM.
    """
    size = _MAX_GRAPH_SIZE if max_concurrency == "auto" else max(2 * max_concurrency, _MIN_GRAPH_LIMIT)
    max_num_seqs = flags.value("max_num_seqs")
    more_are_captured = size < _MAX_GRAPH_SIZE and (max_num_seqs is None or 2 * max_num_seqs > size)
    if more_are_captured and _GRAPH_FLAGS.isdisjoint(flags.values):
        flags.set_default(_GRAPH_SIZE, str(size), "follows MAX_CONCURRENCY")


def parse(flags: Flags, model: Model) -> Any:
    """Return the arguments of `vllm serve` for these flags, after vLLM's checks that do not need the model's files.

    Raises:
        ConfigurationError: vLLM does not accept them.
    """
    return _explain_errors(lambda tried: _parse(tried, model), flags, model)


def engine_config(flags: Flags, args: Any, model: Model) -> tuple[Any, Any]:
    """Return vLLM's engine arguments for those of `vllm serve`, and its configuration for them and the model.

    The usage context must be the server's: with the GPU, it decides how many requests and tokens a step may have.

    Raises:
        ConfigurationError: vLLM does not accept them, or the model.
    """

    def attempt(tried: Flags) -> tuple[Any, Any]:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext

        serve_args = args if tried is flags else _parse(tried, model)
        arguments = AsyncEngineArgs.from_cli_args(serve_args)
        config = arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
        if tried.is_default(_GRAPH_SIZE) and _has_large_steps(config):
            return attempt(tried.without(_GRAPH_SIZE))
        _raise_if_any(
            _check_loading(config),
            _check_parsers_with_model(serve_args, config),
            _check_adapters_with_model(serve_args, config),
        )
        return arguments, config

    return _explain_errors(attempt, flags, model)


def download_adapters(flags: Flags, args: Any, model: Model) -> None:
    """Download adapters into the hub's cache, where vLLM's app finds them after the load.

    Raises:
        ConfigurationError: an adapter cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    for dest, _, path in _adapters(args):
        if _is_hub_repository(path):
            try:
                snapshot_download(path)
            except (OSError, ValueError, LookupError) as error:
                known = startup_errors.known(error, model.path, flags)
                raise ConfigurationError(known or flags.values[dest].not_allowed(error_message(error))) from error


def _parse(flags: Flags, model: Model) -> Any:
    names = ["--model", model.path, "--served-model-name", *model.names]
    # A copy, because vLLM modifies the arguments, which share the parser's default objects.
    args = copy.deepcopy(flags.parser.parse_args([*_defaults(flags), *flags.arguments(), *names]))
    compat.cli_args().validate_parsed_serve_args(args)
    _raise_if_any(_check_parsers(args), _check_adapters(args), _check_app(args))
    return args


def _has_large_steps(config: Any) -> bool:
    """Return whether a request has several tokens in each step, as of a pooling or a diffusion model."""
    return bool(config.model_config.runner_type != "generate" or config.uniform_decode_query_len > 1)


def _raise_if_any(*checks: Iterable[tuple[str, str]]) -> None:
    if errors := [error for check in checks for error in check]:
        raise _FlagsError(errors)


def _explain_errors(attempt: Callable[[Flags], T], flags: Flags, model: Model) -> T:
    """Return what `attempt` returns for the flags.

    Raises:
        ConfigurationError: it fails; the message has a line for each flag that is known to be wrong, or one line with
            the flags without which it succeeds.
    """
    try:
        return attempt(flags)
    except _FlagsError as error:
        lines = [flags.values[dest].not_allowed(reason) for dest, reason in error.errors]
        raise ConfigurationError("\n".join(lines)) from error
    except Exception as error:
        known = startup_errors.known(error, model.path, flags)
        raise ConfigurationError(known or _name_rejected_flags(error, attempt, flags, model)) from error


def _name_rejected_flags(error: Exception, attempt: Callable[[Flags], Any], flags: Flags, model: Model) -> str:
    """Return a message with the flags that cause an error: without one of them, `attempt` succeeds."""
    rejected = {dest: flag for dest, flag in flags.values.items() if _succeeds(attempt, flags.without(dest))}
    if len(rejected) == 1:
        ((dest, flag),) = rejected.items()
        return flag.not_allowed(error_message(error, dest))
    if rejected:
        labels = " and ".join(flag.label for flag in rejected.values())
        return f"{labels} are not allowed together: {error_message(error)}"
    return f"vLLM does not accept the settings: {startup_errors.explain(error, '', model.path)}"


def _succeeds(attempt: Callable[[Flags], Any], flags: Flags) -> bool:
    try:
        attempt(flags)
    except Exception:  # noqa: BLE001 (of whatever kind: the removed flag is not the only cause)
        return False
    return True


def _check_value(action: argparse.Action, value: Any) -> None:
    """Compare a flag's value with the bounds of vLLM's configuration, which its parser does not check.

    Raises:
        pydantic.ValidationError: it is outside of them.
    """
    import vllm.config

    # vLLM groups its flags by their configuration class.
    group = str(getattr(getattr(action, "container", None), "title", None))
    config = getattr(vllm.config, group, None)
    field = getattr(config, "__pydantic_fields__", {}).get(action.dest)
    if field is None or not field.metadata:
        return
    kind: Any = Annotated[field.annotation, field]
    allowed: TypeAdapter[Any] = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
    allowed.validate_python(value)


# Checks of several flags: each yields the flags that are wrong, with the reason.


def _check_parsers(args: Any) -> Iterator[tuple[str, str]]:
    """Find unknown names of parsers, as vLLM's server does before it loads (`validate_api_server_args`)."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    reasoning_dest, reasoning_parser = _reasoning_parser(args)
    for dest, name, manager in (
        ("tool_call_parser", args.tool_call_parser, ToolParserManager),
        (reasoning_dest, reasoning_parser, ReasoningParserManager),
    ):
        if name and name not in (allowed := manager.list_registered()):
            yield dest, f"unknown parser. Allowed: {', '.join(allowed)}"


def _check_adapters(args: Any) -> Iterator[tuple[str, str]]:
    """Find adapters without LoRA enabled, and directories that are not adapters."""
    for dest, name, path in _adapters(args):
        if not args.enable_lora:
            yield dest, "LoRA is not enabled: set ENABLE_LORA=true"
        elif not _is_hub_repository(path) and not (Path(path).expanduser() / "adapter_config.json").is_file():
            yield dest, f"adapter {name}: {path} must be a directory with an adapter_config.json"


def _check_app(args: Any) -> Iterator[tuple[str, str]]:
    """Find middleware and a chat template that vLLM's app could not use; it would fail only after the load."""
    for name in args.middleware:
        module, _, attribute = name.rpartition(".")
        try:
            getattr(importlib.import_module(module), attribute)
        except (AttributeError, ImportError, ValueError) as error:
            yield "middleware", f"{name} cannot be imported: {error}"
    if args.chat_template is not None:
        from jinja2 import TemplateError
        from transformers.utils import chat_template_utils
        from vllm.renderers.chat_utils import load_chat_template

        with compat.optional("check of the chat template before the load"):
            try:
                chat_template_utils._compile_jinja_template(load_chat_template(args.chat_template))  # noqa: SLF001
            except TemplateError as error:
                yield "chat_template", f"invalid template: {error}"


def _check_loading(config: Any) -> Iterator[tuple[str, str]]:
    """Find a load format that vLLM has no loader for, and load the tokenizer; vLLM does both late."""
    from vllm.tokenizers import cached_tokenizer_from_config

    if config.load_config.load_format != "auto":
        from vllm.model_executor.model_loader import LoadFormats, get_model_loader

        try:
            get_model_loader(config.load_config)
        except ValueError as error:
            yield "load_format", f"{error}. vLLM's formats: {', '.join(get_args(LoadFormats))}"
    cached_tokenizer_from_config(config.model_config)  # The engine uses the same cache.


def _check_parsers_with_model(args: Any, config: Any) -> Iterator[tuple[str, str]]:
    """Find parsers that do not work with the model's tokenizer; vLLM's app would fail only after the load."""
    reasoning_dest, reasoning_parser = _reasoning_parser(args)
    if not (args.enable_auto_tool_choice or reasoning_parser) or config.model_config.runner_type != "generate":
        return
    from vllm.parser import ParserManager
    from vllm.tokenizers import cached_tokenizer_from_config

    try:
        ParserManager.get_parser(
            tool_parser_name=args.tool_call_parser,
            reasoning_parser_name=reasoning_parser,
            enable_auto_tools=args.enable_auto_tool_choice,
            model_name=config.model_config.model,
            is_harmony=config.model_config.hf_config.model_type == "gpt_oss",
            tokenizer=cached_tokenizer_from_config(config.model_config),
        )
    except Exception as error:  # noqa: BLE001 (parsers raise any kind)
        # If both parsers are set, the message names the one that failed.
        tools = args.enable_auto_tool_choice and (not reasoning_parser or "--tool-call-parser" in str(error))
        yield "tool_call_parser" if tools else reasoning_dest, error_message(error)


def _check_adapters_with_model(args: Any, config: Any) -> Iterator[tuple[str, str]]:
    """Find local adapters that the engine would not load."""
    if config.lora_config is None:
        return
    from vllm.lora.peft_helper import PEFTHelper

    for dest, name, path in _adapters(args):
        if not _is_hub_repository(path):
            try:
                helper = PEFTHelper.from_local_dir(str(Path(path).expanduser()), config.model_config.max_model_len)
                helper.validate_legal(config.lora_config)
            except (LookupError, OSError, TypeError, ValueError) as error:
                yield dest, f"adapter {name} in {path} cannot be used: {error}"


def _reasoning_parser(args: Any) -> tuple[str, str]:
    """Return the flag that names the reasoning parser, and the name, which is empty if none is set."""
    if args.reasoning_parser:
        return "reasoning_parser", args.reasoning_parser
    return "structured_outputs_config", args.structured_outputs_config.reasoning_parser


def _adapters(args: Any) -> Iterator[tuple[str, str, str]]:
    """Yield the adapters that vLLM's app loads when it starts: the flag, the adapter's name and its path."""
    for adapter in args.lora_modules or ():
        yield "lora_modules", adapter.name, adapter.path
    for name, path in (args.default_mm_loras or {}).items():
        yield "default_mm_loras", name, path


def _is_hub_repository(path: str) -> bool:
    """Return whether vLLM would look for an adapter's path on the hub."""
    return not path.startswith(("/", "~", "./", "../")) and not Path(path).exists()


def _defaults(flags: Flags) -> list[str]:
    """Return the worker's own defaults: on a CPU, no compilation, which takes a minute, and a small KV cache."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return []
    sized = {"gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override"} & flags.values.keys()
    if sized or "VLLM_CPU_KVCACHE_SPACE" in os.environ:
        return ["--enforce-eager"]
    return ["--enforce-eager", f"--kv-cache-memory-bytes={CPU_KV_CACHE_BYTES}"]
