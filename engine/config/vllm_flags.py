"""vLLM's flags, from wherever they are given. Which there are is asked of vLLM's own parser; no list is kept here.

Each flag of `vllm serve` is a variable of the same name: `--max-model-len` is `MAX_MODEL_LEN`. Later wins:

1. vLLM's defaults, and the worker's own on a CPU
2. the variables that the image was built with (`BAKED_SETTINGS_FILE`)
3. `VLLM_CONFIG_FILE`, the YAML file that `vllm serve --config` takes
4. the environment
5. `VLLM_EXTRA_ARGS`, written as on a command line

`None` and `null` are not given, and take away what an earlier place gave. Where the file or the extra arguments are the
image's own, they are part of 2. Of a flag and its other name at the same place, the other name wins, as it does in
worker-vllm.
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

from engine.config.environment import ENVIRONMENT, NOT_GIVEN, Variable, as_text
from engine.config.redaction import redacted
from engine.config.worker_vllm import ALIASES, DEPRECATED, RETIRED
from engine.errors import ConfigurationError

CONFIG_FILE, EXTRA = "VLLM_CONFIG_FILE", "VLLM_EXTRA_ARGS"
TRUE, FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}

# Flags of the server that `vllm serve` is and the worker is not; and the token, which the hub's library reads itself.
# Some are common names in an environment, and mean something else there.
NOT_OURS = {
    "aggregate_engine_logging", "api_key", "api_server_count", "config", "disable_access_log_for_endpoints",
    "disable_uvicorn_access_log", "enable_ssl_refresh", "grpc", "grpc_port", "h11_max_header_count",
    "h11_max_incomplete_event_size", "headless", "help", "hf_token", "host", "log_level", "log_config_file",
    "logging_config", "model_tag", "port", "root_path", "ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile", "ssl_ciphers",
    "ssl_keyfile", "uds", "uvicorn_log_level",
}  # fmt: skip

# Variables of others, unless they are a letter away from ours.
_FOREIGN = re.compile(
    r"(AWS|CUDA|GIT|GPG|HF|HUGGING_?FACE|LC|LD|NCCL|NVIDIA|OMP|PATH|PIP|PYTHON|PYTEST|PYTORCH|RUNPOD|SSH|TORCH|"
    r"TOKENIZERS|TRANSFORMERS|TRITON|UV|VIRTUAL|VLLM|XDG)(_|$)"
)
_CLOSE, _LETTER_AWAY = 0.85, 0.93

_log = logging.getLogger(__name__)


# Forms that a value of JSON is found in: `image=1,video=0`, as worker-vllm's documents have it.
_PAIRS = re.compile(r"[\w.-]+=[^=,{}\[\]]*(,\s*[\w.-]+=[^=,{}\[\]]*)*")
_CONVERTED = re.compile(r"Value .* cannot be converted to <(?:class|function) '?(?P<kind>\w+)", re.DOTALL)
_NUMBER = "it is a whole number, such as 8192, 8k (8000) or 8K (8192)"
_KINDS = {"human_readable_int": _NUMBER, "human_readable_int_or_auto": f"{_NUMBER}, or auto"}
_LONGEST_REASON = 2000


@dataclass(frozen=True, slots=True)
class Given:
    """A flag that was given.

    Attributes:
        name: of the variable or option.
        source: where it was given.
        written: both with the value, as a sentence about it begins.
        arguments: for vLLM's parser.
        value: what that reads.
    """

    name: str
    source: str
    written: str
    arguments: tuple[str, ...]
    value: Any

    def refused(self, reason: str) -> str:
        """The line that says why it is not allowed."""
        return f"{self.written} is not allowed: {reason}"


class Flags:
    """The flags that are given.

    Args:
        parser: vLLM's, of `vllm serve`; its `error` raises ValueError.
        check: raises pydantic's ValidationError if vLLM's configuration does not take a value that its parser takes.
    """

    def __init__(self, parser: argparse.ArgumentParser, check: Callable[[argparse.Action, Any], None]) -> None:
        self.parser = parser
        self._check = check
        self._options: Mapping[str, argparse.Action] = parser._option_string_actions  # noqa: SLF001 (no public one)
        self.actions = {action.dest: action for action in self._options.values() if action.dest not in NOT_OURS}
        self.given: dict[str, Given] = {}

    def read(self, variables: Mapping[str, Variable], settings: Iterable[str]) -> None:
        """Take all that is given.

        Args:
            variables: by their names in capitals.
            settings: names of the worker's own settings, in capitals.

        Raises:
            ConfigurationError: a value that vLLM does not take, or an option that it does not have; a line for each.
        """
        faults: list[str] = []
        environment = {name: one for name, one in variables.items() if one.source == ENVIRONMENT}
        self._take_all({name: one for name, one in variables.items() if name not in environment}, faults)
        baked = dict(self.given)
        self._take_all(environment, faults)
        if faults:
            raise ConfigurationError("\n".join(faults))
        self._leave_out_what_is_for_another_model(baked)
        self._warn(variables, settings)

    def value(self, dest: str) -> Any:
        """What vLLM's parser reads of the flag; None if it was not given."""
        given = self.given.get(dest)
        return None if given is None else given.value

    def without(self, dest: str) -> Self:
        """The same flags without this one."""
        others = copy.copy(self)
        others.given = {name: given for name, given in self.given.items() if name != dest}
        return others

    def arguments(self) -> list[str]:
        """All of them but the model and its names, for vLLM's parser."""
        chosen = (given for dest, given in self.given.items() if dest not in ("model", "served_model_name"))
        return [argument for given in chosen for argument in given.arguments]

    def _take_all(self, variables: Mapping[str, Variable], faults: list[str]) -> None:
        variables = {
            name: one
            for name, one in variables.items()
            if name not in (CONFIG_FILE, EXTRA) or one.value not in NOT_GIVEN
        }
        if file := variables.get(CONFIG_FILE):
            self._take_file(Path(file.value), faults)
        for name, variable in variables.items():
            self._take(name.lower(), name, variable, faults)
        for alias, dest in ALIASES.items():
            if alias in variables:
                self._take(dest, alias, variables[alias], faults)
        if extra := variables.get(EXTRA):
            self._take_arguments(extra, faults)

    def _leave_out_what_is_for_another_model(self, baked: Mapping[str, Given]) -> None:
        """Forget the image's flags where a config file or extra arguments name another model than the image does."""
        image = baked["model"].value if "model" in baked else None
        if image is not None and str(self.value("model")).lower() != image.lower():
            _log.info("The image's settings are for %s, and so not used", image)
            self.given = {dest: given for dest, given in self.given.items() if baked.get(dest) is not given}

    def _take_file(self, file: Path, faults: list[str]) -> None:
        import yaml

        try:
            document = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            faults.append(f"{CONFIG_FILE}={str(file)!r} cannot be read: {redacted(str(error))}")
            return
        if not isinstance(document, dict):
            faults.append(f"{CONFIG_FILE}={str(file)!r} does not hold flags and values, as in `max-model-len: 8192`")
            return
        for name, value in document.items():
            dest = str(name).lstrip("-").replace("-", "_")
            variable = Variable(as_text(value), str(file))
            if dest == "model_tag":
                dest = "model"
            if dest in NOT_OURS:
                _log.warning("%s in %s is ignored: %s", name, file, _why_not(dest))
            elif dest not in self.actions:
                faults.append(f"{name} in {file} is not a flag of vLLM{self._meant(dest, self.actions)}")
            elif variable.value:
                self._take(dest, str(name), variable, faults)

    def _take(self, dest: str, name: str, variable: Variable, faults: list[str]) -> None:
        action = self.actions.get(dest)
        if action is None:
            return
        if dest == "max_num_batched_tokens" and variable.value == "0":
            _log.warning("%s=0 is ignored, as worker-vllm does: vLLM's own default is used", name)
            return
        written = f"{name}={redacted(variable.value)!r} ({variable.source})"
        try:
            self._set(action, name, variable.source, written, _arguments(action, variable.value))
        except (ValueError, argparse.ArgumentError) as error:
            faults.append(f"{written} is not allowed: {reason(error)}")

    def _take_arguments(self, extra: Variable, faults: list[str]) -> None:
        """Take what is written as on a command line: each option with the values after it."""
        try:
            words = shlex.split(extra.value)
        except ValueError as error:
            faults.append(f"{EXTRA} cannot be split into arguments: {error}")
            return
        found: dict[str, list[str]] = {}
        names: dict[str, str] = {}
        dest, unknown = "", False
        for word in words:
            name = _option(word)
            action = self._options.get(name)
            if action is not None:
                dest, unknown = action.dest, False
                names[dest] = name
            elif word.startswith("--") or not (dest or unknown):
                meant = self._meant(name.lstrip("-").replace("-", "_"), self.actions)
                faults.append(f"{EXTRA} has {redacted(word.partition('=')[0])!r}, which is not a flag of vLLM{meant}")
                dest, unknown = "", True
            if dest:
                found.setdefault(dest, []).append(word)
        for dest, arguments in found.items():
            if dest in NOT_OURS:
                _log.warning("%s in %s is ignored: %s", names[dest], EXTRA, _why_not(dest))
                continue
            source = EXTRA if extra.source == ENVIRONMENT else extra.source
            written = f"{EXTRA} has {redacted(' '.join(arguments))!r}, which"
            try:
                self._set(self.actions[dest], names[dest], source, written, arguments)
            except (ValueError, argparse.ArgumentError) as error:
                faults.append(f"{written} is not allowed: {reason(error)}")

    def _set(self, action: argparse.Action, name: str, source: str, written: str, arguments: list[str]) -> None:
        self.given.pop(action.dest, None)
        if arguments:
            value = getattr(self.parser.parse_args(arguments), action.dest)
            self._check(action, value)
            self.given[action.dest] = Given(name, source, written, tuple(arguments), value)

    def _warn(self, variables: Mapping[str, Variable], settings: Iterable[str]) -> None:
        for name in sorted(variables):
            if name in RETIRED:
                _log.warning("%s is ignored: %s", name, RETIRED[name])
            elif name in DEPRECATED:
                _log.warning("%s is an old name: use %s", name, ALIASES[name].upper())
        meant = {*map(str.upper, self.actions), *settings, *ALIASES, *RETIRED}
        known = meant | {*map(str.upper, NOT_OURS)}
        for name, variable in variables.items():
            if name in known:
                continue
            close = _LETTER_AWAY if _FOREIGN.match(name) else _CLOSE
            hint = self._meant(name, meant, close)
            if hint or variable.source != ENVIRONMENT:
                _log.warning("%s is set (%s), and there is no such setting%s", name, variable.source, hint)

    @staticmethod
    def _meant(name: str, known: Iterable[str], cutoff: float = _CLOSE) -> str:
        close = difflib.get_close_matches(name, known, 1, cutoff)
        if not close:
            return ""
        return f": did you mean {close[0] if name.isupper() else '--' + close[0].replace('_', '-')}?"


