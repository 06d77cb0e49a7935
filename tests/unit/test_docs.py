"""The documents: their links lead somewhere, their examples can be read, and the settings that they name exist."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest

from engine.flags import ALIASES
from engine.settings import Settings

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "CHANGELOG.md", *sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
VARIABLE = re.compile(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b|\bDTYPE\b|\bQUANTIZATION\b")

# What a guide names beside the worker's settings: of the build, of the platforms, placeholders, names of their APIs.
BUILD = {
    *re.findall(r"^ARG (\w+)=", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE),
    *re.findall(r"\$\{(\w+):?-", (ROOT / "docker-compose.yml").read_text(encoding="utf-8")),
}
PLATFORM = {"HF_HOME", "VLLM_CACHE_ROOT", "RUNPOD_INIT_TIMEOUT", "RUNPOD_API_KEY", "EASE_AGENT_URL"}
API = {"REQUEST_COUNT", "QUEUE_DELAY"}
PLACEHOLDERS = {
    "YOUR_NAME", "YOUR_TOKEN", "YOUR_TENANT", "REGISTRY_AUTH_ID", "TEMPLATE_ID", "ENDPOINT_ID", "SERVERLESS_ID",
    "SERVERLESS_KEY",
}  # fmt: skip


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def blocks(document: Path, language: str) -> list[str]:
    found = BLOCK.findall(document.read_text(encoding="utf-8"))
    return [text for written_in, text in found if written_in == language]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_to_a_file_leads_to_it(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", document.read_text(encoding="utf-8")))
    lost = []
    for link in links:
        path, _, anchor = link.partition("#")
        if re.match(r"https?://", link):
            continue
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)

    assert lost == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_example_can_be_read(document: Path) -> None:
    for text in blocks(document, "python"):
        ast.parse(text)
    for text in blocks(document, "sh"):
        subprocess.run(["/bin/bash", "-n"], input=text.encode(), check=True)
        for body in re.findall(r"-d '(.*?)'", text, re.DOTALL):
            json.loads(body)


def test_every_variable_of_the_deployment_guide_is_one() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]+)\|", readme, re.MULTILINE)
    flags = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    settings = {name.upper() for name in Settings.model_fields}
    known = settings | flags | set(ALIASES) | BUILD | PLATFORM | API | PLACEHOLDERS
    named = set(VARIABLE.findall((ROOT / "docs/deploy.md").read_text(encoding="utf-8")))

    assert sorted(named - known) == []
    assert sorted((PLATFORM | API | PLACEHOLDERS) - named) == [], "not named any more"
