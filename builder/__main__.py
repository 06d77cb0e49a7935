"""The command line: `python -m builder COMMAND`.

Results go to stdout, everything else to stderr. A failure is one line on stderr that says why, and an exit code of
`errors.EXIT_CODES`.
"""

from __future__ import annotations

import argparse
import errno
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from builder.errors import EXIT_CODES, BuilderError, DiskSpaceError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def _tiny(arguments: argparse.Namespace) -> None:
    """Print where the tiny model lies, having trained it and put it there if need be."""
    from builder.tiny_model import cache  # a command's imports are its own, so that --help answers at once

    directory: Path | None = arguments.directory
    sys.stdout.write(f"{cache.tiny_model(directory)}\n")


def _download(arguments: argparse.Namespace) -> None:
    """Print the commit of the model that lies in the directory then."""
    from builder import download

    manifest = download.download(
        arguments.repository,
        arguments.directory,
        arguments.revision,
        attempts=arguments.attempts,
        update=arguments.update,
    )
    sys.stdout.write(f"{manifest.repository}@{manifest.commit}\n")


def _verify(arguments: argparse.Namespace) -> None:
    """Print how much is right, and how fast it was read and hashed."""
    from builder import verify

    manifest, hashing_s = verify.verify(arguments.directory, offline=arguments.offline)
    speed = manifest.size_bytes / 1e9 / hashing_s
    sys.stdout.write(f"{len(manifest.files)} files, {manifest.size_bytes:,} bytes at {speed:.2f} GB/s: all right\n")


def _manifest(arguments: argparse.Namespace) -> None:
    """Print where the manifest lies."""
    from builder import checkpoint, manifest

    directory: Path = arguments.directory
    checkpoint.check(directory)
    manifest.of_directory(directory).write(directory)
    sys.stdout.write(f"{directory / manifest.NAME}\n")


def _whole(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _doctor(arguments: argparse.Namespace) -> None:
    """Print whether the model would run; that something is wrong is an error."""
    from builder.doctor import report

    options = {name: value for name, value in vars(arguments).items() if name not in ("run", "json")}
    report.diagnose(options, as_json=arguments.json)


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
        prog="python -m builder",
        description="Make what an image or a developer's machine holds.",
        epilog="exit codes:\n" + "\n".join(f"  {code:3}  {meaning}" for code, meaning in EXIT_CODES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    download = commands.add_parser(
        "download",
        help="a model of the hub, whole and verified",
        description=(
            "Download what serving the model needs, check every hash, and write a manifest when all is there. "
            "What was left half-way is gone on with; what is there already is not loaded again."
        ),
        epilog="The token for gated and private models is HF_TOKEN in the environment, or a build secret of that name.",
    )
    download.add_argument("repository", metavar="REPO", help="such as unsloth/phi-4-bnb-4bit")
    download.add_argument("directory", metavar="DIR", type=Path, help="a new or an empty directory")
    download.add_argument("--revision", help="branch, tag or commit; the main branch without it")
    download.add_argument(
        "--attempts", metavar="N", type=_whole, default=8, help="tries for each file (default: %(default)s)"
    )
    download.add_argument(
        "--update", action="store_true", help="let another commit of the same model in DIR become this one"
    )
    download.set_defaults(run=_download)

    verify = commands.add_parser(
        "verify",
        help="whether a model's files are still what they should be",
        description=(
            "Compare every file's size and hash with the manifest and with the hub, the shards with their index, "
            "and load configuration and tokenizer."
        ),
    )
    verify.add_argument("directory", metavar="DIR", type=Path)
    verify.add_argument("--offline", action="store_true", help="do not ask the hub: the manifest has its hashes")
    verify.set_defaults(run=_verify)

    manifest = commands.add_parser(
        "manifest",
        help="write the manifest of a model that is there already",
        description=(
            "Look whether the directory holds a model that loads, and write down its files and their hashes. What a "
            "download has written there of the model's origin is kept while its files are unchanged."
        ),
    )
    manifest.add_argument("directory", metavar="DIR", type=Path)
    manifest.set_defaults(run=_manifest)

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
    except BuilderError as error:
        sys.stderr.write(f"builder: {error}\n")
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"builder: {error}\n")
        return (DiskSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else BuilderError).exit_code
    except KeyboardInterrupt:
        sys.stderr.write("builder: interrupted\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
