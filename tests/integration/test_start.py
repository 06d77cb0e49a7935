"""A start that fails says why in its last line, with nothing of a traceback, and as early as it can be known."""

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
SAID = "The worker cannot start: "
# Code that a model may name: what its configuration is, in another repository than the model's.
CODE = b"""
from transformers import Phi3Config

class TinyConfig(Phi3Config):
    said_by = "code of another repository"
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with model_hub.running() as hub:
        yield hub


def ended(environment: Mapping[str, str], log: Path, *arguments: str) -> tuple[int, str]:
    """The exit status of a worker that answers its one job, and its log."""
    with running(["handler.py", *arguments], {**VLLM_ENVIRONMENT, **environment}, log) as process:
        return process.popen.wait(START_S), process.log


def test_a_model_whose_code_is_in_another_repository_is_served(hub: Hub, tiny_model: str, tmp_path: Path) -> None:
    """And the log says which of the routes that are opened there are not, and which model's settings are left out."""
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

    status, log = ended(environment, tmp_path / "log")

    assert status == 0, log
    assert any(request.endswith("configuration_tiny.py") for request in hub.requests)
    assert "ALLOWED_ROUTES has /metrix, and vLLM's app has no such route" in log
    assert "ALLOWED_ROUTES has /metrics" not in log
    assert log.count("is for org/another, and so not used") == 1


def test_a_tokenizer_that_cannot_be_had_is_named_and_not_the_model(hub: Hub, tiny_model: str, tmp_path: Path) -> None:
    environment = {**hub.environment, "HF_HOME": str(tmp_path / "home"), "TOKENIZER_NAME": "org/none"}

    status, log = ended({**environment, "MODEL_NAME": tiny_model}, tmp_path / "log")

    assert status == 1
    assert log.splitlines()[-1] == (
        f"{SAID}there is no model org/none: check TOKENIZER_NAME; a private model needs HF_TOKEN too"
    )
    assert "Traceback" not in log


def test_an_adapter_that_cannot_be_had_is_named_before_the_engine_is_loaded(
    hub: Hub, tiny_model: str, tmp_path: Path
) -> None:
    adapters = {"ENABLE_LORA": "true", "LORA_MODULES": '[{"name": "a", "path": "org/none"}]'}

    status, log = ended(
        {**hub.environment, **adapters, "HF_HOME": str(tmp_path / "home"), "MODEL_NAME": tiny_model}, tmp_path / "log"
    )

    assert status == 1
    assert log.splitlines()[-1].startswith(f"{SAID}there is no model org/none: check LORA_MODULES")
    assert "Loading the engine" not in log


@pytest.mark.parametrize("where", ["on this machine", "on the platform"])
def test_an_app_that_vllm_cannot_make_ends_the_start_with_a_line(
    where: str, job_queue: EmulatorQueue, tiny_model: str, tmp_path: Path
) -> None:
    """It is made last, once the engine is loaded: the platform would start the worker again and again."""
    queue = job_queue.environment if where == "on the platform" else {}

    status, log = ended({**queue, "MODEL_NAME": tiny_model, "TOOL_SERVER": "127.0.0.1:9"}, tmp_path / "log")

    assert "Engine ready" in log
    assert status == 1, log
    assert f"{SAID}vLLM's app cannot be made: ConnectError: All connection attempts failed\n" in log
    assert "Traceback" not in log, log


def test_a_worker_that_is_told_to_stop_while_it_downloads_its_model_stops_at_once(
    hub: Hub, tiny_model: str, tmp_path: Path
) -> None:
    """What there is of the model is not taken for a whole one by the next start."""
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

        _, alive = psutil.wait_procs(family, timeout=5)
        assert alive == []
        assert process.popen.wait(1) == 0
    kept = [path.name for path in (tmp_path / "models").rglob("*.json")]
    assert "model-manifest.json" not in kept
    assert "config.json" not in kept
