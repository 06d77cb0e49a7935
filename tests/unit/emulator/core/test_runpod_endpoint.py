"""What a worker on RunPod is started with, with fake processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from emulator.core.endpoint import Surroundings
from emulator.core.faults import Faults
from emulator.core.process import ProcessListener
from emulator.core.runpod_endpoint import RunPodEndpoint
from emulator.core.webhooks import Webhooks
from emulator.redaction import Redaction
from emulator.settings import EndpointSettings
from tests.unit.emulator.fakes import FakeClock, FakeProcess


def started(ca_environment: dict[str, str] | None = None, **settings: Any) -> tuple[RunPodEndpoint, FakeProcess]:
    """Return an endpoint with one worker, and that worker's process."""
    processes: list[FakeProcess] = []

    def start(
        command: Sequence[str], env: Mapping[str, str], cwd: str | None, listener: ProcessListener
    ) -> FakeProcess:
        processes.append(FakeProcess(command, env, cwd, listener))
        return processes[-1]

    clock = FakeClock()
    surroundings = Surroundings(
        clock, clock, start, Faults(), Redaction({}, ()), lambda _id, _line: None, lambda _id, _line: None
    )
    document = {"command": "worker", "workersMin": 1, **settings}
    endpoint = RunPodEndpoint(
        EndpointSettings.model_validate(document),
        surroundings,
        base_url="http://127.0.0.1:1",
        ca_environment=ca_environment or {},
        webhooks=Webhooks(),
    )
    endpoint.fleet.tick()
    (process,) = processes
    return endpoint, process


def test_a_worker_is_started_with_the_variables_that_the_sdk_requires() -> None:
    endpoint, process = started(id="ep")
    root = "http://127.0.0.1:1/v2/ep"
    expected = {
        "RUNPOD_WEBHOOK_GET_JOB": f"{root}/job-take/$ID?gpu=EMULATED",
        "RUNPOD_WEBHOOK_POST_OUTPUT": f"{root}/job-done/$RUNPOD_POD_ID/$ID?gpu=EMULATED",
        "RUNPOD_WEBHOOK_POST_STREAM": f"{root}/job-stream/$RUNPOD_POD_ID/$ID?gpu=EMULATED",
        "RUNPOD_WEBHOOK_PING": f"{root}/ping/$RUNPOD_POD_ID",
        "RUNPOD_PING_INTERVAL": "10000",
        "RUNPOD_AI_API_KEY": endpoint.worker_key,
        "RUNPOD_ENDPOINT_ID": "ep",
        "RUNPOD_POD_ID": endpoint.fleet.workers()[0].id,
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        "RUNPOD_SKIP_GPU_CHECK": "true",
    }
    assert {name: process.env[name] for name in expected} == expected


def test_a_worker_trusts_the_emulators_ca_unless_its_endpoint_sets_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/system/ca.pem")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/system/ca.pem")
    ca_environment = {"SSL_CERT_FILE": "/emulator/ca.pem", "REQUESTS_CA_BUNDLE": "/emulator/ca.pem"}
    _, process = started(ca_environment, env={"REQUESTS_CA_BUNDLE": "/endpoint/ca.pem"})
    assert (process.env["SSL_CERT_FILE"], process.env["REQUESTS_CA_BUNDLE"]) == ("/emulator/ca.pem", "/endpoint/ca.pem")


def test_the_workers_own_key_is_redacted() -> None:
    endpoint, process = started()
    process.listener.on_log_line(f"RUNPOD_AI_API_KEY={endpoint.worker_key}")
    assert list(endpoint.fleet.workers()[0].log) == ["RUNPOD_AI_API_KEY=***"]
