"""LoRA adapters: each is a model name, whether it is configured or first named by a job."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from builder.tiny_model.corpus import example
from tests.emulator_queue import EmulatorQueue, emulator_queue
from tests.integration.conftest import START_S
from tests.processes import VLLM_ENVIRONMENT, Process, running

RANK = 8


def write_adapter(folder: Path, model: Path, seed: int, base: str | None = None) -> None:
    """Write an adapter in PEFT's format that changes every answer; its base model is `base`, or the directory."""
    config = json.loads((model / "config.json").read_text())
    size = config["hidden_size"]
    random = torch.Generator().manual_seed(seed)
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.o_proj.lora_{half}.weight": torch.randn(
            shape, generator=random, dtype=torch.float32
        )
        for layer in range(config["num_hidden_layers"])
        for half, shape in (("A", (RANK, size)), ("B", (size, RANK)))
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    adapter = {
        "peft_type": "LORA",
        "base_model_name_or_path": base or str(model),
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["o_proj"],
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(adapter))


@pytest.fixture(scope="module")
def queue() -> Iterator[EmulatorQueue]:
    with emulator_queue() as queue:
        yield queue


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def lora_worker(queue: EmulatorQueue, tiny_model: str, adapters: Path) -> Iterator[Process]:
    folder = adapters
    write_adapter(folder / "named-at-start", Path(tiny_model), 1)
    write_adapter(folder / "on-demand" / "named-by-a-job", Path(tiny_model), 2)
    write_adapter(folder / "on-demand" / "of-a-hub-id", Path(tiny_model), 3, "org/Tiny")
    write_adapter(folder / "on-demand" / "of-another-model", Path(tiny_model), 4, "org/Another")
    write_adapter(folder / "elsewhere", Path(tiny_model), 5)
    flags = {
        "MODEL_NAME": tiny_model,
        "SERVED_MODEL_NAME": "tiny,org/Tiny",
        "ENABLE_LORA": "true",
        "MAX_LORA_RANK": str(RANK),
        "MAX_LORAS": "2",
        "LORA_MODULES": json.dumps([{"name": "named-at-start", "path": str(folder / "named-at-start")}]),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true",
        "VLLM_LORA_RESOLVER_CACHE_DIR": str(folder / "on-demand"),
    }
    with running(["handler.py"], {**VLLM_ENVIRONMENT, **queue.environment, **flags}, folder / "log") as process:
        process.wait_for(queue.has_worker, START_S)
        yield process


def chat(queue: EmulatorQueue, model: str) -> dict[str, Any]:
    request = {"model": model, "messages": example("ok").messages, "temperature": 0, "max_tokens": 20}
    answer: dict[str, Any]
    (answer,) = queue.run({"openai_route": "/v1/chat/completions", "openai_input": request}).wait()
    return answer


@pytest.mark.usefixtures("lora_worker")
def test_each_adapter_is_a_model_with_its_own_answers(queue: EmulatorQueue) -> None:
    names = ("tiny", "named-at-start", "named-by-a-job", "of-a-hub-id")
    answers = {name: chat(queue, name) for name in names}

    assert {name: answer["model"] for name, answer in answers.items()} == {name: name for name in answers}
    texts = {answer["choices"][0]["message"]["content"] for answer in answers.values()}
    assert len(texts) == len(names)
    assert example("ok").answer in texts
    (models,) = queue.run({"openai_route": "/v1/models"}).wait()
    assert set(names) <= {model["id"] for model in models["data"]}


@pytest.mark.usefixtures("lora_worker")
@pytest.mark.parametrize(
    "name", ["named-nowhere", "of-another-model", "../elsewhere", "x/../../elsewhere", "{}/elsewhere"]
)
def test_an_adapter_that_is_missing_or_outside_of_the_directory_is_not_found(
    name: str, queue: EmulatorQueue, adapters: Path
) -> None:
    request = {"model": name.format(adapters), "messages": example("ok").messages}

    error = queue.run({"openai_route": "/v1/chat/completions", "openai_input": request}).error()

    assert (error["status"], error["error"]["code"]) == (404, 404)


@pytest.mark.usefixtures("lora_worker")
def test_the_route_that_loads_adapters_is_not_allowed(queue: EmulatorQueue) -> None:
    request = {"lora_name": "x", "lora_path": "/x"}

    error = queue.run({"openai_route": "/v1/load_lora_adapter", "openai_input": request}).error()

    assert (error["status"], error["error"]["type"]) == (403, "PermissionDeniedError")
