"""The worker's entry points: `handler`, which the SDK registers, and the command line.

    python handler.py                                     runs the job of test_input.json; on a platform (PLATFORM, or
                                                          its own variables), takes jobs from its queue, or serves HTTP
                                                          (ENDPOINT_TYPE)
    python handler.py --test_input '{"input": {...}}'     runs that job
    python handler.py --print-config                      prints the effective configuration
    python handler.py --rp_serve_api                      starts the emulator of the platform with one such worker

The processes that vLLM spawns import this module again, so it has no expensive imports at its top level.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from engine.config.environment import Variable
    from engine.config.settings import Settings
    from engine.queue.protocol import JobQueue

TEST_INPUT = Path(__file__).with_name("test_input.json")


async def handler(job: dict[str, Any]) -> AsyncGenerator[Any, None]:
    """Run one job of the queue on the worker's engine and yield its outputs, as any RunPod-style SDK expects.

    Args:
        job: `{"id": ..., "input": {...}}`; `engine.jobs.inputs` has the accepted inputs.

    Yields:
        The outputs of `engine.jobs.pipeline.run`: text, dicts or one JSON value; `{"error": ...}` last if it failed.
    """
    from engine import worker
    from engine.jobs import pipeline

    outputs = pipeline.run(job, worker.current().engine)
    async with pipeline.aclosing_on_task_exit(outputs):
        async for output in outputs:
            yield output


def main() -> int:
    """Run the command line.

    Returns:
        The exit status: 0 if the job completed, or the worker was asked to stop; 1 if the job or the engine failed, or
        the worker cannot start; 2 for a wrong command line.
    """
    parser = argparse.ArgumentParser(
        description="A serverless worker with vLLM inside. On the platform it takes jobs from the queue or serves "
        "HTTP; elsewhere it runs one job and prints the answer as it is generated, its output as JSON, and its speed.",
        epilog="Settings come from the environment; the README lists them. The SDK's own options are passed to it.",
    )
    parser.add_argument("--test_input", metavar="JSON", help=f"the job to run (default: that of {TEST_INPUT.name})")
    parser.add_argument(
        "--rp_serve_api", action="store_true", help="start the emulator of the platform with one such worker"
    )
    parser.add_argument(
        "--rp_api_host", metavar="HOST", default="localhost", help="address of the emulator (default: localhost)"
    )
    parser.add_argument(
        "--rp_api_port", metavar="PORT", default="8000", help="its port; 0 for any free one (default: 8000)"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the effective configuration and the source of each value"
    )
    arguments, rest = parser.parse_known_args()

    from engine import cold_start, worker
    from engine.config import environment
    from engine.config.settings import Settings
    from engine.errors import ConfigurationError
    from engine.startup import amx

    cold_start.WORKER.mark("interpreter")
    amx.request_permission()
    try:
        _set_logging()
        variables = environment.read()
        settings = Settings.read(variables)
        if arguments.rp_serve_api:
            from emulator import cli

            one_worker = ["--workers-min=1", "--workers-max=1"]
            return cli.main([f"--host={arguments.rp_api_host}", f"--port={arguments.rp_api_port}", *one_worker, *rest])
        serving = settings.on_platform and arguments.test_input is None and not arguments.print_config
        if not serving:
            _set_vllm_quiet()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: sys.exit(0))
        if serving:
            sys.argv[1:] = rest
            return _serve(variables, settings)
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        if arguments.print_config:
            return _print_configuration(variables)
        return _answer(variables, arguments.test_input)
    except ConfigurationError as error:
        sys.stderr.write(f"The worker cannot start: {error}\n")
        return 1
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        sys.stderr.write(
            "vLLM is not installed: install it from the lock file of this version, requirements/gpu.lock "
            "(cpu.lock without a GPU), with `pip install --no-deps`\n"
        )
        return 1
    finally:
        worker.shutdown()


def _print_configuration(variables: Mapping[str, Variable]) -> int:
    """Print the effective configuration, then check it as vLLM would."""
    from engine.startup import configure

    configuration = configure.read(variables)
    for line in configuration.lines():
        sys.stdout.write(line + "\n")
    configure.check_with_model(configuration)
    return 0


def _answer(variables: Mapping[str, Variable], test_input: str | None) -> int:
    """Run one job and print what it yields."""
    from engine import local, worker

    job = local.read_job(TEST_INPUT.read_text(encoding="utf-8") if test_input is None else test_input)
    return asyncio.run(local.answer(job, handler, worker.current(variables).engine))


def _serve(variables: Mapping[str, Variable], settings: Settings) -> int:
    """Serve the platform's clients until a signal asks the worker to stop."""
    from engine.telemetry import json_lines

    if settings.log_format == "json":
        json_lines.redirect()
    if settings.serves_http:
        return _serve_http(variables, settings)
    return _poll_spirit(variables, settings) if settings.queue == "spirit" else _poll_runpod(variables, settings)


