"""The commands and code blocks of the documents, in reading order, and which of them no test can run.

README_zh.md has the same ones as README.md (tests/unit/test_readmes.py), and so is not read.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.whisper import tone

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# The platforms of the documents, and the command that starts each on this machine.
LOCAL_PLATFORMS = {
    "https://api.runpod.ai/": "make up",
    "https://api-serverless.datastone.cn/": 'make up ARGS="--platform spirit"',
}
# Text that is replaced before a test runs it: an endpoint on a platform becomes the one on this machine, and its model
# the tiny one; a file of the reader's, a short one. (For DIR, the reader's own model, a test makes one.)
REPLACED = {
    **dict.fromkeys(LOCAL_PLATFORMS, "http://127.0.0.1:8000/"),
    **dict.fromkeys(('"phi-4"', '"Qwen/Qwen3-8B"'), '"tiny"'),
    "https://example.com/speech.wav": f"data:audio/wav;base64,{base64.b64encode(tone(0.1)).decode()}",
}
# Values that a reader knows from an account.
ACCOUNT = dict.fromkeys(("ENDPOINT_ID", "RUNPOD_API_KEY", "SERVERLESS_ID", "SERVERLESS_KEY"), "local")

_DOCKER = "needs Docker; `make image-test` builds the images"
_NAMES = "is the name of a program, not a command"
_CI = "includes this test, or CI runs it as well"
_LONG = "takes up to an hour, and has its own tests (tests/unit/bench/test_bench.py, tests/soak)"
_IMPORTS = "leaves results in the checkout; tests/integration/test_imports.py runs it"
_BENCH = "takes minutes, and measures; tests/integration/test_bench.py runs it in small"
_ADVISE = "takes minutes on a busy machine; tests/unit/bench/test_advise.py runs it in small"
_ACCOUNT = "needs an account: it creates something on RunPod or Spirit, or asks a worker there, and costs money"
_FILE = "needs the reader's own file; docs/api.md runs it with one"
_DEPLOY = "needs an endpoint; tests/integration/deploy runs it on the emulator"
_SESSION = "is a recording; tests/integration/deploy runs the same commands"
_HUB = "needs the hub, or the reader's own model; tests/integration/test_builder.py runs it"
_NETWORK = "changes this checkout, or downloads what a test need not; tests/unit/tools has what can be tested of it"

_UP = "$ python -m deploy up ./tiny-phi --env SERVED_MODEL_NAME=tiny --workers-min 1 --workers-max 2"
_UPDATE = "$ python -m deploy update tiny-phi --image registry.example/worker:2 --env MAX_NUM_SEQS=32"
_REGISTRY = "registry-serverless.datastone.cn"
_SPIRIT_BASE = f"{_REGISTRY}/library/cuda-12.1.1-cudnn-devel-ubuntu22.04:py311-builder-torch251"

# Commands and blocks that are not run, by document and first line, and the reason. What can be checked without running
# them is checked: syntax, flags, make targets, services, stages and build arguments.
NOT_RUN: dict[tuple[str, str], str] = {
    ("README.md", "$ make test"): _CI,
    ("README.md", "make check"): _CI,
    ("README.md", "python -m batch run IN.jsonl -o OUT.jsonl --endpoint ENDPOINT_ID"): _FILE,
    ("README.md", "docker compose --profile local up"): _DOCKER,
    ("README.md", "registry=docker.io tenant=YOUR_NAME docker compose build vllm"): _DOCKER,
    ("README.md", "docker build --target cpu ."): _DOCKER,
    ("README.md", f"registry={_REGISTRY} tenant=YOUR_TENANT tag=1 docker compose build vllm"): _DOCKER,
    ("README.md", "python -m builder download REPO DIR"): _HUB,
    ("README.md", "python -m builder verify DIR"): _HUB,
    ("README.md", "python -m builder manifest DIR"): _HUB,
    ("README.md", "python -m builder warm"): "takes a minute; tests/integration/test_caches.py runs it",
    ("README.md", "python -m bench"): _LONG,
    ("telemetry.md", "python -m bench.telemetry --prometheus PROGRAM --pictures DIR"): _BENCH,
    ("telemetry.md", "python -m bench.telemetry"): _BENCH,
    ("README.md", "python -m bench advise"): _ADVISE,
    ("README.md", "make soak"): _LONG,
    ("README.md", "python -m deploy up ORG/NAME"): _ACCOUNT,
    ("deploy.md", "registry=docker.io tenant=YOUR_NAME tag=2026-11-23 docker compose build vllm"): _DOCKER,
    ("deploy.md", "docker build"): _NAMES,
    ("deploy.md", "HF_TOKEN_FILE=~/.cache/huggingface/token docker compose build vllm"): _DOCKER,
    ("deploy.md", "export HF_TOKEN=YOUR_TOKEN"): _DOCKER,
    ("deploy.md", "docker inspect"): _NAMES,
    ("deploy.md", "python -m builder verify DIR"): _HUB,
    ("deploy.md", "docker compose --profile gpu up"): _DOCKER,
    ("deploy.md", "docker compose --profile local up"): _DOCKER,
    ("deploy.md", "docker login docker.io"): _DOCKER,
    ("deploy.md", "runpodctl registry create --name NAME --username USER --password TOKEN"): _ACCOUNT,
    ("deploy.md", "export VLLM_SERVERLESS_IMAGE=docker.io/YOUR_NAME/vllm:2026-11-23"): _ACCOUNT,
    ("deploy.md", "python -m deploy update NAME --image IMAGE --env NAME=VALUE --unset NAME"): _DEPLOY,
    ("deploy.md", "python -m deploy rollback NAME"): _DEPLOY,
    ("deploy.md", "python -m deploy status NAME"): _DEPLOY,
    ("deploy.md", "python -m deploy logs NAME --follow"): _DEPLOY,
    ("deploy.md", "python -m deploy down NAME"): _DEPLOY,
    ("deploy.md", "python -m emulator --no-endpoint"): _DEPLOY,
    ("operate.md", "python -m deploy update"): _DEPLOY,
    ("deploy-session.md", "python -m emulator --no-endpoint"): _DEPLOY,
    ("deploy-session.md", _UP): _SESSION,
    ("deploy-session.md", f"{_UP} --no-wait"): _SESSION,
    ("deploy-session.md", _UPDATE): _SESSION,
    ("deploy-session.md", "$ python -m deploy rollback tiny-phi"): _SESSION,
    ("deploy-session.md", "$ python -m deploy status tiny-phi"): _SESSION,
    ("deploy-session.md", "$ python -m deploy logs tiny-phi --tail 4"): _SESSION,
    ("deploy-session.md", "$ python -m deploy down tiny-phi --yes"): _SESSION,
    ("deploy-session.md", "$ python -m deploy status"): _SESSION,
    ("operate.md", "mkdir -p warm"): _DOCKER,
    ("spirit.md", f"registry={_REGISTRY} tenant=YOUR_TENANT tag=2026-11-23 docker compose build vllm"): _DOCKER,
    ("spirit.md", f"base={_SPIRIT_BASE}"): _DOCKER,
    ("spirit.md", "docker images"): _NAMES,
    ("spirit.md", "docker build --build-arg MODEL_NAME= --build-arg QUANTIZATION= --build-arg DTYPE= \\"): _DOCKER,
    ("performance.md", "python -m bench --peer WORKER_VLLM_CHECKOUT                     # 16 minutes"): _LONG,
    ("performance.md", "python -m bench --full --rounds 2"): _LONG,
    ("performance.md", "python -m bench imports"): _IMPORTS,
    ("performance.md", "python -m bench gpu --peer WORKER_VLLM_CHECKOUT"): _BENCH,
    ("performance.md", "python -m bench gpu"): _BENCH,
    ("performance.md", "python -m bench streams"): _BENCH,
    ("performance.md", "python -m bench vllm-bench"): _BENCH,
    (
        "scaling.md",
        "python -m bench advise --throughput 1=105 32=1165 --ttft-ms 1=38 32=110 --cold-start 41s --day 10000 \\",
    ): _ADVISE,
    ("scaling.md", "python -m bench advise"): _ADVISE,
    ("scaling.md", "python -m bench"): _LONG,
    ("scaling.md", "docker logs"): _NAMES,
    ("scaling.md", "python -m pytest tests/soak/test_advise.py -s"): _LONG,
    ("scaling.md", "python -m bench.advisor.scale docs/scaling"): _ADVISE,
    ("upgrading.md", "make preview"): _NETWORK,
    ("upgrading.md", "PYTHONPATH=.venv/vllm-preview VLLM_TARGET_DEVICE=cpu .venv/bin/python handler.py"): _NETWORK,
    ("upgrading.md", "make upgrade"): _NETWORK,
    ("upgrading.md", "make docs"): _NETWORK,
    ("upgrading.md", "make interface"): _CI,
    ("upgrading.md", "make test"): _CI,
    ("upgrading.md", "make soak"): _LONG,
    ("upgrading.md", "make bench"): _LONG,
    ("upgrading.md", "make lock"): _NETWORK,
}  # fmt: skip

_PART = re.compile(
    r"^#+ (?P<title>[^\n]*)$|^```(?P<language>\w*)\n(?P<text>.*?)^```$|(?<!`)`(?P<span>[^`\n]+)`",
    re.MULTILINE | re.DOTALL,
)
_COMMAND = re.compile(r"(?:\w+=\S* )*(?:make|python3?|docker|curl|git|pip|bash|runpodctl|\.venv/\S+) \S.*|make up")
_SERVES = re.compile(r"\bmake up\b|--rp_serve_api\b")


@dataclass(frozen=True)
class Step:
    """A block of a document, or a command between backticks.

    Attributes:
        title: the heading above it.
        platform: the command that has started the platform by then; empty if there is none.
        before: commands that have set up the reader's shell by then.
        setup: the beginning of each Python example.
    """

    document: str
    line: int
    title: str
    language: str
    text: str
    platform: str
    before: str
    setup: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line} {self.language or 'command'}"

    @property
    def not_run(self) -> str | None:
        """Why no test runs it; None if one does."""
        return NOT_RUN.get((self.document, self.text.partition("\n")[0]))

    @cached_property
    def commands(self) -> str:
        """What the reader types: of a console, the commands without prompts and output."""
        if self.language != "console":
            return self.text
        return "\n".join(line[2:] for line in self.text.splitlines() if line.startswith("$ "))

    @property
    def shown(self) -> str:
        """The output that a console shows."""
        lines = self.text.splitlines(keepends=True) if self.language == "console" else []
        return "".join(line for line in lines if not line.startswith("$ "))

    @property
    def serves(self) -> bool:
        """Whether it starts a platform, which runs until it is stopped."""
        return self.language in ("", "console") and bool(_SERVES.search(self.commands))

    @property
    def runs_on(self) -> str:
        """The command that starts the platform that it needs; empty if it needs none."""
        if self.serves:
            return self.commands
        return self.platform if self.language else ""


def steps() -> list[Step]:
    """Return all steps of all documents, in reading order."""
    return [step for document in DOCUMENTS for step in _steps(document)]


def to_run() -> list[Step]:
    """Return the steps to run, each command once: first those that need no platform, then platform by platform."""
    once: dict[tuple[str, str], Step] = {}
    for step in steps():
        if not step.not_run:
            once.setdefault((step.language, step.commands if step.serves else step.text + step.before), step)
    platforms = list(dict.fromkeys(["", *(step.runs_on for step in once.values())]))
    return sorted(once.values(), key=lambda step: platforms.index(step.runs_on))


def _steps(document: Path) -> Iterator[Step]:
    text = document.read_text(encoding="utf-8")
    title = platform = before = setup = ""
    if document.name != "README.md":
        before = "".join(
            step.commands.partition("\n")[0] + "\n" for step in _steps(ROOT / "README.md") if _sets_up_shell(step)
        )
    for part in _PART.finditer(text):
        title = part["title"] or title
        language, written = ("", part["span"]) if part["span"] else (part["language"], part["text"])
        if part["title"] or (part["span"] and not _COMMAND.fullmatch(written)):
            continue
        named = [command for address, command in LOCAL_PLATFORMS.items() if language and address in written]
        line = text.count("\n", 0, part.start()) + 1
        step = Step(document.name, line, title, language, written, (*named, platform)[0], before, setup)
        yield step
        if step.not_run or not language:
            continue
        if step.serves:
            platform = step.commands
        if _sets_up_shell(step):
            before += step.commands.partition("\n")[0] + "\n"
        if language == "python" and title == "Setup":
            setup = written


def _sets_up_shell(step: Step) -> bool:
    """Return whether it begins with a command that sets up the shell for later ones."""
    return not step.not_run and bool(step.language) and step.commands.startswith((". ", "export "))
