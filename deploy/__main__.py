"""The command line: `python -m deploy COMMAND`.

Results go to stdout, everything else to stderr. An error is a message on stderr and an exit code of
`errors.EXIT_CODES`.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import os
import re
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from builder.errors import BuilderError
from deploy import commands, environment
from deploy.api import KEY_VARIABLE, URL, Api, client
from deploy.console import Console
from deploy.context import Context
from deploy.environment import Redaction
from deploy.errors import EXIT_CODES, DeployError
from deploy.first_request import KINDS
from deploy.options import FLASHBOOT, TYPES, Options
from deploy.up import up

# What the doctor cannot download ends with an error of its own: no line for each attempt.
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

URL_VARIABLE, IMAGE_VARIABLE = "RUNPOD_API_URL", "VLLM_SERVERLESS_IMAGE"
_TIMEOUT_S = 1800.0

Run = Callable[[Context, argparse.Namespace], Awaitable[None]]


async def _up(context: Context, arguments: argparse.Namespace) -> None:
    options = _options(arguments)
    await up(
        context,
        arguments.model,
        options,
        name=arguments.name,
        revision=arguments.revision,
        skip_doctor=arguments.skip_doctor,
        wait=arguments.wait,
        kinds=[arguments.task] if arguments.task else [],
    )


async def _update(context: Context, arguments: argparse.Namespace) -> None:
    await commands.update(context, arguments.name, _options(arguments), skip_doctor=arguments.skip_doctor)


async def _rollback(context: Context, arguments: argparse.Namespace) -> None:
    await commands.roll_back(context, arguments.name, arguments.to)


async def _status(context: Context, arguments: argparse.Namespace) -> None:
    await commands.status(context, arguments.name, as_json=arguments.json)


async def _logs(context: Context, arguments: argparse.Namespace) -> None:
    await commands.logs(
        context, arguments.name, follow=arguments.follow, tail=arguments.tail, worker_id=arguments.worker
    )


async def _down(context: Context, arguments: argparse.Namespace) -> None:
    await commands.down(context, arguments.name, confirmed=arguments.yes)


def _options(arguments: argparse.Namespace) -> Options:
    """Return what the command line asks of an endpoint."""
    env = environment.read(arguments.env, arguments.env_file, arguments.secret, os.environ)
    if arguments.max_model_len is not None:
        env["MAX_MODEL_LEN"] = arguments.max_model_len
    return Options(
        image=arguments.image,
        type=TYPES[arguments.type] if arguments.type else None,
        gpus=tuple(arguments.gpu),
        gpus_per_worker=arguments.gpus_per_worker,
        min_cuda=arguments.min_cuda,
        workers_min=arguments.workers_min,
        workers_max=arguments.workers_max,
        idle_timeout_s=arguments.idle_timeout,
        requests_per_worker=arguments.requests_per_worker,
        queue_delay_s=arguments.queue_delay,
        flashboot=FLASHBOOT[arguments.flashboot] if arguments.flashboot else None,
        volumes=None if arguments.volume is None else tuple(arguments.volume),
        data_centers=None if arguments.data_center is None else tuple(arguments.data_center),
        registry=arguments.registry,
        disk_gb=arguments.disk,
        execution_timeout_s=arguments.execution_timeout,
        env=env,
        unset=tuple(arguments.unset),
    )


def _seconds(text: str) -> float:
    """Return a time that an option gives."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def _count(text: str) -> int:
    """Return a number of GPUs that an option gives."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GPUs, 1 or more")
    return int(text)


def _version(text: str) -> str:
    """Return a CUDA version that an option gives."""
    if not re.fullmatch(r"[0-9]+\.[0-9]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a CUDA version, such as 13.0")
    return text


def _add_options(parser: argparse.ArgumentParser, *, creates: bool) -> None:
    """Add what `up` and `update` may ask of an endpoint.

    Args:
        parser: of the command.
        creates: whether it makes an endpoint, so that what is not given has a default.
    """

    def default(text: str) -> str:
        return f" (default: {text})" if creates else ""

    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--gpu",
        action="append",
        default=[],
        metavar="POOL_OR_TYPE",
        help="GPUs to run on: a pool such as ADA_24, or a type such as 4090; may be repeated"
        + default("the cheapest that the model fits"),
    )
    machine.add_argument(
        "--gpus-per-worker",
        type=_count,
        metavar="N",
        help="GPUs of a worker, which the model is split across" + default("as few as it needs"),
    )
    machine.add_argument(
        "--min-cuda",
        type=_version,
        metavar="VERSION",
        help="oldest CUDA version of the machines' drivers" + default("13.0"),
    )
    machine.add_argument(
        "--disk", type=int, metavar="GB", help="size of the container's disk" + default("20, and room for the model")
    )
    volumes = machine.add_mutually_exclusive_group()
    volumes.add_argument("--volume", action="append", metavar="ID", help="network volume to mount; may be repeated")
    volumes.add_argument(
        "--no-volume", dest="volume", action="store_const", const=[], help="mount no network volume any more"
    )
    places = machine.add_mutually_exclusive_group()
    places.add_argument(
        "--data-center",
        action="append",
        metavar="ID",
        help="where workers may run; may be repeated" + default("anywhere"),
    )
    places.add_argument(
        "--no-data-center", dest="data_center", action="store_const", const=[], help="let workers run anywhere again"
    )
    machine.add_argument(
        "--flashboot", choices=FLASHBOOT, help="freeze idle workers for a quicker start" + default("on")
    )

    scaling = parser.add_argument_group("scaling")
    scaling.add_argument(
        "--workers-min", type=int, metavar="N", help="workers that always run, and are paid for" + default("0")
    )
    scaling.add_argument("--workers-max", type=int, metavar="N", help="workers at the most" + default("3"))
    scaling.add_argument(
        "--requests-per-worker",
        type=int,
        metavar="N",
        help="add a worker for each N requests that wait or run" + default("16"),
    )
    scaling.add_argument(
        "--queue-delay", type=_seconds, metavar="S", help="instead, add workers when a request has waited S seconds"
    )
    scaling.add_argument(
        "--idle-timeout",
        type=int,
        metavar="S",
        help="stop a worker that was idle for S seconds; only with --queue-delay or a load balancer" + default("60"),
    )
    scaling.add_argument(
        "--execution-timeout", type=_seconds, metavar="S", help="how long one request may run" + default("600")
    )

    worker = parser.add_argument_group("worker")
    worker.add_argument(
        "--image",
        default=(os.environ.get(IMAGE_VARIABLE) or None) if creates else None,
        help="image of the worker" + default(f"the value of {IMAGE_VARIABLE}"),
    )
    worker.add_argument(
        "--registry", metavar="ID", help="the account's credentials for the image's registry, if it is private"
    )
    worker.add_argument(
        "--max-model-len",
        metavar="TOKENS",
        help="prompt and answer together, such as 8192 or 16k" + default("the model's limit"),
    )
    worker.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="setting of the worker; without a value, with the one it has in the environment; may be repeated",
    )
    worker.add_argument(
        "--env-file", action="append", default=[], type=Path, metavar="FILE", help="file with lines of NAME=VALUE"
    )
    worker.add_argument(
        "--secret",
        action="append",
        default=[],
        metavar="NAME=SECRET",
        help="setting whose value is the account's secret of the name SECRET; may be repeated",
    )
    if creates:
        worker.add_argument(
            "--type", choices=TYPES, help="type of the endpoint, which cannot be changed later (default: queue)"
        )
    parser.set_defaults(unset=[], type=None)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--api-url",
        metavar="URL",
        default=os.environ.get(URL_VARIABLE) or URL,
        help=f"address of RunPod's API (default: the value of {URL_VARIABLE}, or {URL})",
    )
    changes = argparse.ArgumentParser(add_help=False)
    changes.add_argument(
        "--dry-run", action="store_true", help="print the requests that would change something, without sending them"
    )
    waits = argparse.ArgumentParser(add_help=False)
    waits.add_argument(
        "--timeout",
        type=_seconds,
        default=_TIMEOUT_S,
        metavar="S",
        help="how long a start or a rollout may take (default: 1800)",
    )
    parser = argparse.ArgumentParser(
        prog="python -m deploy",
        description=f"Run a model on a serverless endpoint of RunPod. {KEY_VARIABLE} must be in the environment.",
        epilog="exit codes:\n" + "\n".join(f"  {code:3}  {meaning}" for code, meaning in EXIT_CODES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(dry_run=False, timeout=_TIMEOUT_S)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        name: str, run: Run, help_text: str, description: str, *options: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        parents = [common, *options]
        command = subparsers.add_parser(name, help=help_text, description=description, parents=parents)
        command.set_defaults(run=run)
        return command

    command = add(
        "up",
        _up,
        "make an endpoint for a model, and wait until it answers",
        "Check that the model fits, choose GPUs, create the endpoint (or change what differs), wait until it has "
        "answered a first request, and print how to call it. Run it again at any time: it creates no second endpoint.",
        changes,
        waits,
    )
    command.add_argument(
        "model",
        metavar="MODEL",
        help="hub id, such as Qwen/Qwen3-8B, or a directory of the image (if it is not here too: with --skip-doctor)",
    )
    command.add_argument("--name", help="name of the endpoint (default: the last part of MODEL)")
    command.add_argument("--revision", help="branch, tag or commit of the model")
    command.add_argument("--skip-doctor", action="store_true", help="do not check model and settings; needs --gpu")
    command.add_argument(
        "--no-wait", dest="wait", action="store_false", help="do not wait for the rollout or a first answer"
    )
    command.add_argument("--task", choices=KINDS, help="kind of the first request (default: what the model answers)")
    _add_options(command, creates=True)

    command = add(
        "update",
        _update,
        "change an endpoint, and follow the release",
        "Change what the options name of an endpoint, and follow the release.",
        changes,
        waits,
    )
    command.add_argument("name", metavar="NAME", help="name or id of the endpoint")
    command.add_argument("--skip-doctor", action="store_true", help="do not check the settings")
    _add_options(command, creates=False)
    command.add_argument("--unset", action="append", metavar="NAME", help="remove a setting; may be repeated")

    command = add(
        "rollback",
        _rollback,
        "go back to an earlier release",
        "Undo the newest release, or all after --to.",
        changes,
        waits,
    )
    command.add_argument("name", metavar="NAME", help="name or id of the endpoint")
    command.add_argument(
        "--to",
        type=int,
        metavar="RELEASE",
        help="release to go back to, as `status` lists them (default: the one before)",
    )

    command = add(
        "status",
        _status,
        "show workers, releases and price, or list all endpoints",
        "Print the state of an endpoint, or list all.",
    )
    command.add_argument("name", metavar="NAME", nargs="?", help="name or id of the endpoint")
    command.add_argument("--json", action="store_true", help="print one JSON object")

    command = add(
        "logs", _logs, "show the logs of the workers", "Print the logs of an endpoint's workers, and of their machines."
    )
    command.add_argument("name", metavar="NAME", help="name or id of the endpoint")
    command.add_argument("-f", "--follow", action="store_true", help="go on until interrupted, also with new workers")
    command.add_argument(
        "--tail", type=int, default=100, metavar="N", help="lines of each worker to begin with (default: 100)"
    )
    command.add_argument("--worker", metavar="ID", help="only the log of this worker")

    command = add("down", _down, "delete an endpoint", "Delete an endpoint, its workers and its jobs.", changes)
    command.add_argument("name", metavar="NAME", help="name or id of the endpoint")
    command.add_argument("--yes", action="store_true", help="do not ask")
    return parser


async def _run(arguments: argparse.Namespace, console: Console) -> None:
    key = os.environ.get(KEY_VARIABLE, "").strip() or None
    console.redaction.add([key] if key else [])
    async with client(arguments.api_url, key) as http:
        context = Context(
            http,
            Api(http, console.log),
            console,
            has_key=key is not None,
            dry_run=arguments.dry_run,
            timeout_s=arguments.timeout,
        )
        await arguments.run(context, arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the process's exit code. argparse exits with 2 for an invalid command line."""
    arguments = _parser().parse_args(argv)
    console = Console(Redaction())
    try:
        asyncio.run(_run(arguments, console))
    except (DeployError, BuilderError) as error:
        console.log(str(error))
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer
        return 0
    except KeyboardInterrupt:
        console.log("interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
