"""Every setting with each kind of wrong value is refused in one line before anything loads, or is valid for a reason.

The settings are those of vLLM's parser, the worker and worker-vllm. Whether vLLM accepts a value is determined by the
calls that `vllm serve` makes before it loads.
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
from engine.config.settings import SERVER_SETTINGS, Settings
from engine.config.vllm_flags import Flags
from engine.config.worker_vllm import ALIASES, REMOVED
from engine.errors import ConfigurationError
from engine.startup import configure

# Importing vLLM and torch issues deprecation warnings.
pytestmark = [pytest.mark.in_process, pytest.mark.filterwarnings("ignore")]

WRONG = "no-such/thing"
TOO_SMALL, TOO_LARGE = "-7", "1e30"
# Settings whose wrong values vLLM accepts and the worker refuses, and why.
STRICTER = {
    "DATA_PARALLEL_SIZE": "a worker runs one engine",
    "TOOL_CALL_PARSER": "vLLM checks the name once ENABLE_AUTO_TOOL_CHOICE is set",
    "LOAD_FORMAT": "vLLM checks the loader once its processes run",
    "LORA_MODULES": "vLLM checks adapters after loading",
    "MIDDLEWARE": "vLLM imports it after loading",
    "DEFAULT_MM_LORAS": "vLLM checks adapters after loading",
    "TOKENIZER": "vLLM checks the tokenizer when it starts the engine",
    "TOKENIZER_NAME": "vLLM checks the tokenizer when it starts the engine",
    "TOKENIZER_MODE": "vLLM checks the tokenizer when it starts the engine",
}
# Other phrases than `is not allowed: …`, for a file, a repository or a decision of the worker.
OTHER_PHRASES = ("check ", "see ", "cannot be read", "is not a flag of vLLM", "a worker runs one engine")


@dataclass(frozen=True)
class Case:
    """A variable, a value, and the kind of mistake."""

    kind: str
    name: str
    value: str


def cases(flags: Flags) -> Iterator[Case]:
    """Yield each setting with each kind of mistake."""
    names = {dest.upper(): action for dest, action in flags.actions.items()}
    names |= {alias: flags.actions[dest] for alias, dest in ALIASES.items()}
    for name, action in names.items():
        if name not in ("MODEL", "MODEL_NAME"):  # Another model would change the start.
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
    """Return the name without its second to last letter."""
    return name[:-2] + name[-1:]


def _is_number(action: argparse.Action) -> bool:
    for text in ("1", "1.5"):
        try:
            if callable(action.type) and type(action.type(text)) in (int, float) and action.nargs is None:
                return True
        except (ValueError, argparse.ArgumentTypeError):
            continue
    return False


def is_accepted_by_vllm(name: str, value: str, flags: Flags, model: str) -> bool:
    """Return whether vLLM's own server would load the model with this flag."""
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


def outcome_of(case: Case, flags: Flags, model: str, caplog: pytest.LogCaptureFixture) -> str:
    """Return a description of the outcome of a case; it begins with `BAD` if it is wrong."""
    caplog.clear()
    try:
        given = environment.read({"MODEL_NAME": model, case.name: case.value})
        configuration = configure.read(given)
        configure.check_with_model(configuration)
    except ConfigurationError as error:
        return _refusal(case, str(error), flags, model)
    logged = [message for message in caplog.messages if message.startswith(f"{case.name} is ")]
    if case.kind in ("misspelt", "removed"):
        return "logged" if logged else f"BAD: {case} is accepted without a log line"
    if case.kind in ("None", "empty"):
        return _as_not_given(case, configuration, model)
    if case.name.lower() in Settings.model_fields:
        return _accepted_by_the_worker(case)
    if is_accepted_by_vllm(case.name, case.value, flags, model):
        return f"valid: vLLM accepts it, {'any text' if case.value == WRONG else 'it has no such limit'}"
    return f"BAD: {case} is accepted, and vLLM refuses it"


def _accepted_by_the_worker(case: Case) -> str:
    if case.name.lower() in SERVER_SETTINGS:
        return "valid: not read, as the worker does not serve HTTP"
    return "valid: any text" if _is_text(case.name) else f"BAD: {case} is accepted"


def _refusal(case: Case, text: str, flags: Flags, model: str) -> str:
    as_own = re.fullmatch(rf"{case.name}=(.*) is not allowed\. Allowed: .+", text)
    as_flag = re.fullmatch(rf"{case.name}=(.*) \(environment\) is not allowed: .{{3,}}", text)
    names_both = case.name in text and case.value in text and "\n" not in text
    if case.kind in ("None", "empty", "misspelt", "removed"):
        return f"BAD: {case}: {text}"
    if not names_both and not (as_own and "(hidden)" in text):
        return f"BAD: {case}: {text}"
    has_reason = as_own or as_flag or any(words in text for words in OTHER_PHRASES)
    if not has_reason or " at 0x" in text:
        return f"BAD: {case}: {text}"
    if case.name.lower() in Settings.model_fields or case.name in STRICTER or "it should be" in text:
        pass  # The worker's own setting, or a limit that vLLM does not check while the feature is not in use.
    elif is_accepted_by_vllm(case.name, case.value, flags, model):
        return f"BAD: vLLM accepts {case}: {text}"
    return "refused with the variable, the value and what is allowed"


def _as_not_given(case: Case, configuration: Configuration, model: str) -> str:
    unset = Settings.read({"MODEL_NAME": environment.Variable(model, environment.ENVIRONMENT)})
    given = configuration.flags.value(ALIASES.get(case.name, case.name.lower()))
    return "not given" if configuration.settings == unset and given is None else f"BAD: {case} changes something"


def _is_text(name: str) -> bool:
    """Return whether a setting of the worker is text, or a path that is checked where it is used."""
    kind = Settings.model_json_schema()["properties"][name.lower()]
    return "string" in {one.get("type") for one in kind.get("anyOf", [kind])}


def test_every_setting_with_a_wrong_value_is_refused_in_one_line_or_valid_for_a_reason(
    tiny_model: str, caplog: pytest.LogCaptureFixture
) -> None:
    flags = vllm_args.flags()

    results: dict[Case, str] = {case: outcome_of(case, flags, tiny_model, caplog) for case in cases(flags)}

    bad = [result for result in results.values() if result.startswith("BAD")]
    counts = Counter((case.kind, "BAD" if result in bad else result) for case, result in results.items())
    table = "\n".join(f"{kind:16} {result:62} {count}" for (kind, result), count in sorted(counts.items()))
    assert "\n".join(bad) == "", table
    assert len(results) > 1000
