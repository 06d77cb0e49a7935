"""A worker whose model is only on the hub downloads it to the volume, serves it, and then sends no more requests."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from builder.tiny_model.corpus import example
from tests import model_hub
from tests.model_hub import COMMIT, Fault, Hub, Repository
from tests.processes import VLLM_ENVIRONMENT, running
from tests.quantized import quantized

NAME = "an-org/Tiny"
START_S = 240.0
JOB = {
    "openai_route": "/v1/chat/completions",
    "openai_input": {
        "model": NAME,
        "messages": [{"role": "user", "content": "Hello!"}],
        "temperature": 0,
    },
}


@pytest.fixture
def hub(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with model_hub.running() as hub:
        hub.repositories[NAME] = Repository.of(quantized(Path(tiny_model), tmp_path_factory.mktemp("tiny") / "4-bit"))
        yield hub


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    volume = tmp_path / "volume"
    volume.mkdir()
    return volume


def environment(hub: Hub, volume: Path) -> dict[str, str]:
    return {
        **VLLM_ENVIRONMENT,
        **hub.environment,
        "MODEL_NAME": NAME,
        "QUANTIZATION": "bitsandbytes",
        "DTYPE": "bfloat16",
        "NETWORK_VOLUME": str(volume),
        "BAKED_MODEL_DIR": str(volume / "nothing"),
        "HF_HOME": str(volume.parent / "home"),
    }


def test_a_model_is_downloaded_to_the_volume_once_and_served(hub: Hub, volume: Path, tmp_path: Path) -> None:
    """The model has 4 bits, as the default one: since 0.28 vLLM's bitsandbytes is a plugin."""
    with running(
        ["handler.py", "--test_input", json.dumps({"input": JOB})], environment(hub, volume), tmp_path / "log"
    ) as process:
        assert process.popen.wait(START_S) == 0, process.log

        assert f"{NAME}, not found locally, downloading" in process.log
        assert f'"model": "{NAME}"' in process.log
        assert example("hello").answer in process.log
    assert (volume / "models/an-org--tiny/main/model-manifest.json").is_file()
    assert len(hub.requests) == len(set(hub.requests)), "each file once, by the builder, and nothing by vLLM"
    assert all(COMMIT in request or "/cdn/" in request for request in hub.requests[1:])


def test_a_gated_model_aborts_the_start_with_one_line(hub: Hub, volume: Path, tmp_path: Path) -> None:
    hub.repositories[NAME].gated, hub.repositories[NAME].token = True, "hf_notarealtoken"
    variables = {**environment(hub, volume), "HF_TOKEN": "hf_notarealtoken-of-somebody"}
    with running(["handler.py"], variables, tmp_path / "log") as process:
        assert process.popen.wait(START_S) == 1

        assert process.log.splitlines()[-1] == (
            f"The worker cannot start: {NAME} is gated: ask for access at {hub.url}/{NAME}, "
            "and set HF_TOKEN to a token of that account"
        )
        assert "notareal" not in process.log


def test_sigkill_during_the_download_leaves_no_process_behind(hub: Hub, volume: Path, tmp_path: Path) -> None:
    hub.repositories[NAME].always["model.safetensors"] = Fault(piece_s=10)
    with running(["handler.py"], environment(hub, volume), tmp_path / "log") as process:
        process.wait_for(lambda: any("/cdn/" in request for request in hub.requests), START_S)
        family = process.family()
        assert len(family) > 1

        process.popen.send_signal(signal.SIGKILL)

        _, alive = psutil.wait_procs(family, timeout=30)
        assert alive == []
    assert not (volume / "models/an-org--tiny/main/config.json").exists()
