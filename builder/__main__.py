"""The command line: `python -m builder COMMAND`.

Results go to stdout, everything else to stderr. An error is a message on stderr and an exit code of
`errors.EXIT_CODES`.
"""

from __future__ import annotations

import argparse
import errno
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from builder.console import log, positive_int
from builder.errors import EXIT_CODES, BuilderError, DiskSpaceError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_ATTEMPTS = 8


def _tiny(arguments: argparse.Namespace) -> None:
    """Print the directory of the tiny model; train and copy it first if needed."""
    from builder.tiny_model import cache  # each command imports its own modules, so that --help is fast

    directory: Path | None = arguments.directory
    sys.stdout.write(f"{cache.tiny_model(directory)}\n")


def _download(arguments: argparse.Namespace) -> None:
    """Download a model; print its repository and commit."""
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
    """Verify a model; print its size and how fast it was read and hashed."""
    from builder import verify

    manifest, hashing_s = verify.verify(arguments.directory, offline=arguments.offline)
    speed = manifest.size_bytes / 1e9 / hashing_s
    sys.stdout.write(f"{len(manifest.files)} files, {manifest.size_bytes:,} bytes at {speed:.2f} GB/s: OK\n")


def _manifest(arguments: argparse.Namespace) -> None:
    """Write a model's manifest; print its path."""
    from builder import checkpoint, layout, manifest

    directory: Path = arguments.directory
    checkpoint.check(directory)
    manifest.of_directory(directory).write(directory)
    sys.stdout.write(f"{directory / layout.MANIFEST}\n")


def _doctor(arguments: argparse.Namespace) -> None:
    """Print whether the model would run; problems are an error."""
    from builder.doctor import report

    options = {name: value for name, value in vars(arguments).items() if name not in ("run", "json")}
    report.diagnose(options, as_json=arguments.json)


def _pack(arguments: argparse.Namespace) -> None:
    """Pack compiled code; print how many files were added."""
    from builder import cache_file

    names = sys.stdin.read().splitlines() if arguments.stdin else None
    sys.stdout.write(f"{cache_file.pack(arguments.directory, arguments.file, names)} files\n")


def _unpack(arguments: argparse.Namespace) -> None:
    """Unpack compiled code; print how many files that were, and their size."""
    from builder import cache_file

    count, size_bytes = cache_file.unpack(arguments.file, arguments.directory)
    sys.stdout.write(f"{count} files ({size_bytes / 1e6:.1f} MB)\n")


def _warm(arguments: argparse.Namespace) -> None:
    """Make the caches of compiled code; print their directory, unless stdout is the archive."""
    from builder import warm

    directory = warm.warm(arguments.file, arguments.job or warm.JOB)
    if arguments.file != warm.STDOUT:
        sys.stdout.write(f"{directory}\n")


