"""What a start compiles is found by the next one: in its own directory, or through one file on the network volume."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from engine.backend import startup_plan
from engine.backend.startup_phases import CompileCache
from engine.startup import caches
from engine.startup.caches import DIRECTORIES, Caches

MODEL = "org/a model"
OLD = 1_000_000_000


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*DIRECTORIES, "VLLM_SERVERLESS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    monkeypatch.setattr(caches, "_PACK_AFTER_S", (0.0,))
    monkeypatch.setattr(caches, "_SETTLED_S", -1.0)


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    (tmp_path / "volume").mkdir()
    return tmp_path / "volume"


def compile_kernel(name: str, text: str = "code") -> None:
    """Write what a library would, where its variable says."""
    file = Path(os.environ[name]) / "a" / "kernel"
    file.parent.mkdir(parents=True)
    file.write_text(text)


def pack(started: Caches) -> None:
    """Have it done to the end."""
    started.pack_later()
    for thread in threading.enumerate():
        if thread.name == "pack caches":
            thread.join(100)


def test_every_library_has_a_directory_of_its_own_below_one(tmp_path: Path, volume: Path) -> None:
    started = Caches(tmp_path / "caches", volume, MODEL)

    places = {os.environ[name] for name in DIRECTORIES}
    assert len(places) == len(DIRECTORIES)
    assert {Path(place).parent for place in places} == {started.directory}
    assert started.directory.parent == tmp_path / "caches"


def test_what_the_user_says_of_a_library_stands(tmp_path: Path, volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty value says nothing: for vLLM, it would be the working directory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    monkeypatch.setenv("VLLM_CACHE_ROOT", "")

    started = Caches(tmp_path / "caches", volume, MODEL)

    assert os.environ["TRITON_CACHE_DIR"] == "/mine"
    assert os.environ["VLLM_CACHE_ROOT"] == str(started.directory / "vllm")


def test_by_default_they_are_in_the_users_cache(tmp_path: Path, volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    assert Caches(None, volume, MODEL).directory.parent == tmp_path / "cache/vllm-serverless/compiled"


def test_another_worker_finds_through_the_volume_what_one_has_compiled(
    tmp_path: Path, volume: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = Caches(tmp_path / "first", volume, MODEL)
    first.wait()
    compile_kernel("TRITON_CACHE_DIR")
    first.log_usage(None)
    pack(first)
    for name in DIRECTORIES:  # Those of the first worker.
        monkeypatch.delenv(name)

    second = Caches(tmp_path / "second", volume, MODEL)
    second.wait()
    second.log_usage(None)

    assert (second.directory / "triton/a/kernel").read_text() == "code"
    (archive,) = volume.rglob("*.tar")
    log = caplog.text
    assert f"{first.directory}: 0 files (0.0 MB) of earlier starts, 1 files (0.0 MB) new" in log
    assert f"1 files added to {archive} in" in log
    assert f"{second.directory} (1 files (0.0 MB) unpacked from {archive}, waited" in log
    assert "1 files (0.0 MB) of earlier starts, 0 files (0.0 MB) new" in log


def test_what_the_image_or_the_volume_has_is_not_packed_again(tmp_path: Path, volume: Path) -> None:
    directory = Caches(tmp_path / "caches", volume / "none", MODEL).directory
    baked = directory / "vllm" / "baked"
    baked.parent.mkdir()
    baked.write_text("of the image")
    os.utime(baked, (OLD, OLD))

    pack(Caches(tmp_path / "caches", volume, MODEL))

    assert list(volume.rglob("*.tar")) == []


def test_a_file_whose_time_is_a_tick_of_linux_clock_before_the_start_is_new(tmp_path: Path, volume: Path) -> None:
    before_s = time.time() - 0.01
    started = Caches(tmp_path / "caches", volume, MODEL)
    compile_kernel("TRITON_CACHE_DIR")
    os.utime(Path(os.environ["TRITON_CACHE_DIR"]) / "a" / "kernel", (before_s, before_s))

    pack(started)

    assert len(list(volume.rglob("*.tar"))) == 1


def test_models_have_a_file_each(tmp_path: Path, volume: Path) -> None:
    """So that a worker does not unpack what it cannot use."""
    for model in ("org/one", "other/one"):
        started = Caches(tmp_path / model, volume, model)
        (started.directory / "kernel").write_text("code")
        pack(started)

    assert len(list(volume.rglob("*.tar"))) == 2


def test_downloads_are_not_packed(tmp_path: Path, volume: Path) -> None:
    started = Caches(tmp_path / "caches", volume, MODEL)
    asset = started.directory / "vllm/assets/picture"
    asset.parent.mkdir(parents=True)
    asset.write_text("large")

    pack(started)

    assert list(volume.rglob("*.tar")) == []


def test_caches_on_the_volume_itself_are_not_packed(tmp_path: Path, volume: Path) -> None:
    del tmp_path
    started = Caches(volume / "caches", volume, MODEL)
    compile_kernel("VLLM_CACHE_ROOT")

    pack(started)

    assert list(volume.rglob("*.tar")) == []


def test_a_damaged_file_does_not_hinder_a_start_and_is_written_anew(
    tmp_path: Path, volume: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = Caches(tmp_path / "first", volume, MODEL)
    compile_kernel("TRITON_CACHE_DIR")
    pack(first)
    (archive,) = volume.rglob("*.tar")
    archive.write_bytes(b"no archive" * 100)

    second = Caches(tmp_path / "second", volume, MODEL)
    second.wait()

    assert capfd.readouterr().err.count(f"{archive} is damaged") == 1
    (second.directory / "new").write_text("code")
    pack(second)
    third = Caches(tmp_path / "third", volume, MODEL)
    third.wait()
    assert (third.directory / "new").read_text() == "code"


def test_an_unpacking_that_hangs_does_not_hinder_a_start(
    tmp_path: Path, volume: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = Caches(tmp_path / "first", volume, MODEL)
    compile_kernel("TRITON_CACHE_DIR")
    pack(first)
    (archive,) = volume.rglob("*.tar")
    archive.unlink()
    os.mkfifo(archive)  # Nobody writes to it: who reads waits.
    monkeypatch.setattr(caches, "_UNPACK_TIMEOUT_S", 0.2)

    second = Caches(tmp_path / "second", volume, MODEL)
    second.wait()

    assert f"{archive} was not unpacked within" in caplog.text


def test_a_directory_that_cannot_be_used_is_reported_once_and_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()

    started = Caches(tmp_path / "file", tmp_path / "nowhere", MODEL)
    started.wait()
    started.log_usage(None)
    pack(started)

    assert not DIRECTORIES.keys() & os.environ.keys()
    assert caplog.text.count("Set COMPILE_CACHE_DIR to a") == 1
    assert not (tmp_path / "nowhere").exists()


def test_instead_of_a_directory_that_cannot_be_used_the_volume_is(
    tmp_path: Path, volume: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All such workers use the same directory, and nothing is packed."""
    (tmp_path / "file").touch()

    started = Caches(tmp_path / "file", volume, MODEL)
    compile_kernel("TRITON_CACHE_DIR")
    pack(started)

    assert started.directory == volume / "compiled" / caches.key()
    assert (started.directory / "triton/a/kernel").is_file()
    assert caplog.text.count(f": using {started.directory}. Set COMPILE_CACHE_DIR to a") == 1
    assert list(volume.rglob("*.tar")) == []


