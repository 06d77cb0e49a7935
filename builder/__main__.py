"""The command line: `python -m builder COMMAND`.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed with one line on stderr that says why,
2 the command line itself was wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from builder.errors import BuilderError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def _tiny(arguments: argparse.Namespace) -> None:
    """Print where the tiny model lies, having trained it and put it there if need be."""
    from builder import tiny  # a command's imports are its own, so that --help answers at once

    directory: Path | None = arguments.directory
    sys.stdout.write(f"{tiny.tiny_model(directory)}\n")


def _doctor(arguments: argparse.Namespace) -> None:
    """Print whether the model would run; that something is wrong is an error."""
    from builder import doctor

    options = {name: value for name, value in vars(arguments).items() if name not in ("run", "json")}
    doctor.diagnose(options, as_json=arguments.json)


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="would this model with these settings fit this GPU, and what else is wrong",
        description=(
            "Reckon from a model's config.json alone whether its weights and its KV cache fit a GPU, and look at "
            "versions, disk, token and settings. What is not given here is taken from the variables that the worker "
            "reads (MODEL_NAME, MAX_MODEL_LEN, ...). It exits with 1 if something is wrong."
        ),
    )
    doctor.add_argument("model", metavar="MODEL", nargs="?", help="directory or hub id (default: the worker's)")
    doctor.add_argument("--gpu", metavar="NAME_OR_GIB", help="such as L4, A100-80 or 24 (default: this machine's)")
    for flag, metavar in (
        ("--max-model-len", "TOKENS"),
        ("--max-num-seqs", "N"),
        ("--max-num-batched-tokens", "TOKENS"),
        ("--gpu-memory-utilization", "SHARE"),
        ("--tensor-parallel-size", "N"),
        ("--dtype", "TYPE"),
        ("--kv-cache-dtype", "TYPE"),
        ("--quantization", "METHOD"),
    ):
        doctor.add_argument(flag, metavar=metavar, help="as for vLLM")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(run=_doctor)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m builder", description="Make what an image or a developer's machine holds."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    tiny = commands.add_parser(
        "tiny",
        help="a real model of a few megabytes, for trying and testing without a GPU",
        description=(
            "Train a tiny Phi3ForCausalLM (phi-4's architecture and chat format) on a small corpus, once a machine, "
            "and print where it lies. It takes about a minute on two cores, and no time when it is already there."
        ),
        epilog=(
            "The cache is $VLLM_SERVERLESS_CACHE, else $XDG_CACHE_HOME/vllm-serverless, else ~/.cache/vllm-serverless."
        ),
    )
    tiny.add_argument(
        "directory",
        metavar="DIR",
        nargs="?",
        type=Path,
        help="copy the model here as well (a new or empty directory) and print this path instead of the cache's",
    )
    tiny.set_defaults(run=_tiny)
    _add_doctor(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the process's exit code. argparse itself exits with 2 on a wrong command line."""
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], None] = arguments.run
    try:
        run(arguments)
    except (BuilderError, OSError) as error:
        sys.stderr.write(f"builder: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("builder: interrupted\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
