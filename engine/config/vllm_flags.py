"""vLLM's flags, from every source that may set them. vLLM's own parser defines which there are: no list is kept here.

Each flag of `vllm serve` is a variable of the same name: `--max-model-len` is `MAX_MODEL_LEN`. Later sources win:

1. vLLM's defaults, and the worker's own on a CPU
2. the variables that the image was built with (`BAKED_SETTINGS_FILE`)
3. `VLLM_CONFIG_FILE`, the YAML file of `vllm serve --config`
4. the environment
5. `VLLM_EXTRA_ARGS`, written as on a command line

`None` and `null` count as not set, and remove the value of an earlier source. If the file or the extra arguments come
from the image, they are part of 2. If one source sets a flag and its alias, the alias wins, as in worker-vllm.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import json
import logging
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from engine.config.environment import ENVIRONMENT, NULL_WORDS, Variable, as_text
from engine.config.redaction import redacted
from engine.config.worker_vllm import ALIASES, DEPRECATED, REMOVED
from engine.errors import ConfigurationError

CONFIG_FILE, EXTRA_ARGS = "VLLM_CONFIG_FILE", "VLLM_EXTRA_ARGS"
TRUE, FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}

# Flags of the HTTP server, which the worker does not run; and the token, which the hub's client reads itself. Some are
# common names of environment variables with another meaning.
UNSUPPORTED_FLAGS = {
    "aggregate_engine_logging", "api_key", "api_server_count", "config", "disable_access_log_for_endpoints",
    "disable_uvicorn_access_log", "enable_ssl_refresh", "grpc", "grpc_port", "h11_max_header_count",
    "h11_max_incomplete_event_size", "headless", "help", "hf_token", "host", "log_level", "log_config_file",
    "logging_config", "model_tag", "port", "root_path", "ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile", "ssl_ciphers",
    "ssl_keyfile", "uds", "uvicorn_log_level",
}  # fmt: skip

# Variables of other programs: they are misspelt settings only if they differ from one by a letter.
_UNRELATED_ENV = re.compile(
    r"(AWS|CUDA|GIT|GPG|HF|HUGGING_?FACE|LC|LD|NCCL|NVIDIA|OMP|PATH|PIP|PYTHON|PYTEST|PYTORCH|RUNPOD|SSH|TORCH|"
    r"TOKENIZERS|TRANSFORMERS|TRITON|UV|VIRTUAL|VLLM|XDG)(_|$)"
)
# Cutoffs of `difflib.get_close_matches`.
_SIMILAR, _ONE_LETTER_AWAY = 0.85, 0.93

# `image=1,video=0`: how worker-vllm's documentation writes a JSON object.
_PAIRS = re.compile(r"[\w.-]+=[^=,{}\[\]]*(,\s*[\w.-]+=[^=,{}\[\]]*)*")
# What vLLM's parser says of a value that a type does not accept.
_NOT_CONVERTED = re.compile(r"Value .* cannot be converted to <(?:class|function) '?(?P<type>\w+)", re.DOTALL)
_INTEGER = "it must be an integer, such as 8192, 8k (8000) or 8K (8192)"
_TYPE_MESSAGES = {"human_readable_int": _INTEGER, "human_readable_int_or_auto": f"{_INTEGER}, or auto"}
_MAX_MESSAGE_LENGTH = 2000

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FlagValue:
    """The value that one source sets for a flag.

    Attributes:
        name: of the variable or option.
        source: the file, the environment or `VLLM_EXTRA_ARGS`.
        label: name, value and source, for messages.
        arguments: for vLLM's parser.
        value: what vLLM's parser makes of them.
    """

    name: str
    source: str
    label: str
    arguments: tuple[str, ...]
    value: Any

    def not_allowed(self, reason: str) -> str:
        """Return the line that says why this value is not allowed."""
        return f"{self.label} is not allowed: {reason}"


class Flags:
    """The flags that are set.

    Args:
        parser: vLLM's, of `vllm serve`; its `error` raises ValueError.
        check: raises pydantic's ValidationError for a value that the parser accepts but vLLM's configuration does not.
    """

    def __init__(self, parser: argparse.ArgumentParser, check: Callable[[argparse.Action, Any], None]) -> None:
        self.parser = parser
        self._check = check
        self._options: Mapping[str, argparse.Action] = parser._option_string_actions  # noqa: SLF001 (no public one)
        self.actions = {
            action.dest: action for action in self._options.values() if action.dest not in UNSUPPORTED_FLAGS
        }
        self.values: dict[str, FlagValue] = {}
        self._defaults: frozenset[str] = frozenset()

    def load(self, variables: Mapping[str, Variable], settings: Iterable[str]) -> None:
        """Set all flags that the variables, and the files that they name, have.

        Args:
            variables: by their upper-case names.
            settings: names of the worker's own settings, in upper case.

        Raises:
            ConfigurationError: values that vLLM does not accept, or options that it does not have; a line for each.
        """
        errors: list[str] = []
        environment = {name: one for name, one in variables.items() if one.source == ENVIRONMENT}
        self._load_all({name: one for name, one in variables.items() if name not in environment}, errors)
        baked = dict(self.values)
        self._load_all(environment, errors)
        if errors:
            raise ConfigurationError("\n".join(errors))
        self._discard_baked_flags_of_other_model(baked)
        self._warn_about_names(variables, settings)

    def value(self, dest: str) -> Any:
        """Return the value of a flag, as vLLM's parser reads it; None if it is not set."""
        flag = self.values.get(dest)
        return None if flag is None else flag.value

    def set_default(self, dest: str, value: str, source: str) -> None:
        """Set a flag that no source sets, if vLLM has it; `source` says why it has this value."""
        if dest in self.actions and dest not in self.values:
            action, name = self.actions[dest], dest.upper()
            arguments = _arguments(action, value, self._options)
            self._set(action, name, source, f"{name}={value} ({source})", arguments)
            self._defaults = self._defaults | {dest}

    def is_default(self, dest: str) -> bool:
        """Return whether `set_default` has set the flag."""
        return dest in self.values and dest in self._defaults

    def without(self, dest: str) -> Self:
        """Return a copy without this flag."""
        others = copy.copy(self)
        others.values = {name: flag for name, flag in self.values.items() if name != dest}
        return others

    def arguments(self) -> list[str]:
        """Return the arguments for vLLM's parser, without those of the model and its names."""
        chosen = (flag for dest, flag in self.values.items() if dest not in ("model", "served_model_name"))
        return [argument for flag in chosen for argument in flag.arguments]

    def _load_all(self, variables: Mapping[str, Variable], errors: list[str]) -> None:
        variables = {
            name: one
            for name, one in variables.items()
            if name not in (CONFIG_FILE, EXTRA_ARGS) or one.value not in NULL_WORDS
        }
        if file := variables.get(CONFIG_FILE):
            self._load_file(Path(file.value), errors)
        for name, variable in variables.items():
            self._load_variable(name.lower(), name, variable, errors)
        for alias, dest in ALIASES.items():
            if alias in variables:
                self._load_variable(dest, alias, variables[alias], errors)
        if extra := variables.get(EXTRA_ARGS):
            self._load_extra_args(extra, errors)

    def _discard_baked_flags_of_other_model(self, baked: Mapping[str, FlagValue]) -> None:
        """Discard the image's flags if a config file or extra arguments name another model than the image does."""
        image = baked["model"].value if "model" in baked else None
        if image is not None and str(self.value("model")).lower() != image.lower():
            _log.info("Ignoring the image's settings: they are for %s", image)
            self.values = {dest: flag for dest, flag in self.values.items() if baked.get(dest) is not flag}

    def _load_file(self, file: Path, errors: list[str]) -> None:
        import yaml

        try:
            document = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            errors.append(f"{CONFIG_FILE}={str(file)!r} cannot be read: {redacted(str(error))}")
            return
        if not isinstance(document, dict):
            errors.append(f"{CONFIG_FILE}={str(file)!r} must be a mapping of flags to values, as `max-model-len: 8192`")
            return
        for name, value in document.items():
            dest = str(name).lstrip("-").replace("-", "_")
            variable = Variable("null" if value is None else as_text(value), str(file))
            if dest == "model_tag":
                dest = "model"
            if dest in UNSUPPORTED_FLAGS:
                _log.warning("%s in %s is ignored: %s", name, file, _unsupported_reason(dest))
            elif dest not in self.actions:
                errors.append(f"{name} in {file} is not a flag of vLLM{_suggest(dest, self.actions)}")
            elif variable.value:
                self._load_variable(dest, str(name), variable, errors)

    def _load_variable(self, dest: str, name: str, variable: Variable, errors: list[str]) -> None:
        action = self.actions.get(dest)
        if action is None:
            return
        if dest == "max_num_batched_tokens" and variable.value == "0":
            _log.warning("%s=0 is ignored, as in worker-vllm: vLLM's default is used", name)
            return
        label = f"{name}={redacted(variable.value)!r} ({variable.source})"
        try:
            self._set(action, name, variable.source, label, _arguments(action, variable.value, self._options))
        except (ValueError, argparse.ArgumentError) as error:
            errors.append(f"{label} is not allowed: {error_message(error)}")

    def _load_extra_args(self, extra: Variable, errors: list[str]) -> None:
        """Set the options of a command line, each with the values after it."""
        try:
            words = shlex.split(extra.value)
        except ValueError as error:
            errors.append(f"{EXTRA_ARGS} cannot be split into arguments: {error}")
            return
        found: dict[str, list[str]] = {}
        names: dict[str, str] = {}
        dest, unknown = "", False
        for word in words:
            name = _option_name(word)
            action = self._options.get(name)
            if action is not None:
                dest, unknown = action.dest, False
                names[dest] = name
            elif word.startswith("--") or not (dest or unknown):
                hint = _suggest(name.lstrip("-").replace("-", "_"), self.actions)
                errors.append(f"{redacted(word.partition('=')[0])!r} in {EXTRA_ARGS} is not a flag of vLLM{hint}")
                dest, unknown = "", True
            if dest:
                found.setdefault(dest, []).append(word)
        source = EXTRA_ARGS if extra.source == ENVIRONMENT else extra.source
        for dest, arguments in found.items():
            if dest in UNSUPPORTED_FLAGS:
                _log.warning("%s in %s is ignored: %s", names[dest], EXTRA_ARGS, _unsupported_reason(dest))
                continue
            label = f"{redacted(' '.join(arguments))!r} in {EXTRA_ARGS}"
            try:
                self._set(self.actions[dest], names[dest], source, label, arguments)
            except (ValueError, argparse.ArgumentError) as error:
                errors.append(f"{label} is not allowed: {error_message(error)}")

    def _set(self, action: argparse.Action, name: str, source: str, label: str, arguments: list[str]) -> None:
        """Set a flag, or remove it if there are no arguments."""
        self.values.pop(action.dest, None)
        if arguments:
            value = getattr(self.parser.parse_args(arguments), action.dest)
            self._check(action, value)
            self.values[action.dest] = FlagValue(name, source, label, tuple(arguments), value)

    def _warn_about_names(self, variables: Mapping[str, Variable], settings: Iterable[str]) -> None:
        """Log a warning for each removed or deprecated name, and for each name that seems to be misspelt."""
        for name in sorted(variables):
            if name in REMOVED:
                _log.warning("%s is ignored: %s", name, REMOVED[name])
            elif name in DEPRECATED:
                _log.warning("%s is deprecated: use %s", name, ALIASES[name].upper())
        suggested = {*map(str.upper, self.actions), *settings, *ALIASES, *REMOVED}
        known = suggested | {*map(str.upper, UNSUPPORTED_FLAGS)}
        for name, variable in variables.items():
            if name in known:
                continue
            hint = _suggest(name, suggested, _ONE_LETTER_AWAY if _UNRELATED_ENV.match(name) else _SIMILAR)
            if hint or variable.source != ENVIRONMENT:
                _log.warning("%s is not a setting (%s)%s", name, variable.source, hint)


