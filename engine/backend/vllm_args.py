"""VLLM's arguments: its own parser, and what its server checks before it loads anything.

What is asked of vLLM here it does not promise to keep; `make test` tells when an upgrade moves it.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_args

from pydantic import ConfigDict, TypeAdapter

from engine.backend import compat, startup_errors
from engine.config.model import Model
from engine.config.vllm_flags import Flags, reason
from engine.errors import ConfigurationError

GIB_BYTES = 1 << 30
# On a CPU vLLM would take most of the machine's memory for the KV cache and compile for a minute.
CPU_KV_CACHE_BYTES = 1 * GIB_BYTES

_log = logging.getLogger(__name__)
T = TypeVar("T")


class _FlagsError(ValueError):
    """Values of flags that cannot be used: for each the flag and why."""

    def __init__(self, faults: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(why for _, why in faults))
        self.faults = faults


def set_environment() -> None:
    """Set what vLLM reads from the environment when it is imported, where the user has not said otherwise."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # vLLM's app would ask our own calls for this key; clients authenticate with the platform.
    os.environ.pop("VLLM_API_KEY", None)


def flags() -> Flags:
    """The flags that vLLM has, none of them given yet."""
    set_environment()
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]  # vLLM is not typed for --strict
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    return Flags(make_arg_parser(Parser(exit_on_error=False, allow_abbrev=False)), _check_value)


def parse(given: Flags, model: Model) -> Any:
    """The arguments of `vllm serve` for these flags, checked as vLLM does before it has read the model.

    Raises:
        ConfigurationError: vLLM does not accept them.
    """
    return _attempted(lambda flags: _parsed(flags, model), given, model)


def engine_config(given: Flags, args: Any, model: Model) -> tuple[Any, Any]:
    """VLLM's engine arguments for those of `vllm serve`, and the configuration that it makes of them and the model.

    The context counts: by it and by the GPU, vLLM chooses how many requests and tokens a step may have.

    Raises:
        ConfigurationError: vLLM does not accept them, or the model.
    """

    def attempt(flags: Flags) -> tuple[Any, Any]:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext

        own = args if flags is given else _parsed(flags, model)
        arguments = AsyncEngineArgs.from_cli_args(own)
        config = arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
        _refuse(_wrong_loading(config), _wrong_parsers_with(own, config), _wrong_adapters_with(own, config))
        return arguments, config

    return _attempted(attempt, given, model)


def download_adapters(given: Flags, args: Any, model: Model) -> None:
    """Have the adapters of the hub in its cache, where vLLM's app finds them once all is loaded.

    Raises:
        ConfigurationError: one cannot be had.
    """
    from huggingface_hub import snapshot_download

    for dest, _, path in _adapters(args):
        if _of_hub(path):
            try:
                snapshot_download(path)
            except (OSError, ValueError, LookupError) as error:
                told = startup_errors.known(error, model.path, given)
                raise ConfigurationError(told or given.given[dest].refused(reason(error))) from error


def _parsed(flags: Flags, model: Model) -> Any:
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args

    names = ["--model", model.path, "--served-model-name", *model.names]
    # A copy, as vLLM writes into what it reads, and the parser's defaults are shared by all that it reads.
    args = copy.deepcopy(flags.parser.parse_args([*_defaults(flags), *flags.arguments(), *names]))
    validate_parsed_serve_args(args)
    _refuse(_wrong_parsers(args), _wrong_adapters(args), _wrong_app(args))
    return args


def _refuse(*checks: Iterable[tuple[str, str]]) -> None:
    if faults := [fault for check in checks for fault in check]:
        raise _FlagsError(faults)


def _attempted(attempt: Callable[[Flags], T], given: Flags, model: Model) -> T:
    """What the attempt gives for the flags.

    Raises:
        ConfigurationError: it fails; a line for each flag that is known to be wrong, or one that names the flags
            without which it would not fail.
    """
    try:
        return attempt(given)
    except _FlagsError as error:
        raise ConfigurationError("\n".join(given.given[dest].refused(why) for dest, why in error.faults)) from error
    except Exception as error:
        known = startup_errors.known(error, model.path, given)
        raise ConfigurationError(known or _blamed(error, attempt, given, model)) from error


def _blamed(error: Exception, attempt: Callable[[Flags], Any], given: Flags, model: Model) -> str:
    """Say which flags an error is about: those without which vLLM takes the others."""
    blamed = {dest: flag for dest, flag in given.given.items() if _works(attempt, given.without(dest))}
    if len(blamed) == 1:
        ((dest, flag),) = blamed.items()
        return flag.refused(reason(error, dest))
    if blamed:
        together = " and ".join(flag.written.removesuffix(", which") for flag in blamed.values())
        return f"{together} are not allowed together: {reason(error)}"
    return f"vLLM does not accept the settings: {startup_errors.explain(error, '', model.path)}"


def _works(attempt: Callable[[Flags], Any], flags: Flags) -> bool:
    try:
        attempt(flags)
    except Exception:  # noqa: BLE001 (whatever it is, the flag that was left out is not all that is wrong)
        return False
    return True


