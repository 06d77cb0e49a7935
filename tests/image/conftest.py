"""What the tests of the images share: one storage, one hub, one token."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.tiny_model.cache import tiny_model
from tests import model_hub
from tests.image.builds import CACHE, Buildah, pip_mounts, stand_in_for_python
from tests.model_hub import Hub, Repository
from tests.quantized import quantized

TOKEN = "hf_a-token-that-is-in-no-layer"  # noqa: S105
NAME = "unsloth/phi-4-bnb-4bit"


@pytest.fixture(scope="session")
def directory() -> Iterator[Path]:
    """On the disk of the cache, so that large trees can be linked."""
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
    return stand_in_for_python(buildah, directory)


@pytest.fixture(scope="session")
def hub(directory: Path) -> Iterator[Hub]:
    """Has the default model's name, a tiny one in its form, and gives it only to who has the token."""
    with model_hub.running() as hub:
        repository = Repository.of(quantized(tiny_model(), directory / "4-bit"))
        repository.gated, repository.token = True, TOKEN
        hub.repositories[NAME] = repository
        yield hub


@pytest.fixture(scope="session")
def options(hub: Hub, python: str, directory: Path) -> list[str]:
    """What every build is told of this machine."""
    secret = directory / "token"
    secret.write_text(TOKEN, encoding="utf-8")
    arguments = [f"--build-arg=PYTHON_IMAGE={python}", f"--build-arg=HF_ENDPOINT={hub.url}"]
    return [*arguments, f"--secret=id=HF_TOKEN,src={secret}", *pip_mounts(directory)]
