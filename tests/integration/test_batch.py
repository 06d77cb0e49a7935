"""A batch file through the queue: real HTTPS, real processes, kills, and the real engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from openai.types import Completion
from openai.types.chat import ChatCompletion

from builder.tiny_model.corpus import CORPUS
from tests.batch_runs import read_lines, run_with_kills
from tests.emulator_queue import EmulatorQueue, emulator_queue
from tests.processes import ROOT, Process


def test_each_line_is_answered_once_when_a_worker_and_the_client_are_killed(tmp_path: Path) -> None:
    """`make soak` runs ten thousand."""
    outcome = run_with_kills(tmp_path, 200, kill_workers_at=[120], kill_client_at=40, tls=True)

    assert (outcome.right, outcome.others) == (200, 0)
    assert outcome.killed_in_progress > 0
    assert "of 200 lines are answered" in outcome.logs[1]


def test_ctrl_c_twice_ends_a_run_with_one_message(tmp_path: Path) -> None:
    """No worker takes the jobs."""
    lines = [request(str(number), "/v1/completions", prompt="a") for number in range(100)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with emulator_queue() as queue:
        command = [sys.executable, "-m", "batch", "run", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
        with subprocess.Popen(command, cwd=ROOT, env=environment(queue), stderr=subprocess.PIPE) as process:
            while queue.waiting() < len(lines):
                time.sleep(0.05)
            while process.poll() is None:
                process.send_signal(signal.SIGINT)
                time.sleep(0.005)
            assert process.stderr is not None
            told = process.stderr.read().decode()

    assert process.returncode == 130
    assert told.splitlines()[-1].startswith("batch: interrupted; jobs that were sent go on")
    assert "Traceback" not in told


def environment(queue: EmulatorQueue) -> dict[str, str]:
    return {
        **os.environ,
        "RUNPOD_API_KEY": queue.key,
        "RUNPOD_ENDPOINT_BASE_URL": queue.base_url,
        "RUNPOD_ENDPOINT_ID": queue.endpoint,
    }


def run_batch(directory: Path, queue: EmulatorQueue, *lines: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    (directory / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "batch", "run", str(directory / "in.jsonl"), "-o", str(directory / "out.jsonl")],
        cwd=ROOT,
        env=environment(queue),
        capture_output=True,
        text=True,
        check=False,
    )


def request(custom_id: str, url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "tiny", "temperature": 0, **body}}


def test_the_real_engines_answers_are_lines_in_openais_format(
    worker: Process, job_queue: EmulatorQueue, tmp_path: Path
) -> None:
    del worker
    chats = [sample for sample in CORPUS if sample.prompt is None][:3]

    ran = run_batch(
        tmp_path,
        job_queue,
        *(request(f"chat-{index}", "/v1/chat/completions", messages=chat.messages) for index, chat in enumerate(chats)),
        request("completion", "/v1/completions", prompt="January,", max_tokens=5),
        request("wrong", "/v1/chat/completions", messages=[]),
    )

    assert ran.returncode == 5, ran.stderr
    assert ran.stdout.startswith(f"{tmp_path}/out.jsonl: 4 of 5 lines (")
    answers = {line["custom_id"]: line for line in read_lines(tmp_path / "out.jsonl")}
    assert answers.keys() == {"chat-0", "chat-1", "chat-2", "completion"}
    for index, chat in enumerate(chats):
        answer = ChatCompletion.model_validate(answers[f"chat-{index}"]["response"]["body"])
        assert answer.choices[0].message.content == chat.answer
    completion = Completion.model_validate(answers["completion"]["response"]["body"])
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 5
    (wrong,) = read_lines(tmp_path / "out.errors.jsonl")
    assert (wrong["custom_id"], wrong["response"]["status_code"], wrong["error"]) == ("wrong", 400, None)
    assert wrong["response"]["body"]["error"]["code"] == 400
