"""The documents: their links resolve, their examples parse, and the settings that they name exist."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from engine.config.settings import Settings
from engine.config.worker_vllm import ALIASES
from tests.documents import DOCUMENTS as RUN
from tests.documents import NOT_RUN, steps, to_run

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "CHANGELOG.md", *sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
VARIABLE = re.compile(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b|\bDTYPE\b|\bQUANTIZATION\b")

# Names in a guide other than the worker's settings: of the build, of the platforms and their APIs, placeholders.
BUILD = {
    *re.findall(r"^ARG (\w+)=", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE),
    *re.findall(r"\$\{(\w+):?-", (ROOT / "docker-compose.yml").read_text(encoding="utf-8")),
}
PLATFORM = {
    "HF_HOME",
    "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS",
    "RUNPOD_SKIP_GPU_CHECK",
    "VLLM_CACHE_ROOT",
    "VLLM_ENABLE_STARTUP_PLAN",
    "VLLM_MAX_AUDIO_CLIP_FILESIZE_MB",
    "TRITON_CACHE_DIR",
    "RUNPOD_INIT_TIMEOUT",
    "RUNPOD_API_KEY",
    "RUNPOD_API_URL",
    "VLLM_SERVERLESS_IMAGE",
    "EASE_AGENT_URL",
    "HTTP_PROXY",
    "NO_PROXY",
}
GUIDES = ("deploy.md", "operate.md", "spirit.md")
API = {"ADA_24", "REQUEST_COUNT", "QUEUE_DELAY"}
PLACEHOLDERS = {
    "YOUR_NAME", "YOUR_TOKEN", "YOUR_TENANT", "ENDPOINT_ID", "SERVERLESS_ID", "SERVERLESS_KEY",
}  # fmt: skip


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def blocks(document: Path, language: str) -> list[str]:
    found = BLOCK.findall(document.read_text(encoding="utf-8"))
    return [text for written_in, text in found if written_in == language]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_to_a_file_resolves(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", document.read_text(encoding="utf-8")))
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        if re.match(r"https?://", link):
            continue
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)

    assert broken == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_example_parses(document: Path) -> None:
    for text in blocks(document, "python"):
        ast.parse(text)
    for text in blocks(document, "sh"):
        subprocess.run(["/bin/bash", "-n"], input=text.encode(), check=True)
        for body in re.findall(r"-d '(.*?)'", text, re.DOTALL):
            json.loads(body)


def test_every_variable_in_the_deployment_guides_exists() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]+)\|", readme, re.MULTILINE)
    flags = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    settings = {name.upper() for name in Settings.model_fields}
    known = settings | flags | set(ALIASES) | BUILD | PLATFORM | API | PLACEHOLDERS
    named = set(VARIABLE.findall("".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in GUIDES)))

    assert sorted(named - known) == []
    assert sorted((PLATFORM | API | PLACEHOLDERS) - named) == [], "no longer in the guides"


def commands_not_run() -> list[str]:
    """Return the commands that no test runs, one per line."""
    lines: list[str] = []
    for step in steps():
        if step.not_run:
            lines += re.sub(r"\\\n\s*", "", step.commands).splitlines()
    return list(dict.fromkeys(line.partition("  #")[0].strip() for line in lines))


def test_every_command_that_is_listed_as_not_run_is_in_the_documents_and_has_a_reason() -> None:
    not_run = {(step.document, step.text.partition("\n")[0]) for step in steps() if step.not_run}

    assert not_run == set(NOT_RUN)
    assert all(NOT_RUN.values())


def test_every_block_is_run_or_listed_as_not_run() -> None:
    """A block in another language would be neither."""
    assert {step.language for step in steps()} <= {"", "console", "sh", "python", "json"}
    assert {step.document for step in to_run()} == {"README.md", "api.md", "deploy.md", "spirit.md"}
    fenced = [block for document in RUN for block in BLOCK.findall(document.read_text(encoding="utf-8"))]
    assert [(step.language, step.text) for step in steps() if step.language] == fenced


@pytest.mark.parametrize("command", [line for line in commands_not_run() if re.search(r"\bpython3? -m ", line)])
def test_the_flags_of_a_command_that_is_not_run_exist(command: str) -> None:
    """`--help` is the last argument: those before it are parsed first."""
    program = re.search(r"\bpython3? -m [^>]*", command)
    assert program is not None
    given = [*shlex.split(program[0]), "--help"]
    subprocess.run([sys.executable, *given[1:]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=100)


@pytest.mark.parametrize("command", [line for line in commands_not_run() if line.startswith("make ")])
def test_a_make_target_that_is_not_run_exists(command: str) -> None:
    assert re.search(
        rf"^{command.removeprefix('make ')}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )


@pytest.mark.parametrize("command", [line for line in commands_not_run() if re.search(r"\bdocker \w+ \S", line)])
def test_the_names_in_a_docker_command_exist(command: str) -> None:
    """Services, profiles and variables of the compose file; stages and arguments of the Dockerfile; the image's tag."""
    compose = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    services = yaml.safe_load(compose)["services"]
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    words = shlex.split(command)
    if "compose" in words:
        variables = [word.partition("=")[0] for word in words[: words.index("docker")]]
        passed = {name for service in services.values() for name in service["build"]["args"]}
        assert [name for name in variables if f"${{{name}" not in compose and name not in passed] == []
        profiles = {profile for service in services.values() for profile in service["profiles"]}
        assert set(words[words.index("--profile") + 1 :][:1] if "--profile" in words else ()) <= profiles
        assert set(words[words.index("build") + 1 :] if "build" in words else ()) <= set(services)
    elif words[:2] == ["docker", "build"]:
        options = list(pairwise(words))
        stages = [value for option, value in options if option == "--target"]
        assert [stage for stage in stages if not re.search(rf"^FROM \S+ AS {stage}$", dockerfile, re.MULTILINE)] == []
        names = [value.partition("=")[0] for option, value in options if option == "--build-arg"]
        assert [name for name in names if not re.search(rf"^ARG {name}\b", dockerfile, re.MULTILINE)] == []
        secrets = [re.split("[=,]", value)[1] for option, value in options if option == "--secret"]
        assert [secret for secret in secrets if f"--mount=type=secret,id={secret}" not in dockerfile] == []
    else:
        assert words[:2] in (["docker", "push"], ["docker", "login"], ["docker", "run"])