def _suggest(name: str, known: Iterable[str], cutoff: float = _SIMILAR) -> str:
    close = difflib.get_close_matches(name, known, 1, cutoff)
    if not close:
        return ""
    return f": did you mean {close[0] if name.isupper() else '--' + close[0].replace('_', '-')}?"


def _unsupported_reason(dest: str) -> str:
    return "set HF_TOKEN instead" if dest == "hf_token" else "the worker runs no HTTP server"


def _option_name(word: str) -> str:
    """Return the option that a word of a command line names, as vLLM's parser spells it; any other word unchanged."""
    if re.fullmatch(r"-O=?\w*", word):
        return "--optimization-level"
    option = word.partition("=")[0].partition(".")[0].rstrip("+")
    return option.replace("_", "-") if option.startswith("--") else option


def _arguments(action: argparse.Action, text: str, options: Collection[str]) -> list[str]:
    """Return a variable's text as arguments of a command line; none if the flag is not set."""
    option = action.option_strings[0]
    if text in NULL_WORDS and text not in _choices(action):
        return [f"{option}=None"] if _accepts_none(action) else []
    if action.nargs == 0:
        if text.lower() not in TRUE | FALSE:
            raise ValueError("it must be `true` or `false`")
        if text.lower() in TRUE:
            return [option]
        negated = "--no-" + option[2:]
        return [negated] if negated in options else []
    if action.nargs == "+":
        # A model's name may contain spaces.
        items = _list_items(text, spaces=action.dest != "served_model_name")
        if not items and action.default:
            raise ValueError("vLLM does not support an empty list here")
        return [option, *items] if items else []
    if isinstance(action.default, list) and isinstance(action, argparse._AppendAction):  # noqa: SLF001 (no public one)
        return [f"{option}={item}" for item in _list_items(text)]
    return [f"{option}={_to_json(text) if _accepts_json(action) else text}"]


