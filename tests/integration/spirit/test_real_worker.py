"""The worker as it is (`python handler.py`, vLLM, the tiny model) on Spirit: the template's curl, handlers, parity."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from builder.tiny_model.corpus import example
from tests.integration.conftest import FLAGS
from tests.integration.emulator.conftest import LLM_START_S, REPOSITORY, eventually
from tests.integration.emulator.spirit.conftest import ID, KEY, Site, Webhook, site_with, webhook
from tests.integration.emulator.spirit.test_stock_proxy import _CURL
from tests.integration.parity import ask, events, joined, plain
from tests.integration.parity_cases import OVER_HTTP
from tests.processes import BUSY_ENVIRONMENT

__all__ = ["webhook"]

GREEDY = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def baked(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the model's directory, with the name that it has in the template's image."""
    directory = tmp_path_factory.mktemp("image") / "workspace" / "vllm" / "phi-4-bnb-4bit"
    directory.parent.mkdir(parents=True)
    directory.symlink_to(tiny_model)
    return directory


@pytest.fixture(scope="module")
def site(baked: Path) -> Iterator[Site]:
    """Return a site whose worker serves that model, with the flags of `vllm_server`."""
    variables = {**BUSY_ENVIRONMENT, **FLAGS, "MODEL_NAME": str(baked), "SERVED_MODEL_NAME": "tiny"}
    settings = {
        "command": [sys.executable, "handler.py"],
        "cwd": str(REPOSITORY),
        "env": variables,
        "grace": 30,
        "initTimeout": LLM_START_S,
    }
    with site_with(Path("unused"), **settings) as started:
        started.idle_worker(LLM_START_S)
        yield started


@pytest.mark.parametrize("stream", [False, True])
def test_the_templates_curl_works(site: Site, stream: bool, baked: Path) -> None:
    """Word for word but for the address, and the directory in which this machine has the model."""
    command = _CURL.replace("{severless-id}", ID).replace("{serverless-key}", KEY)
    command = command.replace("https://api-serverless.datastone.cn", site.url)
    command = command.replace("/workspace/vllm/phi-4-bnb-4bit", str(baked))
    if stream:
        command = command.replace('"messages"', '"stream": true, "messages"')
    ran = subprocess.run(["/bin/bash", "-c", command], capture_output=True, text=True, check=True, timeout=60)
    if stream:
        assert events(ran.stdout)[-1]["data"] == "[DONE]"
    else:
        assert json.loads(ran.stdout)["choices"][0]["message"]["content"]


def test_a_handlers_task_has_a_webhook(site: Site, webhook: Webhook) -> None:
    value = {"messages": example("ok").messages, "sampling_params": GREEDY}
    task_id = site.submit(value, webhook.url)
    eventually(lambda: webhook.received)
    ((called_for, status, document),) = webhook.received
    assert (called_for, status) == (task_id, 200)
    assert document["choices"][0]["message"]["content"] == example("ok").answer


def test_a_sync_request_is_answered_by_the_same_worker(site: Site) -> None:
    response = site.sync({"openai_input": {"model": "tiny", "messages": example("ok").messages, **GREEDY}})
    assert response.json()["choices"][0]["message"]["content"] == example("ok").answer


CASES = {name: case for name, case in OVER_HTTP.items() if case.route.startswith("/v1/")}


@pytest.mark.parametrize("name", CASES)
def test_an_answer_equals_vllms(name: str, site: Site, vllm_server: httpx.Client) -> None:
    """In status, content type and body, but for ids and times."""
    case = CASES[name]
    pair = [ask(site.openai, case, case.route.removeprefix("/v1")), ask(vllm_server, case, case.route)]
    spirit, direct = pair
    assert (spirit.status, spirit.body[0]) == (direct.status, direct.body[0])
    read = joined if "text/event-stream" in direct.body[0] else plain
    assert read(spirit.body[1]) == read(direct.body[1])


def test_a_client_that_leaves_ends_its_request_in_the_engine(site: Site) -> None:
    body = {"model": "tiny", "messages": example("ok").messages, "stream": True, "ignore_eos": True, "max_tokens": 1500}
    with site.openai.stream("POST", "/chat/completions", json=body) as response:
        next(response.iter_lines())
    eventually(lambda: not site.state()["health"]["jobs"]["inProgress"])
    assert site.state()["jobs"][0]["answers"][0] == 200


def test_sigterm_ends_the_worker_with_0(site: Site) -> None:
    worker = site.idle_worker()
    os.kill(worker["pid"], signal.SIGTERM)
    gone = eventually(lambda: [one for one in site.state()["gone"] if one["id"] == worker["id"]])
    assert gone[0]["exitCode"] == 0
