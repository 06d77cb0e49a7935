"""vLLM's flags, from wherever they are given. Which there are is asked of vLLM's own parser; no list is kept here.

Each flag of `vllm serve` is a variable of the same name: `--max-model-len` is `MAX_MODEL_LEN`. Later wins:

1. vLLM's defaults, and the worker's own on a CPU
2. the variables that the image was built with (`BAKED_SETTINGS_FILE`)
3. `VLLM_CONFIG_FILE`, the YAML file that `vllm serve --config` takes
4. the environment
5. `VLLM_EXTRA_ARGS`, written as on a command line

Where the file or the extra arguments are the image's own, they are part of 2. Of a flag and its other name at the same
place, the other name wins, as it does in worker-vllm.
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigurationError
from engine.secrets import redacted
from engine.variables import ENVIRONMENT, Variable, as_text

EXTRA = "VLLM_EXTRA_ARGS"
TRUE, FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}

# Other names for flags: worker-vllm's.
ALIASES = {
    "MODEL_NAME": "model",
    "MODEL_REVISION": "revision",
    "TOKENIZER_NAME": "tokenizer",
    "OPENAI_SERVED_MODEL_NAME_OVERRIDE": "served_model_name",
    "CUSTOM_CHAT_TEMPLATE": "chat_template",
}
_DEPRECATED_ALIASES = {"OPENAI_SERVED_MODEL_NAME_OVERRIDE", "CUSTOM_CHAT_TEMPLATE"}

# What variables of worker-vllm and of earlier vLLM have become.
RETIRED = {
    "BASE_PATH": "HF_HOME says where the hub's files are kept",
    "CUDA_GRAPH_SIZES": "use CUDAGRAPH_CAPTURE_SIZES",
    "DEFAULT_BATCH_SIZE": "use BATCH_INTERVAL_MS: a batch is what has gathered since the last one",
    "DEFAULT_BATCH_SIZE_GROWTH_FACTOR": "use BATCH_INTERVAL_MS: batches grow with the platform's latency by themselves",
    "BATCH_SIZE_GROWTH_FACTOR": "use BATCH_INTERVAL_MS: batches grow with the platform's latency by themselves",
    "DEFAULT_MIN_BATCH_SIZE": "use BATCH_INTERVAL_MS; the first token never waits",
    "MIN_BATCH_SIZE": "use BATCH_INTERVAL_MS; the first token never waits",
    "DISABLE_FRONTEND_MULTIPROCESSING": "there is no server, and so no process of its own for it",
    "DISABLE_LOG_REQUESTS": "use ENABLE_LOG_REQUESTS=false",
    "DISABLE_MM_PREPROCESSOR_CACHE": "use MM_PROCESSOR_CACHE_GB=0",
    "ENABLE_LORA_BIAS": "vLLM has no biases of adapters any more",
    "ENABLE_MULTIMODAL_ENCODER_DATA_PARALLEL": "use MM_ENCODER_TP_MODE=data",
    "EPLB_LOG_BALANCEDNESS": "use EPLB_CONFIG",
    "EPLB_STEP_INTERVAL": "use EPLB_CONFIG",
    "EPLB_WINDOW_SIZE": "use EPLB_CONFIG",
    "GUIDED_DECODING_BACKEND": "use STRUCTURED_OUTPUTS_CONFIG",
    "GUIDED_DECODING_DISABLE_ADDITIONAL_PROPERTIES": "use STRUCTURED_OUTPUTS_CONFIG",
    "GUIDED_DECODING_DISABLE_ANY_WHITESPACE": "use STRUCTURED_OUTPUTS_CONFIG",
    "GUIDED_DECODING_DISABLE_FALLBACK": "use STRUCTURED_OUTPUTS_CONFIG",
    "LOGITS_PROCESSOR_PATTERN": "use LOGITS_PROCESSORS",
    "LORA_EXTRA_VOCAB_SIZE": "vLLM takes no adapters with tokens of their own any more",
    "MAX_CONTEXT_LEN_TO_CAPTURE": "use MAX_CUDAGRAPH_CAPTURE_SIZE",
    "MAX_LONG_PARTIAL_PREFILLS": "vLLM has no such limit any more",
    "MAX_NUM_PARTIAL_PREFILLS": "vLLM has no such limit any more",
    "NGRAM_PROMPT_LOOKUP_MAX": "use SPECULATIVE_CONFIG",
    "NGRAM_PROMPT_LOOKUP_MIN": "use SPECULATIVE_CONFIG",
    "NUM_LOOKAHEAD_SLOTS": "use SPECULATIVE_CONFIG",
    "NUM_REDUNDANT_EXPERTS": "use EPLB_CONFIG",
    "NUM_SPECULATIVE_TOKENS": "use SPECULATIVE_CONFIG",
    "OVERRIDE_POOLER_CONFIG": "use POOLER_CONFIG",
    "RAW_OPENAI_OUTPUT": "an OpenAI job's output is vLLM's, as it is",
    "REQUEST_TIMEOUT": "use JOB_TIMEOUT_S",
    "ROPE_SCALING": "use HF_OVERRIDES",
    "ROPE_THETA": "use HF_OVERRIDES",
    "SPECULATIVE_METHOD": "use SPECULATIVE_CONFIG",
    "SPECULATIVE_MODEL": "use SPECULATIVE_CONFIG",
    "SWAP_SPACE": "vLLM has no swap space any more",
    "TASK": "use RUNNER and CONVERT",
    "TRANSFORMERS_VERSION": "transformers is installed with the image",
    "VLLM_API_KEY": "the platform authenticates clients",
    "VLLM_ATTENTION_BACKEND": "use ATTENTION_BACKEND",
    "VLLM_PORT": "there is no server, and so no port",
    "VLLM_STARTUP_TIMEOUT": "there is no server to wait for",
}

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
_CLOSE, _LETTER_AWAY = 0.85, 0.95

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Given:
    """A flag that was given: the variable or option, where, the arguments for vLLM's parser, and what it reads."""

    name: str
    source: str
    arguments: tuple[str, ...]
    value: Any