def _list_items(text: str, *, spaces: bool = True) -> list[str]:
    """Return the items of a list: a JSON list, one JSON object, or words separated by commas or spaces."""
    text = _unquote(text)
    if text.startswith(("[", "{")):
        try:
            document = json.loads(text)
        except ValueError as error:
            raise ValueError(f"it is not JSON: {error}") from None
        return [as_text(item) for item in (document if isinstance(document, list) else [document])]
    if spaces:
        return text.replace(",", " ").split()
    return [item.strip() for item in text.split(",") if item.strip()]


def _choices(action: argparse.Action) -> Collection[Any]:
    """Return the values that vLLM lists for a flag, if it lists any."""
    return action.choices or (action.metavar if isinstance(action.metavar, list) else ())  # type: ignore[return-value]


def _accepts_none(action: argparse.Action) -> bool:
    """Return whether vLLM's parser accepts `None` for a flag."""
    if action.nargs is not None or not callable(action.type):
        return False
    try:
        return action.type("None") is None
    except (ValueError, argparse.ArgumentTypeError):
        return False


def _accepts_json(action: argparse.Action) -> bool:
    """Return whether vLLM's parser accepts a JSON object for a flag."""
    if not callable(action.type):
        return False
    try:
        value = action.type("{}")
    except (ValueError, argparse.ArgumentTypeError) as error:
        return _validation_error(error) is not None
    return isinstance(value, dict) or dataclasses.is_dataclass(value)


