"""The platform's own client, unmodified, against the emulator and a worker with the stock SDK."""

from __future__ import annotations

import asyncio

import pytest
import runpod
from runpod.http_client import AsyncClientSession

from tests.integration.emulator.conftest import KEY, Site, eventually


@pytest.fixture
def endpoint(site: Site, monkeypatch: pytest.MonkeyPatch) -> runpod.Endpoint:
    monkeypatch.setattr(runpod, "endpoint_url_base", f"{site.url}/v2")
    return runpod.Endpoint("ep", api_key=KEY)


def test_run_returns_a_job_whose_output_can_be_awaited(endpoint: runpod.Endpoint) -> None:
    job = endpoint.run({"input": {"count": 2}})
    assert job.status() in ("IN_QUEUE", "IN_PROGRESS", "COMPLETED")
    assert job.output(timeout=30) == [{"number": 0}, {"number": 1}]
    assert job.status() == "COMPLETED"


def test_run_sync_returns_the_output(endpoint: runpod.Endpoint) -> None:
    assert endpoint.run_sync({"count": 3}, timeout=30) == [{"number": 0}, {"number": 1}, {"number": 2}]


def test_stream_yields_all_outputs_and_ends(endpoint: runpod.Endpoint) -> None:
    job = endpoint.run({"count": 5, "sleep": 0.3})
    assert list(job.stream()) == [{"number": number} for number in range(5)]


def test_cancel_stops_the_job_and_frees_the_worker(endpoint: runpod.Endpoint, site: Site) -> None:
    job = endpoint.run({"count": 10_000, "sleep": 0.05})
    assert next(iter(job.stream())) == {"number": 0}  # the stock loop ignores a stop signal before the job has started
    assert job.cancel() == {"id": job.job_id, "status": "CANCELLED"}
    assert job.status() == "CANCELLED"
    (worker,) = site.state()["workers"]
    eventually(lambda: any("Stopping job." in line for line in site.state()["workers"][0]["log"]))
    assert site.state()["workers"][0]["id"] == worker["id"]


def test_health_counts_jobs_and_workers(endpoint: runpod.Endpoint) -> None:
    health = endpoint.health()
    assert health["jobs"].keys() == {"completed", "failed", "inProgress", "inQueue", "retried"}
    assert health["workers"].keys() == {"idle", "initializing", "ready", "running", "throttled", "unhealthy"}
    assert health["workers"]["idle"] + health["workers"]["running"] == 1


def test_purge_queue_returns_the_number_of_removed_jobs(endpoint: runpod.Endpoint) -> None:
    assert endpoint.purge_queue() == {"removed": 0, "status": "completed"}


def test_a_wrong_key_is_reported_as_unauthorized(endpoint: runpod.Endpoint) -> None:
    with pytest.raises(RuntimeError, match="401 Unauthorized"):
        runpod.Endpoint(endpoint.endpoint_id, api_key="wrong").run({"count": 1})


def test_the_async_client_runs_streams_and_cancels(endpoint: runpod.Endpoint) -> None:
    async def use() -> tuple[object, list[object], object]:
        async with AsyncClientSession() as session:
            asynchronous = runpod.AsyncioEndpoint(endpoint.endpoint_id, session, api_key=KEY)
            job = await asynchronous.run({"count": 2})
            output = await job.output(timeout=30)
            streamed = [output async for output in (await asynchronous.run({"count": 2})).stream()]
            cancelled = await (await asynchronous.run({"count": 100, "sleep": 1})).cancel()
            return output, streamed, cancelled["status"]

    numbers = [{"number": 0}, {"number": 1}]
    assert asyncio.run(use()) == (numbers, numbers, "CANCELLED")
