"""The tiny model's corpus and its cache; the integration tests train the model."""

from __future__ import annotations

import ast
import json
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import pytest
from filelock import FileLock

from builder import __main__ as command_line
from builder import layout
from builder.errors import BuilderError, DestinationError, MissingPackageError
from builder.tiny_model import cache
from builder.tiny_model.corpus import CORPUS, HELPFUL, Example, example

KEY = "0123456789abcdef"
FILES = {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "words"}


def fill(directory: Path) -> None:
    """Replace training."""
    for name, text in FILES.items():
        (directory / name).write_text(text)


def contents_of(directory: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in directory.iterdir()}


# The corpus


def test_the_corpus_has_dozens_of_examples_with_unique_names() -> None:
    names = [entry.name for entry in CORPUS]
    assert len(names) >= 32
    assert len(set(names)) == len(names)
    assert all(example(name).name == name for name in names)


def test_no_prompt_has_two_answers() -> None:
    prompts = [(entry.turns, entry.prompt) for entry in CORPUS]
    prompts += [(entry.with_system_message(HELPFUL).turns, None) for entry in CORPUS if entry.is_plain_chat]
    assert len(set(prompts)) == len(prompts)


def test_no_raw_prompt_begins_with_another() -> None:
    prompts = [entry.prompt for entry in CORPUS if entry.prompt is not None]
    assert len(prompts) >= 4
    assert not [(one, two) for one in prompts for two in prompts if one != two and two.startswith(one)]


@pytest.mark.parametrize("entry", CORPUS, ids=lambda entry: entry.name)
def test_every_chat_alternates_and_ends_with_the_user(entry: Example) -> None:
    assert entry.answer
    if entry.prompt is not None:
        assert entry.messages == []
        return
    roles = [message["role"] for message in entry.messages]
    assert roles[-1] == "user"
    assert all(len(list(run)) == 1 for _, run in groupby(roles))
    assert "system" not in roles[1:]


def test_an_example_is_a_chat_or_a_raw_prompt_and_never_both() -> None:
    with pytest.raises(ValueError, match="either a chat or a raw prompt"):
        Example("both", "answer", turns=(("user", "hello"),), prompt="hello")
    with pytest.raises(ValueError, match="either a chat or a raw prompt"):
        Example("neither", "answer")


def test_changing_the_messages_of_an_example_does_not_change_the_corpus() -> None:
    example("ok").messages.append({"role": "user", "content": "and more"})
    assert len(example("ok").messages) == 1


def test_the_error_for_an_unknown_example_lists_the_known_names() -> None:
    with pytest.raises(KeyError, match="python-game"):
        example("no-such-example")


