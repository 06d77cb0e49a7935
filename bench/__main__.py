"""The command line: `python -m bench` measures under load, `... cold` cold starts, `... imports` what a start imports.

Exit codes: 0 measured, 1 nothing was measured (a line on stderr says why) or interrupted, 2 usage error.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from types import FrameType

import uvloop

from bench import cold, environment, imports, plots, report, systems
from bench.compare import Results, compare
from bench.report import print_progress
from bench.scenarios import SEED, Scenario, default_scenarios, full_scenarios
from bench.systems import StartError, SystemUnderTest

_IDLE_S = 3.0
_CLIENTS = [1, 8, 24, 64]
_FULL_CLIENTS = [1, 8, 24, 64, 256]


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    result = argparse.ArgumentParser(
        prog="python -m bench",
        description="Compare this worker with vLLM's own server and with worker-vllm: same machine, same tiny model, "
        "same settings, in interleaved rounds. Nothing else should run on the machine during a measurement.",
    )
    result.add_argument("--full", action="store_true", help="measure all scenarios and 256 clients (about two hours)")
    result.add_argument(
        "--clients", type=_positive_int, nargs="+", metavar="N", help="numbers of clients (default: 1 8 24 64)"
    )
    result.add_argument(
        "--seconds",
        type=float,
        default=4.0,
        metavar="S",
        help="duration of one measurement (default: 4); three times as long with 64 or more clients",
    )
    _add_common_options(result)
    commands = result.add_subparsers(dest="command")
    cold_parser = commands.add_parser(
        "cold",
        help="measure cold starts",
        description="Measure cold starts: from a worker's exec to the first token of a job that is already queued.",
    )
    cold_parser.add_argument(
        "--model", choices=cold.MODELS, default="tiny", help="the tiny model, or 1 GB of random weights (default: tiny)"
    )
    cold_parser.add_argument(
        "--cache", choices=cold.CACHES, default="cold", help="state of the file cache (default: cold)"
    )
    # Without defaults, which would replace what was given before `cold`.
    _add_common_options(cold_parser, with_defaults=False)
    imports_parser = commands.add_parser(
        "imports",
        help="list what a start imports",
        description="List what a worker imports from its exec to its first answer, by package, and what it costs.",
    )
    _add_out_option(imports_parser, with_defaults=False)
    return result


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _add_common_options(result: argparse.ArgumentParser, *, with_defaults: bool = True) -> None:
    result.add_argument(
        "--peer",
        type=Path,
        default=None if with_defaults else argparse.SUPPRESS,
        metavar="DIR",
        help="a checkout of runpod-workers/worker-vllm to compare with",
    )
    result.add_argument(
        "--rounds",
        type=_positive_int,
        default=7 if with_defaults else argparse.SUPPRESS,
        metavar="N",
        help="number of rounds (default: 7)",
    )
    _add_out_option(result, with_defaults=with_defaults)


def _add_out_option(result: argparse.ArgumentParser, *, with_defaults: bool) -> None:
    result.add_argument(
        "--out",
        type=Path,
        default=Path("bench-results") if with_defaults else argparse.SUPPRESS,
        metavar="DIR",
        help="directory of the results (default: bench-results)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; return the exit code."""
    arguments = parser().parse_args(argv)
    if arguments.peer is not None and not (arguments.peer / "src" / "main.py").is_file():
        sys.stderr.write(f"{arguments.peer} is not a checkout of worker-vllm: it has no src/main.py\n")
        return 2
    # Servers are stopped by the context managers that started them, so a signal must unwind these.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if arguments.command == "cold":
            return cold.run(arguments.model, arguments.cache, arguments.rounds, arguments.peer, arguments.out)
        if arguments.command == "imports":
            return imports.run(arguments.out)
        return _measure(arguments)
    except KeyboardInterrupt:
        # Starts are written only at the end.
        kept = "" if arguments.command else "; the results contain the complete rounds"
        sys.stderr.write(f"Interrupted{kept}\n")
        return 1


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _measure(arguments: argparse.Namespace) -> int:
    clients = arguments.clients or (_FULL_CLIENTS if arguments.full else _CLIENTS)
    scenarios: list[Scenario] = (full_scenarios if arguments.full else default_scenarios)(clients)
    with ExitStack() as stack:
        ready = _start_systems(stack, arguments.peer, arguments.out / "logs")
        if not ready:
            return 1
        conditions = {
            **environment.hardware(),
            **environment.versions(arguments.peer),
            "settings": "tiny model, eager, on a CPU float32 and 1 GiB of KV cache, otherwise stock",
            "load": f"{arguments.rounds} rounds, {arguments.seconds:g} s each (three times that with 64 or more "
            f"clients), seed {SEED}",
            **{f"idle CPU of {name}, cores": f"{cores:.2f}" for name, cores in _idle_cpu_cores(ready).items()},
        }

        def after_round(results: Results, rounds: int) -> None:
            print_progress(f"Round {rounds} of {arguments.rounds} is complete")
            report.write_json(arguments.out / "results.json", report.to_document(results, conditions))
            report.write_text(arguments.out / "results.txt", report.render_text(results, conditions, rounds))

        results = uvloop.run(compare(ready, scenarios, arguments.rounds, arguments.seconds, after_round))
    sys.stdout.write(report.render_text(results, conditions, arguments.rounds))
    files = plots.write_plots(results, arguments.out)
    print_progress(f"Wrote {arguments.out / 'results.json'}, {arguments.out / 'results.txt'} and {len(files)} plots")
    return 0


def _start_systems(stack: ExitStack, peer: Path | None, logs: Path) -> list[SystemUnderTest]:
    """Start the systems one after another; print and leave out one that does not start."""
    model, gpu = systems.tiny_model(), environment.gpu() is not None
    starts: list[Callable[[], AbstractContextManager[SystemUnderTest]]] = [
        partial(systems.vllm_server, model, logs, gpu=gpu),
        partial(systems.this_worker, model, logs, gpu=gpu),
    ]
    if peer is not None:
        starts.append(partial(systems.peer_worker, model, logs, gpu=gpu, checkout=peer))
    ready = []
    for start in starts:
        try:
            system = stack.enter_context(start())
        except StartError as error:
            print_progress(str(error))
        else:
            print_progress(f"{system.name} is ready after {system.ready_s:.1f} s")
            ready.append(system)
    return ready


def _idle_cpu_cores(ready: list[SystemUnderTest]) -> dict[str, float]:
    """Return how many cores each system uses without requests: all of them run while one is measured."""
    before = [system.total_cpu_s() for system in ready]
    time.sleep(_IDLE_S)
    return {system.name: (system.total_cpu_s() - cpu_s) / _IDLE_S for system, cpu_s in zip(ready, before, strict=True)}


if __name__ == "__main__":
    sys.exit(main())
