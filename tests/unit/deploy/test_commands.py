"""The commands for an endpoint that exists."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from builder.doctor.worker_config import WorkerConfig
from deploy import commands
from deploy import model as doctor
from deploy.context import Context
from deploy.errors import DoctorError, OptionError
from deploy.options import Options
from tests.unit.deploy.conftest import Terminal
from tests.unit.deploy.fakes import FakeRunPod
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
