"""The checks of a model directory: which files count, and damaged indexes."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from builder import checkpoint
from builder.__main__ import main
from builder.errors import DestinationError, IntegrityError
from builder.manifest import model_files
from builder.tiny_model import cache
from builder.verify import verify

SHARD = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with one shard and an index; its configuration is not loaded."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / SHARD).write_bytes(struct.pack("<Q", len(header)) + header + b"..")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": SHARD}}))
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(checkpoint, "_load", lambda _: None)
    return tmp_path


@pytest.mark.parametrize("format_", ["tf_model.h5", "flax_model.msgpack", "pytorch_model.bin"])
def test_an_index_of_another_format_is_not_checked(model: Path, format_: str) -> None:
    (model / f"{format_}.index.json").write_text(json.dumps({"weight_map": {"a": "absent"}}))

    checkpoint.check(model)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_invalid_index_is_reported(model: Path, index: str) -> None:
    (model / INDEX).write_text(index)

    with pytest.raises(IntegrityError, match=f"{INDEX}: not an index of weights"):
        checkpoint.check(model)


def test_a_tensor_that_its_shard_does_not_have_is_reported(model: Path) -> None:
    (model / INDEX).write_text(json.dumps({"weight_map": {"a": SHARD, "b": SHARD, "c": "absent"}}))

    with pytest.raises(IntegrityError) as raised:
        checkpoint.check(model)

    assert str(raised.value).splitlines() == [
        f"absent: missing, but named in {INDEX}",
        f"{SHARD}: missing b, which {INDEX} names (1 in total)",
    ]


def test_files_in_hidden_directories_are_not_the_models(model: Path) -> None:
    metadata = model / ".cache" / "huggingface" / "download" / "config.json.metadata"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("left by `hf download --local-dir`")
    (model / ".gitattributes").write_text("*")

    assert model_files(model) == [".gitattributes", "config.json", SHARD, INDEX]


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    for command in (checkpoint.check, verify):
        with pytest.raises(DestinationError, match="absent is not a directory"):
            command(tmp_path / "absent")


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5"])
def test_an_invalid_number_of_attempts_is_explained(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["download", "an-org/a-model", "model", f"--attempts={text}"])

    assert f"argument --attempts: {text!r} is not an integer of at least 1" in capsys.readouterr().err


def test_a_copy_of_the_tiny_model_may_have_a_manifest(model: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = tmp_path_factory.mktemp("copy")
    cache.copy_into(model, copy)
    (copy / "model-manifest.json").write_text("{}")

    cache.copy_into(model, copy)

    assert (copy / "model-manifest.json").read_text() == "{}"
