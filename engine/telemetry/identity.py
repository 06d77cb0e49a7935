"""Which worker it is: the attributes of all that it exports."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

# The platform's variables and OpenTelemetry's names; those without one begin with `worker.`.
_VARIABLES = {
    "RUNPOD_ENDPOINT_ID": "worker.endpoint.id",
    "RUNPOD_POD_ID": "service.instance.id",
    "RUNPOD_DC_ID": "cloud.region",
}


def platform_identity(environment: Mapping[str, str] = os.environ) -> dict[str, str | int]:
    """Return the attributes that the platform's variables give; the worker's id is the host's name without them."""
    found = {name: environment[variable] for variable, name in _VARIABLES.items() if environment.get(variable)}
    return {"service.instance.id": socket.gethostname(), **found}
