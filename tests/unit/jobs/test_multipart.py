"""A job that names a file becomes the multipart request that vLLM's audio routes take."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import UploadFile
from starlette.requests import Request as FormRequest

from engine.backend.app import Message
from engine.backend.files import Files
from engine.jobs import pipeline
from tests.scripted import ScriptedApp, scripted_files, sse, url_as_content

pytestmark = pytest.mark.anyio
ROUTE = "/v1/audio/transcriptions"
WAV = b"RIFF\x00\xff\r\n--boundary"
TEXT = base64.b64encode(WAV).decode()


async def outputs_of(app: ScriptedApp, value: Any, route: str = ROUTE) -> list[Any]:
    job = {"id": "job-1", "input": {"openai_route": route, "openai_input": value}}
    return [output async for output in pipeline.run(job, app)]


async def form_of(app: ScriptedApp, value: Any) -> list[tuple[str, Any]]:
    """Return the fields that a server reads of the request; of a file its name, type and content."""
    outputs = await outputs_of(app, value)
    assert outputs == [{}], outputs
    ((scope, body),) = app.requests

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    fields: list[tuple[str, Any]] = []
    async with FormRequest(scope, receive).form() as form:
        for name, field in form.multi_items():
            if isinstance(field, UploadFile):
                fields.append((name, (field.filename, field.content_type, await field.read())))
            else:
                fields.append((name, field))
    return fields


async def error_of(app: ScriptedApp, value: Any) -> tuple[int, str]:
    outputs = await outputs_of(app, value)
    assert app.requests == [], "refused before vLLM is called"
    document = json.loads(outputs[-1]["error"])
    return document["status"], document["error"]["message"]


@pytest.mark.parametrize("field", ["file", "file_url", "audio", "audio_url", "audio_base64"])
@pytest.mark.parametrize("route", [ROUTE, "/v1/audio/translations"])
async def test_a_file_may_be_given_under_the_names_of_other_workers(field: str, route: str) -> None:
    app = ScriptedApp()

    assert await outputs_of(app, {field: TEXT, "model": "m"}, route) == [{}]

    assert b'name="file"; filename="file"' in app.requests[0][1]
    assert WAV in app.requests[0][1]


async def test_fields_become_form_fields_as_openais_clients_write_them() -> None:
    given = {
        "file": TEXT,
        "model": "m\r\nwith a line",
        "prompt": '漢 "quoted"',
        "stream": True,
        "temperature": 0.5,
        "seed": 7,
        "language": None,
        "timestamp_granularities": ["word", "segment"],
        "include[]": ["logprobs"],
        "vllm_xargs": {"a": 1},
        "extra_body": {"hotwords": "fox"},
    }

    assert await form_of(ScriptedApp(), given) == [
        ("model", "m\r\nwith a line"),
        ("prompt", '漢 "quoted"'),
        ("stream", "true"),
        ("temperature", "0.5"),
        ("seed", "7"),
        ("timestamp_granularities[]", "word"),
        ("timestamp_granularities[]", "segment"),
        ("include[]", "logprobs"),
        ("vllm_xargs", '{"a":1}'),
        ("hotwords", "fox"),
        ("file", ("file", "application/octet-stream", WAV)),
    ]


@pytest.mark.parametrize(
    ("reference", "upload"),
    [
        (f"data:audio/mpeg;base64,{TEXT}", ("file.mp3", "audio/mpeg", WAV)),
        (f"data:audio/flac;rate=16000;base64,{TEXT}", ("file.flac", "audio/flac", WAV)),
        (f"DATA:;base64,{TEXT}", ("file", "application/octet-stream", WAV)),
        (f"data:audio/wav\r\nX-Header: 1;base64,{TEXT}", ("file", "application/octet-stream", WAV)),
        (base64.encodebytes(WAV * 9).decode(), ("file", "application/octet-stream", WAV * 9)),
        ("https://host/a%20b/talk%201.flac?key=1", ("talk 1.flac", "audio/flac", b"https://host/a%20b/talk%201.flac?key=1")),
        ("HTTP://host", ("file", "application/octet-stream", b"HTTP://host")),
        ("http://h/a%0D%0AX: 1.wav", ("a%0D%0AX: 1.wav", "audio/x-wav", b"http://h/a%0D%0AX: 1.wav")),
    ],
)  # fmt: skip
async def test_a_file_keeps_its_name_and_type_or_gets_them(reference: str, upload: tuple[str, str, bytes]) -> None:
    assert await form_of(ScriptedApp(), {"file": reference}) == [("file", upload)]


async def test_a_file_on_the_network_volume_is_named_by_its_path(tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    (volume / "calls").mkdir(parents=True)
    (volume / 'a "b".wav').write_bytes(WAV)
    (volume / "calls" / "link.mp3").symlink_to(volume / 'a "b".wav')
    (tmp_path / "mount").symlink_to(volume)
    upload = ("link.mp3", "audio/mpeg", WAV)

    for reference in (
        f"{volume}/calls/link.mp3",
        f"file://{volume}/calls/link.mp3",
        f"{tmp_path}/mount/calls/link.mp3",
    ):
        app = ScriptedApp(files=scripted_files(tmp_path / "mount"))
        assert await form_of(app, {"file": reference}) == [("file", upload)]

    app = ScriptedApp(files=scripted_files(volume))
    ((_, quoted),) = await form_of(app, {"file": f'{volume}/a "b".wav'})
    assert quoted[2] == WAV


async def test_a_name_that_is_no_text_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "\udcff.wav"
    path.touch()
    app = ScriptedApp(files=scripted_files(tmp_path))

    assert await form_of(app, {"file": str(path)}) == [("file", ("?.wav", "audio/x-wav", b""))]


async def test_a_path_that_leaves_the_network_volume_is_refused(tmp_path: Path) -> None:
    volume, outside = tmp_path / "volume", tmp_path / "volume-2"
    volume.mkdir()
    outside.mkdir()
    (outside / "secret").write_bytes(WAV)
    (volume / "link").symlink_to(outside / "secret")
    (volume / "directory").symlink_to(outside)
    app = ScriptedApp(files=scripted_files(volume))
    paths = ["/etc/passwd", "/nowhere", "//etc/passwd", "file:///etc/passwd", f"{volume}/../volume-2/secret",
             f"file://{volume}/%2e%2e/volume-2/secret", f"{outside}/secret", f"{volume}/link",
             f"{volume}/directory/secret", f"{volume}/directory/../../etc/passwd"]  # fmt: skip

    for path in paths:
        status, message = await error_of(app, {"file": path})
        assert (status, "below" in message) == (403, True), path


async def test_what_is_no_file_of_the_volume_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"x" * 1001)
    app = ScriptedApp(files=scripted_files(tmp_path))
    refusals = {
        str(tmp_path): "is not a file",
        f"{tmp_path}/pipe": "is not a file",
        f"{tmp_path}/missing": "No such file",
        f"{tmp_path}/a\0b": "is not a path",
        f"{tmp_path}/large": "MAX of the worker allows",
    }

    for path, reason in refusals.items():
        status, message = await error_of(app, {"file": path})
        assert (status, reason in message) == (400, True), (path, message)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"file": "not base64!"}, "is not base64"),
        ({"file": TEXT[:-1]}, "is not base64"),
        ({"file": "data:audio/wav,plain"}, "must be in base64"),
        ({"file": "ftp://host/a.wav"}, "cannot be read from ftp: URLs"),
        ({"file": "a" * 500 + ":"}, "is not base64"),
        ({"file": "file://[/a.wav"}, "URL is not valid"),
        ({"file": base64.b64encode(b"x" * 1004).decode()}, "MAX of the worker allows"),
        ({"file": {"url": "https://host"}}, "file must be text"),
        ({"audio": ""}, "audio must be text"),
        ({"file": TEXT, "audio_url": "https://host"}, "file and audio_url are the same"),
        ({"file": TEXT, "prompt": "\ud83d"}, "surrogate"),
        ({"file": TEXT, "temperature": float("nan")}, "cannot be written as JSON"),
    ],
)
async def test_an_unusable_file_or_field_is_refused_with_the_reason(given: dict[str, Any], reason: str) -> None:
    status, message = await error_of(ScriptedApp(), given)

    assert (status, reason in message) == (400, True), message


async def test_line_breaks_do_not_count_towards_the_limit() -> None:
    ((_, upload),) = await form_of(ScriptedApp(), {"file": base64.encodebytes(b"x" * 1000).decode()})

    assert upload[2] == b"x" * 1000


async def test_without_a_file_vllm_is_asked_and_says_what_is_missing() -> None:
    assert await form_of(ScriptedApp(), {"model": "m", "file": None}) == [("model", "m")]


async def test_a_model_without_the_route_gets_vllms_answer_and_no_file_is_read() -> None:
    app = ScriptedApp(status=404, unknown_routes=frozenset({ROUTE}))

    outputs = await outputs_of(app, {"file": "/etc/passwd"})

    assert json.loads(outputs[-1]["error"])["status"] == 404
    assert len(app.requests) == 1


async def test_a_streamed_transcription_is_delivered_in_complete_events() -> None:
    chunks = sse({"choices": [{"delta": {"content": "漢"}}]}, {"choices": [{"delta": {"content": "字"}}]})
    app = ScriptedApp(body=chunks, content_type="text/event-stream; charset=utf-8")

    outputs = await outputs_of(app, {"file": TEXT, "stream": "true"})

    assert "".join(outputs).encode() == b"".join(chunks)
    assert all(output.endswith("\n\n") for output in outputs)


async def test_a_text_that_begins_like_a_path_and_is_too_long_for_one_is_base64(tmp_path: Path) -> None:
    """As that of an MP3 file does: its first bytes are FF FB or FF F3."""
    mp3 = b"\xff\xfb\x90" + b"x" * 4000
    text = base64.b64encode(mp3).decode()
    assert text.startswith("//")

    ((_, upload),) = await form_of(ScriptedApp(files=Files(tmp_path, 5000, "MAX", url_as_content)), {"file": text})

    assert upload[2] == mp3
