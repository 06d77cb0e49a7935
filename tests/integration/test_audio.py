"""A file that a job names is transcribed as vLLM transcribes the same file in a multipart upload."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.integration.parity import Answer, ParityClient, joined, plain
from tests.integration.parity_cases import Case
from tests.integration.test_parity_pooling import served
from tests.whisper import tone, transcription_model

TRANSCRIPTIONS = "/v1/audio/transcriptions"
TRANSLATIONS = "/v1/audio/translations"
ENGLISH: dict[str, Any] = {"model": "tiny", "language": "en"}
# Longer than one clip of the model, and of a rate that is not the model's.
AUDIO = tone(5, rate_hz=22_050)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audio")


@pytest.fixture(scope="module")
def volume(folder: Path) -> Path:
    """Return a network volume with the file."""
    (folder / "volume").mkdir()
    (folder / "volume" / "tone.wav").write_bytes(AUDIO)
    return folder / "volume"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Serve the file on the loopback interface; yield its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/tone.wav":
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Length", str(len(AUDIO)))
            self.end_headers()
            self.wfile.write(AUDIO)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{web.server_port}/tone.wav"
        web.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def parity(folder: Path, volume: Path) -> Iterator[ParityClient]:
    model = transcription_model(folder / "model")
    environment = {
        "NETWORK_VOLUME": str(volume),
        "ALLOWED_MEDIA_DOMAINS": "127.0.0.1",
        "VLLM_MAX_AUDIO_CLIP_FILESIZE_MB": "1",
        "MAX_NUM_BATCHED_TOKENS": "512",  # A clip is a prompt of the encoder, which is not divided.
    }
    with served(model, environment, folder / "log") as client:
        yield client


@pytest.fixture(params=["URL", "base64", "data URL", "volume"])
def file(request: pytest.FixtureRequest, url: str, volume: Path) -> str:
    """Return what names the file."""
    encoded = base64.b64encode(AUDIO).decode()
    forms = {"URL": url, "base64": encoded, "data URL": f"data:audio/wav;base64,{encoded}"}
    return forms.get(request.param, f"{volume}/tone.wav")


def uploaded(parity: ParityClient, route: str, fields: dict[str, Any], audio: bytes | None = AUDIO) -> Answer:
    """Return vLLM's answer to the same as a multipart upload."""
    files = {} if audio is None else {"file": ("tone.wav", audio, "audio/wav")}
    return parity.uploaded(route, fields, files)


@pytest.mark.parametrize("route", [TRANSCRIPTIONS, TRANSLATIONS])
def test_a_file_in_any_form_is_transcribed_as_in_an_upload(route: str, file: str, parity: ParityClient) -> None:
    queued = parity.queued(Case(route, {**ENGLISH, "file": file}))

    assert queued.status == HTTPStatus.OK
    assert queued.body["text"]
    assert queued == uploaded(parity, route, ENGLISH)


@pytest.mark.parametrize(
    "fields",
    [
        {**ENGLISH, "response_format": "verbose_json", "timestamp_granularities[]": ["segment"]},
        {**ENGLISH, "response_format": "text", "prompt": "A fox 漢"},
        {**ENGLISH, "temperature": 0.5, "seed": 7, "max_completion_tokens": 8},
        {"model": "tiny"},
    ],
    ids=["verbose_json", "text", "sampling", "detected language"],
)
def test_fields_have_the_effect_that_they_have_in_a_form(
    fields: dict[str, Any], volume: Path, parity: ParityClient
) -> None:
    queued = parity.queued(Case(TRANSCRIPTIONS, {**fields, "file": f"{volume}/tone.wav"}))

    assert queued.status == HTTPStatus.OK
    assert plain(queued.body) == plain(uploaded(parity, TRANSCRIPTIONS, fields).body)


def test_a_streamed_transcription_equals_vllms(volume: Path, parity: ParityClient) -> None:
    fields = {**ENGLISH, "stream": True, "stream_include_usage": True}

    queued = parity.queued(Case(TRANSCRIPTIONS, {**fields, "file": f"{volume}/tone.wav"}))
    direct = uploaded(parity, TRANSCRIPTIONS, fields)

    assert queued.status == direct.status == HTTPStatus.OK
    assert isinstance(queued.body, str), "each batch ends with an event"
    assert len(joined(queued.body)) > 1
    assert joined(queued.body) == joined(direct.body)


@pytest.mark.parametrize(
    ("fields", "audio"),
    [
        (ENGLISH, None),
        ({**ENGLISH, "model": "gpt-5"}, AUDIO),
        (ENGLISH, b"no audio at all"),
        ({**ENGLISH, "language": "xx"}, AUDIO),
        ({**ENGLISH, "temperature": "warm"}, AUDIO),
    ],
    ids=["no file", "unknown model", "no audio", "unknown language", "bad field"],
)
def test_an_error_equals_vllms(fields: dict[str, Any], audio: bytes | None, parity: ParityClient) -> None:
    file = {} if audio is None else {"file": base64.b64encode(audio).decode()}

    queued = parity.queued(Case(TRANSCRIPTIONS, fields | file))

    assert queued.status >= HTTPStatus.BAD_REQUEST
    assert queued == uploaded(parity, TRANSCRIPTIONS, fields, audio)


def test_a_file_that_may_not_be_read_is_refused(url: str, volume: Path, parity: ParityClient) -> None:
    (volume / "large.wav").write_bytes(bytes(2**20 + 1))
    (volume / "link").symlink_to("/etc/passwd")
    refusals = {
        f"{volume}/large.wav": (HTTPStatus.BAD_REQUEST, "VLLM_MAX_AUDIO_CLIP_FILESIZE_MB"),
        base64.b64encode(bytes(2**20 + 10)).decode(): (HTTPStatus.BAD_REQUEST, "VLLM_MAX_AUDIO_CLIP_FILESIZE_MB"),
        "/etc/passwd": (HTTPStatus.FORBIDDEN, "network volume"),
        f"{volume}/link": (HTTPStatus.FORBIDDEN, "network volume"),
        url.replace("127.0.0.1", "localhost"): (HTTPStatus.BAD_REQUEST, "allowed domains"),
        f"{url}.missing": (HTTPStatus.UNPROCESSABLE_ENTITY, "404"),
    }

    for reference, (status, reason) in refusals.items():
        answer = parity.queued(Case(TRANSCRIPTIONS, {**ENGLISH, "file": reference}))
        assert (answer.status, reason in answer.body["error"]["message"]) == (status, True), answer
