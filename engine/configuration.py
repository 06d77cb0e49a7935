"""The whole configuration: the worker's own settings, vLLM's flags and the model, each with where it came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine import models, variables
from engine.errors import ConfigurationError
from engine.flags import Flags
from engine.secrets import HIDDEN, names_secret, redacted
from engine.settings import Settings, is_secret

if TYPE_CHECKING:
    from engine.models import Model


@dataclass(frozen=True)
class Configuration:
    """What the worker starts with."""

    settings: Settings
    flags: Flags
    model: Model

    @classmethod
    def read(cls) -> Configuration:
        """The configuration that this process's variables and files give; vLLM is imported for it.

        Raises:
            ConfigurationError: something is not allowed; a line for each.
        """
        given = variables.read()
        settings = Settings.read(given)
        from engine import server

        flags = server.flags()
        flags.read(given, [name.upper() for name in Settings.model_fields])
        if (copies := flags.value("data_parallel_size")) is not None and copies > 1:
            # vLLM serves with it, but when one engine dies it ends the jobs of the others as if they were complete.
            raise ConfigurationError(
                f"DATA_PARALLEL_SIZE is {copies}, and a worker runs one engine: leave it out and let the endpoint run "
                "more workers. TENSOR_PARALLEL_SIZE shares one engine among GPUs"
            )
        model = models.choose(settings, flags)
        return cls(settings, flags, model)

    def lines(self) -> Iterator[str]:
        """Every value that is in effect and where it came from, a line each; secrets are masked."""
        from engine import server

        given = variables.read()
        yield "# The worker's own settings"
        for name in Settings.model_fields:
            value = getattr(self.settings, name)
            shown = HIDDEN if value is not None and is_secret(name) else value
            yield _line(name, shown, given[name.upper()].source if name.upper() in given else "default")
        yield "# vLLM's flags"
        args = vars(server.parse(self.flags, self.model))
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
