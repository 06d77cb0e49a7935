"""What a download changes in its directory; the hub is a fake with small files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pytest

from builder import checkpoint, hf_hub
from builder.download import download
from builder.errors import DestinationError, DiskSpaceError, HubUnreachableError, UnsupportedModelError
from builder.hf_hub import RemoteFile, Repository
from builder.manifest import Manifest

NAME = "an-org/a-model"
OLD = {"config.json": b"{}", "old.json": b"{}", "model.safetensors": b"old weights", "tokenizer.json": b"{}"}
NEW = {"config.json": b"{}", "new.json": b"{}", "model.safetensors": b"new weights", "tokenizer.json": b"{}"}


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what the hub has; files in `broken` cannot be downloaded."""

    def serve(files: dict[str, bytes], commit: str, broken: tuple[str, ...] = ()) -> None:
        remote = [RemoteFile(path, len(data), hashlib.sha256(data).hexdigest(), None) for path, data in files.items()]

        def fetch(_: Repository, file: RemoteFile, target: BinaryIO, *__: object) -> None:
            if file.path in broken:
                raise HubUnreachableError("down")
            target.write(files[file.path])

        monkeypatch.setattr(hf_hub, "repository", lambda *_: Repository(NAME, commit, tuple(remote)))
        monkeypatch.setattr(hf_hub, "fetch", fetch)

    monkeypatch.setattr(checkpoint, "check", lambda _: None)
    return serve


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def model(serve: Callable[..., None], tmp_path: Path) -> Path:
    """A complete model at the old commit."""
    serve(OLD, "old")
    download(NAME, tmp_path, attempts=1)
    return tmp_path


def test_an_update_replaces_the_files_of_the_old_commit(model: Path, serve: Callable[..., None]) -> None:
    serve(NEW, "new")
    manifest = download(NAME, model, attempts=1, update=True)

    assert manifest.commit == "new"
    assert content(model).keys() == {*NEW, "model-manifest.json"}
    assert NEW.items() <= content(model).items()


def test_an_update_to_a_commit_without_weights_keeps_the_model(model: Path, serve: Callable[..., None]) -> None:
    before = content(model)
    serve({"config.json": b"{}", "model.gguf": b"GGUF"}, "new")

    with pytest.raises(UnsupportedModelError):
        download(NAME, model, attempts=1, update=True)

    assert content(model) == before


def test_an_update_for_which_the_disk_is_too_small_keeps_the_model(
    model: Path, serve: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(model)
    serve({**NEW, "model.safetensors": b"x" * 1000}, "new")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=900))

    with pytest.raises(DiskSpaceError, match="has only"):
        download(NAME, model, attempts=1, update=True)

    assert content(model) == before


@pytest.mark.parametrize("name", ["thesis.txt", "notes/plan.md", "new.json"])
def test_an_update_refuses_a_directory_with_files_of_the_user(
    model: Path, serve: Callable[..., None], name: str
) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("mine")
    before = content(model)
    serve(NEW, "new")

    with pytest.raises(DestinationError, match=name):
        download(NAME, model, attempts=1, update=True)

    assert content(model) == before


def test_an_interrupted_update_is_resumed_and_removes_the_old_files(model: Path, serve: Callable[..., None]) -> None:
    serve(NEW, "new", broken=("model.safetensors",))
    with pytest.raises(HubUnreachableError):
        download(NAME, model, attempts=1, update=True)
    assert Manifest.read(model) is None
    assert not (model / "config.json").exists()

    serve(NEW, "new")
    download(NAME, model, attempts=1)

    assert content(model).keys() == {*NEW, "model-manifest.json"}


def test_files_that_are_added_to_an_interrupted_download_are_kept(tmp_path: Path, serve: Callable[..., None]) -> None:
    serve(NEW, "new", broken=("model.safetensors",))
    with pytest.raises(HubUnreachableError):
        download(NAME, tmp_path, attempts=1)
    (tmp_path / "thesis.txt").write_text("mine")

    with pytest.raises(DestinationError, match=r"has other files \(thesis.txt\)"):
        download(NAME, tmp_path, attempts=1)

    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_refused_download_leaves_nothing_in_the_directory(tmp_path: Path, serve: Callable[..., None]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    serve(NEW, "new")

    with pytest.raises(DestinationError):
        download(NAME, tmp_path, attempts=1)

    assert content(tmp_path) == {"thesis.txt": b"mine"}
