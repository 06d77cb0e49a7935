"""The complete configuration: the worker's settings, vLLM's flags and the model, each with its source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from engine.backend import vllm_args
from engine.config.environment import NULL_WORDS, Variable
from engine.config.model import Model
from engine.config.redaction import MASK, is_secret_name, redacted
from engine.config.settings import Settings, is_secret
from engine.config.vllm_flags import Flags


@dataclass(frozen=True)
class Configuration:
    """What the worker is started with.

    Attributes:
        variables: that it is made from, by their upper-case names.
        settings: the worker's own.
        flags: vLLM's, as they are set.
        model: to serve.
        args: the resulting arguments of `vllm serve`.
    """

    variables: Mapping[str, Variable]
    settings: Settings
    flags: Flags
    model: Model
    args: Any

    @cached_property
    def engine_config(self) -> tuple[Any, Any]:
        """The engine arguments of vLLM, and its configuration for them and the model's files.

        Raises:
            ConfigurationError: vLLM does not accept them.
        """
        return vllm_args.engine_config(self.flags, self.args, self.model)

    def lines(self) -> Iterator[str]:
        """Yield every effective value with its source, one line each; secrets are masked."""
        yield "# The worker's own settings"
        for name in Settings.model_fields:
            value = getattr(self.settings, name)
            shown = MASK if value is not None and is_secret(name) else value
            variable = self.variables.get(name.upper())
            source = "default" if variable is None or variable.value in NULL_WORDS else variable.source
            yield _line(name, shown, source)
        yield "# vLLM's flags"
        args = vars(self.args)
        overridden = {"model": self.model.path, "served_model_name": self.model.names}
        for name in sorted(self.flags.actions):
            flag = self.flags.values.get(name)
            value, default = overridden.get(name, args.get(name)), self.flags.actions[name].default
            if flag is not None:
                set_as = flag.name.lstrip("-").replace("-", "_").lower()
                source = flag.source if set_as == name else f"{flag.source}, {flag.name}"
            else:
                source = "default" if value == default else "worker's default"
            yield _line(name, MASK if value and is_secret_name(name) else value, source)


def _line(name: str, value: Any, source: str) -> str:
    if isinstance(value, frozenset | tuple):
        value = ",".join(sorted(value) if isinstance(value, frozenset) else value)
    text = " ".join(str(getattr(value, "value", value)).split())
    return redacted(f"{name.upper()}={text}") + f"  ({source})"
