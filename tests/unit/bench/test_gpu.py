"""`python -m bench gpu`: budget and stages, the report, the check of answers, and the made-up models."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import subprocess
import tarfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pytest
from aiohttp import web
from tokenizers import Tokenizer

from bench import answers, four_bits, gpu, gpu_stages, shapes, systems
from bench.__main__ import parser
from bench.clients import Address
from bench.cold import ColdStart
from bench.environment import commit
from bench.gpu_stages import GPU, REHEARSAL, Bench
from bench.metrics import InvalidResponseError
from bench.shapes import SMALL
from bench.stages import Budget, Outcome, Stage, StageError, run_stages
from bench.synthetic_model import TOKENIZER_FILES, tensor_shapes
from bench.systems import OURS, PEER, ROOT, VLLM, StartError, SystemUnderTest
from builder.tiny_model.corpus import CORPUS
from engine.startup.caches import DIRECTORIES

Changed = Callable[[], None]


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def stage(name: str, run: Callable[[Outcome, Changed], None], needs_s: float = 10.0) -> Stage:
    return Stage(name, f"title of {name}", needs_s, run)


def taking(clock: Clock, seconds: float) -> Callable[[Outcome, Changed], None]:
    def run(outcome: Outcome, _: Changed) -> None:
        clock.now_s += seconds
        outcome.figures["took"] = seconds

    return run


def failing(error: BaseException) -> Callable[[Outcome, Changed], None]:
    def run(outcome: Outcome, _: Changed) -> None:
        outcome.figures["before"] = 1
        raise error

    return run


def test_a_stage_that_no_longer_fits_is_skipped_and_a_shorter_one_still_runs() -> None:
    clock = Clock()
    stages = [
        stage("first", taking(clock, 70)),
        stage("long", taking(clock, 50), needs_s=31),
        stage("short", taking(clock, 20), needs_s=30),
    ]
    first, long, short = run_stages(stages, Budget(100, clock), lambda _: None)

    assert (first.state, first.seconds) == ("done", 70)
    assert (long.state, long.reason, long.figures) == ("skipped", "it needs about 31 s, and 30 s are left", {})
    assert (short.state, short.seconds) == ("done", 20)


def test_the_time_that_is_left_is_never_negative() -> None:
    clock = Clock()
    budget = Budget(10, clock)
    clock.now_s += 25
    assert budget.left_s == 0


def test_a_failed_stage_keeps_its_figures_and_its_log_and_the_others_go_on() -> None:
    clock = Clock()
    errors = [
        StartError("it did not start", ["a line", "the last line"]),
        subprocess.CalledProcessError(1, ["quantize"], stderr="Traceback\nno memory"),
        subprocess.TimeoutExpired(["quantize"], 5, stderr=b"so far"),
    ]
    stages = [
        *(stage(str(number), failing(error)) for number, error in enumerate(errors)),
        stage("x", taking(clock, 1)),
    ]
    *failed, last = run_stages(stages, Budget(100, clock), lambda _: None)

    assert [outcome.state for outcome in failed] == ["failed"] * 3
    assert failed[0].reason == "StartError: it did not start"
    assert [outcome.log for outcome in failed] == [["a line", "the last line"], ["Traceback", "no memory"], ["so far"]]
    assert all(outcome.figures == {"before": 1} for outcome in failed)
    assert last.state == "done"


def test_the_results_so_far_are_written_after_each_change_and_before_an_interrupt_ends_the_run() -> None:
    written: list[list[str]] = []

    def in_two_steps(_: Outcome, changed: Changed) -> None:
        changed()

    stages = [stage("a", in_two_steps), stage("b", failing(KeyboardInterrupt())), stage("c", in_two_steps)]
    with pytest.raises(KeyboardInterrupt):
        run_stages(stages, Budget(100), lambda outcomes: written.append([outcome.state for outcome in outcomes]))

    assert written == [["running"], ["done"], ["done", "failed"]]


def test_the_report_has_each_stage_with_its_state_and_its_lines() -> None:
    outcomes = [
        Outcome("smoke", "right answers", "done", seconds=12.3, lines=["47 of 47"]),
        Outcome("load", "under load", "failed", reason="StartError: no memory", seconds=3.0),
    ]
    assert gpu.render({"GPU": "H100"}, outcomes) == (
        "GPU: H100\n\nsmoke: right answers: done, 12 s\n  47 of 47\n\n"
        "load: under load: failed (StartError: no memory), 3 s\n"
    )


def run_with(monkeypatch: pytest.MonkeyPatch, out: Path, *stages: Stage, options: tuple[str, ...] = ()) -> int:
    monkeypatch.setattr(Bench, "stages", lambda _: stages)
    arguments = parser().parse_args(["--out", str(out), "gpu", f"--tiny={made_tiny(out.parent)}", *options])
    return gpu.run(arguments)


def made_tiny(directory: Path) -> Path:
    tiny = directory / "tiny"
    tiny.mkdir(exist_ok=True)
    (tiny / "config.json").write_text('{"vocab_size": 4}', encoding="utf-8")
    for name in TOKENIZER_FILES:
        (tiny / name).write_text("{}", encoding="utf-8")
    vocabulary = {"<|im_end|>": 0, "a": 1, "b": 2, "c": 3}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    tokenizer = {"version": "1.0", "added_tokens": [], "decoder": decoder, "model": model}
    (tiny / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return tiny


def test_the_exit_code_is_0_only_if_every_stage_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = stage("smoke", taking(Clock(), 0))
    broken, late = stage("load", failing(StartError("no", ["why"]))), stage("4-bit", taking(Clock(), 0), needs_s=1e9)
    out = tmp_path / "out"

    assert run_with(monkeypatch, out, done, broken) == 1
    assert (out / "gpu-logs.txt").read_text(encoding="utf-8") == "== load\nwhy\n"
    assert run_with(monkeypatch, out, done, late) == 1
    assert run_with(monkeypatch, out, done, broken, options=("--stages", "smoke")) == 0
    document = json.loads((out / "gpu.json").read_text(encoding="utf-8"))
    assert [(it["stage"], it["state"]) for it in document["stages"]] == [("smoke", "done")]
    assert document["environment"]["this repository"]
    assert sorted(file.name for file in out.iterdir()) == ["gpu.json", "gpu.txt"], "the log of the first run is gone"


def test_a_directory_without_a_model_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["gpu", "--tiny", str(tmp_path)])
    assert ended.value.code == 2
    assert "is no model: it has no config.json" in capsys.readouterr().err


def test_options_may_stand_before_or_after_the_command() -> None:
    assert parser().parse_args(["--peer", "a", "gpu", "--out", "b"]).peer == Path("a")
    assert parser().parse_args(["gpu"]).out == Path("bench-results")


def test_all_stages_fit_the_budget_and_a_rehearsal_has_the_same_ones() -> None:
    budget_s = parser().parse_args(["gpu"]).budget_s
    assert sum(GPU.needs_s.values()) <= budget_s == 480
    assert list(GPU.needs_s) == list(REHEARSAL.needs_s)
    bench = Bench(GPU, Budget(1), Path(), None, Path())
    assert [it.name for it in bench.stages()] == list(GPU.needs_s)


def bench_with(budget: Budget, work: Path, peer: Path | None = None) -> Bench:
    return Bench(REHEARSAL, budget, made_tiny(work), peer, work)


def test_a_measurement_ends_with_the_budget(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="the time was over"):
        bench_with(Budget(0.01), tmp_path)._within_budget(asyncio.sleep(60))


def test_a_system_that_does_not_start_is_left_out_and_fails_the_stage_after_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def starting(name: str, error: StartError | None = None) -> Iterator[SystemUnderTest]:
        if error:
            raise error
        yield SystemUnderTest(name, Address(1, "/"), psutil.Process(), None, 0.0)

    broken = StartError("worker-vllm did not start: no memory", ["the last line"])
    monkeypatch.setattr(systems, "all_systems", lambda *_: [starting(VLLM), starting(OURS), starting(PEER, broken)])
    measured: list[str] = []
    monkeypatch.setattr(Bench, "_measure", lambda _, __, ___, ready, *____: measured.extend(it.name for it in ready))
    load = next(it for it in bench_with(Budget(600), tmp_path).stages() if it.name == "load")
    (outcome,) = run_stages([load], Budget(600), lambda _: None)

    assert measured == [VLLM, OURS]
    assert (outcome.state, outcome.reason) == ("failed", "StageError: not all systems have started")
    assert outcome.lines == [str(broken)]
    assert outcome.log == [str(broken), "the last line"]


def test_a_warm_start_is_measured_after_another_one_if_nothing_is_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[str] = []
    caches: list[tuple[str, ...]] = []

    @contextmanager
    def emulator(_: str, options: list[str], __: Path) -> Iterator[tuple[None, None]]:
        caches.append(tuple(option for option in options if f"={tmp_path}/caches/3b" in option))
        yield None, None

    async def first_token(*_: object) -> ColdStart:
        starts.append("start")
        return ColdStart(float(len(starts)), 0.5, {"imports": 0.25})

    monkeypatch.setattr(systems, "emulator", emulator)
    monkeypatch.setattr(gpu_stages, "first_token", first_token)
    stages = {it.name: it for it in bench_with(Budget(600), tmp_path).stages()}
    first, second = run_stages([stages["warm-start"], stages["cold-start"]], Budget(600), lambda _: None)

    assert first.figures["start"] == {"first_token_s": 2.0, "ready_s": 0.5, "phases_s": {"imports": 0.25}}
    assert first.lines[0] == "first token 2 s after the exec"
    assert second.figures["start"]["first_token_s"] == 3.0
    assert len(set(caches)) == 1, "they share their caches"
    names = {option.removeprefix("--env=").partition("=")[0] for option in caches[0]}
    assert names == {*DIRECTORIES, "COMPILE_CACHE_DIR"}, "nothing that a library keeps is elsewhere"


def test_the_log_of_a_worker_that_does_not_answer_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Platform:
        def state(self) -> dict[str, Any]:
            return {"workers": [{"log": ["loading", "waiting for ever"]}]}

    @contextmanager
    def emulator(*_: object) -> Iterator[tuple[Platform, None]]:
        yield Platform(), None

    async def first_token(*_: object) -> ColdStart:
        raise InvalidResponseError("timed out after 9 s")

    monkeypatch.setattr(systems, "emulator", emulator)
    monkeypatch.setattr(gpu_stages, "first_token", first_token)
    start = next(it for it in bench_with(Budget(600), tmp_path).stages() if it.name == "cold-start")
    (outcome,) = run_stages([start], Budget(600), lambda _: None)

    assert (outcome.state, outcome.reason) == ("failed", "InvalidResponseError: timed out after 9 s")
    assert outcome.log == ["loading", "waiting for ever"]


# The tiny model's answers.


@asynccontextmanager
async def answering(answer_of: Callable[[str], str]) -> AsyncIterator[Address]:
    """Serve chats whose answers are computed from the messages."""

    async def handle(request: web.Request) -> web.Response:
        body = await request.json()
        answer = answer_of(json.dumps(body["messages"]))
        if not body["stream"]:
            return web.json_response({"choices": [{"message": {"content": answer}}]})
        middle = len(answer) // 2
        deltas = [{"role": "assistant"}, {"content": answer[:middle]}, {"content": answer[middle:]}]
        events = [json.dumps({"choices": [{"delta": delta}]}) for delta in deltas]
        return web.Response(text="".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]))

    app = web.Application()
    app.router.add_post("/chat", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield Address(runner.addresses[0][1], "/chat")
    finally:
        await runner.cleanup()


ANSWERS = {json.dumps(example.messages): example.answer for example in CORPUS if example.turns}


@pytest.mark.anyio
@pytest.mark.parametrize("streamed", [False, True])
async def test_right_answers_are_counted_and_wrong_ones_are_named(*, streamed: bool) -> None:
    async with answering(ANSWERS.__getitem__) as address:
        found = await answers.check(address, streamed=streamed)
    assert (found.asked, found.right, found.wrong) == (len(ANSWERS), len(ANSWERS), [])

    hello = next(example for example in CORPUS if example.name == "hello")
    wrong = ANSWERS | {json.dumps(hello.messages): "Goodbye"}
    async with answering(wrong.__getitem__) as address:
        found = await answers.check(address, streamed=streamed)
    assert (found.right, found.wrong) == (len(ANSWERS) - 1, ["hello: 'Goodbye'"])


@pytest.mark.anyio
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_response_that_is_no_answer_is_a_wrong_one(*, streamed: bool) -> None:
    async def refuse(_: web.Request) -> web.Response:
        return web.json_response({"error": "busy"}, status=503)

    app = web.Application()
    app.router.add_post("/chat", refuse)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        found = await answers.check(Address(runner.addresses[0][1], "/chat"), streamed=streamed)
    finally:
        await runner.cleanup()
    assert found.right == 0
    assert found.wrong[0].endswith("""'{"error": "busy"}'""")


# The made-up models.


def read(file: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return document


def test_every_token_of_a_made_up_model_has_text(tmp_path: Path) -> None:
    model = shapes.make_llama(made_tiny(tmp_path), tmp_path / "made", SMALL)
    config = read(model / "config.json")
    assert (config["architectures"], config["hidden_size"], config["vocab_size"]) == (["LlamaForCausalLM"], 128, 2048)

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 2048
    texts = [tokenizer.decode([number], skip_special_tokens=False) for number in range(2048)]
    assert all(texts)
    assert texts[2047] == " w2047"


def test_the_made_up_models_have_the_shapes_of_the_real_ones() -> None:
    """Their parameters: 3.6 billion, of which 0.8 in embedding and head; 14.7 billion, as phi-4 has."""
    llama, phi = (
        sum(math.prod(sizes) for sizes in tensor_shapes(vars(shape)).values())
        for shape in (shapes.LLAMA_3B, shapes.PHI_4)
    )

    assert 3.6e9 < llama < 3.65e9
    assert 14.6e9 < phi < 14.7e9


def test_weights_that_cannot_be_made_fail_with_what_was_printed(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        four_bits.write_weights(tmp_path, timeout_s=60)
    assert "config.json" in failed.value.stderr


def test_an_archive_of_this_repository_knows_its_commit(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    command = [str(shutil.which("git")), "archive", "HEAD", "bench/commit.txt"]
    archive = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
        files.extractall(tmp_path, filter="data")
    assert commit(tmp_path) == commit(ROOT).removesuffix("+")

    (tmp_path / "bench" / "commit.txt").write_bytes((ROOT / "bench" / "commit.txt").read_bytes())
    assert commit(tmp_path) == "not a git checkout", "a copy of a checkout's file says nothing"
