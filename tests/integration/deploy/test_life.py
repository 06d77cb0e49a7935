"""The life of an endpoint: created, asked, changed under load, rolled back, watched, deleted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable

from tests.integration.deploy.conftest import KEY, UP, Account
from tests.open_loop import PROMPT, open_loop


def test_an_endpoint_from_up_to_down(account: Callable[..., Account]) -> None:
    site = account(env={"PAUSE_S": "0.02"})

    # Up: one endpoint that answers.
    ran = site.run(*UP, "--workers-min", "2", "--env", "GREETING=hi")
    assert ran.code == 0, ran.err
    (endpoint,) = site.endpoints()
    url = f"{site.url}/v2/{endpoint['id']}/openai/v1"
    assert f"Endpoint  tiny ({endpoint['id']}), queue" in ran.out
    assert f"URL       {url}" in ran.out
    assert re.search(r"Answer    chat, first token after \d+\.\d s: Hello!", ran.out)
    assert re.search(r"Worker    cold start \d+\.\d s: ", ran.out)
    assert "Price     $1.10/h while a worker runs; $2.20/h idle (2 always run); at most $3.30/h (3 workers)" in ran.out
    assert "deploy: GPU: ADA_24 (RTX 4090, 24 GB, $1.10/h)" in ran.err

    # The command that it prints works word for word.
    curl = ran.out[ran.out.index("curl ") :]
    done = subprocess.run(
        ["/bin/bash", "-c", curl], env={**os.environ, "RUNPOD_API_KEY": KEY}, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {"said": "Hello!"}

    # Again: no change, no second endpoint.
    ran = site.run(*UP, "--workers-min", "2", "--env", "GREETING=hi")
    assert (ran.code, len(site.endpoints())) == (0, 1)
    assert f"tiny ({endpoint['id']}) is as wanted: no change" in ran.err

    # An update and its way back under load: every request is answered in full.
    with open_loop(url, KEY, 50) as load:
        ran = site.run("update", "tiny", "--image", "x/y:2", "--env", "GREETING=hello", "--skip-doctor")
        assert ran.code == 0, ran.err
        assert "tiny: image: x/y:1 -> x/y:2" in ran.err
        assert "tiny: env: GREETING=hi -> hello" in ran.err
        assert re.search(r"(\d) of \1 workers run release 2", ran.err)
        back = site.run("rollback", "tiny")
        assert back.code == 0, back.err
        assert "deploy: back to release 1" in back.err
        assert re.search(r"(\d) of \1 workers run release 3", back.err)
        time.sleep(0.1)
    assert len(load.answers) > 20
    assert load.texts() == {PROMPT}
    (endpoint,) = site.endpoints()
    assert endpoint["image"] == "x/y:1"
    assert endpoint["env"] == {"MODEL_NAME": "org/tiny", "WARM_UP": "true", "GREETING": "hi"}

    ran = site.run("status", "tiny")
    assert ran.code == 0
    assert re.search(r"^Release +3, on (\d) of \1 workers$", ran.out, re.MULTILINE)
    document = json.loads(site.run("status", "tiny", "--json").out)
    assert {one["isStale"] for one in document["workers"]} == {False}

    ran = site.run("logs", "tiny", "--tail", "500")
    assert ran.code == 0
    assert "start container for x/y:1: begin" in ran.out
    assert '"status": "completed"' in ran.out

    ran = site.run("down", "tiny", "--yes")
    assert (ran.code, site.endpoints()) == (0, [])
    assert site.run("down", "tiny", "--yes").code == 3


def test_up_changes_what_differs(account: Callable[..., Account]) -> None:
    site = account()
    assert site.run(*UP, "--no-wait").code == 0

    ran = site.run(*UP, "--no-wait", "--workers-max", "5", "--max-model-len", "4096")

    assert ran.code == 0, ran.err
    assert "tiny: workers.max: 3 -> 5" in ran.err
    assert "tiny: env: + MAX_MODEL_LEN=4096" in ran.err
    (endpoint,) = site.endpoints()
    assert endpoint["workers"]["max"] == 5


def test_logs_follow_workers_that_start_later(account: Callable[..., Account]) -> None:
    site = account()
    assert site.run(*UP, "--no-wait").code == 0
    environment = {**os.environ, "RUNPOD_API_KEY": KEY, "RUNPOD_API_URL": site.url}
    command = [*(sys.executable, "-m", "deploy", "logs", "tiny", "--follow")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert site.run(*UP).code == 0
            assert process.stdout is not None
            lines: list[str] = []
            while not lines or '"status": "completed"' not in lines[-1]:
                lines.append(process.stdout.readline())
                assert lines[-1], lines
        finally:
            process.terminate()
    assert "create container x/y:1" in lines[0]


def test_a_load_balancer_answers_and_is_updated_under_load(account: Callable[..., Account]) -> None:
    site = account(env={"PAUSE_S": "0.02"})

    ran = site.run(*UP, "--type", "load-balancer", "--workers-min", "1")

    assert ran.code == 0, ran.err
    (endpoint,) = site.endpoints()
    url = f"{endpoint['requestUrls']['base']}/v1"
    assert f"Endpoint  tiny ({endpoint['id']}), load balancer" in ran.out
    assert f"URL       {url}" in ran.out
    assert "Answer    chat, first token after" in ran.out
    curl = ran.out[ran.out.index("curl ") :]
    done = subprocess.run(
        ["/bin/bash", "-c", curl], env={**os.environ, "RUNPOD_API_KEY": KEY}, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {"said": "Hello!"}

    with open_loop(url, KEY, 20) as load:
        ran = site.run("update", "tiny", "--image", "x/y:2")
        assert ran.code == 0, ran.err
    assert load.texts() == {PROMPT}
    again = site.run(*UP, "--no-wait")
    assert again.code == 2
    assert "tiny is of type LOAD_BALANCER, which cannot be changed: choose another --name" in again.err
