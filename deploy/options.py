"""What the command line asks for, as the fields of the API's requests, and those fields as options again."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deploy.errors import OptionError

QUEUE, LOAD_BALANCER = "QUEUE", "LOAD_BALANCER"
TYPES = {"queue": QUEUE, "load-balancer": LOAD_BALANCER}
FLASHBOOT = {"off": "OFF", "on": "FLASHBOOT", "priority": "PRIORITY_FLASHBOOT"}

# A field of a request, and the option that sets it.
_OPTIONS = {
    "dataCenterIds": "--data-center",
    "disk": "--disk",
    "env": "--env",
    "flashboot": "--flashboot",
    "gpu.count": "--gpus-per-worker",
    "gpu.excludedTypes": "--gpu",
    "gpu.minCudaVersion": "--min-cuda",
    "gpu.pools": "--gpu",
    "gpu": "--gpu",
    "image": "--image",
    "name": "--name",
    "networkVolumes": "--volume",
    "registry": "--registry",
    "scaling.queueDelay": "--queue-delay",
    "scaling.requestCount": "--requests-per-worker",
    "tail": "--tail",
    "scaling": "--requests-per-worker or --queue-delay",
    "timeout": "--execution-timeout",
    "type": "--type",
    "workers.idleTimeout": "--idle-timeout",
    "workers.max": "--workers-max",
    "workers.min": "--workers-min",
    "workers": "--workers-min, --workers-max or --idle-timeout",
}
# In prose a field is known by its dot or its capital; `image` alone is a word.
_PROSE = {name: option for name, option in _OPTIONS.items() if re.search(r"[.A-Z]", name)}
_LAST_PARTS = {name.rpartition(".")[2]: option for name, option in _PROSE.items() if re.search(r"[A-Z]", name)}


def _any_of(names: Mapping[str, str]) -> str:
    return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))


_PATH = re.compile(rf"\$\.({_any_of(_OPTIONS)})(?![\w])(?:\[\d+\]|\.(?=\w))*")
_AT_BEGINNING = re.compile(rf"(?:^|(?<=; ))({_any_of(_OPTIONS)})(?=:)")
_IN_PROSE = re.compile(rf"(?<![\w.$-])({_any_of({**_PROSE, **_LAST_PARTS})})(?![\w-])")


def option_names(text: str) -> str:
    """Return a message about a request with the options in place of the fields: `--workers-max: -1 is less than 0`."""

    def path(match: re.Match[str]) -> str:
        return _OPTIONS[match[1]] + (" " if text[match.end() : match.end() + 1].isalnum() else "")

    named = _AT_BEGINNING.sub(lambda match: _OPTIONS[match[1]], _PATH.sub(path, text))
    named = _IN_PROSE.sub(lambda match: {**_LAST_PARTS, **_PROSE}[match[1]], named)
    return named.removeprefix("$: ").replace(": $: ", ": ")


@dataclass(frozen=True)
class Options:
    """What is asked of an endpoint; None means not given, as does no GPU.

    Attributes:
        gpus: pools or GPU types.
        volumes: network volumes; empty for none.
        data_centers: where workers may run; empty for anywhere.
        idle_timeout_s: after which an idle worker is stopped.
        requests_per_worker: scale by the number of requests.
        queue_delay_s: scale by the time that a request waits.
        execution_timeout_s: of one request.
        disk_gb: of the container.
        unset: variables to remove.
        env: variables of the worker, without those that follow from other options.
    """

    image: str | None = None
    type: str | None = None
    gpus: tuple[str, ...] = ()
    gpus_per_worker: int | None = None
    min_cuda: str | None = None
    workers_min: int | None = None
    workers_max: int | None = None
    idle_timeout_s: int | None = None
    requests_per_worker: int | None = None
    queue_delay_s: float | None = None
    flashboot: str | None = None
    volumes: tuple[str, ...] | None = None
    data_centers: tuple[str, ...] | None = None
    registry: str | None = None
    disk_gb: int | None = None
    execution_timeout_s: float | None = None
    env: Mapping[str, str] | None = None
    unset: tuple[str, ...] = ()

    def fields(self) -> dict[str, Any]:
        """Return the fields of a request that the options give, without `gpu`'s pools and `env`.

        Raises:
            OptionError: two options exclude each other.
        """
        if self.requests_per_worker is not None and self.queue_delay_s is not None:
            raise OptionError("--requests-per-worker and --queue-delay exclude each other: give one")
        workers = {"min": self.workers_min, "max": self.workers_max, "idleTimeout": self.idle_timeout_s}
        fields: dict[str, Any] = {
            "image": self.image,
            "registry": self.registry,
            "disk": self.disk_gb,
            "gpu": _given({"count": self.gpus_per_worker, "minCudaVersion": self.min_cuda}),
            "workers": _given(workers),
            "scaling": self._scaling(),
            "flashboot": self.flashboot,
            "networkVolumes": None if self.volumes is None else list(self.volumes),
            "dataCenterIds": None if self.data_centers is None else list(self.data_centers),
            "timeout": None if self.execution_timeout_s is None else math.ceil(self.execution_timeout_s * 1000),
        }
        return _given(fields)

    def _scaling(self) -> dict[str, Any] | None:
        if self.queue_delay_s is not None:
            return {"type": "QUEUE_DELAY", "queueDelay": self.queue_delay_s}
        if self.requests_per_worker is not None:
            return {"type": "REQUEST_COUNT", "requestCount": self.requests_per_worker}
        return None


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None and value != {}}