def test_what_a_killed_unpacking_has_left_is_neither_packed_nor_counted(
    tmp_path: Path, volume: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    started = Caches(tmp_path / "caches", volume, MODEL)
    (started.directory / ".kernel.abcdefgh.partial").write_text("co")

    started.log_usage(None)
    pack(started)

    assert "0 files (0.0 MB) new" in caplog.text
    assert list(volume.rglob("*.tar")) == []


def test_without_a_volume_there_is_nothing_to_pack(tmp_path: Path) -> None:
    started = Caches(tmp_path / "caches", tmp_path / "nowhere", MODEL)
    compile_kernel("TRITON_CACHE_DIR")

    pack(started)

    assert not (tmp_path / "nowhere").exists()


def test_a_worker_that_ends_stops_packing(tmp_path: Path, volume: Path) -> None:
    started = Caches(tmp_path / "caches", volume, MODEL)
    with (started.directory / "large").open("wb") as large:
        large.truncate(3 << 30)
    started.pack_later()
    while not list(volume.rglob("*.partial")):
        time.sleep(0.001)

    started.close()
    pack(started)

    assert list(volume.rglob("*.tar")) == []
    assert subprocess.run(["/bin/pgrep", "-f", str(volume)], check=False, capture_output=True).stdout == b""


@pytest.mark.parametrize(
    ("change", "value"),
    [("_gpus", lambda: iter(["NVIDIA L4"])), ("_cpu_flags", lambda: "avx"), ("_version", lambda _: "9.9")],
)
def test_another_processor_or_another_version_has_another_directory(
    change: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = caches.key()

    monkeypatch.setattr(caches, change, value)

    assert caches.key() != before


@pytest.mark.parametrize(("listed", "name"), [(True, "L40S"), (False, "GPU")])
def test_a_gpu_is_known_without_cuda(listed: bool, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the driver's list; or, where a container does not see that, from its device."""
    (tmp_path / "nvidia0").touch()
    if listed:
        (tmp_path / "0000:01:00.0").mkdir()
        (tmp_path / "0000:01:00.0/information").write_text("Model: \t\t NVIDIA L40S\nIRQ:   \t\t 24\n")
    monkeypatch.setattr(caches, "_DRIVER_DIR", tmp_path)
    monkeypatch.setattr(caches, "_DEVICE_DIR", tmp_path)

    assert caches.key().split("-")[1:-1] == [name]


def test_with_a_gpu_the_host_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts with the same GPU have different processors, and their kernels are the same."""
    monkeypatch.setattr(caches, "_gpus", lambda: iter(["NVIDIA H100 80GB HBM3"] * 2))
    before = caches.key()

    monkeypatch.setattr(caches, "_cpu_flags", lambda: "avx")

    assert caches.key() == before
    assert "H100-80GB-HBM3" in before


@pytest.mark.parametrize(
    ("found", "told", "level"),
    [
        (CompileCache.USED, "; the compiled model was loaded", "INFO"),
        (CompileCache.EMPTY, "; the model was compiled", "INFO"),
        (
            CompileCache.UNLOADABLE,
            "; vLLM could not load the compiled model, as its log says, and has compiled it again",
            "WARNING",
        ),
        (None, " new", "INFO"),
    ],
)
def test_a_start_says_whether_it_could_use_the_compiled_model(
    found: CompileCache | None, told: str, level: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    Caches(tmp_path / "caches", tmp_path / "nowhere", MODEL).log_usage(found)

    (record,) = caplog.records
    assert record.getMessage().endswith(told)
    assert record.levelname == level


def test_a_volume_of_another_user_is_reported_with_what_to_do(
    tmp_path: Path, volume: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer of the system is made up: root, who runs many tests, may write everywhere."""
    caplog.set_level(logging.INFO)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != volume and access(path, mode))

    started = Caches(tmp_path / "caches", volume, MODEL)
    compile_kernel("TRITON_CACHE_DIR")
    started.log_usage(None)

    assert f"may not write to {volume}" in caplog.text


@pytest.mark.parametrize(
    ("package", "file", "names"),
    [
        ("vllm", "envs.py", ["VLLM_CACHE_ROOT", startup_plan.ENABLE]),
        ("vllm", "utils/deep_gemm.py", ["VLLM_CACHE_ROOT"]),
        ("vllm", "v1/worker/startup_plan.py", ["VLLM_CACHE_ROOT"]),
        ("torch", "_inductor/runtime/cache_dir_utils.py", ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"]),
    ],
)
def test_the_variables_are_those_of_the_libraries(package: str, file: str, names: list[str]) -> None:
    """Of those that a machine without a GPU has."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / file).read_text(encoding="utf-8")

    assert [name for name in names if name not in source] == []
