"""The builder's download and its checks, with the real hub client over HTTP, against a hub that breaks."""

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
from builder.manifest import NAME, UNFINISHED, Manifest, hashed
from tests import model_hub
from tests.model_hub import COMMIT, Fault, Hub, Repository
from tests.processes import Process, running

REPOSITORY = Path(__file__).parents[2]
REPO = "an-org/a-model"
TOKEN = "hf_the-secret-of-the-tests"  # noqa: S105
FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
BALLAST, BALLAST_BYTES = "ballast", 24_000_000
KEPT_BYTES = 10 << 20
# More than the client keeps at once, so that some is on the disk; it is asked for in one go then.
PAUSE_AT_BYTES = 15_000_000
WAIT_S = 240.0
BESIDE = {
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
    whole = (model / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    header.pop("__metadata__", None)
    names = sorted(header)
    # The hub's client hands on 10 MB at a time: what is to break in the middle has to be larger.
    header[BALLAST] = {"dtype": "U8", "shape": [BALLAST_BYTES], "data_offsets": [0, BALLAST_BYTES]}
    files = {path.name: path.read_bytes() for path in model.iterdir() if path.name != "model.safetensors"}
    places = {}
    for shard, part in ((FIRST, names[: len(names) // 2]), (SECOND, [*names[len(names) // 2 :], BALLAST])):
        entries, data = {}, b""
        for name in part:
            start, end = header[name]["data_offsets"]
            tensor = bytes(end) if name == BALLAST else whole[8 + length + start : 8 + length + end]
            entries[name] = {**header[name], "data_offsets": [len(data), len(data) + len(tensor)]}
            data += tensor
            places[name] = shard
        head = json.dumps(entries).encode()
        files[shard] = struct.pack("<Q", len(head)) + head + data
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": places}).encode()
    return files


@pytest.fixture(scope="module")
def files(tiny_model: str) -> dict[str, bytes]:
    return _split(Path(tiny_model))


@pytest.fixture
def hub(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with model_hub.running() as hub:
        hub.repositories[REPO] = Repository({**files, **BESIDE})
        for name, value in hub.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        yield hub


def test_the_token_is_found_by_its_older_name_too(
    hub: Hub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories[REPO].token = TOKEN
    monkeypatch.setenv("HF_TOKEN", "None")
    assert download(tmp_path) == 3
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", TOKEN)

    assert download(tmp_path) == 0
    assert_whole(tmp_path, files)


@pytest.fixture
def broken(hub: Hub) -> Callable[..., None]:
    """Let the next requests of a path meet these faults."""

    def add(path: str, *faults: Fault) -> None:
        hub.repositories[REPO].faults[path] = deque(faults)

    return add


def download(directory: Path, *options: str) -> int:
    return main(["download", REPO, str(directory), "--attempts=3", *options])


def assert_whole(directory: Path, files: dict[str, bytes]) -> None:
    held = {str(path.relative_to(directory)) for path in directory.rglob("*")}
    assert held == {*files, "LICENSE", NAME}
    assert all((directory / name).read_bytes() == content for name, content in files.items())
    assert main(["verify", str(directory)]) == 0


def assert_no_model(directory: Path) -> None:
    """Nothing takes it for a model: it has neither a manifest nor a configuration."""
    assert not (directory / NAME).exists()
    assert not (directory / "config.json").exists()


def has_the_others(directory: Path, files: dict[str, bytes]) -> bool:
    """Whether all is there that is loaded at the same time as the second shard."""
    return all((directory / name).is_file() for name in (*files, "LICENSE") if name not in (SECOND, "config.json"))


def all_bytes(files: dict[str, bytes]) -> int:
    return sum(map(len, files.values())) + len(BESIDE["LICENSE"])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("builder: ")]
    return lines[-1].removeprefix("builder: ")


def test_a_download_is_whole_verified_and_holds_only_what_serving_needs(
    hub: Hub, files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert download(tmp_path / "model", "--revision", "main") == 0
    assert capsys.readouterr().out == f"{REPO}@{COMMIT}\n"
    assert_whole(tmp_path / "model", files)
    manifest = Manifest.read(tmp_path / "model")
    assert manifest is not None
    assert (manifest.repository, manifest.revision, manifest.commit) == (REPO, "main", COMMIT)
    assert {"python", "huggingface_hub", "transformers"} <= manifest.made_by.keys()
    assert not any("onnx" in request or "pytorch" in request for request in hub.requests)


def test_what_is_there_already_is_not_loaded_again(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    assert download(tmp_path) == 0
    sent = hub.sent_bytes
    assert download(tmp_path, "--revision", COMMIT) == 0
    assert hub.sent_bytes == sent
    assert_whole(tmp_path, files)


def test_cut_connections_go_on_where_they_broke(
    hub: Hub, files: dict[str, bytes], broken: Callable[..., None], tmp_path: Path
) -> None:
    broken(SECOND, Fault(cut_at=15_000_000), Fault(cut_at=0), Fault(cut_at=12_000_000))
    assert download(tmp_path) == 0
    assert_whole(tmp_path, files)
    cut = 15_000_000 + 12_000_000
    assert hub.sent_bytes == all_bytes(files) + cut - 2 * KEPT_BYTES


def test_refusals_that_pass_are_tried_again(
    files: dict[str, bytes], broken: Callable[..., None], tmp_path: Path
) -> None:
    broken("", Fault(503), Fault(500))
    broken(FIRST, Fault(503), Fault(429, {"Retry-After": "1"}), Fault(502))
    broken("config.json", Fault(504))
    assert download(tmp_path) == 0
    assert_whole(tmp_path, files)


def test_slow_bytes_are_waited_for(files: dict[str, bytes], broken: Callable[..., None], tmp_path: Path) -> None:
    broken(SECOND, Fault(piece_s=0.005))
    assert download(tmp_path) == 0
    assert_whole(tmp_path, files)


def test_a_hub_that_stays_down_is_told_and_the_next_run_goes_on(
    hub: Hub, files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories[REPO].always[SECOND] = Fault(503, until=lambda: has_the_others(tmp_path, files))
    assert download(tmp_path) == 6
    assert one_line(capsys) == (
        f"{hub.url} answers 503, also after several tries: run it again later, it goes on from where it stopped"
    )
    assert_no_model(tmp_path)
    hub.repositories[REPO].always.clear()
    sent = hub.sent_bytes
    assert download(tmp_path) == 0
    assert hub.sent_bytes - sent <= len(files[SECOND]) + len(files["config.json"])
    assert_whole(tmp_path, files)


def test_a_wrong_hash_is_loaded_anew(files: dict[str, bytes], broken: Callable[..., None], tmp_path: Path) -> None:
    broken(FIRST, Fault(flip=True))
    broken("tokenizer.json", Fault(flip=True))
    assert download(tmp_path) == 0
    assert_whole(tmp_path, files)


@pytest.mark.parametrize("path", [FIRST, "config.json"])
def test_a_hash_that_stays_wrong_is_told_and_nothing_of_it_kept(
    hub: Hub, tmp_path: Path, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories[REPO].always[path] = Fault(flip=True)
    assert download(tmp_path) == 4
    assert one_line(capsys) == f"{path}: the hub sent something else than it announces, 3 times; nothing was kept"
    assert_no_model(tmp_path)
    assert not (tmp_path / path).exists()
    assert not (tmp_path / UNFINISHED / path).exists()


def test_a_gated_model_needs_access_and_a_token(
    hub: Hub,
    files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.repositories[REPO].gated, hub.repositories[REPO].token = True, TOKEN
    assert download(tmp_path) == 3
    assert len(hub.requests) == len(set(hub.requests)), "what cannot pass is not tried again"
    assert one_line(capsys) == (
        f"{REPO} is gated: ask for access at {hub.url}/{REPO}, and set HF_TOKEN, which is not set, "
        "to a token of that account"
    )
    assert_no_model(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_of-somebody-else")
    assert download(tmp_path) == 3
    assert one_line(capsys).endswith("and set HF_TOKEN to a token of that account")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert download(tmp_path) == 0
    assert_whole(tmp_path, files)
    assert hub.tokens_at_cdn == []
    told = capsys.readouterr()
    assert TOKEN not in told.out + told.err
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["an-org/another"],
            "there is no model an-org/another at {url}/an-org/another, or it is private and HF_TOKEN",
        ),
        ([REPO, "--revision=v9"], REPO + " has no revision v9: see {url}/" + REPO + "/commits/main"),
        (["a b"], "'a b' is not the name of a model: it looks like organization/name"),
    ],
)
def test_what_is_not_there_is_told_and_no_directory_made(
    hub: Hub, tmp_path: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["download", arguments[0], str(tmp_path / "model"), *arguments[1:]]) == 3
    assert one_line(capsys).startswith(told.format(url=hub.url))
    assert not (tmp_path / "model").exists()


def test_a_repository_without_weights_is_refused(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repositories["an-org/data"] = Repository({"config.json": b"{}", "model.gguf": b"GGUF"})
    assert main(["download", "an-org/data", str(tmp_path)]) == 4
    assert one_line(capsys) == "an-org/data holds no weights that vLLM loads (safetensors or PyTorch)"


@pytest.mark.parametrize("path", ["../escaped.json", "/etc/escaped.json", "a/../../escaped.json"])
def test_no_file_leaves_the_directory(hub: Hub, tmp_path: Path, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repositories[REPO].files[path] = b"{}"
    assert download(tmp_path / "model") == 3
    assert one_line(capsys) == f"{REPO} has a file that would not stay in its directory: {path!r}"
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_is_not_there_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert main(["download", REPO, str(tmp_path), "--attempts=2"]) == 6
    assert one_line(capsys).startswith("http://127.0.0.1:9 cannot be reached, also after several tries")


def test_a_portals_page_in_the_place_of_the_hubs_answer_is_told(
    hub: Hub, broken: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken("", Fault(body=b"<html>Log in to the network"))
    assert download(tmp_path / "model") == 3
    assert one_line(capsys).startswith(f"{hub.url} answers with something that is not the hub's: see what is there")
    assert not (tmp_path / "model").exists()


def test_a_file_that_the_client_cannot_load_is_refused_before_anything_is_loaded(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories[REPO].sizes[SECOND] = 60_000_000_000
    assert download(tmp_path) == 4
    assert one_line(capsys).startswith(
        f"{SECOND} of {REPO} has 60 GB, and the hub gives files above 50 GB over the Xet protocol alone: load the"
    )
    assert hub.sent_bytes == 0


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_told_and_leaves_none_behind(
    hub: Hub,
    tmp_path: Path,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A file in the place of a lock would outlive a process that is killed, and the next ones would wait for ever."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    hub.repositories[REPO].always["config.json"] = Fault(503)
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert download(tmp_path) == 6
    assert f"the disk of {tmp_path} has no locks: let one process at a time" in capsys.readouterr().err
    hub.repositories[REPO].always.clear()
    assert download(tmp_path) == 0
    assert main(["verify", str(tmp_path)]) == 0


def test_a_directory_that_holds_something_else_is_left_alone(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    assert download(tmp_path) == 2
    assert one_line(capsys) == f"{tmp_path} holds something else (thesis.txt): name a new or an empty one"
    assert (tmp_path / "thesis.txt").read_text() == "ten years of work"
    assert hub.sent_bytes == 0


def test_another_commit_does_not_go_over_a_whole_model(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert download(tmp_path) == 0
    hub.repositories[REPO].commit = "d" * 40
    assert download(tmp_path) == 2
    assert one_line(capsys) == (
        f"{tmp_path} holds {REPO} at {COMMIT}, not {REPO} at {'d' * 40}: name another directory, or --update it"
    )


def test_an_update_loads_what_has_changed_and_is_no_model_until_it_is_whole(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    assert download(tmp_path) == 0
    changed = {**files, "generation_config.json": b'{"temperature": 0.5}'}
    hub.repositories[REPO] = Repository({**changed, **BESIDE}, commit="d" * 40)
    hub.repositories[REPO].always["generation_config.json"] = Fault(503)
    assert download(tmp_path, "--update") == 6
    assert_no_model(tmp_path)
    hub.repositories[REPO].always.clear()
    sent = hub.sent_bytes
    assert download(tmp_path, "--update") == 0
    assert hub.sent_bytes - sent <= len(changed["generation_config.json"]) + len(files["config.json"])
    assert_whole(tmp_path, changed)


def test_a_download_of_an_older_commit_left_half_way_becomes_the_new_one(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repositories[REPO].files["old.json"] = b"{}"
    hub.repositories[REPO].always[SECOND] = Fault(503, until=(tmp_path / "old.json").exists)
    assert download(tmp_path) == 6
    changed = {**files, "generation_config.json": b'{"temperature": 0.5}'}
    hub.repositories[REPO] = Repository({**changed, **BESIDE}, commit="d" * 40)
    assert download(tmp_path) == 0
    assert_whole(tmp_path, changed)


def _in_another_process(directory: Path, log: Path) -> AbstractContextManager[Process]:
    return running(["-m", "builder", "download", REPO, str(directory), "--attempts=3"], {}, log)


def test_a_killed_download_is_no_model_and_the_next_one_goes_on(
    hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    """The hub stands still in the middle of a file until the test is over, so that the kill always comes first."""
    model = tmp_path / "model"
    part = model / UNFINISHED / SECOND
    hub.repositories[REPO].always[SECOND] = Fault(pause_at=PAUSE_AT_BYTES, until=lambda: False)
    with _in_another_process(model, tmp_path / "log") as process:
        process.wait_for(
            lambda: has_the_others(model, files) and part.exists() and part.stat().st_size >= KEPT_BYTES, WAIT_S
        )
        process.popen.send_signal(signal.SIGKILL)
        assert process.popen.wait(WAIT_S) == -signal.SIGKILL
    assert_no_model(model)
    assert main(["verify", str(model)]) == 4
    kept = part.stat().st_size
    hub.repositories[REPO].always.clear()
    sent = hub.sent_bytes
    assert download(model) == 0
    assert kept >= KEPT_BYTES
    assert hub.sent_bytes - sent <= len(files[SECOND]) - kept + len(files["config.json"])
    assert_whole(model, files)


def test_two_processes_at_once_load_a_model_once(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    """The hub stands still in the middle of a file until one of them has said that it waits."""
    model, logs = tmp_path / "model", [tmp_path / "one", tmp_path / "other"]

    def waiting() -> int:
        return sum("another process is downloading" in log.read_text(encoding="utf-8") for log in logs if log.exists())

    hub.repositories[REPO].always[SECOND] = Fault(pause_at=PAUSE_AT_BYTES, until=lambda: waiting() > 0)
    with _in_another_process(model, logs[0]) as one, _in_another_process(model, logs[1]) as other:
        assert [process.popen.wait(WAIT_S) for process in (one, other)] == [0, 0], one.log + other.log
    assert hub.sent_bytes == all_bytes(files)
    assert waiting() == 1
    assert_whole(model, files)


@pytest.fixture
def small_disk(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a shell command where `$disk` is a disk of its own, of `size` MB, for this command alone."""

    def run(size: int, command: str) -> subprocess.CompletedProcess[str]:
        disk = tmp_path / "disk"
        disk.mkdir(exist_ok=True)
        script = f"mount -t tmpfs -o size={size}m small {disk} && {command}"
        return subprocess.run(
            # timeout(1) ends all that the command has started, which the end of the command alone would not.
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


def test_a_disk_that_is_too_small_is_told_before_anything_is_loaded(
    hub: Hub, small_disk: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    ran = small_disk(16, f"$python -m builder download {REPO} $disk/model; code=$?; ls -A $disk/model; exit $code")
    assert ran.returncode == 5
    assert "an-org/a-model needs 0.03 GB more, and the disk of" in ran.stderr.splitlines()[-1]
    assert hub.sent_bytes == 0


def test_a_disk_that_fills_up_is_told_and_what_came_is_kept(
    hub: Hub, small_disk: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Another program fills it once the download has seen that there is room; the hub stands still until it has."""
    full = tmp_path / "full"
    hub.repositories[REPO].always[SECOND] = Fault(pause_at=PAUSE_AT_BYTES, until=full.exists)
    ran = small_disk(
        48,
        f"($python -m builder download {REPO} $disk/model & loading=$!; "
        f"until [ -s $disk/model/{UNFINISHED}/{SECOND} ] || ! kill -0 $loading; do sleep 0.05; done; "
        f"dd if=/dev/zero of=$disk/other bs=64k 2>/dev/null; touch {full}; "
        "wait $loading; code=$?; ls -A $disk/model; exit $code)",
    )
    assert ran.returncode == 5, ran
    assert ran.stderr.splitlines()[-1] == (
        "builder: the disk is full: make room and run it again, it goes on from where it stopped"
    )
    held = ran.stdout.split()
    assert NAME not in held
    assert "config.json" not in held
    assert UNFINISHED in held


@pytest.fixture
def model(files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A whole model from elsewhere, with a manifest."""
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
    ("harm", "told"),
    [
        (_truncate, f"{FIRST}: cut short, 1,000 bytes of"),
        (_flip, f"{SECOND}: changed, its sha256 is"),
        (_remove, f"{SECOND}: missing"),
        (_add, "model-00003-of-00002.safetensors: not in the manifest"),
    ],
)
def test_verify_names_each_file_that_is_not_what_it_was(
    model: Path, harm: Callable[[Path], None], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    harm(model)
    assert main(["verify", str(model)]) == 4
    assert one_line(capsys).startswith(told)


def test_verify_names_swapped_files(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two files of one size: only their contents tell."""
    one, other = (model / "a.txt"), (model / "b.txt")
    one.write_text("one")
    other.write_text("two")
    assert main(["manifest", str(model)]) == 0
    one.write_text("two")
    other.write_text("one")
    capsys.readouterr()
    assert main(["verify", str(model)]) == 4
    errors = capsys.readouterr().err
    assert "a.txt: swapped, it holds b.txt" in errors
    assert "b.txt: swapped, it holds a.txt" in errors


def test_verify_names_all_that_is_wrong_at_once(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is cut short hides neither a bit that was turned nor two shards in each other's place."""
    cut, flipped = model / "tokenizer.json", model / "generation_config.json"
    os.truncate(cut, 100)
    content = bytearray(flipped.read_bytes())
    content[-2] ^= 1
    flipped.write_bytes(content)
    (model / FIRST).rename(model / "kept")
    (model / SECOND).rename(model / FIRST)
    (model / "kept").rename(model / SECOND)
    (model / "LICENSE").write_text("a stranger")

    assert main(["verify", str(model)]) == 4
    errors = capsys.readouterr().err
    assert "tokenizer.json: cut short, 100 bytes of " in errors
    assert "generation_config.json: changed, its sha256 is " in errors
    assert f"{FIRST}: swapped, it holds {SECOND}" in errors
    assert f"{SECOND}: swapped, it holds {FIRST}" in errors
    assert "LICENSE: not in the manifest" in errors


@pytest.mark.usefixtures("hub")
def test_a_new_manifest_keeps_where_the_model_is_from_while_its_files_are_the_same(
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
    assert one_line(capsys) == (
        f"{tmp_path} was {REPO} at {COMMIT}, and is not any more ({SECOND}): "
        f"download it anew, or remove {NAME} to have one of what is there now"
    )
    assert Manifest.read(tmp_path) == after


def test_help_tells_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"{code:3}  {meaning}" in shown for code, meaning in EXIT_CODES.items())


@pytest.mark.usefixtures("hub")
def test_verify_asks_the_hub_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A manifest that was changed together with a file satisfies itself, and not the hub."""
    assert download(tmp_path) == 0
    for name in ("generation_config.json", FIRST):
        content = bytearray((tmp_path / name).read_bytes())
        content[-2] ^= 1
        (tmp_path / name).write_bytes(content)
    manifest = Manifest.read(tmp_path)
    assert manifest is not None
    Manifest.of(
        hashed(tmp_path, [file.path for file in manifest.files]), manifest.repository, manifest.revision, COMMIT
    ).write(tmp_path)
    assert main(["verify", str(tmp_path)]) == 4
    errors = capsys.readouterr().err
    assert f"{FIRST}: not what {REPO} has at {COMMIT}" in errors
    assert f"generation_config.json: not what {REPO} has at {COMMIT}" in errors


@pytest.mark.usefixtures("hub")
def test_verify_says_that_the_hub_cannot_be_asked_and_does_without_when_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert download(tmp_path) == 0
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert main(["verify", str(tmp_path)]) == 6
    assert "cannot be reached" in one_line(capsys)
    assert main(["verify", str(tmp_path), "--offline"]) == 0
    assert re.fullmatch(r"\d+ files, [\d,]+ bytes at \d+\.\d\d GB/s: all right\n", capsys.readouterr().out)


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
    ("harm", "told"),
    [
        (_no_index_entry, f"{FIRST}: without a.tensor, which model.safetensors.index.json has in it (1 such tensors)"),
        (_no_shard, f"{SECOND}: missing, and model.safetensors.index.json names it"),
        (_truncate, f"{FIRST}: cut short, or no safetensors file (1,000 bytes)"),
        (_shorten, f"{SECOND}: cut short, "),
        (_no_header, f"{FIRST}: cut short, or no safetensors file (1,000 bytes)"),
        (_no_tokenizer, "{model}: its tokenizer does not load: "),
        (_no_config, "{model} holds no config.json"),
    ],
)
def test_what_is_no_whole_model_gets_no_manifest(
    model: Path, harm: Callable[[Path], None], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / NAME).unlink()
    harm(model)
    assert main(["manifest", str(model)]) == 4
    assert one_line(capsys).startswith(told.format(model=model))
    assert not (model / NAME).exists()


def test_a_directory_without_a_manifest_is_not_verified(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / NAME).unlink()
    assert main(["verify", str(model)]) == 4
    assert one_line(capsys).startswith(f"{model} has no manifest: its download was not finished")
    (model / NAME).write_text('{"format": 2}')
    assert main(["verify", str(model)]) == 4
    assert "is no manifest that this version reads" in one_line(capsys)
