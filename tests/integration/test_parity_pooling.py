"""Answers of pooling models from the queue equal those of the same app, in the same process, over HTTP."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from emulator.free_port import free_port
from tests.emulator_queue import emulator_queue
from tests.integration.conftest import START_S
from tests.integration.parity import ParityClient, plain
from tests.integration.parity_cases import CLASSIFIED, EMBEDDED, NOT_CLASSIFIED, NOT_EMBEDDED, embedding
from tests.processes import BUSY_ENVIRONMENT, running

if TYPE_CHECKING:
    from collections.abc import Mapping

CLASSES = 3


@pytest.fixture(scope="module")
def embedding_model(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ParityClient]:
    with served(
        tiny_model, {"RUNNER": "pooling", "CONVERT": "embed"}, tmp_path_factory.mktemp("embedding") / "log"
    ) as parity:
        yield parity


@pytest.fixture(scope="module")
def classifier(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ParityClient]:
    folder = tmp_path_factory.mktemp("classifier")
    with served(with_head(Path(tiny_model), folder / "model"), {"RUNNER": "pooling"}, folder / "log") as parity:
        yield parity


@contextmanager
def served(model: str, more: Mapping[str, str], log: Path) -> Iterator[ParityClient]:
    """Run a worker with a model, and yield a client of its queue and of its app."""
    port = free_port()
    with emulator_queue() as queue, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        environment = {**BUSY_ENVIRONMENT, **queue.environment, **more, "HTTP_PORT": str(port)}
        environment |= {"MODEL_NAME": model, "SERVED_MODEL_NAME": "tiny"}
        # One request at a time and no prefix cache: batches and caches change the last bits of a number.
        environment |= {"MAX_NUM_SEQS": "1", "ENABLE_PREFIX_CACHING": "false"}
        with running(["-m", "tests.served_worker"], environment, log) as process:
            process.wait_for(queue.has_worker, START_S)
            yield ParityClient(queue, client)


def with_head(model: Path, folder: Path) -> str:
    """Copy the model with a classification head, whose weights are rows of its embedding; return the directory."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Phi3ForSequenceClassification"]}
    config |= {"id2label": {str(n): f"class {n}" for n in range(CLASSES)}}
    config |= {"label2id": {f"class {n}": n for n in range(CLASSES)}}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] = weights["lm_head.weight"][40 : 40 + CLASSES].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_answer_of_an_embedding_model_equals_vllms(name: str, embedding_model: ParityClient) -> None:
    queued, direct = embedding_model.queued(EMBEDDED[name]), embedding_model.direct(EMBEDDED[name])

    assert direct.status == queued.status == HTTPStatus.OK
    assert plain(queued.body) == plain(direct.body)


@pytest.mark.parametrize("name", NOT_EMBEDDED)
def test_an_error_of_an_embedding_model_equals_vllms(name: str, embedding_model: ParityClient) -> None:
    queued, direct = embedding_model.queued(NOT_EMBEDDED[name]), embedding_model.direct(NOT_EMBEDDED[name])

    assert queued == direct
    assert direct.status >= HTTPStatus.BAD_REQUEST


@pytest.mark.parametrize("form", ["bytes", "bytes_only"])
def test_an_embedding_in_bytes_is_refused_as_an_output_must_be_json(form: str, embedding_model: ParityClient) -> None:
    case = embedding("a fox", encoding_format=form)

    queued, direct = embedding_model.queued(case), embedding_model.direct(case)

    assert direct.status == HTTPStatus.OK
    assert queued.status == HTTPStatus.BAD_REQUEST
    assert "output is JSON or text" in queued.body["error"]["message"]


@pytest.mark.parametrize("name", CLASSIFIED)
def test_an_answer_of_a_classifier_equals_vllms(name: str, classifier: ParityClient) -> None:
    queued, direct = classifier.queued(CLASSIFIED[name]), classifier.direct(CLASSIFIED[name])

    assert direct.status == queued.status == HTTPStatus.OK
    assert plain(queued.body) == plain(direct.body)


@pytest.mark.parametrize("name", NOT_CLASSIFIED)
def test_an_error_of_a_classifier_equals_vllms(name: str, classifier: ParityClient) -> None:
    queued, direct = classifier.queued(NOT_CLASSIFIED[name]), classifier.direct(NOT_CLASSIFIED[name])

    assert queued == direct
    assert direct.status >= HTTPStatus.BAD_REQUEST
