"""Every setting, given wrongly in each way, is refused in one line before anything is loaded, or is legal for a reason.

The settings are those of vLLM's own parser, the worker's and worker-vllm's. What is legal is asked of vLLM: the calls
that `vllm serve` makes before it loads.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from engine.backend import compat, vllm_args
from engine.backend.configuration import Configuration
from engine.config import environment
from engine.config.settings import Settings
from engine.config.vllm_flags import Flags
from engine.config.worker_vllm import ALIASES, REMOVED
from engine.errors import ConfigurationError
from engine.startup import configure

# Importing vLLM and torch warns of their own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")

WRONG = "no-such/thing"
TOO_SMALL, TOO_LARGE = "-7", "1e30"
# What vLLM takes and the worker refuses, and why.
STRICTER = {
    "DATA_PARALLEL_SIZE": "a worker runs one engine",
    "TOOL_CALL_PARSER": "vLLM looks at the name once ENABLE_AUTO_TOOL_CHOICE is set",
    "LOAD_FORMAT": "vLLM looks for the loader once its processes run",
    "LORA_MODULES": "vLLM looks for adapters once all is loaded",
    "MIDDLEWARE": "vLLM imports it once all is loaded",
    "DEFAULT_MM_LORAS": "vLLM looks for adapters once all is loaded",
    "TOKENIZER": "vLLM looks for the tokenizer once it starts the engine",
    "TOKENIZER_NAME": "vLLM looks for the tokenizer once it starts the engine",
    "TOKENIZER_MODE": "vLLM looks for the tokenizer once it starts the engine",
}
# Beside `is not allowed: …`, what a line says where it is about a file, a repository or a choice of ours.
OTHER_WORDS = ("check ", "see ", "cannot be read", "is not a flag of vLLM", "a worker runs one engine")


@dataclass(frozen=True)
class Case:
    """A variable with a value, and in which way it is wrong."""

    way: str
    name: str
    value: str


def cases(flags: Flags) -> Iterator[Case]:
    """Each setting in each way that it can be given wrongly."""
    names = {dest.upper(): action for dest, action in flags.actions.items()}
    names |= {alias: flags.actions[dest] for alias, dest in ALIASES.items()}
    for name, action in names.items():
        if name not in ("MODEL", "MODEL_NAME"):  # Another model is another start.
            if _is_number(action):
                yield Case("out of range", name, TOO_SMALL)
                yield Case("out of range", name, TOO_LARGE)
            yield Case("of a wrong type", name, WRONG)
            yield from (Case(word or "empty", name, word) for word in ("None", ""))
        yield Case("misspelt", _misspelt(name), "1")
    for name in map(str.upper, Settings.model_fields):
        if name not in ("BAKED_SETTINGS_FILE", "VLLM_CONFIG_FILE"):
            yield Case("out of range", name, TOO_SMALL)
        yield Case("of a wrong type", name, WRONG)
        yield from (Case(word or "empty", name, word) for word in ("None", ""))
        yield Case("misspelt", _misspelt(name), "1")
    for name in REMOVED:
        yield Case("removed", name, "1")
        yield Case("misspelt", _misspelt(name), "1")


def _misspelt(name: str) -> str:
    """A name without one letter of its last word."""
    return name[:-2] + name[-1:]


def _is_number(action: argparse.Action) -> bool:
    for text in ("1", "1.5"):
        try:
            if callable(action.type) and type(action.type(text)) in (int, float) and action.nargs is None:
                return True
        except (ValueError, argparse.ArgumentTypeError):
            continue
    return False


def takes(name: str, value: str, flags: Flags, model: str) -> bool:
    """Whether vLLM's own server would go on to load the model with this flag."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.launcher import validate_api_server_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    action = flags.actions[ALIASES.get(name, name.lower())]
    option = [action.option_strings[0], value] if action.nargs == "+" else [f"{action.option_strings[0]}={value}"]
    own = ["--model", model, "--enforce-eager", "--kv-cache-memory-bytes=1G"]
    try:
        parser = compat.cli_args().make_arg_parser(FlexibleArgumentParser(exit_on_error=False))
        args = parser.parse_args([*own, *option])
        compat.cli_args().validate_parsed_serve_args(args)
        validate_api_server_args(args)
        AsyncEngineArgs.from_cli_args(args).create_engine_config()
    except (Exception, SystemExit):  # noqa: BLE001 (vLLM refuses in many ways)
        return False
    return True


