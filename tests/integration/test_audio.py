"""A file is transcribed as vLLM transcribes it in a multipart upload: named by a job, or uploaded to a balancer."""

from __future__ import annotations

import base64
import socket
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.integration.balancer.conftest import Site, openai_client, served_by_worker
from tests.integration.emulator.conftest import KEY, eventually
from tests.integration.parity import Answer, ParityClient, joined, plain, upload
from tests.integration.parity_cases import Case
from tests.integration.test_parity_pooling import served
from tests.processes import OTHER_CORE, VLLM_ENVIRONMENT
from tests.whisper import tone, transcription_model

TRANSCRIPTIONS = "/v1/audio/transcriptions"
TRANSLATIONS = "/v1/audio/translations"
ENGLISH: dict[str, Any] = {"model": "tiny", "language": "en"}
# Longer than one clip of the model, and of a rate that is not the model's.
AUDIO = tone(5, rate_hz=22_050)
LIMITS = {
    "VLLM_MAX_AUDIO_CLIP_FILESIZE_MB": "1",
    "MAX_NUM_BATCHED_TOKENS": "512",  # A clip is a prompt of the encoder, which is not divided.
}


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
def model(folder: Path) -> str:
    return transcription_model(folder / "model")


@pytest.fixture(scope="module")
def parity(model: str, folder: Path, volume: Path) -> Iterator[ParityClient]:
    environment = {"NETWORK_VOLUME": str(volume), "ALLOWED_MEDIA_DOMAINS": "127.0.0.1", **LIMITS}
    with served(model, environment, folder / "log") as client:
        yield client


@pytest.fixture(scope="module")
def site(model: str) -> Iterator[Site]:
    """Run the worker as it is on a load-balancing endpoint, with the same model."""
    variables = {**VLLM_ENVIRONMENT, **OTHER_CORE, **LIMITS, "MODEL_NAME": model, "SERVED_MODEL_NAME": "tiny"}
    variables |= {"MAX_NUM_SEQS": "1", "ENABLE_PREFIX_CACHING": "false"}
    with served_by_worker(variables) as site:
        yield site


@pytest.fixture
def client(site: Site) -> Iterator[openai.OpenAI]:
    with openai_client(site) as client:
        yield client


@pytest.fixture(params=["URL", "base64", "data URL", "volume"])
def file(request: pytest.FixtureRequest, url: str, volume: Path) -> str:
    """Return what names the file."""
    encoded = base64.b64encode(AUDIO).decode()
    forms = {"URL": url, "base64": encoded, "data URL": f"data:audio/wav;base64,{encoded}"}
    return forms.get(request.param, f"{volume}/tone.wav")


def uploaded(parity: ParityClient, route: str, fields: dict[str, Any], audio: bytes | None = AUDIO) -> Answer:
    """Return vLLM's answer to the same as a multipart upload."""
    return upload(parity.client, route, fields, file_part(audio))


def file_part(audio: bytes | None, field: str = "file") -> dict[str, tuple[str, bytes, str]]:
    """Return the form's part with the file, if there is one."""
    return {} if audio is None else {field: ("tone.wav", audio, "audio/wav")}


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


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # Of OpenAI's client: translations.
@pytest.mark.parametrize("kind", ["transcriptions", "translations"])
def test_the_openai_client_uploads_a_file_to_a_load_balancing_endpoint(
    kind: str, client: openai.OpenAI, parity: ParityClient
) -> None:
    resource: Any = getattr(client.audio, kind)
    answer = resource.create(model="tiny", file=("tone.wav", AUDIO), extra_body={"language": "en"})

    assert answer.text
    assert answer.text == uploaded(parity, f"/v1/audio/{kind}", ENGLISH).body["text"]


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # Of OpenAI's client: translations.
@pytest.mark.parametrize("kind", ["transcriptions", "translations"])
def test_the_openai_client_streams_the_text_of_an_upload(
    kind: str, client: openai.OpenAI, parity: ParityClient
) -> None:
    fields = {"language": "en", "stream": True, "stream_include_usage": True}
    resource: Any = getattr(client.audio, kind).with_streaming_response
    with resource.create(model="tiny", file=("tone.wav", AUDIO), extra_body=fields) as response:
        balanced = response.read().decode()

    direct = uploaded(parity, f"/v1/audio/{kind}", ENGLISH | fields).body
    assert len(joined(balanced)) > 1
    assert joined(balanced) == joined(direct)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({**ENGLISH, "response_format": "verbose_json"}, file_part(AUDIO)),
        ({**ENGLISH, "response_format": "text", "prompt": "A fox 漢"}, file_part(AUDIO)),
        ({**ENGLISH, "temperature": 0.5, "seed": 7}, file_part(AUDIO)),
        (ENGLISH, file_part(None)),
        (ENGLISH, file_part(AUDIO, "audio")),
        (ENGLISH, file_part(b"")),
        (ENGLISH, file_part(b"no audio at all")),
        (ENGLISH, file_part(bytes(2**20 + 1))),
        ({**ENGLISH, "model": "gpt-5"}, file_part(AUDIO)),
        ({**ENGLISH, "language": "xx"}, file_part(AUDIO)),
        ({**ENGLISH, "temperature": "warm"}, file_part(AUDIO)),
    ],
    ids=["verbose_json", "text", "sampling", "no file", "another field", "empty file", "no audio", "large file",
         "unknown model", "unknown language", "bad field"],
)  # fmt: skip
def test_an_upload_to_a_load_balancing_endpoint_gets_vllms_answer(
    fields: dict[str, Any], parts: dict[str, tuple[str, bytes, str]], site: Site, parity: ParityClient
) -> None:
    balanced = upload(site.client, TRANSCRIPTIONS, fields, parts)
    direct = upload(parity.client, TRANSCRIPTIONS, fields, parts)

    assert balanced.status == direct.status < HTTPStatus.INTERNAL_SERVER_ERROR
    assert plain(balanced.body) == plain(direct.body)


def test_a_client_that_leaves_in_mid_upload_is_logged_as_such(site: Site) -> None:
    host, port = site.url.removeprefix("http://").split(":")
    head = (
        f"POST {TRANSCRIPTIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 100000\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
    )
    with socket.create_connection((host, int(port))) as leaving:
        leaving.sendall(head.encode())
        eventually(lambda: site.workers("running"))

    eventually(lambda: site.lines_with('"status": "stopped"'))
    assert not site.lines_with("failed in the engine")
