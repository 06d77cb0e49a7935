"""The image's layers: which are rebuilt after a change of the code, and that none has a secret."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from builder import cache_file
from tests.image.builds import ROOT, Buildah, build_vllm_base, files_with
from tests.image.conftest import NAME, TOKEN
from tests.model_hub import COMMIT, Hub

IMAGE = "worker-layers"
MODEL = "workspace/vllm/phi-4-bnb-4bit"


@pytest.fixture(scope="module")
def checkout(directory: Path) -> Path:
    """A copy of the build context, for changes."""
    copy = directory / "checkout"
    ignore = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", ".hypothesis")
    shutil.copytree(ROOT, copy, ignore=ignore)
    return copy


@pytest.fixture(scope="module")
def build(buildah: Buildah, options: list[str], directory: Path, python: str, checkout: Path) -> Any:
    base = build_vllm_base(buildah, directory, python, real=False)

    def build() -> dict[str, Any]:
        buildah.build(IMAGE, "--layers", f"--build-arg=BASE_IMAGE={base}", *options, context=checkout)
        return buildah.inspect(IMAGE)

    return build


@pytest.fixture(scope="module")
def image(build: Any) -> dict[str, Any]:
    document: dict[str, Any] = build()
    return document


def layers(image: dict[str, Any]) -> list[str]:
    ids: list[str] = image["OCIv1"]["rootfs"]["diff_ids"]
    return ids


def layer_steps(image: dict[str, Any]) -> list[str]:
    """Return the build steps that made layers, in order."""
    return [step["created_by"].strip() for step in image["OCIv1"]["history"] if not step.get("empty_layer")]


def test_the_model_is_complete_in_a_separate_layer(image: dict[str, Any], buildah: Buildah) -> None:
    assert image["OCIv1"]["rootfs"]["type"] == "layers"
    files = buildah.files(buildah.container(IMAGE))
    manifest = json.loads((files / MODEL / "model-manifest.json").read_bytes())
    assert (manifest["repository"], manifest["revision"], manifest["commit"]) == (NAME, "main", COMMIT)
    assert all((files / MODEL / file["path"]).stat().st_size == file["size_bytes"] for file in manifest["files"])
    settings = json.loads((files / "workspace/vllm/settings.json").read_bytes())
    assert settings == {"MODEL_NAME": NAME, "QUANTIZATION": "bitsandbytes", "DTYPE": "bfloat16"}
    assert sum(step.endswith("in ${MODEL_DIR}") for step in layer_steps(image)) == 1


def test_the_worker_runs_as_an_unprivileged_user(image: dict[str, Any]) -> None:
    config = image["Docker"]["config"]
    assert config["User"] == "10001"
    assert config["Cmd"] == ["python3", "handler.py"]
    assert not config["Entrypoint"]
    assert config["Healthcheck"]["Test"] == ["CMD", "python3", "-m", "engine.health"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.title"] == "vllm-serverless"
    assert labels["org.opencontainers.image.version"] == "0.1.0"
    assert (labels["vllm-serverless.model"], labels["vllm-serverless.model.revision"]) == (NAME, "main")


def test_the_image_has_only_the_files_that_a_worker_needs(image: dict[str, Any], buildah: Buildah) -> None:
    del image
    files = buildah.files(buildah.container(IMAGE)) / "app"
    assert {path.name for path in files.iterdir()} == {
        "LICENSE", "builder", "emulator", "engine", "handler.py", "requirements", "runpod_api", "test_input.json"
    }  # fmt: skip


@pytest.mark.parametrize("path", ["engine/health.py", "builder/doctor/report.py"])
def test_a_change_of_the_code_rebuilds_only_the_last_layer(path: str, build: Any, checkout: Path, hub: Hub) -> None:
    """Including code of the builder that a download does not use."""
    image, sent = build(), hub.sent_bytes
    module = checkout / path
    module.write_text(module.read_text() + "# changed\n")
    changed = build()

    before, after = layers(image), layers(changed)
    assert len(before) == len(after) == len(layer_steps(image))
    different = [step for step, *pair in zip(layer_steps(image), before, after, strict=True) if pair[0] != pair[1]]
    assert len(different) == 1, different
    assert re.fullmatch(r".*COPY dir:\w+ in \.", different[0]), different
    assert hub.sent_bytes == sent, "the model is not downloaded again"


def test_compiled_code_is_added_to_a_finished_image(image: dict[str, Any], buildah: Buildah, directory: Path) -> None:
    """It belongs to the worker's user, who adds to it."""
    kernel = directory / "kernels/key/triton/kernel"
    kernel.parent.mkdir(parents=True)
    kernel.write_bytes(b"code")
    (directory / "warm").mkdir()
    cache_file.pack(directory / "kernels", directory / "warm/compiled.tar")

    options = ["--target=warm", f"--build-arg=WARM_FROM=localhost/{IMAGE}", f"--file={ROOT / 'Dockerfile'}"]
    buildah.build("worker-warm", *options, context=directory / "warm")

    assert buildah.inspect("worker-warm")["Docker"]["config"]["Cmd"] == image["Docker"]["config"]["Cmd"]
    unpacked = buildah.files(buildah.container("worker-warm")) / "workspace/vllm/compiled/key/triton/kernel"
    assert unpacked.read_bytes() == b"code"
    assert {path.stat().st_uid for path in (unpacked, *list(unpacked.parents)[:3])} == {10001}


def test_an_image_without_a_model_downloads_nothing(buildah: Buildah, options: list[str], hub: Hub) -> None:
    """Its worker gets the model's name, and downloads it at its start."""
    requests = len(hub.requests)
    empty = [f"--build-arg={name}=" for name in ("MODEL_NAME", "QUANTIZATION", "DTYPE")]
    buildah.build("no-model", "--target=model", "--layers", *empty, *options)
    files = buildah.files(buildah.container("no-model"))
    assert list((files / "model").iterdir()) == []
    assert json.loads((files / "settings.json").read_bytes()) == {}
    assert len(hub.requests) == requests


def test_no_secret_is_in_any_layer_history_or_environment(image: dict[str, Any], buildah: Buildah) -> None:
    """Search all bytes of the image storage: each layer of each stage, and each configuration."""
    assert TOKEN not in json.dumps(image)
    assert files_with(buildah.directory, TOKEN.encode()) == []
    assert files_with(buildah.directory, COMMIT.encode()), "the search finds other content"