def judged(case: Case, flags: Flags, model: str, caplog: pytest.LogCaptureFixture) -> str:
    """What comes of a case, by kind; beginning with `BAD` if it is not as it should be."""
    caplog.clear()
    try:
        given = environment.read({"MODEL_NAME": model, case.name: case.value})
        configuration = configure.read(given)
        configure.check_with_model(configuration)
    except ConfigurationError as error:
        return _refusal(case, str(error), flags, model)
    said = [message for message in caplog.messages if message.startswith(f"{case.name} is ")]
    if case.way in ("misspelt", "removed"):
        return "a line says it" if said else f"BAD: {case} is taken without a word"
    if case.way in ("None", "empty"):
        return _as_not_given(case, configuration, model)
    if case.name.lower() in Settings.model_fields:
        return "legal: any text" if _is_text(case.name) else f"BAD: {case} is taken"
    if takes(case.name, case.value, flags, model):
        return f"legal: vLLM takes it, {'any text' if case.value == WRONG else 'it has no such bound'}"
    return f"BAD: {case} is taken, and vLLM refuses it"


def _refusal(case: Case, text: str, flags: Flags, model: str) -> str:
    as_own = re.fullmatch(rf"{case.name}=(.*) is not allowed\. Allowed: .+", text)
    as_flag = re.fullmatch(rf"{case.name}=(.*) \(environment\) is not allowed: .{{3,}}", text)
    names_both = case.name in text and case.value in text and "\n" not in text
    if case.way in ("None", "empty", "misspelt", "removed"):
        return f"BAD: {case}: {text}"
    if not names_both and not (as_own and "(hidden)" in text):
        return f"BAD: {case}: {text}"
    says_why = as_own or as_flag or any(words in text for words in OTHER_WORDS)
    if not says_why or " at 0x" in text:
        return f"BAD: {case}: {text}"
    if case.name.lower() in Settings.model_fields or case.name in STRICTER or "it should be" in text:
        pass  # The worker's own; or a bound of vLLM's own, at which it does not look while the part is not in use.
    elif takes(case.name, case.value, flags, model):
        return f"BAD: vLLM takes {case}: {text}"
    return "a line says the variable, the value and what is allowed"


def _as_not_given(case: Case, configuration: Configuration, model: str) -> str:
    unset = Settings.read({"MODEL_NAME": environment.Variable(model, environment.ENVIRONMENT)})
    given = configuration.flags.value(ALIASES.get(case.name, case.name.lower()))
    return "not given" if configuration.settings == unset and given is None else f"BAD: {case} changes something"


def _is_text(name: str) -> bool:
    """Whether a setting of the worker's own is text, or the path of something that is looked at where it is used."""
    kind = Settings.model_json_schema()["properties"][name.lower()]
    return "string" in {one.get("type") for one in kind.get("anyOf", [kind])}


def test_every_setting_given_wrongly_is_refused_in_a_line_or_legal_for_a_reason(
    tiny_model: str, caplog: pytest.LogCaptureFixture
) -> None:
    flags = vllm_args.flags()

    results: dict[Case, str] = {case: judged(case, flags, tiny_model, caplog) for case in cases(flags)}

    bad = [result for result in results.values() if result.startswith("BAD")]
    counts = Counter((case.way, "BAD" if result in bad else result) for case, result in results.items())
    table = "\n".join(f"{way:16} {result:62} {count}" for (way, result), count in sorted(counts.items()))
    assert "\n".join(bad) == "", table
    assert len(results) > 1000