def _why_not(dest: str) -> str:
    return "set HF_TOKEN in its place" if dest == "hf_token" else "the worker is no server"


def _option(word: str) -> str:
    """The option that a word of a command line names, as vLLM's parser has it, if it names one."""
    if re.fullmatch(r"-O=?\w*", word):
        return "--optimization-level"
    option = word.partition("=")[0].partition(".")[0].rstrip("+")
    return option.replace("_", "-") if option.startswith("--") else option


def _arguments(action: argparse.Action, text: str) -> list[str]:
    """A variable's text as arguments of a command line."""
    option = action.option_strings[0]
    if text in NOT_GIVEN and text not in _words(action):
        return [f"{option}=None"] if _reads_none(action) else []
    if action.nargs == 0:
        if text.lower() not in TRUE | FALSE:
            raise ValueError("it is `true` or `false`")
        if text.lower() in TRUE:
            return [option]
        negated = "--no-" + option[2:]
        return [negated] if negated in action.option_strings else []
    if action.nargs == "+":
        # A model's name may have spaces in it.
        items = _items(text, spaces=action.dest != "served_model_name")
        if not items and action.default:
            raise ValueError("vLLM has no way to say that the list is empty")
        return [option, *items] if items else []
    if isinstance(action.default, list) and isinstance(action, argparse._AppendAction):  # noqa: SLF001 (no public one)
        return [f"{option}={item}" for item in _items(text)]
    return [f"{option}={_as_json(text) if _takes_json(action) else text}"]


