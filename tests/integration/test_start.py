"""A failed start is explained in its last line, without a traceback, and as early as possible."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from tests import model_hub
from tests.emulator_queue import EmulatorQueue
from tests.model_hub import Fault, Hub, Repository
from tests.processes import VLLM_ENVIRONMENT, running

START_S = 240.0
PREFIX = "The worker cannot start: "
# Code for a model's configuration, in another repository than the model's.
CODE = b"""
from transformers import Phi3Config

class TinyConfig(Phi3Config):
    source = "code of another repository"
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with model_hub.running() as hub:
        yield hub


def run_worker(environment: Mapping[str, str], log: Path, *arguments: str) -> tuple[int, str]:
    """Run a worker to its end; return its exit status and its log."""
    with running(["handler.py", *arguments], {**VLLM_ENVIRONMENT, **environment}, log) as process:
        return process.popen.wait(START_S), process.log


def test_a_model_with_code_in_another_repository_is_served(hub: Hub, tiny_model: str, tmp_path: Path) -> None:
    """The log also reports an allowed route that does not exist, and settings of another model that are not used."""
    model = shutil.copytree(tiny_model, tmp_path / "remote")
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "org/code--configuration_tiny.TinyConfig"}
    (model / "config.json").write_text(json.dumps(config))
    (tmp_path / "settings.json").write_text('{"MODEL_NAME": "org/another", "DTYPE": "half"}')
    hub.repositories["org/code"] = Repository({"configuration_tiny.py": CODE})
    environment = {
        **hub.environment,
        "HF_HOME": str(tmp_path / "home"),
        "BAKED_SETTINGS_FILE": str(tmp_path / "settings.json"),
        "MODEL_NAME": str(model),
        "TRUST_REMOTE_CODE": "true",
        "ALLOWED_ROUTES": "/metrix,/metrics",
    }

    status, log = run_worker(environment, tmp_path / "log")

    assert status == 0, log
    assert any(request.endswith("configuration_tiny.py") for request in hub.requests)
    assert "ALLOWED_ROUTES has /metrix, but vLLM's app has no such route" in log
    assert "ALLOWED_ROUTES has /metrics" not in log
    assert log.count("its settings are for org/another") == 1


def test_a_missing_tokenizer_is_reported_by_name(hub: Hub, tiny_model: str, tmp_path: Path) -> None:
    environment = {**hub.environment, "HF_HOME": str(tmp_path / "home"), "TOKENIZER_NAME": "org/none"}

    status, log = run_worker({**environment, "MODEL_NAME": tiny_model}, tmp_path / "log")

    assert status == 1
    assert log.splitlines()[-1] == (
        f"{PREFIX}there is no model org/none: check TOKENIZER_NAME; a private model needs HF_TOKEN too"
    )
    assert "Traceback" not in log


def test_a_missing_adapter_is_reported_before_the_engine_loads(hub: Hub, tiny_model: str, tmp_path: Path) -> None:
    adapters = {"ENABLE_LORA": "true", "LORA_MODULES": '[{"name": "a", "path": "org/none"}]'}

    status, log = run_worker(
        {**hub.environment, **adapters, "HF_HOME": str(tmp_path / "home"), "MODEL_NAME": tiny_model}, tmp_path / "log"
    )

    assert status == 1
    assert log.splitlines()[-1].startswith(f"{PREFIX}there is no model org/none: check LORA_MODULES")
    assert "Loading the engine" not in log


@pytest.mark.parametrize("where", ["on this machine", "on the platform"])
def test_an_error_of_vllms_app_ends_the_start_with_one_line(
    where: str, job_queue: EmulatorQueue, tiny_model: str, tmp_path: Path
) -> None:
    """The app is made last, after the engine has loaded."""
    queue = job_queue.environment if where == "on the platform" else {}

    status, log = run_worker({**queue, "MODEL_NAME": tiny_model, "TOOL_SERVER": "127.0.0.1:9"}, tmp_path / "log")

    assert "Engine ready" in log
    assert status == 1, log
    assert f"{PREFIX}vLLM's app cannot be made: ConnectError: All connection attempts failed\n" in log
    assert "Traceback" not in log, log


def test_sigterm_during_the_download_of_the_model_ends_the_worker_at_once(
    hub: Hub, tiny_model: str, tmp_path: Path
) -> None:
    """The partial download is not taken for a complete model."""
    hub.repositories["org/Tiny"] = Repository.of(Path(tiny_model))
    hub.repositories["org/Tiny"].always["model.safetensors"] = Fault(until=lambda: False)
    environment = {
        **VLLM_ENVIRONMENT,
        **hub.environment,
        "MODEL_NAME": "org/Tiny",
        "DOWNLOAD_DIR": str(tmp_path / "models"),
        "HF_HOME": str(tmp_path / "home"),
    }
    with running(["handler.py"], environment, tmp_path / "log") as process:
        process.wait_for(lambda: any("/cdn/" in request for request in hub.requests), START_S)
        family = process.family()

        process.popen.send_signal(signal.SIGTERM)

        _, alive = psutil.wait_procs(family, timeout=30)
        assert alive == []
        assert process.popen.wait(1) == 0
    files = [path.name for path in (tmp_path / "models").rglob("*.json")]
    assert "model-manifest.json" not in files
    assert "config.json" not in files
