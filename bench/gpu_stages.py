"""The stages of `python -m bench gpu`, in the order of their worth.

    smoke        the tiny model answers its whole corpus, streamed and not, through the emulator
    cold-start   the 3B shape, nothing cached: from exec to the first token
    load         the 3B shape under load: vLLM alone, this worker, worker-vllm
    warm-start   the 3B shape again, with what the stages before have cached
    4-bit        phi-4's shape in 4 bits, nothing cached: the start, then tokens per second

The cold start comes before the load, whose servers then find compiled code, which saves a minute: they share one
directory of caches. Smoke test and 4-bit model have their own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import uvloop

from bench import answers, four_bits, report, shapes, systems
from bench.cold import SCALED_FROM_ZERO, ColdStart, first_token
from bench.compare import Results, compare
from bench.scenarios import Scenario
from bench.shapes import Shape
from bench.stages import Budget, Outcome, Stage, StageError
from bench.systems import OURS, EmulatedPlatform, Setup, StartError, SystemUnderTest
from engine.startup.caches import DIRECTORIES

FIGURES = (
    "requests_per_s",
    "tokens_per_s",
    "ttft_p50_ms",
    "ttft_p95_ms",
    "itl_p50_ms",
    "inter_chunk_p95_ms",
    "cpu_s_per_1000_tokens",
    "requests",
    "errors",
)
"""The metrics in the report; the JSON has all of them."""


@dataclass(frozen=True)
class Plan:
    """What is measured on one kind of machine.

    Args:
        load: the shape under load and of the first two starts.
        four_bits: the shape in 4 bits.
        clients: the numbers of clients under load.
        clients_4_bit: the same of the 4-bit model.
        tokens: output tokens of each response.
        rounds: interleaved rounds of the load.
        seconds: duration of one measurement; three times that with 64 or more clients.
        flags: vLLM's flags of each server.
        shared: further flags of servers that run at the same time.
        needs_s: by stage, the time without which it is not started.
    """

    load: Shape
    four_bits: Shape
    clients: tuple[int, ...]
    clients_4_bit: tuple[int, ...]
    tokens: int
    rounds: int
    seconds: float
    flags: Mapping[str, str]
    shared: Mapping[str, str]
    needs_s: Mapping[str, float]


# From what the stages took on an H100 on 26 November 2026: a start 40 to 120 s, quantizing phi-4's shape 11 s.
GPU = Plan(
    load=shapes.LLAMA_3B,
    four_bits=shapes.PHI_4,
    clients=(1, 8, 64, 256),
    clients_4_bit=(1, 32),
    tokens=128,
    rounds=2,
    seconds=2.0,
    flags={"served-model-name": "tiny"},
    # With the second one vLLM measures no memory, which fails while other servers start on the same card.
    shared={"gpu-memory-utilization": "0.2", "kv-cache-memory-bytes": str(4 << 30)},
    needs_s={"smoke": 60.0, "cold-start": 100.0, "load": 120.0, "warm-start": 45.0, "4-bit": 110.0},
)
REHEARSAL = Plan(
    load=shapes.SMALL,
    four_bits=shapes.SMALL,
    clients=(1, 4),
    clients_4_bit=(1, 2),
    tokens=16,
    rounds=2,
    seconds=0.5,
    flags={"served-model-name": "tiny", "enforce-eager": "true"},
    shared={},
    needs_s={"smoke": 15.0, "cold-start": 15.0, "load": 30.0, "warm-start": 15.0, "4-bit": 20.0},
)


_T = TypeVar("_T")


@dataclass
class Bench:
    """Everything that the stages share.

    Args:
        plan: what to measure.
        budget: the time for it.
        tiny: the tiny model's directory.
        peer: a checkout of worker-vllm, or None.
        work: a directory for models, caches and logs.
    """

    plan: Plan
    budget: Budget
    tiny: Path
    peer: Path | None
    work: Path
    _is_cached: bool = field(default=False, init=False)

    def stages(self) -> list[Stage]:
        """Return all stages in order."""
        runs: dict[str, tuple[str, Callable[[Outcome, Callable[[], None]], None]]] = {
            "smoke": ("right answers", self._smoke),
            "cold-start": ("start of the 3B shape, nothing cached", partial(self._start, warm=False)),
            "load": ("the 3B shape under load", self._load),
            "warm-start": ("start of the 3B shape, caches warm", partial(self._start, warm=True)),
            "4-bit": ("phi-4's shape in 4 bits: start with nothing cached, and load", self._four_bits),
        }
        return [Stage(name, title, self.plan.needs_s[name], run) for name, (title, run) in runs.items()]

    def _smoke(self, outcome: Outcome, changed: Callable[[], None]) -> None:
        setup = self._setup(self.tiny, {}, "smoke")
        with systems.this_worker(setup, self._logs) as system, _log_kept(outcome, system.platform):
            outcome.figures["ready_s"] = system.ready_s
            outcome.lines = [f"ready after {report.format_number(system.ready_s)} s"]
            changed()
            for streamed in (False, True):
                found = self._within_budget(answers.check(system.address, streamed=streamed))
                kind = "streamed" if streamed else "not streamed"
                outcome.figures[kind] = asdict(found)
                outcome.lines += [f"{found.right} of {found.asked} answers right, {kind}", *found.wrong]
                changed()
                if found.wrong:
                    raise StageError(f"{len(found.wrong)} of {found.asked} answers are wrong, {kind}")

    def _start(self, outcome: Outcome, changed: Callable[[], None], *, warm: bool) -> None:
        if warm and not self._is_cached:
            self._start_once(outcome)
        _record_start(outcome, self._start_once(outcome))
        changed()

    def _start_once(self, outcome: Outcome) -> ColdStart:
        # The memory of the card is the worker's alone, and measuring it is part of a start.
        setup = self._setup_3b({})
        with self._idle_platform(outcome, setup) as platform:
            start = uvloop.run(first_token(platform, setup.start_timeout_s))
        self._is_cached = True
        return start

    def _load(self, outcome: Outcome, changed: Callable[[], None]) -> None:
        setup = self._setup_3b(self.plan.shared)
        scenarios = [Scenario(clients=clients, tokens=self.plan.tokens) for clients in self.plan.clients]
        with ExitStack() as stack:
            ready = self._start_all(stack, setup, outcome)
            if not ready:
                raise StageError("no system has started")
            self._is_cached = True
            with _log_kept(outcome, *(system.platform for system in ready)):
                self._measure(outcome, changed, ready, scenarios, self.plan.rounds)
        if outcome.log:
            raise StageError("not all systems have started")

    def _four_bits(self, outcome: Outcome, changed: Callable[[], None]) -> None:
        model = shapes.make_phi_in_4_bits(self.tiny, self.work / "four-bits", self.plan.four_bits)
        begun_s = time.monotonic()
        four_bits.write_weights(model, self.budget.left_s)
        outcome.figures["quantizing_s"] = time.monotonic() - begun_s
        outcome.lines = [f"weights made and quantized in {report.format_number(outcome.figures['quantizing_s'])} s"]
        # The settings of the image with the default model.
        setup = self._setup(model, {"quantization": "bitsandbytes", "dtype": "bfloat16"}, "four-bits")
        scenarios = [Scenario(clients=clients, tokens=self.plan.tokens) for clients in self.plan.clients_4_bit]
        with self._idle_platform(outcome, setup) as platform:
            _record_start(outcome, uvloop.run(first_token(platform, setup.start_timeout_s)))
            changed()
            self._measure(outcome, changed, [SystemUnderTest.of_worker(OURS, platform)], scenarios, rounds=1)

    def _start_all(self, stack: ExitStack, setup: Setup, outcome: Outcome) -> list[SystemUnderTest]:
        """Start all systems at the same time; record and leave out one that does not start."""
        starts = systems.all_systems(setup, self._logs, self.peer)
        ready = []
        with ThreadPoolExecutor() as pool:
            for future in [pool.submit(stack.enter_context, start) for start in starts]:
                try:
                    ready.append(future.result())
                except StartError as error:
                    outcome.lines.append(str(error))
                    outcome.log += [str(error), *error.log]
        return ready

    def _measure(
        self,
        outcome: Outcome,
        changed: Callable[[], None],
        ready: Sequence[SystemUnderTest],
        scenarios: Sequence[Scenario],
        rounds: int,
    ) -> None:
        """Measure interleaved rounds, and record them after each one."""
        before = list(outcome.lines)

        def after_round(results: Results, complete: int) -> None:
            outcome.figures |= {"rounds": complete, "scenarios": report.scenarios_document(results)}
            outcome.lines = [*before, f"median (minimum .. maximum) of the rounds, of which {complete} of {rounds} ran"]
            for scenario in scenarios:
                outcome.lines += ["", *report.table(results, scenario, FIGURES).splitlines()]
            changed()

        self._within_budget(compare(ready, scenarios, rounds, self.plan.seconds, after_round))
        failed = sum(
            measured["metrics"]["errors"]
            for scenario in outcome.figures["scenarios"]
            for of_system in scenario["systems"].values()
            for measured in of_system
        )
        if failed:
            raise StageError(f"{failed} requests failed")

    @contextmanager
    def _idle_platform(self, outcome: Outcome, setup: Setup) -> Iterator[EmulatedPlatform]:
        """Run an emulator that starts a worker for the first job; keep the worker's log if the block fails."""
        options = [*SCALED_FROM_ZERO, *systems.worker_options(setup)]
        with systems.emulator(OURS, options, self._logs) as (platform, _), _log_kept(outcome, platform):
            yield platform

    def _setup_3b(self, flags: Mapping[str, str]) -> Setup:
        model = self.work / "3b"
        if not model.exists():
            shapes.make_llama(self.tiny, model, self.plan.load)
        return self._setup(model, {"load-format": "dummy", **flags}, "3b")

    def _setup(self, model: Path, flags: Mapping[str, str], caches: str) -> Setup:
        """Return a server's setup; `caches` names the directory of its caches, which begins empty."""
        directory = self.work / "caches" / caches
        # The libraries' own variables, which vLLM alone and the peer follow too; the worker adds nothing to them.
        environment = {name: str(directory / cache) for name, cache in DIRECTORIES.items()}
        environment["COMPILE_CACHE_DIR"] = str(directory)
        return Setup(model, {**self.plan.flags, **flags}, environment, max(self.budget.left_s, 1.0))

    @property
    def _logs(self) -> Path:
        return self.work / "logs"

    def _within_budget(self, measuring: Awaitable[_T]) -> _T:
        """Run to the end, or to that of the budget.

        Raises:
            StageError: the time was over first.
        """

        async def limited() -> _T:
            async with asyncio.timeout(self.budget.left_s):
                return await measuring

        try:
            return uvloop.run(limited())
        except TimeoutError:
            raise StageError("the time was over before its end; what is complete is reported") from None


@contextmanager
def _log_kept(outcome: Outcome, *platforms: EmulatedPlatform | None) -> Iterator[None]:
    """If the block fails, keep the last lines of the workers that still run; those of others are in a `StartError`."""
    try:
        yield
    except Exception:
        with suppress(OSError, RuntimeError, LookupError):
            for platform in filter(None, platforms):
                outcome.log += [line for worker in platform.state()["workers"] for line in worker["log"]]
        raise


def _record_start(outcome: Outcome, start: ColdStart) -> None:
    outcome.figures["start"] = asdict(start)
    outcome.lines.append(f"first token {report.format_number(start.first_token_s)} s after the exec")
    outcome.lines += [f"  {phase:16}{report.format_number(seconds):>8}" for phase, seconds in start.phases_s.items()]
