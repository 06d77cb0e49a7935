"""The two sides: the worker on its queue, beside other streams, and vLLM's own server."""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.integration.conftest import START_S
from tests.integration.parity import events, joined
from tests.job_queue import JobQueue, QueuedJob, serving
from tests.parsers.apps import BASE
from tests.parsers.cases import CHAT, Case
from tests.parsers.model import with_their_tokens
from tests.processes import OTHER_CORE, VLLM_ENVIRONMENT, Process, running

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"}
ASKED_ANEW = 3
BY_CHANCE = {"id", "item_id", "call_id", "signature"}
AT_ONCE = 4
# Answers as they are asked for, and log-probabilities that do not hang on the batch.
FLAGS = {
    "LOGITS_PROCESSORS": "tests.parsers.forced:Forced",
    "LOGPROBS_MODE": "processed_logprobs",
    "ENABLE_PREFIX_CACHING": "false",
}
_MIDDLEWARE = "tests.parsers.apps.ByModel"

Told = list[Any]


def told(text: str, case: Case) -> Told:
    """What of a stream has to be equal; ids and signatures, of which many are drawn by chance, are not."""
    found: Told = sorted(events(text), key=_choice) if case.exactly else joined(text)
    return [_without_chance(one) for one in found]


def _choice(event: dict[str, Any]) -> float:
    """By what to sort the events of a step: chance has which of several choices comes first."""
    choices = event["data"].get("choices") if isinstance(event["data"], dict) else None
    return choices[0]["index"] if choices else math.inf


def _without_chance(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: "" if name in BY_CHANCE and isinstance(part, str) else _without_chance(part)
            for name, part in value.items()
        }
    return [_without_chance(part) for part in value] if isinstance(value, (list, tuple)) else value


class VllmAlone:
    """VLLM's own server.

    It joins what has come in while it was late, too. So an answer that differs from the worker's is asked for anew, and
    alone.
    """

    def __init__(self, process: Process, client: httpx.Client, model: Path) -> None:
        self._process = process
        self._client = client
        self._model = model
        self._answers: dict[str, list[str]] = {}

    def wait(self) -> None:
        """Wait until it serves."""
        self._process.wait_for(self._serves, START_S)

    def learn(self, cases: Mapping[str, Case]) -> None:
        """Ask for the answers to these cases, some at once; first let it make all apps, which holds its loop up."""
        for case in {case.body.get("model"): case for case in cases.values()}.values():
            self._client.post(case.route, json={**case.request(self._model), "stream": False, "max_tokens": 1})
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for name, answer in zip(cases, pool.map(self._text, cases.values()), strict=True):
                self._answers[name] = [answer]

    def difference(self, name: str, case: Case, text: str) -> tuple[Told, Told] | None:
        """From where on the text and the server's answer differ; None if they do not, now or when it is asked anew."""
        answers, found = self._answers[name], told(text, case)
        while found not in (known := [told(answer, case) for answer in answers]):
            if len(answers) > ASKED_ANEW:
                first = next(
                    (at for at, pair in enumerate(zip(found, known[-1], strict=False)) if pair[0] != pair[1]), -1
                )
                return found[first:], known[-1][first:]
            answers.append(self._text(case))
        return None

    def _text(self, case: Case) -> str:
        return self._client.post(case.route, json=case.request(self._model)).raise_for_status().text

    def _serves(self) -> bool:
        try:
            return self._client.get("/health").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False


class Worker:
    """The worker on its queue."""

    def __init__(self, process: Process, queue: JobQueue, model: Path) -> None:
        self._process = process
        self._queue = queue
        self._model = model

    def wait(self) -> None:
        """Wait until it takes jobs."""
        self._process.wait_for(self._queue.has_worker, START_S)

    def texts(self, cases: Mapping[str, Case], others: int, at_once: int) -> dict[str, str]:
        """The streams of these cases, some at once, each beside at least so many long chats of plain text."""
        with self._long_chats(others), ThreadPoolExecutor(at_once) as pool:
            return dict(zip(cases, pool.map(self._text, cases.values()), strict=True))

    def _text(self, case: Case) -> str:
        job = self._queue.run(_job(case.route, case.request(self._model)), 300)
        status = job.status()
        if status["status"] != "COMPLETED":
            raise RuntimeError(f"the job has {status['status']}: {status.get('error')}\n{self._process.log[-4000:]}")
        return "".join(job.outputs)

    def _long_chat(self) -> QueuedJob:
        said = [{"role": "user", "content": "Tell me more."}]
        body = {"model": BASE, "messages": said, "max_tokens": 1900, "ignore_eos": True, "stream": True}
        return self._queue.submit(_job(CHAT, body))

    @contextmanager
    def _long_chats(self, number: int) -> Iterator[None]:
        """Keep so many running."""
        chats = [self._long_chat() for _ in range(number)]
        for chat in chats:
            chat.first_output()
        enough = threading.Event()

        def keep() -> None:
            while not enough.wait(0.5):
                for place, chat in enumerate(chats):
                    if chat.status()["status"] in ENDED:
                        chats[place] = self._long_chat()

        keeping = threading.Thread(target=keep)
        keeping.start()
        try:
            yield
        finally:
            enough.set()
            keeping.join()
            for chat in chats:
                self._queue.cancel(chat)
            for chat in chats:
                chat.wait()


@contextmanager
def both_sides(tiny_model: Path, directory: Path) -> Iterator[tuple[Worker, VllmAlone]]:
    """Start both on the tiny model with the tokens of all models, each with one engine for all parsers.

    The worker is `handler.py` with the stock SDK and the real engine, on a queue of its own: a worker that other tests
    share would take some of its jobs.
    """
    model = with_their_tokens(tiny_model, directory / "model")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ["-m", "vllm.entrypoints.openai.api_server", "--host=127.0.0.1", f"--port={port}", "--enforce-eager"]
    arguments += [f"--model={model}", "--served-model-name", BASE, f"--middleware={_MIDDLEWARE}"]
    for name, value in FLAGS.items():
        flag = name.lower().replace("_", "-")
        arguments += [f"--no-{flag}"] if value == "false" else [f"--{flag}", value]
    environment = {**VLLM_ENVIRONMENT, **FLAGS, "MODEL_NAME": str(model), "SERVED_MODEL_NAME": BASE}
    with (
        serving() as queue,
        running(["-m", "tests.parsers.worker"], environment | queue.environment, directory / "worker.log") as ours,
        running(arguments, VLLM_ENVIRONMENT | OTHER_CORE, directory / "vllm.log") as theirs,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        worker, alone = Worker(ours, queue, model), VllmAlone(theirs, client, model)
        worker.wait()
        alone.wait()
        yield worker, alone


def _job(route: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"openai_route": route, "openai_input": body}
