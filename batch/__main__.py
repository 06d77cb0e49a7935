"""The command line: `python -m batch run IN.jsonl -o OUT.jsonl --endpoint ID`.

The result goes to stdout, everything else to stderr. An error is a message on stderr and an exit code of
`errors.EXIT_CODES`. The API key is only taken from RUNPOD_API_KEY.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import httpx
from tqdm import tqdm

from batch.endpoint import Endpoint
from batch.errors import EXIT_CODES, BatchError, FailedLinesError, SettingError
from batch.journal import Journal
from batch.request_file import RequestFile
from batch.runner import Limits, Run

_BASE_URL = "https://api.runpod.ai/v2"
# The platform's queue takes 500 waiting jobs for each worker that an endpoint may have.
_MAX_JOBS = 500
_ATTEMPTS = 5


def log(text: str) -> None:
    """Write a message to stderr, above the progress bar if there is one."""
    tqdm.write(f"batch: {text}", file=sys.stderr)


def _run(arguments: argparse.Namespace) -> None:
    """Answer every line of the file; print how many there are, and where."""
    output: Path = arguments.output
    if not output.name:
        raise SettingError(f"{str(output)!r} is not the name of a file: name the output with -o")
    errors: Path = arguments.errors or output.with_suffix(f".errors{output.suffix}")
    journal = Journal(output, errors)
    if len({path.resolve() for path in (arguments.input, output, errors, journal.path)}) < 4:  # noqa: PLR2004
        raise SettingError("input, output, errors file and journal must be four different files")
    url, key = _endpoint_url(arguments), _api_key()
    endpoint = _endpoint(url, key)
    requests = RequestFile.read(arguments.input)
    journal.open([request.custom_id for request in requests.requests], requests.sha256, url)
    begun = time.monotonic()
    before = len(journal.answered)
    total = len(requests.requests)
    complete = False
    try:
        if before:
            log(f"{'continuing' if before < total else 'nothing to do'}: {before:,} of {total:,} lines are answered")
        with closing(requests), tqdm(total=total, initial=before, unit="line", disable=None) as bar:
            if before < total:
                _send_all(arguments, endpoint, requests, journal, bar)
        complete = True
    finally:
        journal.close(complete=complete)
    speed = f" ({(total - before) / (time.monotonic() - begun):.1f} lines/s)" if before < total else ""
    sys.stdout.write(f"{output}: {total - journal.failed:,} of {total:,} lines{speed}\n")
    if journal.failed:
        lines = "1 line" if journal.failed == 1 else f"{journal.failed:,} lines"
        raise FailedLinesError(f"{lines} failed: see {errors}")


def _send_all(
    arguments: argparse.Namespace, endpoint: Endpoint, requests: RequestFile, journal: Journal, bar: tqdm[None]
) -> None:
    try:
        asyncio.run(_send(arguments, endpoint, requests, journal, bar))
    except asyncio.CancelledError:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # The event loop's end has undone that of `interrupt`.
        raise KeyboardInterrupt from None


async def _send(
    arguments: argparse.Namespace, endpoint: Endpoint, requests: RequestFile, journal: Journal, bar: tqdm[None]
) -> None:
    task, loop = asyncio.current_task(), asyncio.get_running_loop()

    def interrupt() -> None:
        """End the run; another Ctrl-C would leave its end half done, with tracebacks."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if task is not None:
            task.cancel()

    loop.add_signal_handler(signal.SIGINT, interrupt)
    async with endpoint:
        await endpoint.check()
        await Run(requests, journal, endpoint, Limits(arguments.max_jobs, arguments.attempts), bar).run()


def _endpoint_url(arguments: argparse.Namespace) -> str:
    base_url = arguments.base_url or os.environ.get("RUNPOD_ENDPOINT_BASE_URL") or _BASE_URL
    endpoint = arguments.endpoint or os.environ.get("RUNPOD_ENDPOINT_ID", "")
    if "@" in base_url:
        raise SettingError("the base URL has an @: the API key is only taken from RUNPOD_API_KEY")
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", base_url):
        raise SettingError(f"{base_url!r} is not a URL: --base-url is one such as {_BASE_URL}")
    if not re.fullmatch(r"[\w-]+", endpoint):
        raise SettingError(f"{endpoint!r} is not an endpoint's id: name it with --endpoint or RUNPOD_ENDPOINT_ID")
    return f"{base_url.rstrip('/')}/{endpoint}"


def _endpoint(url: str, key: str) -> Endpoint:
    try:
        httpx.URL(url)
        return Endpoint(url, key, log)
    except httpx.InvalidURL as error:
        raise SettingError(f"{url!r} is not a URL: {error}") from None
    except (OSError, ValueError, ImportError) as error:
        raise SettingError(f"SSL_CERT_FILE, or a variable such as HTTPS_PROXY, is invalid: {error}") from None


def _api_key() -> str:
    key = os.environ.get("RUNPOD_API_KEY", "").strip()
    if not re.fullmatch(r"[!-~]+", key):
        raise SettingError("RUNPOD_API_KEY is not set, or has characters that no key has")
    return key


def _positive_int(text: str) -> int:
    if not re.fullmatch(r"[0-9]+", text) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m batch",
        description="Send a file of requests through a queue endpoint.",
        epilog="exit codes:\n" + "\n".join(f"  {code:3}  {meaning}" for code, meaning in EXIT_CODES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    run = commands.add_parser(
        "run",
        help="answer every line of a file in OpenAI's batch format",
        description=(
            "Check every line of the file, send each as a job, and write the answers in OpenAI's format, in the order "
            "in which they come. A run that was killed continues when the same command is started again: what is "
            "answered is not sent again, and what was sent is collected."
        ),
        epilog="RUNPOD_API_KEY is the API key; SSL_CERT_FILE names a file of CAs to trust instead of the usual ones.",
    )
    run.add_argument("input", metavar="IN.jsonl", type=Path, help='lines of {"custom_id", "method", "url", "body"}')
    run.add_argument("-o", "--output", metavar="OUT.jsonl", type=Path, required=True, help="file of the answers")
    run.add_argument(
        "--errors", metavar="FILE", type=Path, help="file of the lines that failed (default: OUT.errors.jsonl)"
    )
    run.add_argument("--endpoint", metavar="ID", help="id of the endpoint (default: RUNPOD_ENDPOINT_ID)")
    run.add_argument(
        "--base-url", metavar="URL", help=f"of the platform's API (default: RUNPOD_ENDPOINT_BASE_URL, or {_BASE_URL})"
    )
    run.add_argument(
        "--max-jobs",
        metavar="N",
        type=_positive_int,
        default=_MAX_JOBS,
        help="maximum number of jobs in the queue and running (default: %(default)s)",
    )
    run.add_argument(
        "--attempts",
        metavar="N",
        type=_positive_int,
        default=_ATTEMPTS,
        help="maximum number of jobs for one line, in one run (default: %(default)s)",
    )
    run.set_defaults(run=_run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the process's exit code. argparse exits with 2 for an invalid command line."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except BatchError as error:
        log(str(error))
        return error.exit_code
    except OSError as error:
        log(str(error) if error.filename is None else f"{error.filename}: {error.strerror}")
        return BatchError.exit_code
    except KeyboardInterrupt:
        log("interrupted; jobs that were sent go on; the same command collects them, up to 30 minutes after their end")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
