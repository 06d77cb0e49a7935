"""The commands for an endpoint that exists."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import httpx
import pytest

from builder.doctor.worker_config import WorkerConfig
from deploy import commands, report
from deploy import model as doctor
from deploy.context import Context
from deploy.errors import DoctorError, OptionError
from deploy.options import Options
from runpod_api.models import Endpoint, GpuType
from tests.unit.deploy.conftest import Terminal
from tests.unit.deploy.fakes import FakeRunPod, gpu
from tests.unit.deploy.test_api import body


@pytest.fixture(autouse=True)
def endpoint(runpod: FakeRunPod) -> dict[str, Any]:
    return runpod.add(body())


def test_the_settings_of_an_update_are_checked_with_those_that_stay(
    context: Context, runpod: FakeRunPod, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def query(model: str | None, variables: Any) -> WorkerConfig:
        seen.append((model, variables["MAX_MODEL_LENN"]))
        return WorkerConfig(variables, warnings=("MAX_MODEL_LENN is not a setting",))

    monkeypatch.setattr(doctor, "query_worker", query)
    options = Options(env={"MAX_MODEL_LENN": "1"})

    with pytest.raises(DoctorError, match="MAX_MODEL_LENN is not a setting"):
        asyncio.run(commands.update(context, "tiny", options))
    assert seen == [("org/tiny", "1")]
    assert runpod.bodies == []

    asyncio.run(commands.update(context, "tiny", options, skip_doctor=True))
    assert runpod.bodies[-1]["env"]["MAX_MODEL_LENN"] == "1"


def test_an_update_by_id_that_names_nothing_new_changes_nothing(
    context: Context, runpod: FakeRunPod, terminal: Terminal
) -> None:
    asyncio.run(commands.update(context, "ep1", Options(image="x/y:1")))

    assert runpod.bodies == []
    assert "tiny (ep1) is as wanted: no change" in terminal.messages


def test_an_update_to_another_gpu_excludes_the_others_of_its_pool(context: Context, runpod: FakeRunPod) -> None:
    asyncio.run(commands.update(context, "tiny", Options(gpus=("NVIDIA L4",))))

    assert runpod.bodies == [{"gpu": {"pools": ["AMPERE_24"], "excludedTypes": ["NVIDIA RTX A5000"]}}]


def test_an_update_takes_volumes_and_data_centers_back(
    context: Context, runpod: FakeRunPod, terminal: Terminal
) -> None:
    runpod.endpoints["ep1"] |= {"networkVolumes": ["vol"], "dataCenterIds": ["EU-1"], "disk": 20}

    asyncio.run(commands.update(context, "tiny", Options(volumes=(), data_centers=())))

    assert runpod.bodies == [{"networkVolumes": [], "dataCenterIds": []}]
    assert "tiny: networkVolumes: vol -> none" in terminal.messages
    assert "the container's disk of 20 GB: give --disk if it needs more" in terminal.messages


def test_an_endpoint_is_deleted_only_if_that_is_confirmed(
    context: Context, runpod: FakeRunPod, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = ["", "no", "y"]
    asked: list[str] = []

    def ask(question: str) -> str:
        asked.append(question)
        return answers.pop(0)

    monkeypatch.setattr("builtins.input", ask)

    for _ in range(2):
        with pytest.raises(OptionError, match="not deleted"):
            asyncio.run(commands.down(context, "tiny", confirmed=False))
    assert list(runpod.endpoints) == ["ep1"]
    asyncio.run(commands.down(context, "tiny", confirmed=False))

    assert runpod.endpoints == {}
    assert "Delete tiny (ep1), its 0 workers and all its jobs? This cannot be undone." in asked[0]


@pytest.mark.parametrize("name", ["tiny", None])
def test_a_status_shows_no_secret(context: Context, runpod: FakeRunPod, terminal: Terminal, name: str | None) -> None:
    runpod.endpoints["ep1"]["env"]["HF_TOKEN"] = "hf_secretsecretsecret"  # noqa: S105 (not a real one)

    asyncio.run(commands.status(context, name))
    asyncio.run(commands.status(context, name, as_json=True))

    assert "ep1" in terminal.result
    assert "secretsecret" not in terminal.result


def test_the_endpoints_are_listed_without_a_name(context: Context, terminal: Terminal) -> None:
    asyncio.run(commands.status(context, None))

    assert terminal.result == "tiny  ep1  QUEUE  x/y:1\n"


def test_a_dry_run_prints_the_change_and_sends_none(context: Context, runpod: FakeRunPod, terminal: Terminal) -> None:
    runpod.releases = [
        {
            "id": f"rel{version}", "version": version, "source": "MANUAL", "workerCount": 0,
            "createdAt": f"2026-06-01T12:0{version}:00Z",
            "diff": [{"field": "template.imageName", "old": "x/y:0", "new": "x/y:1"}] if version > 1 else [],
        }
        for version in (2, 1)
    ]  # fmt: skip
    dry = dataclasses.replace(context, dry_run=True)
    environment = {"MY_KEY": "abcdefgh"}

    asyncio.run(commands.update(dry, "tiny", Options(image="x/y:2", env=environment), skip_doctor=True))
    asyncio.run(commands.roll_back(dry, "tiny", None))
    asyncio.run(commands.down(dry, "tiny", confirmed=False))

    assert [line for line in terminal.result.splitlines() if line[0] not in " {}"] == [
        "PATCH https://runpod.test/v2/serverless/ep1",
        "PATCH https://runpod.test/v2/serverless/ep1",
        "DELETE https://runpod.test/v2/serverless/ep1",
    ]
    assert '"image": "x/y:2"' in terminal.result
    assert '"image": "x/y:0"' in terminal.result
    assert "abcdefgh" not in terminal.result + terminal.messages
    assert runpod.bodies == []
    assert not [one for one in runpod.requests if not one.startswith("GET ")]


def test_what_somebody_else_changes_during_the_check_stays(
    context: Context, runpod: FakeRunPod, monkeypatch: pytest.MonkeyPatch
) -> None:
    def query(_: str | None, variables: Any) -> WorkerConfig:
        runpod.endpoints["ep1"]["env"] = {**runpod.endpoints["ep1"]["env"], "THEIRS": "1"}
        return WorkerConfig(variables)

    monkeypatch.setattr(doctor, "query_worker", query)

    asyncio.run(commands.update(context, "tiny", Options(env={"OURS": "1"})))

    assert {"OURS", "THEIRS"} <= runpod.bodies[-1]["env"].keys()


def test_what_the_autoscaler_does_at_once_is_no_rollout(
    context: Context, runpod: FakeRunPod, terminal: Terminal
) -> None:
    asyncio.run(commands.update(context, "tiny", Options(workers_max=5)))

    assert runpod.bodies == [{"workers": {"max": 5}}]
    assert "this takes effect at once: no worker is replaced for it" in terminal.messages
    assert "release" not in terminal.messages + terminal.result
    assert not [one for one in runpod.requests if one.endswith("/releases")]


def test_a_change_that_is_refused_is_not_announced(context: Context, terminal: Terminal) -> None:
    with pytest.raises(OptionError, match="--disk: 0 is less than the minimum of 1"):
        asyncio.run(commands.update(context, "tiny", Options(disk_gb=0)))

    assert terminal.messages == ""


def test_a_cpu_endpoint_can_be_changed_but_gets_no_gpus(context: Context, runpod: FakeRunPod) -> None:
    runpod.endpoints["ep1"] |= {"gpu": None, "cpu": [{"id": "cpu5c", "vcpuCount": 4, "memory": 8}]}

    asyncio.run(commands.update(context, "tiny", Options(env={"A": "1"}), skip_doctor=True))
    with pytest.raises(OptionError, match="tiny is a CPU endpoint, which cannot become one with GPUs"):
        asyncio.run(commands.update(context, "tiny", Options(gpus=("4090",))))

    assert [set(one) for one in runpod.bodies] == [{"env"}]


def test_the_price_is_that_of_the_types_that_are_not_excluded(
    context: Context, runpod: FakeRunPod, terminal: Terminal
) -> None:
    runpod.catalogue = [*runpod.catalogue, gpu("NVIDIA RTX 4090 D", "ADA_24", 24, 9.0)]
    runpod.endpoints["ep1"]["gpu"] |= {"excludedTypes": ["NVIDIA RTX 4090 D"]}

    asyncio.run(commands.status(context, "tiny"))

    assert "$1.10/h while a worker runs" in terminal.result


def test_a_frozen_worker_is_to_have_served_a_request(context: Context, runpod: FakeRunPod) -> None:
    runpod.endpoints["ep1"]["flashboot"] = "OFF"
    del runpod.endpoints["ep1"]["env"]["WARM_UP"]

    asyncio.run(commands.update(context, "tiny", Options(flashboot="FLASHBOOT")))

    assert runpod.bodies[-1]["env"]["WARM_UP"] == "true"


def test_ctrl_c_during_a_change_says_that_it_may_have_been_made(
    context: Context, runpod: FakeRunPod, terminal: Terminal
) -> None:
    def interrupt(request: httpx.Request) -> None:
        if request.method != "GET":
            raise asyncio.CancelledError

    runpod.script = [interrupt] * 9

    for command in (
        commands.update(context, "tiny", Options(image="x/y:2")), commands.down(context, "tiny", confirmed=True)
    ):  # fmt: skip
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(command)

    assert "deploy: tiny may have been changed: look at `status tiny`" in terminal.messages
    assert "deploy: tiny may have been deleted: look at `status`" in terminal.messages


def test_a_status_lists_the_releases_that_one_can_go_back_to(
    context: Context, runpod: FakeRunPod, terminal: Terminal
) -> None:
    diffs = [[], ["template.imageName", "template.env"], ["gpuIds"]]
    runpod.releases = [
        {
            "id": f"rel{version}", "version": version, "source": "MANUAL", "workerCount": 0,
            "createdAt": f"2026-06-01T12:0{version}:00+02:00",
            "diff": [{"field": field, "old": "a", "new": "b"} for field in fields],
        }
        for version, fields in enumerate(diffs, 1)
    ]  # fmt: skip

    asyncio.run(commands.status(context, "tiny"))

    lines = [line.split(None, 4) for line in terminal.result.splitlines() if " UTC  " in line]
    assert lines == [
        ["3", "2026-06-01", "10:03:00", "UTC", "gpu.pools"],
        ["2", "2026-06-01", "10:02:00", "UTC", "image, env"],
        ["1", "2026-06-01", "10:01:00", "UTC", "created"],
    ]


def test_the_most_that_an_endpoint_costs_is_that_of_its_dearest_pool(runpod: FakeRunPod) -> None:
    """Also if the first worker has got a cheaper one."""
    runpod.endpoints["ep1"]["gpu"]["pools"] = ["ADA_24", "AMPERE_48"]
    catalogue = [GpuType.model_validate(one) for one in runpod.catalogue]

    text = report.price(Endpoint.model_validate(runpod.endpoints["ep1"]), catalogue, "NVIDIA GeForce RTX 4090")

    assert text == "$1.10/h while a worker runs; $0.00/h idle (0 always run); at most $3.66/h (3 workers)"
