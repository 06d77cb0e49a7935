"""Which model is served, and where it is found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from engine.config.environment import ENVIRONMENT, Variable
from engine.config.model import Model
from engine.config.settings import Settings
from engine.config.vllm_flags import Flags
from engine.errors import ConfigurationError
from engine.startup import model_resolver, model_store

NAME = "Org/A--Model"
COMMIT, OTHER = "a" * 40, "b" * 40


class Given(Flags):
    """Flags with these values, without vLLM's parser."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def value(self, dest: str) -> Any:
        return self.values.get(dest)


class Machine:
    """A machine with an image, a volume and a home."""

    def __init__(self, root: Path) -> None:
        self.image = root / "image"
        self.volume = root / "volume"
        self.home = root / "home"
        self.settings: dict[str, Any] = {}

    def choose(self, model: str | None = None, **flags: Any) -> Model:
        values = {"baked_model_dir": self.image, "network_volume": self.volume, **self.settings}
        return model_resolver.choose(Settings.model_validate(values), Given({"model": model, **flags}))

    def whole(self, directory: Path, name: str | None = NAME, revision: str | None = None, commit: str = COMMIT) -> str:
        """Put a model with its manifest there."""
        directory.mkdir(parents=True)
        manifest: dict[str, Any] = {"repository": name, "revision": revision, "commit": commit, "files": []}
        (directory / "model-manifest.json").write_text(json.dumps(manifest))
        return str(directory)

    def cached(self, cache: Path, commit: str = COMMIT, name: str = "models--Org--A--Model", ref: str = "main") -> str:
        """Put a model into a cache of the hub's client."""
        snapshot = cache / name / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (snapshot / "tokenizer.json").write_text("{}")
        (snapshot / "model-00001-of-00001.safetensors").write_text("")
        index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
        (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
        if ref:
            (cache / name / "refs").mkdir(exist_ok=True)
            (cache / name / "refs" / ref).write_text(commit)
        return str(snapshot)

    @property
    def platforms_cache(self) -> Path:
        return self.volume / "huggingface-cache" / "hub"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(tmp_path)
    monkeypatch.setattr(constants, "HF_HOME", str(machine.home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(machine.home / "hub"))
    return machine


def test_without_a_name_the_model_in_the_image_answers_to_its_hub_id_and_its_path(machine: Machine) -> None:
    path = machine.whole(machine.image)

    assert machine.choose(served_model_name=["a"]) == Model(path, ("a", NAME, path))


def test_a_model_in_the_image_from_elsewhere_answers_to_the_name_of_its_directory(machine: Machine) -> None:
    path = machine.whole(machine.image, name=None)

    assert machine.choose() == Model(path, (machine.image.name, path))


def test_a_directory_of_which_nothing_is_known_answers_to_its_name(machine: Machine) -> None:
    directory = machine.volume / "a-model"
    directory.mkdir(parents=True)

    assert machine.choose(str(directory)).names == ("a-model", str(directory))
    assert machine.choose(str(directory), served_model_name=["a"]).names == ("a", str(directory))


def test_what_lies_in_the_image_without_a_manifest_is_not_taken_for_a_model(machine: Machine) -> None:
    machine.image.mkdir()
    (machine.image / "config.json").write_text("{}")

    with pytest.raises(ConfigurationError, match="has no manifest, so it may be incomplete"):
        machine.choose()
    assert machine.choose(str(machine.image)).path == str(machine.image)


def test_a_manifest_that_cannot_be_read_stops_the_start(machine: Machine) -> None:
    machine.whole(machine.image)
    (machine.image / "model-manifest.json").write_text("{}")

    with pytest.raises(ConfigurationError, match="cannot be read: rebuild the image"):
        machine.choose()


def test_on_the_platform_a_worker_without_a_model_does_not_start(machine: Machine) -> None:
    machine.settings["runpod_webhook_get_job"] = "http://queue/"

    with pytest.raises(ConfigurationError, match="set MODEL_NAME"):
        machine.choose()


def test_off_the_platform_it_is_the_tiny_model_and_the_log_says_so(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = subprocess.CompletedProcess([], 0, stdout=b"/cache/tiny\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: made)
    caplog.set_level("INFO", "engine")

    assert machine.choose() == Model("/cache/tiny", ("tiny", "/cache/tiny"))
    assert "tiny model, as MODEL_NAME is not set" in caplog.text


def test_a_tiny_model_that_cannot_be_made_stops_the_start(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, stdout=b""))

    with pytest.raises(ConfigurationError, match="could not be made"):
        machine.choose()


def test_a_named_directory_is_served_as_it_is_and_has_to_be_there(machine: Machine) -> None:
    snapshot = machine.cached(machine.home / "elsewhere")

    assert machine.choose(snapshot, served_model_name=["a"]).names == ("a", "Org/A--Model", snapshot)
    with pytest.raises(ConfigurationError, match="no such directory"):
        machine.choose("/nowhere/model")


def test_a_tilde_is_the_users_directory(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = machine.home / "a-model"
    directory.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(machine.home))

    assert machine.choose("~/a-model").path == str(directory)
    with pytest.raises(ConfigurationError, match=r"MODEL_NAME='~/none': no such directory"):
        machine.choose("~/none")


def test_a_named_directory_with_a_manifest_answers_to_its_hub_id_too(machine: Machine) -> None:
    path = machine.whole(machine.image)

    assert machine.choose(path, served_model_name=["a"]).names == ("a", NAME, path)


def test_the_places_are_looked_at_in_their_order_and_the_log_says_which(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    """Each place is filled before those that come before it."""
    caplog.set_level("INFO", "engine")
    machine.volume.mkdir()
    downloaded = machine.volume / "models" / "org--a--model" / "main"
    fillings: list[tuple[Callable[[], str], str]] = [
        (lambda: str(downloaded), "not found locally, downloading"),
        (lambda: machine.whole(downloaded), f"downloaded earlier at commit {COMMIT}"),
        (lambda: machine.cached(machine.home / "hub"), "in the hub's cache"),
        (lambda: machine.cached(machine.platforms_cache), "in the platform's cache"),
        (lambda: machine.whole(machine.image), f"in the image at commit {COMMIT}"),
    ]
    for number, (fill, place) in enumerate(fillings):
        path = fill()
        caplog.clear()
        to_download = None if number else (NAME, None)
        assert machine.choose(NAME) == Model(path, tuple(dict.fromkeys((NAME, path))), to_download)
        assert caplog.messages == [f"Model {path}: {NAME}, {place}"]


def test_download_dir_is_looked_in_and_is_where_a_model_is_downloaded_to(machine: Machine, tmp_path: Path) -> None:
    """A cache of the hub's client, as vLLM fills it there, and what this worker has downloaded there."""
    machine.volume.mkdir()
    elsewhere = tmp_path / "elsewhere"
    machine.cached(machine.home / "hub")

    assert machine.choose(NAME, download_dir=str(elsewhere)).path.startswith(str(machine.home))
    new = machine.choose("org/new", download_dir=str(elsewhere))
    assert (new.path, new.to_download) == (str(elsewhere / "org--new" / "main"), ("org/new", None))
    machine.whole(Path(new.path), "org/new")
    assert machine.choose("org/new", download_dir=str(elsewhere)) == Model(new.path, ("org/new", new.path))
    assert machine.choose(NAME, download_dir=str(elsewhere)).path.startswith(str(machine.home))
    cached = machine.cached(elsewhere)
    assert machine.choose(NAME, download_dir=str(elsewhere)).path == cached
    given = {"MODEL_NAME": Variable(NAME, ENVIRONMENT), "DOWNLOAD_DIR": Variable(str(elsewhere), ENVIRONMENT)}
    settings = Settings(baked_model_dir=machine.image, network_volume=machine.volume)
    assert model_resolver.guess_model_dir(settings, given) == Path(cached)


def test_a_volume_that_the_workers_user_may_not_read_is_not_looked_into(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    """As a network volume of another user: the image's own is not root."""
    machine.cached(machine.platforms_cache)
    named = machine.whole(machine.volume / "models" / "org--a--model" / "main")
    machine.whole(machine.image)
    hidden = (machine.volume / "huggingface-cache", machine.volume / "models", machine.image)
    for directory in hidden:
        directory.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            temporary = Path(os.environ["PYTEST_DEBUG_TEMPROOT"])
            for parent in (machine.volume, *machine.volume.parents):
                if parent.is_relative_to(temporary) and parent != temporary:
                    parent.chmod(0o755)
            os.seteuid(65534)
        model = machine.choose(NAME)
        with pytest.raises(ConfigurationError, match=r"no such directory, or none that user \d+, which .* may access"):
            machine.choose(named)
    finally:
        os.seteuid(user)
        for directory in hidden:
            directory.chmod(0o755)

    assert model.to_download == (NAME, None)
    assert f"Skipping {machine.platforms_cache}: user" in caplog.text


def test_a_download_ends_at_once_when_the_worker_is_told_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handler of SIGTERM raises SystemExit, as handler.py's does; the builder says nothing for minutes."""
    real = subprocess.Popen
    started: list[subprocess.Popen[bytes]] = []

    def popen(_: object, **options: Any) -> Any:
        started.append(real([sys.executable, "-c", "import time; time.sleep(300)"], **options))
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", popen)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    begun = time.monotonic()
    try:
        with pytest.raises(SystemExit):
            model_resolver.download(Model(str(tmp_path / "models" / "a"), (), ("Org/A", None)))
    finally:
        signal.signal(signal.SIGTERM, before)

    assert time.monotonic() - begun < 5
    assert started[0].returncode is not None, "it has ended too"


def test_without_a_volume_models_are_kept_beside_the_hubs_cache(machine: Machine) -> None:
    model = machine.choose("gpt2", revision="refs/pr/1")

    assert model.path == str(machine.home / "models" / "gpt2" / "refs--pr--1")
    assert model.to_download == ("gpt2", "refs/pr/1")


@pytest.mark.parametrize(
    ("revision", "there"), [(None, True), ("v1", True), (COMMIT, True), ("main", False), (OTHER, False)]
)
def test_the_image_serves_the_revision_that_is_asked_for(machine: Machine, revision: str | None, there: bool) -> None:
    machine.whole(machine.image, revision="v1")

    assert (machine.choose(NAME.lower(), revision=revision).path == str(machine.image)) == there


@pytest.mark.parametrize(
    ("revision", "there"), [(None, True), ("main", True), (COMMIT, True), ("v1", False), (OTHER, False)]
)
def test_a_cache_serves_the_revision_that_is_asked_for(machine: Machine, revision: str | None, there: bool) -> None:
    path = machine.cached(machine.platforms_cache)

    assert (machine.choose(NAME, revision=revision).path == path) == there


def test_names_in_the_platforms_cache_are_matched_without_case_and_without_references(machine: Machine) -> None:
    path = machine.cached(machine.platforms_cache, name="models--org--a--model", ref="")

    assert machine.choose(NAME).path == path
    machine.cached(machine.platforms_cache, OTHER, name="models--org--a--model", ref="")
    assert machine.choose(NAME).to_download, "one of two snapshots would be a guess"


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model-00001-of-00001.safetensors"])
def test_a_half_cached_model_is_not_taken(machine: Machine, missing: str) -> None:
    (Path(machine.cached(machine.platforms_cache)) / missing).unlink()

    assert machine.choose(NAME).to_download == (NAME, None)


SHARDS = "model-00001-of-00002.safetensors model-00002-of-00002.safetensors"
PYTORCH = "pytorch_model-00001-of-00002.bin pytorch_model-00002-of-00002.bin"


@pytest.mark.parametrize(
    ("held", "whole"),
    [
        ("config.json tokenizer.json model.safetensors", True),
        (f"config.json tokenizer.json {SHARDS}", True),
        (f"config.json tokenizer.json {SHARDS} model.safetensors.index.json", True),
        (f"config.json vocab.json merges.txt {PYTORCH} pytorch_model.bin.index.json", True),
        ("params.json tekken.json consolidated.safetensors", True),
        (f"config.json tokenizer.model {SHARDS} model.safetensors.index.json pytorch_model.bin.index.json", True),
        (
            f"config.json tokenizer.model {SHARDS} model.safetensors.index.json consolidated.safetensors.index.json",
            True,
        ),
        ("config.json tokenizer.json model-00001-of-000001.safetensors", True),
        ("config.json tokenizer.json model-00001-of-00030.safetensors", False),
        ("config.json tokenizer.json model-00001-of-00002.safetensors model.safetensors.index.json", False),
        (f"config.json tokenizer.json model-00001-of-00002.safetensors {PYTORCH}", False),
        ("config.json tokenizer.json training_args.bin", False),
        ("config.json tokenizer.json optimizer.pt rng_state_0.pth scheduler.pt", False),
        ("config.json tokenizer.json adapter_model.safetensors", False),
        ("config.json model.safetensors tokenizer_config.json", False),
        ("config.json tokenizer.json model.safetensors.index.json", False),
        ("tokenizer.json model.safetensors", False),
    ],
)
def test_a_cache_counts_as_whole_by_its_configuration_tokenizer_and_one_set_of_weights(
    machine: Machine, held: str, whole: bool
) -> None:
    """Each index names the two shards of its stem and kind."""
    snapshot = machine.platforms_cache / "models--org--a--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name in held.split():
        stem, _, kind = name.removesuffix(".index.json").rpartition(".")
        shards = [f"{stem}-0000{number}-of-00002.{kind}" for number in (1, 2)]
        (snapshot / name).write_text(json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}))

    assert (machine.choose(NAME).path == str(snapshot)) == whole


def _saying(text: str, end: str) -> list[str]:
    """A command that says something on stderr and then ends."""
    return [sys.executable, "-c", f"import os, signal, sys; sys.stderr.write({text!r}); sys.stderr.flush(); {end}"]


@pytest.mark.parametrize(
    ("said", "end", "told"),
    [
        (
            "builder: org/a at c0ffee: 3 files\nDownloading: 12%|#  \rDownloading: 45%|###  ",
            "os.kill(os.getpid(), signal.SIGKILL)",
            "the download of Org/A ended with -9 (killed by SIGKILL: out of memory?)",
        ),
        ("", "os.kill(os.getpid(), signal.SIGTERM)", "the download of Org/A ended with -15 (killed by SIGTERM)"),
        ("builder: begun\nDownloading: 45%|###\rbuilder: it is gated\n", "sys.exit(3)", "it is gated"),
        ("builder: a.txt: missing\nb.txt: missing\n", "sys.exit(4)", "a.txt: missing; b.txt: missing"),
        (
            "builder: begun\nTraceback (most …):\n  line\nKeyError: 1\n",
            "sys.exit(1)",
            "the download of Org/A ended with 1: KeyError: 1",
        ),
        ("", "sys.exit(1)", "the download of Org/A ended with 1"),
    ],
)
def test_a_download_that_fails_gives_the_builders_reason_and_no_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, end: str, told: str
) -> None:
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: real(_saying(said, end), **options))

    with pytest.raises(ConfigurationError) as raised:
        model_resolver.download(Model(str(tmp_path / "models" / "a"), (), ("Org/A", None)))
    assert str(raised.value) == told


def test_a_volume_that_the_workers_user_may_not_write_to_is_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = subprocess.Popen
    command = _saying("builder: [Errno 13] Permission denied\n", "sys.exit(1)")
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: real(command, **options))
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.F_OK and path.exists())

    with pytest.raises(ConfigurationError, match=f"Permission denied.* may not write to {tmp_path}: build .* WORKER=0"):
        model_resolver.download(Model(str(tmp_path / "models" / "a"), (), ("Org/A", None)))


