"""`python -m bench vllm-bench`: what vLLM's own load tool, `vllm bench serve`, says of vLLM alone and of this worker.

The tool takes the time between two events for the time between two tokens (ITL). So its ITL is that of this bench's
inter-chunk latency; its TPOT, which is from the number of tokens that `usage` has, is that of the ITL per token.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench import environment, report, systems
from bench.report import print_progress
from bench.systems import ROOT, Setup, StartError, SystemUnderTest

# `vllm bench serve` without its command line, which does not start without the metadata of the CUDA build.
_TOOL = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
_TIMEOUT_S = 600.0
_LABEL_WIDTH = 26
_WIDTH = 16
# Of the tool's result.
FIGURES = {
    "completed": "requests",
    "failed": "failed",
    "total_output_tokens": "output tokens",
    "request_throughput": "requests/s",
    "output_throughput": "tokens/s",
    "median_ttft_ms": "TTFT p50, ms",
    "p95_ttft_ms": "TTFT p95, ms",
    "median_tpot_ms": "TPOT p50, ms",
    "median_itl_ms": "ITL (of events) p50, ms",
    "p95_itl_ms": "ITL (of events) p95, ms",
}


def add_options(result: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    result.add_argument("--requests", type=int, default=200, metavar="N", help="number of requests (default: 200)")
    result.add_argument("--concurrency", type=int, default=24, metavar="N", help="requests at a time (default: 24)")
    result.add_argument("--tokens", type=int, default=64, metavar="N", help="output tokens of each (default: 64)")
    result.add_argument(
        "--out", type=Path, default=argparse.SUPPRESS, metavar="DIR", help="directory of vllm-bench.json and .txt"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure both systems; print and write the results; return the exit code."""
    out: Path = arguments.out
    setup = systems.stock_setup(systems.tiny_model(), gpu=environment.gpu() is not None)
    results: dict[str, Mapping[str, Any]] = {}
    with ExitStack() as stack:
        try:
            ready = [stack.enter_context(start) for start in systems.all_systems(setup, out / "logs", peer=None)]
            for system in ready:
                results[system.name] = _measure(system, setup, arguments, out / "vllm-bench-tool.json")
                print_progress(f"{system.name} is measured")
        except (StartError, subprocess.SubprocessError) as error:
            print_progress(str(error))
            print_progress(getattr(error, "stderr", None) or "")
            return 1
    conditions = {**environment.hardware(), **environment.versions(None)}
    text = render(conditions, results)
    report.write_json(out / "vllm-bench.json", {"environment": conditions, "systems": results})
    report.write_text(out / "vllm-bench.txt", text)
    sys.stdout.write(text)
    return 0


def render(conditions: Mapping[str, str], results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the report for people: a row per figure, a column per system."""
    lines = [*(f"{key}: {value}" for key, value in conditions.items()), ""]
    lines.append(f"{'':{_LABEL_WIDTH}}" + "".join(f"{name:>{_WIDTH}}" for name in results))
    for figure, label in FIGURES.items():
        values = (report.format_number(result[figure]) for result in results.values())
        lines.append(f"{label:{_LABEL_WIDTH}}" + "".join(f"{value:>{_WIDTH}}" for value in values))
    return "\n".join(lines) + "\n"


def _measure(system: SystemUnderTest, setup: Setup, arguments: argparse.Namespace, file: Path) -> Mapping[str, Any]:
    """Return the tool's result for one system.

    Raises:
        subprocess.SubprocessError: the tool failed, or took too long.
    """
    address = system.address
    options = {
        "backend": "openai-chat",
        "base-url": f"http://{address.host}:{address.port}",
        "endpoint": address.path,
        "model": str(setup.model),
        "served-model-name": "tiny",
        "dataset-name": "random",
        "random-input-len": "16",
        "random-output-len": str(arguments.tokens),
        "num-prompts": str(arguments.requests),
        "max-concurrency": str(arguments.concurrency),
        "metric-percentiles": "95",
        "result-dir": str(file.parent),
        "result-filename": file.name,
    }
    flags = ["--ignore-eos", "--disable-tqdm", "--save-result"]
    command = [sys.executable, "-c", _TOOL, *(f"--{name}={value}" for name, value in options.items()), *flags]
    variables = {**os.environ, "OPENAI_API_KEY": "local", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        subprocess.run(command, cwd=ROOT, env=variables, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    finally:
        file.unlink(missing_ok=True)
    return result