def _poll_runpod(variables: Mapping[str, Variable], settings: Settings) -> int:
    """Take jobs from RunPod's queue until a signal asks the worker to stop."""
    from engine import worker
    from engine.queue import runpod_client
    from engine.queue.bucket import Bucket
    from engine.startup import fitness

    with fitness.Checks() as checks:
        serving = worker.current(variables, checks)

    async def run(queue: JobQueue) -> int:
        return await serving.serve(queue, handler)

    return runpod_client.serve(handler, run, serving.max_concurrency, serving.engine.failure, Bucket.of(settings))


def _poll_spirit(variables: Mapping[str, Variable], settings: Settings) -> int:
    """Take jobs from Spirit's agent until a signal asks the worker to stop; heartbeats begin before the load."""
    from engine import worker
    from engine.queue import spirit_client, spirit_sdk
    from engine.queue.bucket import Bucket

    running = spirit_sdk.start_heartbeat()
    serving = worker.current(variables)
    if running is None:
        from engine import health
        from engine.queue.spirit_proxy_mode import ProxyMode

        engine = serving.engine
        mode = ProxyMode(
            engine, serving.max_concurrency, settings.drain_timeout_s, lambda: [health.heartbeat(engine.failure)]
        )
        return mode.serve()

    async def run(queue: JobQueue) -> int:
        return await serving.serve(queue, handler)

    return spirit_client.serve(run, running, settings.spirit_request_timeout_s, Bucket.of(settings))


def _serve_http(variables: Mapping[str, Variable], settings: Settings) -> int:
    """Serve a load-balancing endpoint until a signal asks the worker to stop; health checks are answered at once."""
    from engine.server.health_check import HealthCheck
    from engine.server.listeners import Listeners
    from engine.server.loading import LoadingServer

    listeners = Listeners.open(settings)
    own_port = settings.port_health if settings.port_health != settings.port else None
    check = HealthCheck(settings.health_check_path, own_port)
    with LoadingServer(listeners, check) as loading:
        import uvloop

        from engine import worker
        from engine.startup import fitness

        with fitness.Checks() as checks:
            serving = worker.current(variables, checks)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(serving.serve_http(listeners, loading, check))


def _set_logging() -> None:
    """Set up the worker's log, and the SDK's log level unless the user has set it."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)-7s| %(message)s"))
    logger = logging.getLogger("engine")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    # The SDK and its dependencies add a handler to the root logger: each line would be logged twice.
    logger.propagate = False
    # The SDK's default, DEBUG, logs each output of each job.
    if "RUNPOD_DEBUG_LEVEL" not in os.environ:
        os.environ.setdefault("RUNPOD_LOG_LEVEL", "INFO")


def _set_vllm_quiet() -> None:
    """Keep vLLM's log off stdout, which is for the answer, unless the user has set its variables."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_LOGS", "-all")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    warnings.simplefilter("ignore")


def cli() -> None:
    """Run this file as `python handler.py` does, for the command `vllm-serverless`.

    It becomes the main module, which the processes that vLLM spawns import again.
    """
    import runpy

    runpy.run_path(__file__, run_name="__main__")


if __name__ == "__main__":
    try:
        exit_status = main()
    except SystemExit as stop:
        exit_status = 0 if stop.code is None else stop.code if isinstance(stop.code, int) else 1
    except Exception:  # noqa: BLE001 (printed as Python would, but before the log ends)
        traceback.print_exc()
        exit_status = 1
    from engine.telemetry import json_lines

    json_lines.finish()
    sys.stdout.flush()
    # Skip the interpreter's shutdown: all processes have ended, and the teardown of vLLM and torch takes time and may
    # raise errors.
    os._exit(exit_status)
elif __name__ == "__mp_main__":  # a process that vLLM has spawned
    from engine import child_processes
    from engine.backend import startup_logs
    from engine.startup import amx

    amx.request_permission()
    child_processes.set_parent_death_signal()
    startup_logs.install()