class Flags:
    """The flags that are given.

    Args:
        parser: vLLM's, of `vllm serve`; its `error` raises ValueError.
    """

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser
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

    def arguments(self) -> list[str]:
        """All of them but the model and its names, for vLLM's parser."""
        chosen = (given for dest, given in self.given.items() if dest not in ("model", "served_model_name"))
        return [argument for given in chosen for argument in given.arguments]

    def _take_all(self, variables: Mapping[str, Variable], faults: list[str]) -> None:
        if file := variables.get("VLLM_CONFIG_FILE"):
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
            faults.append(f"VLLM_CONFIG_FILE={str(file)!r} cannot be read: {redacted(str(error))}")
            return
        if not isinstance(document, dict):
            faults.append(f"VLLM_CONFIG_FILE={str(file)!r} does not hold flags and values, as in `max-model-len: 8192`")
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
        try:
            arguments = _arguments(action, variable.value)
            self._set(dest, name, variable.source, arguments)
        except (ValueError, argparse.ArgumentError) as error:
            faults.append(f"{name}={redacted(variable.value)!r} ({variable.source}) is not allowed: {_reason(error)}")

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
            try:
                self._set(dest, names[dest], EXTRA if extra.source == ENVIRONMENT else extra.source, arguments)
            except (ValueError, argparse.ArgumentError) as error:
                faults.append(f"{EXTRA} has {redacted(' '.join(arguments))!r}, which is not allowed: {_reason(error)}")

    def _set(self, dest: str, name: str, source: str, arguments: list[str]) -> None:
        self.given.pop(dest, None)
        if arguments:
            value = getattr(self.parser.parse_args(arguments), dest)
            self.given[dest] = Given(name, source, tuple(arguments), value)

    def _warn(self, variables: Mapping[str, Variable], settings: Iterable[str]) -> None:
        for name in sorted(variables):
            if name in RETIRED:
                _log.warning("%s is ignored: %s", name, RETIRED[name])
            elif name in _DEPRECATED_ALIASES:
                _log.warning("%s is an old name: use %s", name, ALIASES[name].upper())
        known = {*(dest.upper() for dest in [*self.actions, *NOT_OURS]), *settings, *ALIASES, *RETIRED}
        for name, variable in variables.items():
            if name in known:
                continue
            close = _LETTER_AWAY if _FOREIGN.match(name) else _CLOSE
            meant = self._meant(name, known - {dest.upper() for dest in NOT_OURS}, close)
            if meant or variable.source != ENVIRONMENT:
                _log.warning("%s is set (%s), and there is no such setting%s", name, variable.source, meant)

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
    if action.nargs == 0:
        if text.lower() not in TRUE | FALSE:
            raise ValueError("it is `true` or `false`")
        if text.lower() in TRUE:
            return [option]
        negated = "--no-" + option[2:]
        return [negated] if negated in action.option_strings else []
    if action.nargs == "+":
        items = _items(text)
        if not items and action.default:
            raise ValueError("vLLM has no way to say that the list is empty")
        return [option, *items] if items else []
    if isinstance(action.default, list) and isinstance(action, argparse._AppendAction):  # noqa: SLF001 (no public one)
        return [f"{option}={item}" for item in _items(text)]
    return [f"{option}={text}"]


def _items(text: str) -> list[str]:
    """The items of a list: a JSON list, one JSON object, or words between commas or spaces."""
    if text.startswith(("[", "{")):
        try:
            document = json.loads(text)
        except ValueError as error:
            raise ValueError(f"it is not JSON: {error}") from None
        return [as_text(item) for item in (document if isinstance(document, list) else [document])]
    return text.replace(",", " ").split()


def _reason(error: Exception) -> str:
    message = error.message if isinstance(error, argparse.ArgumentError) else str(error)
    return redacted(" ".join(message.split()))
