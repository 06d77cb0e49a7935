"""The command line: `python -m bench` measures under load, `... cold` cold starts, `... gpu` a machine with a GPU.

`... advise` measures nothing: it simulates an endpoint with what was measured.

Exit codes: 0 measured, 1 nothing was measured (a line on stderr says why), interrupted, or a stage of `gpu` failed or
was skipped, 2 usage error.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import uvloop

from bench import advise, cold, environment, gpu, imports, plots, report, streams, systems, vllm_bench
from bench.advisor import options as advise_options
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
    gpu.add_options(commands.add_parser("gpu", help="measure a machine with one GPU", description=gpu.__doc__))
    streams.add_options(
        commands.add_parser("streams", help="measure streams at the pace of a GPU", description=streams.__doc__)
    )
    advise_options.add_options(
        commands.add_parser("advise", help="find settings for an endpoint", description=advise.__doc__)
    )
    imports.add_options(commands.add_parser("imports", help="list what a start imports", description=imports.__doc__))
    vllm_bench.add_options(
        commands.add_parser("vllm-bench", help="measure with vLLM's own load tool", description=vllm_bench.__doc__)
    )
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
        return _COMMANDS[arguments.command](arguments)
    except KeyboardInterrupt:
        # Some are written only at the end.
        kept = "; the results contain what is complete" if arguments.command in (None, "gpu", "streams") else ""
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
    setup = systems.stock_setup(systems.tiny_model(), gpu=environment.gpu() is not None)
    ready = []
    for start in systems.all_systems(setup, logs, peer):
        try:
            system = stack.enter_context(start)
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


def _measure_cold_starts(arguments: argparse.Namespace) -> int:
    return cold.run(arguments.model, arguments.cache, arguments.rounds, arguments.peer, arguments.out)


_COMMANDS: dict[str | None, Callable[[argparse.Namespace], int]] = {
    None: _measure,
    "advise": advise.run,
    "cold": _measure_cold_starts,
    "gpu": gpu.run,
    "imports": lambda arguments: imports.run(arguments.out),
    "streams": streams.run,
    "vllm-bench": vllm_bench.run,
}

if __name__ == "__main__":
    sys.exit(main())
