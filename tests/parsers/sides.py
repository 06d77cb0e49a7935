"""The two sides of the comparison: the worker on its queue, with concurrent streams, and vLLM's own server."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from emulator.free_port import free_port
from tests.emulator_queue import EmulatorQueue, QueuedJob, emulator_queue
from tests.integration.conftest import START_S
from tests.integration.parity import events, joined
from tests.parsers.apps import BASE
from tests.parsers.cases import CHAT, Case
from tests.parsers.model import with_special_tokens
from tests.processes import BUSY_ENVIRONMENT, OTHER_CORE, VLLM_ENVIRONMENT, Process, running

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"}
MAX_REPEATS = 3
STEP_MS = 30
RANDOM_FIELDS = {"id", "item_id", "call_id", "signature"}
AT_ONCE = 4
# Forces the answers of the requests, and log-probabilities that do not depend on the batch.
FLAGS = {
    "LOGITS_PROCESSORS": "tests.parsers.forced:Forced",
    "LOGPROBS_MODE": "processed_logprobs",
    "ENABLE_PREFIX_CACHING": "false",
}
_MIDDLEWARE = "tests.parsers.apps.ByModel"

Content = list[Any]


def content_of(text: str, case: Case) -> Content:
    """Return what of a stream must be equal; ids and signatures are not, as many of them are random."""
    content: Content = sorted(events(text), key=_choice_index) if case.exactly else joined(text)
    return [_without_random_fields(part) for part in content]


def _choice_index(event: dict[str, Any]) -> float:
    """Return a sort key: the order of the choices within one step is random."""
    choices = event["data"].get("choices") if isinstance(event["data"], dict) else None
    return choices[0]["index"] if choices else math.inf


def _without_random_fields(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: "" if name in RANDOM_FIELDS and isinstance(part, str) else _without_random_fields(part)
            for name, part in value.items()
        }
    return [_without_random_fields(part) for part in value] if isinstance(value, (list, tuple)) else value


class VLLMServer:
    """VLLM's own server.

    When it is late, it joins deltas as well. So a request whose answer differs from the worker's is repeated, with no
    other request running, and steps that take longer than it may be late.
    """

    def __init__(self, process: Process, client: httpx.Client, model: Path) -> None:
        self._process = process
        self._client = client
        self._model = model
        self._answers: dict[str, list[str]] = {}

    def wait(self) -> None:
        """Wait until it serves."""
        self._process.wait_for(self._serves, START_S)

    def load_answers(self, cases: Mapping[str, Case]) -> None:
        """Send these cases, several at once; before that, let it make all apps, which blocks its event loop."""
        for case in {case.body.get("model"): case for case in cases.values()}.values():
            self._client.post(case.route, json={**case.request(self._model), "stream": False, "max_tokens": 1})
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for name, answer in zip(cases, pool.map(self._text, cases.values()), strict=True):
                self._answers[name] = [answer]

    def difference(self, name: str, case: Case, text: str) -> tuple[Content, Content] | None:
        """Return both from their first difference on; None if the server's answer, or a repeat of it, is the same."""
        answers, content = self._answers[name], content_of(text, case)
        while content not in (known := [content_of(answer, case) for answer in answers]):
            if len(answers) > MAX_REPEATS:
                first = next(
                    (at for at, pair in enumerate(zip(content, known[-1], strict=False)) if pair[0] != pair[1]), -1
                )
                return content[first:], known[-1][first:]
            answers.append(self._text(case, STEP_MS))
        return None

    def _text(self, case: Case, step_ms: int = 0) -> str:
        request = case.request(self._model)
        if step_ms and "vllm_xargs" in request:
            request["vllm_xargs"]["step_ms"] = step_ms
        return self._client.post(case.route, json=request).raise_for_status().text

    def _serves(self) -> bool:
        try:
            return self._client.get("/health").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False


class Worker:
    """The worker and its queue."""

    def __init__(self, process: Process, queue: EmulatorQueue, model: Path) -> None:
        self._process = process
        self._queue = queue
        self._model = model

    def wait(self) -> None:
        """Wait until it takes jobs."""
        self._process.wait_for(self._queue.has_worker, START_S)

    def texts(self, cases: Mapping[str, Case], concurrent: int, at_once: int) -> dict[str, str]:
        """Return the streams of these cases, `at_once` at a time, while `concurrent` long chats of plain text run."""
        with self._long_chats(concurrent), ThreadPoolExecutor(at_once) as pool:
            return dict(zip(cases, pool.map(self._text, cases.values()), strict=True))

    def _text(self, case: Case) -> str:
        job = self._queue.run(_job(case.route, case.request(self._model)), 300)
        status = job.status()
        if status["status"] != "COMPLETED":
            raise RuntimeError(f"the job is {status['status']}: {status.get('error')}\n{self._process.log[-4000:]}")
        return "".join(job.outputs)

    def _long_chat(self) -> QueuedJob:
        messages = [{"role": "user", "content": "Tell me more."}]
        body = {"model": BASE, "messages": messages, "max_tokens": 1900, "ignore_eos": True, "stream": True}
        return self._queue.submit(_job(CHAT, body))

    @contextmanager
    def _long_chats(self, number: int) -> Iterator[None]:
        """Keep this number of long chats running."""
        chats = [self._long_chat() for _ in range(number)]
        for chat in chats:
            chat.first_output()
        stopped = threading.Event()

        def replace_ended() -> None:
            while not stopped.wait(0.5):
                for place, chat in enumerate(chats):
                    if chat.status()["status"] in ENDED:
                        chats[place] = self._long_chat()

        thread = threading.Thread(target=replace_ended)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()
            for chat in chats:
                self._queue.cancel(chat)
            for chat in chats:
                chat.wait()


@contextmanager
def both_sides(tiny_model: Path, directory: Path) -> Iterator[tuple[Worker, VLLMServer]]:
    """Start both on the tiny model with the special tokens of all models, each with one engine for all parsers.

    The worker is `handler.py` with the real SDK and the real engine. It has its own queue, as a worker that other tests
    share would take some of the jobs.
    """
    model = with_special_tokens(tiny_model, directory / "model")
    port = free_port()
    arguments = ["-m", "vllm.entrypoints.openai.api_server", "--host=127.0.0.1", f"--port={port}", "--enforce-eager"]
    arguments += [f"--model={model}", "--served-model-name", BASE, f"--middleware={_MIDDLEWARE}"]
    for name, value in FLAGS.items():
        flag = name.lower().replace("_", "-")
        arguments += [f"--no-{flag}"] if value == "false" else [f"--{flag}", value]
    environment = {**BUSY_ENVIRONMENT, **FLAGS, "MODEL_NAME": str(model), "SERVED_MODEL_NAME": BASE}
    with (
        emulator_queue() as queue,
        running(
            ["-m", "tests.parsers.worker"], environment | queue.environment, directory / "worker.log"
        ) as worker_process,
        running(arguments, VLLM_ENVIRONMENT | OTHER_CORE, directory / "vllm.log") as server_process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        worker, vllm = Worker(worker_process, queue, model), VLLMServer(server_process, client, model)
        worker.wait()
        vllm.wait()
        yield worker, vllm


def _job(route: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"openai_route": route, "openai_input": body}