@pytest.mark.parametrize(
    ("name", "flags"),
    [(NAME, {"load_format": "runai_streamer"}), ("org/model-GGUF:Q4_K_M", {}), ("s3://bucket/model", {})],
)
def test_what_is_not_loaded_from_a_directory_is_left_to_vllm(
    machine: Machine, name: str, flags: dict[str, Any]
) -> None:
    assert machine.choose(name, **flags) == Model(name, (name,))


@pytest.mark.parametrize(
    ("flags", "offline"),
    [
        ({}, True),
        ({"tokenizer": "org/tokenizer"}, False),
        ({"tokenizer": str(model_store.ROOT)}, True),
        ({"enable_lora": True}, False),
        ({"spec_model": "org/draft"}, False),
        ({"generation_config": "vllm"}, True),
        ({"generation_config": "org/other"}, False),
        ({"trust_remote_code": True}, True),
    ],
)
def test_the_hub_is_not_asked_when_all_that_is_needed_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], offline: bool
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    model_resolver.enable_offline_mode(Model("org/model", ()), Given(flags))
    assert not constants.HF_HUB_OFFLINE
    model_resolver.enable_offline_mode(Model(str(tmp_path), ()), Given(flags))
    assert bool(constants.HF_HUB_OFFLINE) is offline


@pytest.mark.parametrize(
    ("file", "code", "elsewhere"),
    [
        ("config.json", "configuration_a.AConfig", False),
        ("config.json", "org/code--configuration_a.AConfig", True),
        ("tokenizer_config.json", ["org/code--tokenization_a.ATokenizer", None], True),
        ("preprocessor_config.json", "org/code--processing_a.AProcessor", True),
    ],
)
def test_the_hub_is_asked_for_code_of_another_repository_if_that_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, code: Any, elsewhere: bool
) -> None:
    (tmp_path / file).write_text(json.dumps({"auto_map": {"AutoSomething": code}}))

    for trusted in (True, False):
        monkeypatch.setenv("HF_HUB_OFFLINE", "")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        model_resolver.enable_offline_mode(Model(str(tmp_path), ()), Given({"trust_remote_code": trusted}))
        assert bool(constants.HF_HUB_OFFLINE) is not (elsewhere and trusted)


def test_two_models_do_not_share_a_directory() -> None:
    names = [("a/b", None), ("a/b", "v1"), ("a/b", "refs/pr/1"), ("a", "b"), ("a--b/c", None)]

    assert len({model_store.download_dir(Path(), name, revision) for name, revision in names}) == len(names)
