"""Each image, started with its own command, answers a job of the emulator, and compiles nothing that it imports."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench import imports
from builder.tiny_model.corpus import example
from emulator.app import run_in_thread
from tests.image.builds import ROOT, Buildah, build_cuda_base, build_vllm_base, checkout_for_cpu
from tests.image.conftest import NAME
from tests.integration.emulator.conftest import Site, settings_with
from tests.model_hub import Hub

START_S = 400.0


@pytest.fixture
def on_base(buildah: Buildah, directory: Path, python: str) -> Callable[[str], tuple[Path, list[str]]]:
    """Builds the substitute for a base image, which is large; returns the context and the options of a build on it."""

    def build(base: str) -> tuple[Path, list[str]]:
        if not base:
            return ROOT, []
        if base == "vllm":
            return ROOT, [f"--build-arg=BASE_IMAGE={build_vllm_base(buildah, directory, python, real=True)}"]
        context, wheels = checkout_for_cpu(directory)
        return context, [f"--build-arg=BASE_IMAGE={build_cuda_base(buildah, directory, python)}", wheels]

    return build


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("target", "base", "name"),
    [("cpu", "", "tiny"), ("gpu", "vllm", NAME), ("gpu", "cuda", NAME), ("cpu-hub", "", NAME)],
    ids=[
        "CPU image with the tiny model",
        "GPU image",
        "GPU image on a base with CUDA and an older torch",
        "CPU image with a model of the hub",
    ],
)
def test_the_images_command_answers_a_job_of_the_emulator(  # noqa: PLR0913, PLR0917
    target: str,
    base: str,
    name: str,
    buildah: Buildah,
    options: list[str],
    on_base: Callable[[str], tuple[Path, list[str]]],
    hub: Hub,
) -> None:
    context, given = on_base(base)
    buildah.build(target, f"--target={target}", *given, *options, context=context)
    requests = len(hub.requests)
    command = buildah.inspect(target)["Docker"]["config"]["Cmd"]
    container = buildah.container(target)
    files = buildah.files(container)
    shutil.copytree(imports.LOG_DIRECTORY, files / "import_log")
    variables = ["PYTHONPATH=/import_log", f"{imports.LOG_VARIABLE}=/tmp/imports", "PYTHONDONTWRITEBYTECODE=1"]
    run = [
        sys.executable,
        str(Path(__file__).with_name("in_container.py")),
        *buildah.command,
        "--",
        container,
        "env",
        *variables,
        *command,
    ]
    with ExitStack() as stack:
        emulator = stack.enter_context(run_in_thread(settings_with(command=run, workersMin=1, env=dict(os.environ))))
        site = Site(emulator.url, stack)
        job = site.submit({"messages": [{"role": "user", "content": "Hello!"}], "sampling_params": {"temperature": 0}})
        document = site.ended(job, START_S)
        log = "\n".join(site.state()["workers"][0]["log"])
    assert document["status"] == "COMPLETED", log
    (answer,) = document["output"]
    assert answer["choices"][0]["message"]["content"] == example("hello").answer
    assert answer["model"] == name
    assert len(hub.requests) == requests, "the worker uses the model in the image"
    records = imports.read_log(files / "tmp" / "imports")
    assert {record.package for record in records} >= {"asyncio", "engine", "runpod", "torch", "vllm"}
    assert [record.module for record in records if record.compiled] == []
    buildah.run("rm", container)
    buildah.run("rmi", "--force", target)
