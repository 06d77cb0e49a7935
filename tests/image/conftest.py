"""Fixtures of the image tests: one image storage, one fake hub, one token."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.tiny_model.cache import tiny_model
from tests import model_hub
from tests.image.builds import CACHE, Buildah, build_python_base, pip_mounts
from tests.model_hub import Hub, Repository
from tests.quantized import quantized

TOKEN = "hf_a-token-that-is-in-no-layer"  # noqa: S105
NAME = "unsloth/phi-4-bnb-4bit"


@pytest.fixture(scope="session")
def directory() -> Iterator[Path]:
    """A directory on the disk of the cache, so that large trees can be hard-linked."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def buildah(directory: Path) -> Iterator[Buildah]:
    buildah = Buildah(directory / "storage")
    yield buildah
    buildah.close()


@pytest.fixture(scope="session")
def python(buildah: Buildah, directory: Path) -> str:
    return build_python_base(buildah, directory)


@pytest.fixture(scope="session")
def hub(directory: Path) -> Iterator[Hub]:
    """A hub with a gated repository under the default model's name: the tiny model in 4 bits."""
    with model_hub.running() as hub:
        repository = Repository.of(quantized(tiny_model(), directory / "4-bit"))
        repository.gated, repository.token = True, TOKEN
        hub.repositories[NAME] = repository
        yield hub


@pytest.fixture(scope="session")
def options(hub: Hub, python: str, directory: Path) -> list[str]:
    """The build options that depend on this machine."""
    secret = directory / "token"
    secret.write_text(TOKEN, encoding="utf-8")
    arguments = [f"--build-arg=PYTHON_IMAGE={python}", f"--build-arg=HF_ENDPOINT={hub.url}"]
    return [*arguments, f"--secret=id=HF_TOKEN,src={secret}", *pip_mounts(directory)]