def _check_value(action: argparse.Action, value: Any) -> None:
    """Compare a flag's value with the bounds of vLLM's configuration, which the flag's parser does not know.

    Raises:
        pydantic.ValidationError: it is outside them.
    """
    import vllm.config

    # vLLM groups its flags by the configuration that they are a part of.
    group = str(getattr(getattr(action, "container", None), "title", None))
    config = getattr(vllm.config, group, None)
    field = getattr(config, "__pydantic_fields__", {}).get(action.dest)
    if field is None or not field.metadata:
        return
    kind: Any = Annotated[field.annotation, field]
    allowed: TypeAdapter[Any] = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
    allowed.validate_python(value)


def _wrong_parsers(args: Any) -> Iterator[tuple[str, str]]:
    """Names of parsers that there are not, as vLLM's server looks for before it loads (`validate_api_server_args`)."""
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
            yield dest, f"there is no such parser. Allowed: {', '.join(allowed)}"


def _wrong_adapters(args: Any) -> Iterator[tuple[str, str]]:
    """Adapters that may not be loaded, and those whose directories hold none."""
    for dest, name, path in _adapters(args):
        if not args.enable_lora:
            yield dest, "LoRA is not enabled: set ENABLE_LORA=true"
        elif not _of_hub(path) and not (Path(path).expanduser() / "adapter_config.json").is_file():
            yield dest, f"adapter {name}: {path} has to be a directory with an adapter_config.json"


def _wrong_app(args: Any) -> Iterator[tuple[str, str]]:
    """Middleware and a chat template that vLLM's app, made once all is loaded, could not use."""
    for name in args.middleware:
        module, _, thing = name.rpartition(".")
        try:
            getattr(importlib.import_module(module), thing)
        except (AttributeError, ImportError, ValueError) as error:
            yield "middleware", f"{name} cannot be imported: {error}"
    if args.chat_template is not None:
        from jinja2 import TemplateError
        from transformers.utils import chat_template_utils
        from vllm.renderers.chat_utils import load_chat_template

        with compat.optional("chat templates to be checked before they are used"):
            try:
                chat_template_utils._compile_jinja_template(load_chat_template(args.chat_template))  # noqa: SLF001
            except TemplateError as error:
                yield "chat_template", f"the template is wrong: {error}"


def _wrong_loading(config: Any) -> Iterator[tuple[str, str]]:
    """A load format that vLLM has no loader of: its processes find out late. The tokenizer is loaded too."""
    from vllm.tokenizers import cached_tokenizer_from_config

    if config.load_config.load_format != "auto":
        from vllm.model_executor.model_loader import LoadFormats, get_model_loader

        try:
            get_model_loader(config.load_config)
        except ValueError as error:
            yield "load_format", f"{error}. vLLM's own: {', '.join(get_args(LoadFormats))}"
    cached_tokenizer_from_config(config.model_config)  # The engine takes it from the same cache.


def _wrong_parsers_with(args: Any, config: Any) -> Iterator[tuple[str, str]]:
    """Parsers that cannot be used with the model's tokenizer, which vLLM's app finds out once all is loaded."""
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
    except Exception as error:  # noqa: BLE001 (a parser's own)
        # Where both are given, it says which of them it is.
        tools = args.enable_auto_tool_choice and (not reasoning_parser or "--tool-call-parser" in str(error))
        yield "tool_call_parser" if tools else reasoning_dest, reason(error)


def _wrong_adapters_with(args: Any, config: Any) -> Iterator[tuple[str, str]]:
    """Adapters on this machine that the engine would refuse when it loads them."""
    if config.lora_config is None:
        return
    from vllm.lora.peft_helper import PEFTHelper

    for dest, name, path in _adapters(args):
        if not _of_hub(path):
            try:
                helper = PEFTHelper.from_local_dir(str(Path(path).expanduser()), config.model_config.max_model_len)
                helper.validate_legal(config.lora_config)
            except (LookupError, OSError, TypeError, ValueError) as error:
                yield dest, f"adapter {name} in {path} cannot be used: {error}"


def _reasoning_parser(args: Any) -> tuple[str, str]:
    """The flag that names a parser for reasoning, and that name; nothing if there is none."""
    if args.reasoning_parser:
        return "reasoning_parser", args.reasoning_parser
    return "structured_outputs_config", args.structured_outputs_config.reasoning_parser


def _adapters(args: Any) -> Iterator[tuple[str, str, str]]:
    """The adapters that vLLM's app loads as it starts: the flag that gives one, its name and its path."""
    for adapter in args.lora_modules or ():
        yield "lora_modules", adapter.name, adapter.path
    for name, path in (args.default_mm_loras or {}).items():
        yield "default_mm_loras", name, path


def _of_hub(path: str) -> bool:
    """Whether vLLM takes an adapter's path for a repository of the hub."""
    return not path.startswith(("/", "~", "./", "../")) and not Path(path).exists()


def _defaults(given: Flags) -> list[str]:
    """The worker's own defaults: on a CPU, neither a minute of compilation nor most of the memory."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return []
    sized = {"gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override"} & given.given.keys()
    if sized or "VLLM_CPU_KVCACHE_SPACE" in os.environ:
        return ["--enforce-eager"]
    return ["--enforce-eager", f"--kv-cache-memory-bytes={CPU_KV_CACHE_BYTES}"]
