"""The whole configuration: the worker's own settings, vLLM's flags and the model, each with where it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.backend import vllm_args
from engine.config import environment
from engine.config.environment import Variable
from engine.config.redaction import HIDDEN, names_secret, redacted
from engine.config.settings import Settings, is_secret
from engine.config.vllm_flags import Flags
from engine.errors import ConfigurationError
from engine.startup import model_resolver
from engine.startup.model_resolver import Model


@dataclass(frozen=True)
class Configuration:
    """What the worker starts with.

    Attributes:
        given: the variables that say so, by their names in capitals.
        settings: the worker's own.
        flags: vLLM's.
        model: the model.
        args: the arguments of `vllm serve` for all of them.
    """

    given: Mapping[str, Variable]
    settings: Settings
    flags: Flags
    model: Model
    args: Any

    @classmethod
    def read(cls, given: Mapping[str, Variable] | None = None) -> Configuration:
        """The configuration that variables and files give, as far as it can be checked without the model.

        VLLM is imported for it.

        Args:
            given: the variables; this process's, without them.

        Raises:
            ConfigurationError: something is not allowed; a line for each.
        """
        given = environment.read() if given is None else given
        settings = Settings.read(given)
        flags = vllm_args.flags()
        flags.read(given, [name.upper() for name in Settings.model_fields])
        if (copies := flags.value("data_parallel_size")) is not None and copies > 1:
            # vLLM serves with it, but when one engine dies it ends the jobs of the others as if they were complete.
            raise ConfigurationError(
                f"DATA_PARALLEL_SIZE is {copies}, and a worker runs one engine: leave it out and let the endpoint run "
                "more workers. TENSOR_PARALLEL_SIZE shares one engine among GPUs"
            )
        model = model_resolver.choose(settings, flags)
        return cls(given, settings, flags, model, vllm_args.parse(flags, model))

    @cached_property
    def engine_config(self) -> tuple[Any, Any]:
        """VLLM's engine arguments and the configuration that it makes of them and of the model's files.

        Raises:
            ConfigurationError: vLLM does not accept them.
        """
        return vllm_args.engine_config(self.flags, self.args, self.model)

    def check_with_model(self) -> None:
        """Check all that vLLM checks before it loads the model, if that is on this machine.

        Raises:
            ConfigurationError: vLLM does not accept it.
        """
        if self.model.to_download is None and Path(self.model.path).is_dir():
            model_resolver.stay_offline(self.model, self.flags)
            _ = self.engine_config

    def lines(self) -> Iterator[str]:
        """Every value that is in effect and where it came from, a line each; secrets are masked."""
        yield "# The worker's own settings"
        for name in Settings.model_fields:
            value = getattr(self.settings, name)
            shown = HIDDEN if value is not None and is_secret(name) else value
            source = self.given[name.upper()].source if name.upper() in self.given else "default"
            yield _line(name, shown, source)
        yield "# vLLM's flags"
        args = vars(self.args)
        chosen = {"model": self.model.path, "served_model_name": self.model.names}
        for name in sorted(self.flags.actions):
            flag = self.flags.given.get(name)
            value, default = chosen.get(name, args.get(name)), self.flags.actions[name].default
            if flag is not None:
                written = flag.name.lstrip("-").replace("-", "_").lower()
                source = flag.source if written == name else f"{flag.source}, {flag.name}"
            else:
                source = "default" if value == default else "worker's default"
            yield _line(name, HIDDEN if value and names_secret(name) else value, source)


def _line(name: str, value: Any, source: str) -> str:
    text = " ".join(str(getattr(value, "value", value)).split())
    return redacted(f"{name.upper()}={text}") + f"  ({source})"