def _items(text: str, *, spaces: bool = True) -> list[str]:
    """The items of a list: a JSON list, one JSON object, or words between commas or spaces."""
    text = _without_quotes(text)
    if text.startswith(("[", "{")):
        try:
            document = json.loads(text)
        except ValueError as error:
            raise ValueError(f"it is not JSON: {error}") from None
        return [as_text(item) for item in (document if isinstance(document, list) else [document])]
    if spaces:
        return text.replace(",", " ").split()
    return [item.strip() for item in text.split(",") if item.strip()]


def _words(action: argparse.Action) -> Collection[Any]:
    """The words that vLLM names as values of a flag, if it names any."""
    return action.choices or (action.metavar if isinstance(action.metavar, list) else ())  # type: ignore[return-value]


def _reads_none(action: argparse.Action) -> bool:
    """Whether vLLM's parser has a way to say that a flag has no value."""
    if action.nargs is not None or not callable(action.type):
        return False
    try:
        return action.type("None") is None
    except (ValueError, argparse.ArgumentTypeError):
        return False


def _takes_json(action: argparse.Action) -> bool:
    """Whether a flag's value may be a JSON object, as far as its parser tells."""
    if not callable(action.type):
        return False
    try:
        value = action.type("{}")
    except (ValueError, argparse.ArgumentTypeError) as error:
        return _validation_error(error) is not None
    return isinstance(value, dict) or dataclasses.is_dataclass(value)


