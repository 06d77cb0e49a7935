"""One serverless service on Spirit: its queue, its workers with their agents, its proxied requests."""

from __future__ import annotations

from emulator.api.ports import HOST, Ports
from emulator.core.endpoint import Endpoint, Surroundings
from emulator.core.worker import ACTIVE_STATES, WorkerState
from emulator.errors import SettingsError
from emulator.spirit.relay import Relay
from emulator.spirit.settings import SpiritEndpointSettings
from emulator.spirit.task import Task
from emulator.spirit.task_queue import TASKS_QUEUED_TOPIC, TaskQueue, TaskQueueSettings


class SpiritEndpoint(Endpoint):
    """A service as Spirit's interfaces see it; also the listener of its queue.

    Args:
        settings: settings of the service.
        surroundings: what all endpoints share.
        agents: ports of the agents.

    Raises:
        SettingsError: a port of `agentPorts` is not available.
    """

    settings: SpiritEndpointSettings
    queue: TaskQueue

    def __init__(self, settings: SpiritEndpointSettings, surroundings: Surroundings, agents: Ports) -> None:
        super().__init__(settings, surroundings)
        queue_settings = TaskQueueSettings(settings.lost_after_s, settings.max_retries, settings.retention_s)
        self.queue = TaskQueue(queue_settings, surroundings.clock, surroundings.wall_clock, self)
        self.relays: dict[str, Relay] = {}
        """By task id, for as long as a client waits."""
        self.duplicates: list[Task] = []
        self._agents = agents
        self.fleet = self._create_fleet(self.worker_environment, surroundings.redaction)
        for number, port in enumerate(settings.agent_ports, 1):
            try:
                agents.open(settings.id, f"external-{number}", port)
            except OSError as error:
                raise SettingsError(f"no agent can listen on {HOST}:{port}: {error.strerror}") from None

    def worker_environment(self, worker: str) -> dict[str, str]:
        """Open an agent for a worker; return the variables by which the SDK and this repository's worker find it.

        Raises:
            OSError: no port is available.
        """
        port = self._agents.open(self.settings.id, worker)
        return {
            "PLATFORM": "spirit",
            "EASE_AGENT_URL": f"http://{HOST}:{port}",
            "EASE_HEARTBEAT_INTERVAL": str(self.settings.heartbeat_interval_s),
            "PYTHONUNBUFFERED": "1",
        }

    def can_serve(self) -> bool:
        """Return whether a worker serves, or one can come: otherwise clients get 503."""
        states = [worker.state for worker in self.fleet.workers()]
        if any(state in ACTIVE_STATES and state is not WorkerState.THROTTLED for state in states):
            return True
        can_start = self.settings.command and self.settings.workers_max > self._surroundings.faults.throttled_workers
        return bool(can_start or self.settings.agent_ports)

    def page_document(self) -> dict[str, str | None]:
        """Return how the page reaches the service's APIs."""
        return {"openaiPath": "/v1", "authorization": f"{self.settings.id}-{{key}}", "cancelPath": None}

    def forget_duplicates(self) -> None:
        """Drop the tasks that a fault would still give out a second time."""
        self.duplicates.clear()

    def on_worker_stopping(self, worker: str) -> None:
        """End the takes that agents hold, the worker's own among them."""
        del worker
        self.long_poll.notify(TASKS_QUEUED_TOPIC)

    def on_worker_frozen(self, worker: str, *, drops_connections: bool) -> None:
        """Do nothing: a worker's agent is on its machine, and so are their connections."""

    def on_worker_thawed(self, worker: str) -> None:
        """Let the agent's open takes look for a task."""
        del worker
        self.long_poll.notify(TASKS_QUEUED_TOPIC)

    def on_worker_exited(self, worker: str) -> None:
        """Close the worker's agent."""
        self._agents.close(worker)
