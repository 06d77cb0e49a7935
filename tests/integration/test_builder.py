"""The builder's download and verification, with the real hub client over HTTP, against a hub with injected faults."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from builder.__main__ import main
from builder.errors import EXIT_CODES
from builder.layout import MANIFEST, PARTIAL_DIR
from builder.manifest import Manifest, hash_files
from tests import model_hub
from tests.model_hub import COMMIT, Fault, Hub, Repository
from tests.processes import Process, running

pytestmark = pytest.mark.in_process

REPOSITORY = Path(__file__).parents[2]
REPO = "an-org/a-model"
TOKEN = "hf_the-secret-of-the-tests"  # noqa: S105
FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
BALLAST, BALLAST_BYTES = "ballast", 24_000_000
# The client writes chunks of this size.
CHUNK_BYTES = 10 << 20
# More than a chunk, so that some of the file is on the disk.
PAUSE_AT_BYTES = 15_000_000
WAIT_S = 240.0
OTHER_FILES = {
    "README.md": b"a page",
    ".gitattributes": b"*",
    "original/consolidated.00.pth": b"the same weights again",
    "pytorch_model.bin": b"and again",
    "pytorch_model.bin.index.json": b"{}",
    "training_args.bin": b"left by the training",
    "onnx/model.onnx": b"and again",
    "LICENSE": b"You may.",
}


def _split(model: Path) -> dict[str, bytes]:
    """The tiny model's files, with its weights in two shards and an index, as large models have them."""
    weights = (model / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", weights[:8])
    header = json.loads(weights[8 : 8 + length])
    header.pop("__metadata__", None)
    names = sorted(header)
    # The hub's client writes 10 MB at a time: a file must be larger to be interrupted in the middle.
    header[BALLAST] = {"dtype": "U8", "shape": [BALLAST_BYTES], "data_offsets": [0, BALLAST_BYTES]}
    files = {path.name: path.read_bytes() for path in model.iterdir() if path.name != "model.safetensors"}
    shard_of = {}
    for shard, part in ((FIRST, names[: len(names) // 2]), (SECOND, [*names[len(names) // 2 :], BALLAST])):
        entries, data = {}, b""
        for name in part:
            start, end = header[name]["data_offsets"]
            tensor = bytes(end) if name == BALLAST else weights[8 + length + start : 8 + length + end]
            entries[name] = {**header[name], "data_offsets": [len(data), len(data) + len(tensor)]}
            data += tensor
            shard_of[name] = shard
        head = json.dumps(entries).encode()
        files[shard] = struct.pack("<Q", len(head)) + head + data
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": shard_of}).encode()
    return files


@pytest.fixture(scope="module")
def files(tiny_model: str) -> dict[str, bytes]:
    return _split(Path(tiny_model))


@pytest.fixture
def hub(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with model_hub.running() as hub:
        hub.repositories[REPO] = Repository({**files, **OTHER_FILES})
        for name, value in hub.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        yield hub


def test_the_older_name_of_the_token_works_too(
    hub: Hub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories[REPO].token = TOKEN
    monkeypatch.setenv("HF_TOKEN", "None")
    assert download(tmp_path) == 3
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", TOKEN)

    assert download(tmp_path) == 0
    assert_complete(tmp_path, files)


@pytest.fixture
def broken(hub: Hub) -> Callable[..., None]:
    """Injects faults into the next requests for a path."""

    def add(path: str, *faults: Fault) -> None:
        hub.repositories[REPO].faults[path] = deque(faults)

    return add


def download(directory: Path, *options: str) -> int:
    return main(["download", REPO, str(directory), "--attempts=3", *options])


def assert_complete(directory: Path, files: dict[str, bytes]) -> None:
    existing = {str(path.relative_to(directory)) for path in directory.rglob("*")}
    assert existing == {*files, "LICENSE", MANIFEST}
    assert all((directory / name).read_bytes() == content for name, content in files.items())
    assert main(["verify", str(directory)]) == 0


def assert_no_model(directory: Path) -> None:
    """No loader accepts it: it has neither a manifest nor a configuration."""
    assert not (directory / MANIFEST).exists()
    assert not (directory / "config.json").exists()


def has_the_others(directory: Path, files: dict[str, bytes]) -> bool:
    """Whether all files that are downloaded in parallel with the second shard are there."""
    return all((directory / name).is_file() for name in (*files, "LICENSE") if name not in (SECOND, "config.json"))


def all_bytes(files: dict[str, bytes]) -> int:
    return sum(map(len, files.values())) + len(OTHER_FILES["LICENSE"])


def last_message(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("builder: ")]
    return lines[-1].removeprefix("builder: ")


def test_a_download_is_complete_verified_and_has_only_the_required_files(
    hub: Hub, files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert download(tmp_path / "model", "--revision", "main") == 0
    assert capsys.readouterr().out == f"{REPO}@{COMMIT}\n"
    assert_complete(tmp_path / "model", files)
    manifest = Manifest.read(tmp_path / "model")
    assert manifest is not None
    assert (manifest.repository, manifest.revision, manifest.commit) == (REPO, "main", COMMIT)
    assert {"python", "huggingface_hub", "transformers"} <= manifest.made_by.keys()
    assert not any("onnx" in request or "pytorch" in request for request in hub.requests)


def test_existing_files_are_not_downloaded_again(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    assert download(tmp_path) == 0
    sent = hub.sent_bytes
    assert download(tmp_path, "--revision", COMMIT) == 0
    assert hub.sent_bytes == sent
    assert_complete(tmp_path, files)


def test_broken_connections_are_resumed(
    hub: Hub, files: dict[str, bytes], broken: Callable[..., None], tmp_path: Path
) -> None:
    broken(SECOND, Fault(cut_at=15_000_000), Fault(cut_at=0), Fault(cut_at=12_000_000))
    assert download(tmp_path) == 0
    assert_complete(tmp_path, files)
    cut = 15_000_000 + 12_000_000
    assert hub.sent_bytes == all_bytes(files) + cut - 2 * CHUNK_BYTES


def test_transient_errors_are_retried(files: dict[str, bytes], broken: Callable[..., None], tmp_path: Path) -> None:
    broken("", Fault(503), Fault(500))
    broken(FIRST, Fault(503), Fault(429, {"Retry-After": "1"}), Fault(502))
    broken("config.json", Fault(504))
    assert download(tmp_path) == 0
    assert_complete(tmp_path, files)


def test_a_slow_download_completes(files: dict[str, bytes], broken: Callable[..., None], tmp_path: Path) -> None:
    broken(SECOND, Fault(piece_s=0.005))
    assert download(tmp_path) == 0
    assert_complete(tmp_path, files)


def test_a_hub_that_stays_down_is_reported_and_the_next_run_resumes(
    hub: Hub, files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories[REPO].always[SECOND] = Fault(503, until=lambda: has_the_others(tmp_path, files))
    assert download(tmp_path) == 6
    assert last_message(capsys) == f"{hub.url} answers 503: try again later"
    assert_no_model(tmp_path)
    hub.repositories[REPO].always.clear()
    sent = hub.sent_bytes
    assert download(tmp_path) == 0
    assert hub.sent_bytes - sent <= len(files[SECOND]) + len(files["config.json"])
    assert_complete(tmp_path, files)


def test_a_file_with_a_wrong_hash_is_downloaded_again(
    files: dict[str, bytes], broken: Callable[..., None], tmp_path: Path
) -> None:
    broken(FIRST, Fault(flip=True))
    broken("tokenizer.json", Fault(flip=True))
    assert download(tmp_path) == 0
    assert_complete(tmp_path, files)


@pytest.mark.parametrize("path", [FIRST, "config.json"])
def test_a_hash_that_stays_wrong_is_reported_and_the_file_discarded(
    hub: Hub, tmp_path: Path, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories[REPO].always[path] = Fault(flip=True)
    assert download(tmp_path) == 4
    assert last_message(capsys) == f"{path}: the hub sent content with a wrong hash 3 times; it was discarded"
    assert_no_model(tmp_path)
    assert not (tmp_path / path).exists()
    assert not (tmp_path / PARTIAL_DIR / path).exists()


def test_a_gated_model_needs_access_and_a_token(
    hub: Hub,
    files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.repositories[REPO].gated, hub.repositories[REPO].token = True, TOKEN
    assert download(tmp_path) == 3
    assert len(hub.requests) == len(set(hub.requests)), "permanent errors are not retried"
    assert last_message(capsys) == (
        f"{REPO} is gated: ask for access at {hub.url}/{REPO}, and set HF_TOKEN to a token of that account "
        "(it is not set)"
    )
    assert_no_model(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_of-somebody-else")
    assert download(tmp_path) == 3
    assert last_message(capsys).endswith("and set HF_TOKEN to a token of that account")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert download(tmp_path) == 0
    assert_complete(tmp_path, files)
    assert hub.tokens_at_cdn == []
    output = capsys.readouterr()
    assert TOKEN not in output.out + output.err
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["an-org/another"],
            "there is no model an-org/another at {url}/an-org/another, or it is private and HF_TOKEN",
        ),
        ([REPO, "--revision=v9"], REPO + " has no revision v9: see {url}/" + REPO + "/commits/main"),
        (["a b"], "'a b' is not a model name such as organization/name"),
    ],
)
def test_a_missing_model_is_reported_and_no_directory_made(
    hub: Hub, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["download", arguments[0], str(tmp_path / "model"), *arguments[1:]]) == 3
    assert last_message(capsys).startswith(message.format(url=hub.url))
    assert not (tmp_path / "model").exists()


def test_a_repository_without_weights_is_refused(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repositories["an-org/data"] = Repository({"config.json": b"{}", "model.gguf": b"GGUF"})
    assert main(["download", "an-org/data", str(tmp_path)]) == 4
    assert last_message(capsys) == "an-org/data has no weights that vLLM loads (safetensors or PyTorch)"


@pytest.mark.parametrize("path", ["../escaped.json", "/etc/escaped.json", "a/../../escaped.json"])
def test_a_repository_with_an_unsafe_path_is_refused(
    hub: Hub, tmp_path: Path, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories[REPO].files[path] = b"{}"
    assert download(tmp_path / "model") == 3
    assert last_message(capsys) == f"{REPO} has a file with an unsafe path: {path!r}"
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_hub_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert main(["download", REPO, str(tmp_path), "--attempts=2"]) == 6
    assert last_message(capsys) == "http://127.0.0.1:9 cannot be reached: try again later"


def test_a_login_page_instead_of_the_hubs_answer_is_reported(
    hub: Hub, broken: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken("", Fault(body=b"<html>Log in to the network"))
    assert download(tmp_path / "model") == 3
    assert last_message(capsys).startswith(f"{hub.url} does not answer as the hub does")
    assert not (tmp_path / "model").exists()


def test_a_file_that_is_too_large_for_http_is_refused_before_the_download(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories[REPO].sizes[SECOND] = 60_000_000_000
    assert download(tmp_path) == 4
    assert last_message(capsys).startswith(
        f"{SECOND} of {REPO} has 60 GB, and the hub serves files above 50 GB only over the Xet protocol: use `hf"
    )
    assert hub.sent_bytes == 0


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_reported_and_no_lock_is_left(
    hub: Hub,
    tmp_path: Path,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A lock file that merely exists would outlive a killed process, and later ones would wait forever."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    hub.repositories[REPO].always["config.json"] = Fault(503)
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert download(tmp_path) == 6
    assert f"the disk of {tmp_path} does not support locks" in capsys.readouterr().err
    hub.repositories[REPO].always.clear()
    assert download(tmp_path) == 0
    assert main(["verify", str(tmp_path)]) == 0


def test_a_directory_with_other_files_is_refused_and_not_changed(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    assert download(tmp_path) == 2
    assert last_message(capsys) == f"{tmp_path} has other files (thesis.txt): use a new or empty directory"
    assert (tmp_path / "thesis.txt").read_text() == "ten years of work"
    assert hub.sent_bytes == 0


def test_another_commit_does_not_replace_a_complete_model(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert download(tmp_path) == 0
    hub.repositories[REPO].commit = "d" * 40
    assert download(tmp_path) == 2
    assert last_message(capsys) == (
        f"{tmp_path} has {REPO} at {COMMIT}, not {REPO} at {'d' * 40}: use another directory, or --update"
    )


def test_an_update_downloads_only_changes_and_is_no_model_until_it_is_complete(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    assert download(tmp_path) == 0
    changed = {**files, "generation_config.json": b'{"temperature": 0.5}'}
    hub.repositories[REPO] = Repository({**changed, **OTHER_FILES}, commit="d" * 40)
    hub.repositories[REPO].always["generation_config.json"] = Fault(503)
    assert download(tmp_path, "--update") == 6
    assert_no_model(tmp_path)
    hub.repositories[REPO].always.clear()
    sent = hub.sent_bytes
    assert download(tmp_path, "--update") == 0
    assert hub.sent_bytes - sent <= len(changed["generation_config.json"]) + len(files["config.json"])
    assert_complete(tmp_path, changed)


def test_an_interrupted_download_of_an_older_commit_becomes_the_new_commit(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repositories[REPO].files["old.json"] = b"{}"
    hub.repositories[REPO].always[SECOND] = Fault(503, until=(tmp_path / "old.json").exists)
    assert download(tmp_path) == 6
    changed = {**files, "generation_config.json": b'{"temperature": 0.5}'}
    hub.repositories[REPO] = Repository({**changed, **OTHER_FILES}, commit="d" * 40)
    assert download(tmp_path) == 0
    assert_complete(tmp_path, changed)


def _in_another_process(directory: Path, log: Path) -> AbstractContextManager[Process]:
    return running(["-m", "builder", "download", REPO, str(directory), "--attempts=3"], {}, log)


def test_a_killed_download_is_no_model_and_the_next_one_resumes(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    """The hub pauses in the middle of a file until the test is over, so that the kill always comes first."""
    model = tmp_path / "model"
    part = model / PARTIAL_DIR / SECOND
    hub.repositories[REPO].always[SECOND] = Fault(pause_at=PAUSE_AT_BYTES, until=lambda: False)
    with _in_another_process(model, tmp_path / "log") as process:
        process.wait_for(
            lambda: has_the_others(model, files) and part.exists() and part.stat().st_size >= CHUNK_BYTES, WAIT_S
        )
        process.popen.send_signal(signal.SIGKILL)
        assert process.popen.wait(WAIT_S) == -signal.SIGKILL
    assert_no_model(model)
    assert main(["verify", str(model)]) == 4
    kept = part.stat().st_size
    hub.repositories[REPO].always.clear()
    sent = hub.sent_bytes
    assert download(model) == 0
    assert kept >= CHUNK_BYTES
    assert hub.sent_bytes - sent <= len(files[SECOND]) - kept + len(files["config.json"])
    assert_complete(model, files)


def test_two_processes_download_a_model_once(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    """The hub pauses in the middle of a file until one process has logged that it waits."""
    model, logs = tmp_path / "model", [tmp_path / "one", tmp_path / "other"]

    def waiting() -> int:
        return sum("another process is downloading" in log.read_text(encoding="utf-8") for log in logs if log.exists())

    hub.repositories[REPO].always[SECOND] = Fault(pause_at=PAUSE_AT_BYTES, until=lambda: waiting() > 0)
    with _in_another_process(model, logs[0]) as one, _in_another_process(model, logs[1]) as other:
        assert [process.popen.wait(WAIT_S) for process in (one, other)] == [0, 0], one.log + other.log
    assert hub.sent_bytes == all_bytes(files)
    assert waiting() == 1
    assert_complete(model, files)


@pytest.fixture
def small_disk(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a shell command with `$disk`, a disk of `size` MB that only this command sees."""

    def run(size: int, command: str) -> subprocess.CompletedProcess[str]:
        disk = tmp_path / "disk"
        disk.mkdir(exist_ok=True)
        script = f"mount -t tmpfs -o size={size}m small {disk} && {command}"
        return subprocess.run(
            # timeout(1) also ends the processes that the command has started.
            [
                "/usr/bin/timeout",
                "--kill-after=5",
                str(WAIT_S),
                "/usr/bin/unshare",
                "--map-root-user",
                "--mount",
                "sh",
                "-c",
                script,
            ],
            cwd=REPOSITORY,
            env={**os.environ, "disk": str(disk), "python": sys.executable},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_a_disk_that_is_too_small_is_reported_before_the_download(
    hub: Hub, small_disk: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    ran = small_disk(16, f"$python -m builder download {REPO} $disk/model; code=$?; ls -A $disk/model; exit $code")
    assert ran.returncode == 5
    assert "an-org/a-model needs 0.03 GB more, but" in ran.stderr.splitlines()[-1]
    assert hub.sent_bytes == 0


def test_a_disk_that_fills_up_is_reported_and_partial_files_are_kept(
    hub: Hub, small_disk: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Another program fills it after the download has checked the space; the hub pauses until then."""
    full = tmp_path / "full"
    hub.repositories[REPO].always[SECOND] = Fault(pause_at=PAUSE_AT_BYTES, until=full.exists)
    ran = small_disk(
        48,
        f"($python -m builder download {REPO} $disk/model & loading=$!; "
        f"until [ -s $disk/model/{PARTIAL_DIR}/{SECOND} ] || ! kill -0 $loading; do sleep 0.05; done; "
        f"dd if=/dev/zero of=$disk/other bs=64k 2>/dev/null; touch {full}; "
        "wait $loading; code=$?; ls -A $disk/model; exit $code)",
    )
    assert ran.returncode == 5, ran
    assert ran.stderr.splitlines()[-1] == (
        "builder: the disk is full: free some space and run the command again to resume"
    )
    existing = ran.stdout.split()
    assert MANIFEST not in existing
    assert "config.json" not in existing
    assert PARTIAL_DIR in existing


@pytest.fixture
def model(files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A complete model that is not from the hub, with a manifest."""
    directory = tmp_path / "model"
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    assert main(["manifest", str(directory)]) == 0
    capsys.readouterr()
    return directory


def _truncate(model: Path) -> None:
    os.truncate(model / FIRST, 1000)


def _shorten(model: Path) -> None:
    os.truncate(model / SECOND, (model / SECOND).stat().st_size - 1)


def _flip(model: Path) -> None:
    content = bytearray((model / SECOND).read_bytes())
    content[-1] ^= 1
    (model / SECOND).write_bytes(content)


def _remove(model: Path) -> None:
    (model / SECOND).unlink()


def _add(model: Path) -> None:
    shutil.copy(model / SECOND, model / "model-00003-of-00002.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, f"{FIRST}: truncated, 1,000 bytes instead of"),
        (_flip, f"{SECOND}: changed, its sha256 is"),
        (_remove, f"{SECOND}: missing"),
        (_add, "model-00003-of-00002.safetensors: not in the manifest"),
    ],
)
def test_verify_names_each_damaged_file(
    model: Path, damage: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(model)
    assert main(["verify", str(model)]) == 4
    assert last_message(capsys).startswith(message)


def test_verify_names_swapped_files(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two files of the same size: only their contents differ."""
    one, other = (model / "a.txt"), (model / "b.txt")
    one.write_text("one")
    other.write_text("two")
    assert main(["manifest", str(model)]) == 0
    one.write_text("two")
    other.write_text("one")
    capsys.readouterr()
    assert main(["verify", str(model)]) == 4
    errors = capsys.readouterr().err
    assert "a.txt: swapped, it has the content of b.txt" in errors
    assert "b.txt: swapped, it has the content of a.txt" in errors


def test_verify_reports_all_problems_at_once(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A truncated file hides neither a flipped bit nor two swapped shards."""
    cut, flipped = model / "tokenizer.json", model / "generation_config.json"
    os.truncate(cut, 100)
    content = bytearray(flipped.read_bytes())
    content[-2] ^= 1
    flipped.write_bytes(content)
    (model / FIRST).rename(model / "kept")
    (model / SECOND).rename(model / FIRST)
    (model / "kept").rename(model / SECOND)
    (model / "LICENSE").write_text("unexpected")

    assert main(["verify", str(model)]) == 4
    errors = capsys.readouterr().err
    assert "tokenizer.json: truncated, 100 bytes instead of " in errors
    assert "generation_config.json: changed, its sha256 is " in errors
    assert f"{FIRST}: swapped, it has the content of {SECOND}" in errors
    assert f"{SECOND}: swapped, it has the content of {FIRST}" in errors
    assert "LICENSE: not in the manifest" in errors


@pytest.mark.usefixtures("hub")
def test_a_new_manifest_keeps_the_origin_if_the_files_are_unchanged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert download(tmp_path, "--revision=main") == 0
    before = Manifest.read(tmp_path)
    assert before is not None
    assert main(["manifest", str(tmp_path)]) == 0
    after = Manifest.read(tmp_path)
    assert after is not None
    assert (after.repository, after.revision, after.commit) == (REPO, "main", COMMIT)
    assert after.files == before.files

    _flip(tmp_path)
    assert main(["manifest", str(tmp_path)]) == 4
    assert last_message(capsys) == (
        f"{tmp_path} was {REPO} at {COMMIT}, but files have changed ({SECOND}): "
        f"download the model again, or remove {MANIFEST} to write a new one for the current files"
    )
    assert Manifest.read(tmp_path) == after


def test_help_lists_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"{code:3}  {meaning}" in shown for code, meaning in EXIT_CODES.items())


@pytest.mark.usefixtures("hub")
def test_verify_compares_with_the_hub_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A manifest that was changed together with a file matches it, but not the hub."""
    assert download(tmp_path) == 0
    for name in ("generation_config.json", FIRST):
        content = bytearray((tmp_path / name).read_bytes())
        content[-2] ^= 1
        (tmp_path / name).write_bytes(content)
    manifest = Manifest.read(tmp_path)
    assert manifest is not None
    Manifest.of(
        hash_files(tmp_path, [file.path for file in manifest.files]), manifest.repository, manifest.revision, COMMIT
    ).write(tmp_path)
    assert main(["verify", str(tmp_path)]) == 4
    errors = capsys.readouterr().err
    assert f"{FIRST}: differs from {REPO} at {COMMIT}" in errors
    assert f"generation_config.json: differs from {REPO} at {COMMIT}" in errors


@pytest.mark.usefixtures("hub")
def test_verify_reports_an_unreachable_hub_and_skips_it_with_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert download(tmp_path) == 0
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert main(["verify", str(tmp_path)]) == 6
    assert "cannot be reached" in last_message(capsys)
    assert main(["verify", str(tmp_path), "--offline"]) == 0
    assert re.fullmatch(r"\d+ files, [\d,]+ bytes at \d+\.\d\d GB/s: OK\n", capsys.readouterr().out)


def _no_index_entry(model: Path) -> None:
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"]["a.tensor"] = FIRST
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def _no_shard(model: Path) -> None:
    (model / SECOND).unlink()


def _no_header(model: Path) -> None:
    (model / FIRST).write_bytes(b"\xff" * 1000)


def _no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{")


def _no_config(model: Path) -> None:
    (model / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_index_entry, f"{FIRST}: missing a.tensor, which model.safetensors.index.json names (1 in total)"),
        (_no_shard, f"{SECOND}: missing, but named in model.safetensors.index.json"),
        (_truncate, f"{FIRST}: truncated, or not a safetensors file (1,000 bytes)"),
        (_shorten, f"{SECOND}: truncated, "),
        (_no_header, f"{FIRST}: truncated, or not a safetensors file (1,000 bytes)"),
        (_no_tokenizer, "{model}: the tokenizer does not load: "),
        (_no_config, "{model} has no config.json"),
    ],
)
def test_an_incomplete_model_gets_no_manifest(
    model: Path, damage: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / MANIFEST).unlink()
    damage(model)
    assert main(["manifest", str(model)]) == 4
    assert last_message(capsys).startswith(message.format(model=model))
    assert not (model / MANIFEST).exists()


def test_a_directory_without_a_manifest_is_not_verified(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / MANIFEST).unlink()
    assert main(["verify", str(model)]) == 4
    assert last_message(capsys).startswith(f"{model} has no manifest: if its download was interrupted")
    (model / MANIFEST).write_text('{"format": 2}')
    assert main(["verify", str(model)]) == 4
    assert "is not a valid manifest of this version" in last_message(capsys)