def _as_json(text: str) -> str:
    """The JSON that a text means: with quotes around it, or as `image=1,video=0`."""
    text = _without_quotes(text)
    if not _PAIRS.fullmatch(text):
        return text
    pairs = (pair.partition("=") for pair in text.split(","))
    return json.dumps({name.strip(): _json_or_text(value.strip()) for name, _, value in pairs})


def _without_quotes(text: str) -> str:
    """A JSON object or list without the quotes that files of variables, and copying, leave around it."""
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


def reason(error: BaseException, dest: str = "") -> str:
    """Why vLLM does not take a value, in one line and without what it shows of the value.

    Args:
        error: vLLM's.
        dest: the flag that it is about.
    """
    if (validation := _validation_error(error)) is not None:
        words = "; ".join(dict.fromkeys(_in_words(fault, dest) for fault in validation.errors(include_url=False)))
    else:
        words = error.message if isinstance(error, argparse.ArgumentError) else str(error)
        kind = converted["kind"] if (converted := _CONVERTED.match(words)) else ""
        if invalid := re.match(r"invalid (\w+) value", words):
            kind = invalid[1]
        if kind == "loads":
            words = f"it is not JSON: {_json_fault(error)}"
        elif kind in _KINDS:
            words = _KINDS[kind]
        elif converted:
            words = f"invalid {kind} value"
    return redacted(" ".join(words.split()))[:_LONGEST_REASON]


def _in_words(fault: Any, dest: str) -> str:
    """What pydantic says of one value: where in it, and what is allowed there."""
    said = str(fault["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    said = said.replace("Input should be", "it should be").replace("Invalid JSON:", "it is not JSON:")
    place = "" if fault["loc"][:1] == (dest,) else ".".join(str(part) for part in fault["loc"])
    return f"{place}: {said}" if place else said


def _json_fault(error: BaseException) -> str:
    """What the JSON parser said, of which vLLM's parser keeps nothing."""
    cause = next((one for one in _causes(error) if isinstance(one, json.JSONDecodeError)), None)
    return str(cause) if cause else "it cannot be read"


def _validation_error(error: BaseException) -> ValidationError | None:
    return next((one for one in _causes(error) if isinstance(one, ValidationError)), None)


def _causes(error: BaseException) -> Iterable[BaseException]:
    """An error and what it came from, the last first."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