def _to_json(text: str) -> str:
    """Return the JSON of a text that may be quoted, or written as `image=1,video=0`."""
    text = _unquote(text)
    if not _PAIRS.fullmatch(text):
        return text
    pairs = (pair.partition("=") for pair in text.split(","))
    return json.dumps({name.strip(): _json_or_text(value.strip()) for name, _, value in pairs})


def _unquote(text: str) -> str:
    """Return a JSON object or list without the quotes that env files, and copying, leave around it."""
    quote = text[:1]
    if quote not in ("'", '"') or text[-1:] != quote:
        return text
    inner = text[1:-1].strip()
    if quote == '"' and isinstance(document := _json_or_text(text), str):
        inner = document.strip().removeprefix('"').removesuffix('"')
    return inner if inner.startswith(("{", "[")) or _PAIRS.fullmatch(inner) else text


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def error_message(error: BaseException, dest: str = "") -> str:
    """Return why vLLM does not accept a value, in one line with secrets masked.

    Args:
        error: vLLM's.
        dest: the flag that it is about.
    """
    if (validation := _validation_error(error)) is not None:
        message = "; ".join(dict.fromkeys(_describe_error(one, dest) for one in validation.errors(include_url=False)))
    else:
        message = error.message if isinstance(error, argparse.ArgumentError) else str(error)
        type_name = failed["type"] if (failed := _NOT_CONVERTED.match(message)) else ""
        if invalid := re.match(r"invalid (\w+) value", message):
            type_name = invalid[1]
        if type_name == "loads":
            message = f"it is not JSON: {_json_error(error)}"
        elif type_name in _TYPE_MESSAGES:
            message = _TYPE_MESSAGES[type_name]
        elif failed:
            message = f"invalid {type_name} value"
    return redacted(" ".join(message.split()))[:_MAX_MESSAGE_LENGTH]


def _describe_error(error: Any, dest: str) -> str:
    """Return the field and message of one of pydantic's errors."""
    message = str(error["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message.replace("Input should be", "it should be").replace("Invalid JSON:", "it is not JSON:")
    field = "" if error["loc"][:1] == (dest,) else ".".join(str(part) for part in error["loc"])
    return f"{field}: {message}" if field else message


def _json_error(error: BaseException) -> str:
    """Return the JSON parser's message, which vLLM's parser drops."""
    cause = next((one for one in _causes(error) if isinstance(one, json.JSONDecodeError)), None)
    return str(cause) if cause else "it cannot be read"


def _validation_error(error: BaseException) -> ValidationError | None:
    return next((one for one in _causes(error) if isinstance(one, ValidationError)), None)


def _causes(error: BaseException) -> Iterable[BaseException]:
    """Yield an error and its causes, the latest first."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
