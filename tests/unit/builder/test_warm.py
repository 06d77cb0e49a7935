"""`warm` starts the worker and packs what it has compiled; here, a small program stands in for the worker."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from builder import warm
from builder.__main__ import main
from builder.errors import WorkerError

WORKER = """
import os, pathlib, sys
print("an answer")
if os.environ.get("COMPILES") == "0":
    sys.exit()
caches = pathlib.Path(os.environ["COMPILE_CACHE_DIR"], "key", "triton")
caches.mkdir(parents=True, exist_ok=True)
(caches / "kernel").write_text(" ".join(sys.argv[1:]))
sys.exit(int(os.environ.get("STATUS", "0")))
"""

KEY = ("-c", "print('key')")


@pytest.fixture(autouse=True)
def _worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(warm, "_HANDLER", tmp_path / "worker.py")
    monkeypatch.setattr(warm, "_KEY", KEY)
    monkeypatch.delenv("COMPILES", raising=False)
    monkeypatch.setenv("COMPILE_CACHE_DIR", str(tmp_path / "caches"))
    monkeypatch.delenv("STATUS", raising=False)


def packed(file: Path) -> dict[str, bytes]:
    with tarfile.open(file) as archive:
        return {one.name: content.read() for one in archive if (content := archive.extractfile(one)) is not None}


def test_what_the_worker_has_compiled_is_packed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Stale files of an earlier archive are not."""
    file = tmp_path / "out/compiled.tar"
    file.parent.mkdir()
    with tarfile.open(file, "w") as old:
        old.add(tmp_path / "worker.py", "old")

    assert main(["warm", str(file)]) == 0

    assert packed(file) == {"key/triton/kernel": f"--test_input {warm.JOB}".encode()}
    assert capfd.readouterr().out == f"{tmp_path / 'caches'}\n"
    assert list(file.parent.iterdir()) == [file]


def test_the_archive_can_be_stdout(tmp_path: Path) -> None:
    """So that a container needs no directory of the host. The worker's answer is not in it."""
    handler = str(tmp_path / "worker.py")
    code = f"from builder import __main__, warm; warm._HANDLER, warm._KEY = {handler!r}, {KEY!r}; __main__.main()"
    root = Path(__file__).parents[3]

    done = subprocess.run([sys.executable, "-c", code, "warm", "-"], cwd=root, capture_output=True, check=True)

    (tmp_path / "stdout.tar").write_bytes(done.stdout)
    assert packed(tmp_path / "stdout.tar").keys() == {"key/triton/kernel"}
    assert b"an answer" in done.stderr


def test_a_job_of_ones_own_is_run(tmp_path: Path) -> None:
    job = json.dumps({"input": {"openai_route": "/v1/embeddings"}})

    assert main(["warm", str(tmp_path / "file.tar"), "--job", job]) == 0

    assert packed(tmp_path / "file.tar") == {"key/triton/kernel": f"--test_input {job}".encode()}


def test_a_worker_that_fails_is_an_error_and_nothing_is_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STATUS", "1")

    assert main(["warm", str(tmp_path / "file.tar")]) == WorkerError.exit_code
    assert "the worker ended with 1, see above: nothing was packed" in capfd.readouterr().err
    assert not (tmp_path / "file.tar").exists()


def test_without_cache_dir_the_worker_and_the_builder_mean_the_same_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COMPILE_CACHE_DIR")
    monkeypatch.setenv("VLLM_SERVERLESS_CACHE", str(tmp_path / "own"))

    assert main(["warm"]) == 0

    assert capfd.readouterr().out == f"{tmp_path / 'own' / 'compiled'}\n"
    assert (tmp_path / "own/compiled/key/triton/kernel").is_file()


def test_only_what_this_worker_can_use_is_packed(tmp_path: Path) -> None:
    """Nothing of older versions, no downloads, and nothing incomplete."""
    for name in ("key of an older vLLM/kernel", "key/vllm/assets/picture", "key/triton/.kernel.abcdefgh.partial"):
        (tmp_path / "caches" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "caches" / name).touch()

    assert main(["warm", str(tmp_path / "file.tar")]) == 0

    assert packed(tmp_path / "file.tar").keys() == {"key/triton/kernel"}


def test_a_worker_that_compiles_nothing_is_an_error_and_an_earlier_archive_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMPILES", "0")
    (tmp_path / "file.tar").write_bytes(b"of an earlier call")

    assert main(["warm", str(tmp_path / "file.tar")]) == WorkerError.exit_code

    assert f"the worker has compiled nothing into {tmp_path / 'caches/key'}: nothing was" in capfd.readouterr().err
    assert (tmp_path / "file.tar").read_bytes() == b"of an earlier call"
    assert main(["warm"]) == 0, "nothing is to be packed"


def test_the_key_is_the_workers() -> None:
    from engine.startup import caches

    code = "from builder import warm; import subprocess, sys; subprocess.run([sys.executable, *warm._KEY])"
    root = Path(__file__).parents[3]

    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True, text=True)

    assert done.stdout == f"{caches.key()}\n"