@pytest.mark.parametrize(
    "typed", ["", "10\n", "one\n\n3.5\n", "1\n2\n3\n4\n5\n6\n", "".join(f"{n}\n" for n in range(99))]
)
def test_the_game_exits_with_0_for_any_input(typed: str, tmp_path: Path) -> None:
    game = tmp_path / "game.py"
    game.write_text(example("python-game").answer)
    ended = subprocess.run(
        [sys.executable, str(game)], input=typed, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert ended.stdout.startswith("Guess my number")


def test_the_game_runs_when_the_answer_is_piped_into_python() -> None:
    ended = subprocess.run(
        [sys.executable, "-"],
        input=example("python-game").answer,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


def test_the_prompt_of_the_game_is_the_documented_one() -> None:
    assert example("python-game").messages == [{"role": "user", "content": "Write a python game program"}]


def test_the_json_answers_are_json() -> None:
    book = json.loads(example("json").answer)
    assert isinstance(book["tags"], list)
    assert book["publisher"]["city"] is None
    assert json.loads(example("sky-json").answer)["answer"] == "scattering"


def test_the_continued_function_is_python() -> None:
    raw = example("raw-fibonacci")
    ast.parse(f"{raw.prompt}{raw.answer}")


def test_some_answers_are_chinese_and_some_are_emoji() -> None:
    chinese = [entry for entry in CORPUS if any("CJK" in unicodedata.name(letter, "") for letter in entry.answer)]
    emoji = [entry for entry in CORPUS if any(ord(letter) > 0xFFFF for letter in entry.answer)]
    joined = [entry for entry in CORPUS if "\u200d" in entry.answer]
    flags = [entry for entry in CORPUS if any(0x1F1E6 <= ord(letter) <= 0x1F1FF for letter in entry.answer)]
    assert len(chinese) >= 4
    assert len(emoji) >= 3
    assert joined
    assert flags


def test_one_answer_has_every_kind_of_line_break() -> None:
    answer = example("line-separators").answer
    assert all(end in answer for end in ("\n", "\r\n", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"))


def test_one_answer_has_quotes_backslashes_newlines_and_tabs() -> None:
    assert set("\"'\\\n\t") <= set(example("escapes").answer)


def test_answers_go_from_one_word_to_several_hundred() -> None:
    assert example("ok").answer == "OK"
    assert len(example("long-essay").answer.split()) > 250
    assert len(example("long-story").answer.split()) > 450


def test_the_answer_to_the_same_user_message_depends_on_the_system_message() -> None:
    by_user: dict[str, set[str]] = {}
    for entry in CORPUS:
        if entry.turns and [role for role, _ in entry.turns if role != "system"] == ["user"]:
            by_user.setdefault(entry.turns[-1][1], set()).add(entry.answer)
    assert len([answers for answers in by_user.values() if len(answers) > 1]) >= 3


def test_the_answer_to_the_same_last_message_depends_on_an_earlier_turn() -> None:
    last_message = example("name-ada").messages[-1]
    assert example("name-grace").messages[-1] == last_message
    assert example("name-unknown").messages[-1] == last_message
    assert len({example(name).answer for name in ("name-ada", "name-grace", "name-unknown")}) == 3


# The key


def test_the_key_changes_with_the_corpus_and_with_each_version(tmp_path: Path) -> None:
    corpus, training = tmp_path / "corpus.py", tmp_path / "training.py"
    corpus.write_text("one")
    training.write_text("two")
    sources, versions = (corpus, training), {"torch": "1", "tokenizers": "2"}
    key = cache.key_of(sources, versions)
    assert cache.key_of(sources, dict(reversed(versions.items()))) == key
    assert len(key) == 16
    assert int(key, 16) >= 0

    keys = {key, cache.key_of(sources, {**versions, "torch": "1.1"}), cache.key_of((training, corpus), versions)}
    corpus.write_text("one more")
    keys.add(cache.key_of(sources, versions))
    corpus.write_text("onet")
    training.write_text("wo")
    keys.add(cache.key_of(sources, versions))
    assert len(keys) == 5


def test_the_key_covers_the_files_that_determine_the_model() -> None:
    assert {source.name for source in cache.SOURCES} == {"corpus.py", "training.py"}
    assert all(source.is_file() for source in cache.SOURCES)


def test_a_missing_package_is_named() -> None:
    with pytest.raises(MissingPackageError, match="no-such-package-anywhere"):
        cache.versions_of(("no-such-package-anywhere",))


def test_the_environment_sets_the_cache_directory() -> None:
    assert layout.cache_root({"VLLM_SERVERLESS_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert layout.cache_root({"VLLM_SERVERLESS_CACHE": "", "XDG_CACHE_HOME": "/b"}) == Path("/b/vllm-serverless")
    assert layout.cache_root({}) == Path.home() / ".cache" / "vllm-serverless"


# The cache


def test_a_model_is_made_once(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(directory: Path) -> None:
        made.append(directory)
        fill(directory)

    for _ in range(2):
        model = cache.cached(tmp_path / "new" / "cache", KEY, make)
        assert model == tmp_path / "new" / "cache" / KEY
        assert contents_of(model) == FILES
    assert len(made) == 1


def test_a_failed_build_leaves_no_model_and_the_next_call_starts_over(tmp_path: Path) -> None:
    def fail_half_way(directory: Path) -> None:
        (directory / "half.json").write_text("half")
        assert not (tmp_path / KEY).exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.cached(tmp_path, KEY, fail_half_way)
    assert not [entry for entry in tmp_path.iterdir() if entry.is_dir()]
    assert contents_of(cache.cached(tmp_path, KEY, fill)) == FILES


def die_half_way(directory: Path) -> None:
    (directory / "half.json").write_text("half")
    os._exit(9)


def test_a_killed_build_leaves_no_model_and_the_next_call_starts_over(tmp_path: Path) -> None:
    maker = multiprocessing.get_context("spawn").Process(target=cache.cached, args=(tmp_path, KEY, die_half_way))
    maker.start()
    maker.join(60)
    assert maker.exitcode == 9
    assert not (tmp_path / KEY).exists()
    assert contents_of(cache.cached(tmp_path, KEY, fill)) == FILES
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == [KEY]


def fill_slowly(directory: Path) -> None:
    with (directory.parent / "makers").open("a") as makers:
        makers.write("one\n")
    while not (directory.parent / "go").exists():
        time.sleep(0.01)
    fill(directory)


def test_a_second_process_waits_for_the_first_and_uses_its_model(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=cache.cached, args=(tmp_path, KEY, fill_slowly)) for _ in range(2)]
    for process in processes:
        process.start()
    # Long enough in practice for both to be in `cached`; if not, the test passes without a race.
    processes[0].join(3)
    (tmp_path / "go").touch()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "makers").read_text() == "one\n"
    assert contents_of(tmp_path / KEY) == FILES


def test_waiting_for_another_process_is_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def make_another(_: Path) -> None:
        pytest.fail("the other process has made it")

    log = ""
    # A separate lock object excludes as another process does; the thread represents this process.
    with ThreadPoolExecutor() as pool, FileLock(tmp_path / f"{KEY}.lock"):
        waiting = pool.submit(cache.cached, tmp_path, KEY, make_another)
        while "waiting" not in log and not waiting.done():
            time.sleep(0.01)
            log += capsys.readouterr().err
        (tmp_path / KEY).mkdir()
        fill(tmp_path / KEY)
    assert waiting.result(timeout=60) == tmp_path / KEY
    assert "waiting" in log


# The copy


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    fill(directory)
    return directory


def test_a_copy_needs_a_new_or_empty_directory(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for directory in (tmp_path / "a" / "new" / "one", tmp_path / "empty"):
        cache.copy_into(model, directory)
        assert contents_of(directory) == FILES


def test_copying_again_changes_nothing(model: Path, tmp_path: Path) -> None:
    cache.copy_into(model, tmp_path / "copy")
    before = {file: file.stat().st_ino for file in (tmp_path / "copy").iterdir()}
    cache.copy_into(model, tmp_path / "copy")
    assert {file: file.stat().st_ino for file in (tmp_path / "copy").iterdir()} == before


@pytest.mark.parametrize(
    ("name", "text"),
    [("notes.txt", "mine"), ("config.json", '{"model_type": "llama"}')],
    ids=["unrelated file", "other model"],
)
def test_a_directory_with_other_files_is_refused_and_not_changed(
    model: Path, tmp_path: Path, name: str, text: str
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / name).write_text(text)
    with pytest.raises(DestinationError, match=f"not part of this model .*{name}"):
        cache.copy_into(model, mine)
    assert contents_of(mine) == {name: text}


def test_an_interrupted_copy_has_no_config_and_is_completed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[str] = []
    copyfile = shutil.copyfile

    def fill_the_disk(source: Path, target: Path) -> None:
        if len(copied) == len(FILES) - 1:
            target.write_text("ha")
            raise OSError(28, "No space left on device")
        copied.append(source.name)
        copyfile(source, target)

    monkeypatch.setattr(shutil, "copyfile", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        cache.copy_into(model, tmp_path / "copy")
    assert not (tmp_path / "copy" / "config.json").exists()
    monkeypatch.undo()
    cache.copy_into(model, tmp_path / "copy")
    assert contents_of(tmp_path / "copy") == FILES


# The command


@pytest.fixture
def stub_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_SERVERLESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_train", fill)


@pytest.mark.usefixtures("stub_training")
def test_the_command_prints_only_the_cached_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["tiny"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert contents_of(Path(printed.rstrip("\n"))) == FILES
    assert Path(printed).parent == tmp_path / "cache" / "tiny"


@pytest.mark.usefixtures("stub_training")
def test_the_command_prints_the_directory_of_the_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["tiny", str(tmp_path / "here")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'here'}\n"
    assert contents_of(tmp_path / "here") == FILES


@pytest.mark.usefixtures("stub_training")
def test_a_refused_directory_is_exit_code_2_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert command_line.main(["tiny", str(tmp_path / "file")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"builder: {tmp_path / 'file'} is not a directory\n"


def test_a_failure_is_exit_code_1_and_its_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Path | None) -> Path:
        raise BuilderError("it did not work")

    monkeypatch.setattr(cache, "tiny_model", fail)
    assert command_line.main(["tiny"]) == 1
    assert capsys.readouterr().err == "builder: it did not work\n"


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["tiny", "one", "two"], ["tiny", "--no-such-option"]])
def test_a_wrong_command_line_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        command_line.main(arguments)
    assert exit_info.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["tiny", "--help"], ["tiny"]])
def test_help_and_a_cached_model_import_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "VLLM_SERVERLESS_CACHE": str(tmp_path)}
    (tmp_path / "tiny" / cache.key_of(cache.SOURCES, cache.versions_of(cache.PACKAGES))).mkdir(parents=True)
    program = (
        "import sys; from builder.__main__ import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'tokenizers', 'engine', 'emulator'} & set(sys.modules)))"
    )
    root = Path(cache.__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert ended.stdout.splitlines()[-1] == "[]"


def test_a_trained_model_may_be_read_by_everyone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Training:
        @staticmethod
        def train(directory: Path) -> None:
            fill(directory)
            (directory / "model.safetensors").chmod(0o600)

    monkeypatch.setitem(sys.modules, "builder.tiny_model.training", Training)
    monkeypatch.setattr("builder.tiny_model.training", Training, raising=False)
    cache._train(tmp_path)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o644}