def _add_caches(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    warm = commands.add_parser(
        "warm",
        help="compile what a worker would compile at its first start",
        description=(
            "Start the worker once with the settings of the environment, on the kind of GPU that it will have, and run "
            "one job, so that vLLM and its libraries compile into the worker's COMPILE_CACHE_DIR; print that directory."
        ),
        epilog="To put the result into an image, build the Dockerfile's target `warm` (docs/operate.md).",
    )
    warm.add_argument("file", metavar="FILE", nargs="?", help="pack the caches into this tar archive; - is stdout")
    warm.add_argument("--job", metavar="JSON", help="the job to run (default: a completion of 16 tokens)")
    warm.set_defaults(run=_warm)

    pack = commands.add_parser(
        "pack",
        help="pack compiled code into one file",
        description=(
            "Add the files of a directory to a tar archive that several workers may share: it is replaced as a whole, "
            "and files that it has already stay."
        ),
    )
    pack.add_argument("directory", metavar="DIR", type=Path)
    pack.add_argument("file", metavar="FILE", type=Path)
    pack.add_argument("--stdin", action="store_true", help="pack only the files that stdin names, one a line")
    pack.set_defaults(run=_pack)

    unpack = commands.add_parser(
        "unpack",
        help="unpack compiled code",
        description="Unpack such an archive; files that are in the directory already are left as they are.",
    )
    unpack.add_argument("file", metavar="FILE", type=Path)
    unpack.add_argument("directory", metavar="DIR", type=Path)
    unpack.set_defaults(run=_unpack)


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="check whether a model fits a GPU, and the worker's settings",
        description=(
            "Compute from a model's config.json whether its weights and its KV cache fit a GPU, and check package "
            "versions, disk space, token and settings. Options default to the worker's environment variables "
            "(MODEL_NAME, MAX_MODEL_LEN, ...). Exits with 1 if there are problems."
        ),
    )
    doctor.add_argument("model", metavar="MODEL", nargs="?", help="directory or hub id (default: the worker's model)")
    doctor.add_argument("--revision", help="branch, tag or commit of a model of the hub (default: the main branch)")
    doctor.add_argument("--gpu", metavar="NAME_OR_GIB", help="such as L4, A100-80 or 24 (default: this machine's)")
    for flag, metavar in (
        ("--max-model-len", "TOKENS"),
        ("--max-num-seqs", "N"),
        ("--max-num-batched-tokens", "TOKENS"),
        ("--gpu-memory-utilization", "FRACTION"),
        ("--tensor-parallel-size", "N"),
        ("--dtype", "TYPE"),
        ("--kv-cache-dtype", "TYPE"),
        ("--quantization", "METHOD"),
    ):
        doctor.add_argument(flag, metavar=metavar, help="as in vLLM")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(run=_doctor)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m builder",
        description="Prepare a model for a worker: on a developer's machine or in an image.",
        epilog="exit codes:\n" + "\n".join(f"  {code:3}  {meaning}" for code, meaning in EXIT_CODES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    download = commands.add_parser(
        "download",
        help="download and verify a model from the hub",
        description=(
            "Download the files that serving the model needs, check each hash, and write a manifest at the end. "
            "An interrupted download is resumed; files that are there already are not downloaded again."
        ),
        epilog="For gated and private models set HF_TOKEN in the environment, or a build secret of that name.",
    )
    download.add_argument("repository", metavar="REPO", help="such as unsloth/phi-4-bnb-4bit")
    download.add_argument("directory", metavar="DIR", type=Path, help="a new or empty directory")
    download.add_argument("--revision", help="branch, tag or commit (default: the main branch)")
    download.add_argument(
        "--attempts",
        metavar="N",
        type=positive_int,
        default=_ATTEMPTS,
        help="attempts for each file (default: %(default)s)",
    )
    download.add_argument("--update", action="store_true", help="replace another commit of the same model in DIR")
    download.set_defaults(run=_download)

    verify = commands.add_parser(
        "verify",
        help="check a model's files against its manifest and the hub",
        description=(
            "Compare each file's size and hash with the manifest and with the hub, the shards with their index, "
            "and load configuration and tokenizer."
        ),
    )
    verify.add_argument("directory", metavar="DIR", type=Path)
    verify.add_argument("--offline", action="store_true", help="compare with the manifest only, not with the hub")
    verify.set_defaults(run=_verify)

    manifest = commands.add_parser(
        "manifest",
        help="write the manifest of a model directory",
        description=(
            "Check that the directory has a loadable model, and write a manifest with the hashes of its files. "
            "The origin in an existing manifest is kept if the files are unchanged."
        ),
    )
    manifest.add_argument("directory", metavar="DIR", type=Path)
    manifest.set_defaults(run=_manifest)

    tiny = commands.add_parser(
        "tiny",
        help="make a real model of a few megabytes, for use and tests without a GPU",
        description=(
            "Train a tiny Phi3ForCausalLM (phi-4's architecture and chat format) on a small corpus, once per machine, "
            "and print its directory. It takes about a minute on two cores; later calls use the cache."
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
        help="copy the model to this new or empty directory, and print it instead of the cache's",
    )
    tiny.set_defaults(run=_tiny)
    _add_caches(commands)
    _add_doctor(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the process's exit code. argparse exits with 2 for an invalid command line."""
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], None] = arguments.run
    try:
        run(arguments)
    except BuilderError as error:
        log(str(error))
        return error.exit_code
    except OSError as error:
        log(str(error))
        return (DiskSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else BuilderError).exit_code
    except KeyboardInterrupt:
        log("interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
