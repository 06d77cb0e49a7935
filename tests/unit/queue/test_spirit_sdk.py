"""What is used of Spirit's SDK: its interface is checked, and its heartbeats and log are adapted."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from engine.queue.spirit_sdk import SDKLogHandler, missing_interface

ROOT = Path(__file__).parents[3]
# Starts heartbeats, with a proxy that must not be used, names a task and forks.
_PROGRAM = """
import os, time
from engine.queue import spirit_sdk
running = spirit_sdk.start_heartbeat()
running.current_jobs.add("a-task")
for _ in range(20):
    child = os.fork()
    if not child:
        import xml.dom.minidom
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
time.sleep(1.5)
"""


def test_the_installed_sdk_has_the_interface_that_the_job_loop_needs() -> None:
    assert missing_interface() is None


@pytest.mark.parametrize(
    ("name", "replacement", "expected_message"),
    [
        ("run", None, "run"),
        ("run", lambda handlers: handlers, "too many positional arguments"),
        ("worker.run", lambda handlers, env: (handlers, env), "start calls"),
        ("task.Task.parse", None, "parse"),
        ("task.getStatus", lambda header: header, "unexpected keyword argument"),
        ("concurrency.Concurrency.add_job", None, None),
        ("heartbeat.Heartbeat._do_heartbeat", None, "_do_heartbeat"),
        ("settings.HEADER_HEALTH", None, "HEADER_HEALTH"),
        ("log.logger", None, "logger"),
    ],
)
def test_a_missing_or_different_part_of_the_sdk_is_named(
    name: str, replacement: object, expected_message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not used may be missing."""
    if replacement is None:
        monkeypatch.delattr(f"spirit_gpu.{name}")
    else:
        monkeypatch.setattr(f"spirit_gpu.{name}", replacement)

    missing = missing_interface()
    assert missing is None if expected_message is None else expected_message in str(missing)


def test_heartbeats_name_the_tasks_and_use_no_proxy_and_forks_do_not_hang() -> None:
    beats: list[list[str]] = []

    class Agent(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            beats.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["requestIDs"])
            time.sleep(0.02)
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: Any) -> None:
            pass

    agent = ThreadingHTTPServer(("127.0.0.1", 0), Agent)
    thread = threading.Thread(target=agent.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    environment = {
        "EASE_AGENT_URL": f"http://127.0.0.1:{agent.server_port}",
        "EASE_HEARTBEAT_INTERVAL": "1",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
    }
    try:
        subprocess.run(
            [sys.executable, "-c", _PROGRAM], cwd=ROOT, env={**os.environ, **environment}, timeout=30, check=True
        )
    finally:
        agent.shutdown()
        thread.join()
        agent.server_close()
    assert beats[-1] == ["a-task"]


@pytest.mark.parametrize(
    ("variable", "message"), [("EASE_TEST_MODE", "EASE_TEST_MODE is set, but this worker has no test mode: unset it")]
)
def test_the_sdks_test_mode_is_refused(variable: str, message: str) -> None:
    done = subprocess.run(
        [sys.executable, "handler.py"],
        cwd=ROOT,
        env={**os.environ, "PLATFORM": "spirit", variable: "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, f"The worker cannot start: {message}\n")


def test_a_line_about_a_job_has_its_id(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("engine.test")
    monkeypatch.setattr(logger, "handlers", [SDKLogHandler()])
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "level", logging.INFO)

    logger.info("Job %s: half of it", "one")
    logger.warning("all of it", extra={"job_id": "two"})
    logger.error("nothing of %s", "three")

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["message"], line["requestID"], line["level"]) for line in lines] == [
        ("Job one: half of it", "one", "INFO"),
        ("all of it", "two", "WARN"),
        ("nothing of three", "", "ERROR"),
    ]
