"""What one worker compiles, the next one uses: with the real vLLM, its compiler and its own keys."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

from tests.emulator_queue import EmulatorQueue
from tests.processes import VLLM_ENVIRONMENT, running

START_S = 300.0
COMPILED = {**VLLM_ENVIRONMENT, "ENFORCE_EAGER": "false"}


def libraries(directory: Path) -> dict[str, float]:
    """Return the libraries that inductor has compiled, with the time of each."""
    return {path.name: round(path.stat().st_mtime, 3) for path in directory.rglob("*.so")}


def test_a_worker_finds_on_the_volume_what_another_has_compiled(
    job_queue: EmulatorQueue, tiny_model: str, tmp_path: Path
) -> None:
    """The second one is that of `builder warm`, on a machine with an empty disk; its archive has everything."""
    volume, image = tmp_path / "volume", tmp_path / "compiled.tar"
    volume.mkdir()
    environment = {**COMPILED, "MODEL_NAME": tiny_model, "NETWORK_VOLUME": str(volume)}
    first = {**environment, **job_queue.environment, "COMPILE_CACHE_DIR": str(tmp_path / "first")}
    with running(["handler.py"], first, tmp_path / "log") as worker:
        worker.wait_for(lambda: "files added to" in worker.log, START_S)
        log = worker.log

    second = {**environment, "COMPILE_CACHE_DIR": str(tmp_path / "second")}
    with running(["-m", "builder", "warm", str(image)], second, tmp_path / "log") as builder:
        assert builder.popen.wait(START_S) == 0, builder.log
        warm_log = builder.log

    files = r"\d\d+ files \(\d+\.\d MB\)"
    assert re.search(rf"Caches \S+/first/\S+: 0 files \(0\.0 MB\) of earlier starts, {files} new", log)
    assert re.search(
        rf"Caches \S+/second/\S+ \({files} unpacked from \S+\.tar, waited \d+\.\d s\): {files} of earlier starts",
        warm_log,
    )
    compiled = libraries(tmp_path / "first")
    assert compiled
    assert libraries(tmp_path / "second") == compiled
    with tarfile.open(image) as archive:
        assert compiled.keys() <= {Path(name).name for name in archive.getnames()}
