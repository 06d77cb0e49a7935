"""Every example of `docs/api.md` works as it stands there, and the README's with what its placeholders stand for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest

from engine.routes import SERVING
from tests.integration.emulator.conftest import KEY, REPOSITORY, Site

_PART = re.compile(r"^## (?P<title>[^\n]*)$|^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Example:
    """A fenced block and the section that it stands in."""

    title: str
    language: str
    text: str


def examples() -> list[Example]:
    found, title = [], ""
    for part in _PART.finditer((REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8")):
        if part["title"]:
            title = part["title"]
        else:
            found.append(Example(title, part["language"], part["text"]))
    return found


SETUP, *EXAMPLES = examples()


def example_id(example: Example) -> str:
    return f"{example.title.partition(':')[0]} {example.language}"


@pytest.mark.parametrize("example", EXAMPLES, ids=example_id)
def test_an_example_of_the_documentation_works(example: Example, request: pytest.FixtureRequest) -> None:
    kinds = {"that embeds": "embedder", "that classifies": "classifier"}
    kind = next((fixture for words, fixture in kinds.items() if words in example.title), "llm")
    site: Site = request.getfixturevalue(kind)
    url = site.openai_url.removesuffix("/openai/v1")

    if example.language == "json":
        job = site.client.post("/runsync", json={"input": json.loads(example.text)}).json()
        assert job["status"] == "COMPLETED", job
        assert job["output"]
        return
    command = ["bash", "-c", example.text]
    if example.language == "python":
        command = [sys.executable, "-c", SETUP.text + example.text]
    ran = subprocess.run(
        command, env={**os.environ, "URL": url, "KEY": KEY}, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()
    if example.language == "sh":
        document = json.loads(ran.stdout)
        assert "error" not in document
        assert document.get("status") in (None, "COMPLETED", "completed", "incomplete")


def test_the_readmes_python_works(llm: Site) -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    text = "".join(part["text"] for part in _PART.finditer(readme) if part["language"] == "python")
    for placeholder, meant in {
        "https://api.runpod.ai/v2/ENDPOINT_ID/openai/v1": llm.openai_url,
        "http://127.0.0.1:8000/v2/local/openai/v1": llm.openai_url,
        '"RUNPOD_API_KEY"': repr(KEY),
        '"local"': repr(KEY),
        "MODEL_NAME": "tiny",
    }.items():
        assert placeholder in text
        text = text.replace(placeholder, meant)

    ran = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=False)

    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


def test_every_open_route_is_named() -> None:
    text = (REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8")

    assert [route for route in sorted(SERVING) if f"`{route}`" not in text] == []


def test_each_route_has_a_job_a_curl_and_a_python_example() -> None:
    languages: dict[str, set[str]] = {}
    for example in EXAMPLES:
        languages.setdefault(example.title, set()).add(example.language)

    assert len(languages) >= 9
    assert {title: kinds for title, kinds in languages.items() if kinds != {"json", "sh", "python"}} == {
        "Errors": {"python"}
    }
