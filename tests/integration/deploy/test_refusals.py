"""What the user reads when something is refused, does not start, or cannot be reached: one line, and what to change."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy import api
from deploy.api import Api
from emulator.app import run_in_thread
from emulator.settings import EmulatorSettings
from tests import deploy_errors
from tests.integration.deploy.conftest import KEY, READ_KEY, UP, Account
from tests.processes import ROOT
from tests.unit.deploy.test_api import body


def error(status: int) -> dict[str, Any]:
    return {"kind": "error", "route": "control-plane", "status": status}


@pytest.mark.parametrize(
    ("arguments", "key", "faults", "code", "says"),
    [
        (("update", "tiny", "--workers-min", "5"), KEY, [], 2,
         "--workers-min 5 exceeds --workers-max 3: raise --workers-max"),
        (("update", "tiny", "--workers-max", "-1"), KEY, [], 2, "--workers-max: -1 is less than the minimum of 0"),
        (("update", "tiny", "--gpu", "ADA_25"), KEY, [], 2, "--gpu ADA_25: there is no such pool or GPU type"),
        (("update", "tiny", "--queue-delay", "0.1"), KEY, [], 2, "--queue-delay: 0.1 is less than the minimum of 0.5"),
        (("status", "tiny"), None, [], 3, "RUNPOD_API_KEY is not set: export a key of the console"),
        (("status", "tiny"), "rpa_wrongkey", [], 3, "the API does not accept RUNPOD_API_KEY"),
        (("update", "tiny", "--workers-max", "4"), READ_KEY, [], 3, "RUNPOD_API_KEY has no permission for this"),
        (("status", "other"), KEY, [], 3, "there is no endpoint other; there are tiny"),
        (("rollback", "tiny", "--to", "7"), KEY, [], 2, "--to 7: tiny has the releases 1"),
        (("status", "tiny"), KEY, [error(400)], 2, "the API does not accept the request"),
        (("status", "tiny"), KEY, [error(404)], 1, "the API answers 404 (Not Found): is http://127.0.0.1:"),
        (("status", "tiny"), KEY, [error(422)], 2, "the API does not accept the request"),
        (("status", "tiny"), KEY, [error(429)], 6, "too many requests"),
        (("status", "tiny"), KEY, [error(500)], 6, "the API fails with 500"),
        (("status", "tiny"), KEY, [{"kind": "drop", "route": "control-plane"}], 6, "cannot be reached"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else None,
)  # fmt: skip
def test_each_refusal_is_one_line(  # noqa: PLR0913, PLR0917 (a table)
    account: Callable[..., Account],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    key: str | None,
    faults: list[dict[str, Any]],
    code: int,
    says: str,
) -> None:
    monkeypatch.setattr(api, "WAIT_S", 0.001)
    site = account()
    assert site.run(*UP, "--no-wait").code == 0
    site.faults(*faults)

    ran = site.run(*arguments, key=key)

    *_, line = ran.err.splitlines()
    assert says in line
    assert line.startswith("deploy: ")
    assert ran.code == code
    assert "Traceback" not in ran.err
    assert KEY not in ran.err + ran.out


def test_the_table_of_refusals_is_what_the_user_reads() -> None:
    document = ROOT / "docs" / "deploy-errors.md"

    assert deploy_errors.with_table(text := document.read_text(encoding="utf-8")) == text, (
        "run `python -m tests.deploy_errors docs/deploy-errors.md`"
    )


def test_a_used_up_quota_is_waited_for(account: Callable[..., Account], monkeypatch: pytest.MonkeyPatch) -> None:
    """The API says 60 s; the test waits less, and so it is refused until it gives up."""
    monkeypatch.setattr(api, "_seconds", lambda _: 0.01)
    site = account({"rateLimits": {"minute": 1}})

    ran = site.run("status")
    assert ran.code == 0
    ran = site.run("status")

    assert ran.code == 6
    assert ran.err.count("trying again") == 4
    assert "too many requests (rate limit exceeded for the minute window): run the command again when" in ran.err


def test_a_lost_answer_creates_one_endpoint(account: Callable[..., Account]) -> None:
    site = account()
    site.faults({"kind": "drop", "route": "control-plane", "when": "after", "times": 1})

    async def create() -> str:
        async with api.client(site.url, KEY) as http:
            return (await Api(http, lambda _: None, wait_s=0).create(body())).id

    assert asyncio.run(create()) == site.endpoints()[0]["id"]
    assert len(site.endpoints()) == 1


def test_an_image_that_cannot_be_pulled_is_said_at_once(account: Callable[..., Account]) -> None:
    site = account()
    site.faults(missing_images=["x/y:1"])

    ran = site.run(*UP)

    assert ran.code == 4
    assert "the image x/y:1 cannot be pulled" in ran.err
    assert ran.err.endswith("check --image, and --registry if it is private\n")
    health = site.http.get(f"/v2/{site.endpoints()[0]['id']}/health").json()
    assert health["jobs"]["inQueue"] == 0, "the first request must not keep workers starting"


def test_a_worker_that_cannot_start_is_said_at_once(account: Callable[..., Account]) -> None:
    """The real worker refuses the setting before it loads anything."""
    site = account(command=[sys.executable, "handler.py"])

    ran = site.run(*UP, "--env", "MAX_CONCURRENCY=many")

    assert ran.code == 4
    assert "the worker cannot start: MAX_CONCURRENCY='many' is not allowed. Allowed: integer" in ran.err


def test_a_worker_that_exits_again_and_again_is_given_up(account: Callable[..., Account]) -> None:
    site = account(command=[sys.executable, "-c", "print('no such module'); raise SystemExit(3)"])

    ran = site.run(*UP)

    assert ran.code == 4
    assert "the worker exits with 3 again and again; its last line: no such module: look at `logs " in ran.err


def test_missing_capacity_is_said_while_it_lasts(account: Callable[..., Account]) -> None:
    site = account()
    site.faults(throttled_workers=64)

    ran = site.run(*UP, timeout_s=1)

    assert ran.code == 5
    assert "no GPU of the endpoint's pools is free: waiting; to wait less, add pools with --gpu" in ran.err
    assert "no GPU was free for 1 s: add pools with --gpu, or allow other data centers" in ran.err


def test_an_interrupted_start_leaves_no_job_behind(account: Callable[..., Account]) -> None:
    site = account()
    site.faults(throttled_workers=64)
    environment = {**os.environ, "RUNPOD_API_KEY": KEY, "RUNPOD_API_URL": site.url}
    with subprocess.Popen(
        [sys.executable, "-m", "deploy", *UP], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert any("no GPU of the endpoint's pools is free" in line for line in lines)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        left, last = process.stderr.read().splitlines()[-2:]
    (endpoint,) = site.endpoints()
    assert left == f"deploy: tiny ({endpoint['id']}) is left as it is: run `up` again to go on, or `down tiny`"
    assert last == "deploy: interrupted"
    health = site.http.get(f"/v2/{site.endpoints()[0]['id']}/health").json()
    assert health["jobs"]["inQueue"] == 0


def test_ctrl_c_ends_the_question_of_down(account: Callable[..., Account]) -> None:
    site = account()
    assert site.run(*UP, "--no-wait").code == 0
    environment = {**os.environ, "RUNPOD_API_KEY": KEY, "RUNPOD_API_URL": site.url}
    command = [sys.executable, "-u", "-m", "deploy", "down", "tiny"]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(len("Delete tiny")) == "Delete tiny"
        stat = Path(f"/proc/{process.pid}/stat")
        while stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "S":
            time.sleep(0.01)  # until it waits for the answer
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr is not None
        assert process.stderr.read() == "deploy: interrupted\n"
    assert len(site.endpoints()) == 1


def test_ctrl_c_ends_the_doctor_while_the_hub_does_not_answer(account: Callable[..., Account]) -> None:
    site = account()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and answers nothing
        hub = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = {
            **os.environ, "RUNPOD_API_KEY": KEY, "RUNPOD_API_URL": site.url,
            "HF_ENDPOINT": hub, "HF_HUB_ETAG_TIMEOUT": "300",
        }  # fmt: skip
        command = [sys.executable, "-m", "deploy", "up", "org/tiny", "--image", "x/y:1"]
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            connection, _ = silent.accept()
            with connection:
                process.send_signal(signal.SIGINT)
                assert process.wait(30) == 130
            assert process.stderr is not None
            assert process.stderr.read().splitlines() == [
                "deploy: checking org/tiny and its settings", "deploy: interrupted"
            ]  # fmt: skip
    assert site.endpoints() == []


def test_logs_end_when_nobody_reads_them(account: Callable[..., Account]) -> None:
    site = account()
    assert site.run(*UP, "--workers-min", "1").code == 0
    environment = {**os.environ, "RUNPOD_API_KEY": KEY, "RUNPOD_API_URL": site.url}
    command = [sys.executable, "-m", "deploy", "logs", "tiny", "--follow"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert "create container x/y:1" in process.stdout.readline()
        process.stdout.close()
        assert site.run(*UP, "--workers-min", "1").code == 0, "which logs more"
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_a_certificate_is_trusted_by_ssl_cert_file(
    account: Callable[..., Account], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "WAIT_S", 0.001)
    settings = {"port": 0, "tls": True, "apiKeys": [KEY], "endpoints": [{"id": "ep"}]}
    with run_in_thread(EmulatorSettings.model_validate(settings)) as emulator:
        site = account()
        site.url = emulator.url
        monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        refused = site.run("status")
        monkeypatch.setenv("SSL_CERT_FILE", str(emulator.ca_file))
        accepted = site.run("status")

    assert refused.code == 6
    assert "is not trusted: set SSL_CERT_FILE" in refused.err
    assert (accepted.code, accepted.out.split()[0]) == (0, "ep")
