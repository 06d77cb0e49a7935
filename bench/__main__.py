"""The command line: `python -m bench` measures under load, `python -m bench cold` measures starts.

Exit codes: 0 measured, 1 nothing could be measured (one line on stderr says why), 2 the command line is wrong.
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

from bench import cold, environment, plots, report, systems
from bench.compare import Results, compare
from bench.scenarios import SEED, Scenario, default_scenarios, full_scenarios
from bench.systems import OURS, PEER, VLLM, Server, ServerError

_IDLE_S = 3.0
_CLIENTS = [1, 8, 24, 64]
_FULL_CLIENTS = [1, 8, 24, 64, 256]


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    result = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measures this worker beside vLLM's own server and worker-vllm: same machine, same tiny model, "
        "same settings, in interleaved rounds. The machine should do nothing else meanwhile.",
    )
    result.add_argument("--full", action="store_true", help="all scenarios (about two hours) and 256 clients")
    result.add_argument(
        "--clients", type=_positive, nargs="+", metavar="N", help="numbers of clients (default: 1 8 24 64)"
    )
    result.add_argument(
        "--seconds",
        type=float,
        default=4.0,
        metavar="S",
        help="length of a measurement (default: 4); three times as long from 64 clients on",
    )
    _common(result)
    starts = result.add_subparsers(dest="command").add_parser(
        "cold", description="Measures starts: from the worker's exec to the first token of a job that waits already."
    )
    starts.add_argument("--model", choices=cold.MODELS, default="tiny", help="tiny, or made-up weights of 1 GB")
    starts.add_argument(
        "--cache", choices=cold.CACHES, default="cold", help="whether files are in memory (default: cold)"
    )
    _common(starts)
    return result


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def _common(of: argparse.ArgumentParser) -> None:
    of.add_argument("--peer", type=Path, metavar="DIR", help="a checkout of runpod-workers/worker-vllm to compare with")
    of.add_argument("--rounds", type=_positive, default=7, metavar="N", help="how many times (default: 7)")
    of.add_argument(
        "--out", type=Path, default=Path("bench-results"), metavar="DIR", help="for results (default: bench-results)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; return the exit code."""
    arguments = parser().parse_args(argv)
    if arguments.peer is not None and not (arguments.peer / "src" / "main.py").is_file():
        sys.stderr.write(f"{arguments.peer} is no checkout of worker-vllm: it has no src/main.py\n")
        return 2
    # The servers end with the blocks that started them, so a signal must unwind those.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if arguments.command == "cold":
            return cold.run(arguments.model, arguments.cache, arguments.rounds, arguments.peer, arguments.out)
        return _measure(arguments)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted; the rounds that were complete are in the results\n")
        return 1


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _measure(arguments: argparse.Namespace) -> int:
    clients = arguments.clients or (_FULL_CLIENTS if arguments.full else _CLIENTS)
    scenarios: list[Scenario] = (full_scenarios if arguments.full else default_scenarios)(clients)
    with ExitStack() as stack:
        ready = start_all(stack, arguments.peer, arguments.out / "logs")
        if not ready:
            return 1
        about = {
            **environment.machine(),
            **environment.versions(arguments.peer),
            "settings": "tiny model, eager, on a CPU float32 and 1 GiB of KV cache, all else stock",
            "load": f"{arguments.rounds} rounds, {arguments.seconds:g} s each (from 64 clients on thrice that), "
            f"seed {SEED}",
            **{f"idle CPU of {name}, cores": f"{cores:.2f}" for name, cores in _idle_cpu(ready).items()},
        }

        def after_round(results: Results, rounds: int) -> None:
            _say(f"round {rounds} of {arguments.rounds} is complete")
            report.write_json(arguments.out / "results.json", report.document(results, about))
            report.write_text(arguments.out / "results.txt", report.text(results, about, rounds))

        measured = compare(ready, scenarios, arguments.rounds, arguments.seconds, after_round)
        results = uvloop.run(measured)
    sys.stdout.write(report.text(results, about, arguments.rounds))
    files = plots.write_plots(results, arguments.out)
    _say(f"Written: {arguments.out / 'results.json'}, {arguments.out / 'results.txt'}, and {len(files)} plots")
    return 0


def start_all(stack: ExitStack, peer: Path | None, logs: Path) -> list[Server]:
    """Start the servers one by one; one that does not start is left out, with a line that says so."""
    model, gpu = systems.tiny_model(), environment.gpu() is not None
    starts: dict[str, Callable[[], AbstractContextManager[Server]]] = {
        VLLM: partial(systems.vllm_alone, model, logs, gpu=gpu),
        OURS: partial(systems.this_worker, model, logs, gpu=gpu),
    }
    if peer is not None:
        starts[PEER] = partial(systems.peer_worker, model, logs, gpu=gpu, checkout=peer)
    ready = []
    for start in starts.values():
        try:
            server = stack.enter_context(start())
        except ServerError as error:
            _say(str(error))
        else:
            _say(f"{server.name} is ready after {server.ready_s:.1f} s")
            ready.append(server)
    return ready


def _idle_cpu(ready: list[Server]) -> dict[str, float]:
    """How many cores each server takes while none is asked anything: all run beside the one that is measured."""
    before = [server.all_cpu_s() for server in ready]
    time.sleep(_IDLE_S)
    return {server.name: (server.all_cpu_s() - cpu_s) / _IDLE_S for server, cpu_s in zip(ready, before, strict=True)}


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
