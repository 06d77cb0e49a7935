"""The control plane: all endpoints and templates of the user, who may change them, and what they cost."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Mapping
from typing import Any, Final

from pydantic import ValidationError

from emulator.api.bodies import describe_validation_error
from emulator.control_plane import rules
from emulator.control_plane.billing import Meter
from emulator.control_plane.deployment import Deployment, ManagedEndpoint, config_of
from emulator.control_plane.quotas import Quotas
from emulator.control_plane.rules import Config
from emulator.control_plane.settings import OF_REQUESTS, ControlPlaneSettings
from emulator.control_plane.templates import Templates
from emulator.core.endpoint import Endpoint, Surroundings
from emulator.core.worker import WorkerState
from emulator.errors import NotFoundError, SettingsError
from emulator.settings import BalancerSettings, EndpointSettings, RunPodEndpointSettings

_ID_LETTERS: Final = 14

CreateEndpoint = Callable[[RunPodEndpointSettings, Surroundings], ManagedEndpoint]
"""Makes an endpoint of the type that its settings have."""
_SETTINGS: Final[Mapping[str, type[EndpointSettings | BalancerSettings]]] = {
    "QUEUE": EndpointSettings,
    "LOAD_BALANCER": BalancerSettings,
}


class ControlPlane:
    """The endpoints that the API manages, with their templates.

    Args:
        settings: settings of the control plane.
        surroundings: what all endpoints share.
        create_endpoint: makes an endpoint.

    Raises:
        SettingsError: the settings of created endpoints are invalid.
    """

    def __init__(
        self, settings: ControlPlaneSettings, surroundings: Surroundings, create_endpoint: CreateEndpoint
    ) -> None:
        self._bases = _bases(settings.endpoint)
        self.endpoints: dict[str, Endpoint] = {}
        """All endpoints by id."""
        self.deleted: dict[str, Endpoint] = {}
        """Deleted endpoints by id, until their workers have exited."""
        self.deployments: dict[str, Deployment] = {}
        self.templates = Templates()
        self.quotas = Quotas(settings.rate_limits, surroundings.clock)
        self._meter = Meter()
        self.settings = settings
        self._surroundings = surroundings
        self._create_endpoint = create_endpoint
        self._sampled_at = surroundings.clock()

    def add(self, settings: RunPodEndpointSettings) -> None:
        """Add an endpoint that the emulator's options define; its workers run what these say."""
        plain = self.settings.model_copy(update={"model_dir": None})
        deployment = Deployment(settings.id, config_of(settings), settings, plain, self._surroundings)
        self._start(deployment, settings)

    def create(self, body: Mapping[str, Any]) -> Deployment:
        """Create an endpoint from a body that is valid by the description.

        Raises:
            APIError: the body breaks a rule of the description's texts.
        """
        config = rules.create(body, self.templates.get)
        letters = string.ascii_lowercase + string.digits
        endpoint_id = "".join(secrets.choice(letters) for _ in range(_ID_LETTERS))
        deployment = Deployment(endpoint_id, config, self._bases[config["type"]], self.settings, self._surroundings)
        self._start(deployment, deployment.settings())
        return deployment

    def update(self, endpoint_id: str, body: Mapping[str, Any]) -> Deployment:
        """Change an endpoint by a body that is valid by the description.

        Raises:
            APIError: there is no such endpoint, or the body breaks a rule of the description's texts.
        """
        deployment = self.deployment(endpoint_id)
        config: Config = rules.update(deployment.config, body, self.templates.get)
        deployment.update(config)
        self.templates.follow(deployment.template_id, config)
        return deployment

    def delete(self, endpoint_id: str) -> None:
        """Delete an endpoint and its template: its jobs are cancelled, its workers stopped.

        Raises:
            NotFoundError: there is no such endpoint.
        """
        deployment = self.deployment(endpoint_id)
        endpoint = self.endpoints.pop(endpoint_id)
        del self.deployments[endpoint_id]
        self.templates.unbind(deployment.template_id)
        self.deleted[endpoint_id] = endpoint
        endpoint.queue.close()
        workers = endpoint.fleet.workers()
        endpoint.fleet.close("the endpoint was deleted")
        for worker in workers:
            # Ends the streams of its log, unless a process of its own may still write to it.
            deployment.logs.long_poll.notify(worker.id)

    def deployment(self, endpoint_id: str) -> Deployment:
        """Return an endpoint.

        Raises:
            NotFoundError: there is no such endpoint.
        """
        if endpoint_id not in self.deployments:
            raise NotFoundError(f"endpoint {endpoint_id} not found")
        return self.deployments[endpoint_id]

    def bill(self, query: Mapping[str, Any]) -> dict[str, Any]:
        """Return the billing records that a query, which is valid by the description, asks for.

        Raises:
            BadRequestError: its parameters contradict each other.
        """
        return self._meter.document(query, self._surroundings.wall_clock())

    async def tick(self) -> None:
        """Close deleted endpoints whose workers have exited; to be called several times a second."""
        for endpoint_id, endpoint in list(self.deleted.items()):
            endpoint.fleet.tick()
            if endpoint.fleet.is_empty:
                del self.deleted[endpoint_id]
                await endpoint.close()

    def sample(self) -> None:
        """Meter the workers since the last call."""
        now, wall = self._surroundings.clock(), self._surroundings.wall_clock()
        elapsed_s, self._sampled_at = now - self._sampled_at, now
        for deployment in self.deployments.values():
            workers = sum(
                worker.process is not None and worker.state is not WorkerState.FROZEN
                for worker in deployment.endpoint.fleet.workers()
            )
            placed = deployment.placement()
            self._meter.add(
                deployment.id,
                on_gpu=placed.gpu_type is not None,
                seconds=workers * elapsed_s,
                price=placed.price,
                at=wall,
            )

    def _start(self, deployment: Deployment, settings: RunPodEndpointSettings) -> None:
        endpoint = self._create_endpoint(settings, deployment.surroundings)
        deployment.endpoint = endpoint
        deployment.template_id = self.templates.bind(deployment.id, deployment.config)
        self.endpoints[deployment.id] = endpoint
        self.deployments[deployment.id] = deployment


def _bases(document: Mapping[str, Any]) -> dict[str, RunPodEndpointSettings]:
    """Return the settings of created endpoints, by type: each has those of the document that it knows.

    Raises:
        SettingsError: one is invalid, is for each request to say, or is unknown to all types.
    """
    known = {
        kind: {info.alias or name for name, info in model.model_fields.items()} - OF_REQUESTS
        for kind, model in _SETTINGS.items()
    }
    if unknown := sorted(document.keys() - set().union(*known.values())):
        raise SettingsError(f"controlPlane.endpoint: {', '.join(unknown)} cannot be set for all created endpoints")
    try:
        return {
            kind: model.model_validate({name: value for name, value in document.items() if name in known[kind]})
            for kind, model in _SETTINGS.items()
        }
    except ValidationError as error:
        raise SettingsError(f"controlPlane.endpoint: {describe_validation_error(error)}") from None
