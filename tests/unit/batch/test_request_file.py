"""A batch file is checked as a whole before anything is sent; each error names its line."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from batch.errors import InputChangedError, InputFileError
from batch.request_file import MAX_JOB_BYTES, URLS, RequestFile
from engine.backend.routes import GET_ONLY, SERVING

CHAT = "/v1/chat/completions"


def line(custom_id: str = "a", **changes: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello!"}]}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body, **changes}


def write(path: Path, *lines: dict[str, Any] | str) -> Path:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "in.jsonl"


def errors_of(path: Path) -> list[str]:
    with pytest.raises(InputFileError) as caught:
        RequestFile.read(path)
    return [text.removeprefix(f"{path}:") for text in str(caught.value).splitlines()]


def test_each_line_becomes_the_job_of_its_route_with_the_body_as_it_is_written(file: Path) -> None:
    body = '{"model": "tiny",  "seed": 12345678901234567890123, "prompt": "\\u00e9\\ud83d\\ude00", "top_p": 1.0}'
    text = f'{{"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {body}}}'
    write(file, line("a"), "", text, " ")

    requests = RequestFile.read(file)

    assert [(one.custom_id, one.line) for one in requests.requests] == [("a", 1), ("b", 3)]
    first, second = (requests.job(one) for one in requests.requests)
    assert json.loads(first) == {"input": {"openai_route": CHAT, "openai_input": line()["body"]}}
    assert body.encode() in second
    assert requests.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    requests.close()


def test_a_last_line_without_its_end_is_a_line(file: Path) -> None:
    file.write_text(json.dumps(line("a")) + "\r\n" + json.dumps(line("b")))

    assert [one.custom_id for one in RequestFile.read(file).requests] == ["a", "b"]


def test_a_byte_order_mark_is_accepted(file: Path) -> None:
    file.write_bytes(codecs.BOM_UTF8 + json.dumps(line("a")).encode() + b"\r\n" + json.dumps(line("b")).encode())

    requests = RequestFile.read(file)

    assert [one.custom_id for one in requests.requests] == ["a", "b"]
    assert [json.loads(requests.job(one))["input"]["openai_input"] for one in requests.requests] == [line()["body"]] * 2


def test_a_file_that_is_replaced_after_it_was_checked_is_sent_as_it_was(file: Path) -> None:
    requests = RequestFile.read(write(file, line("a")))
    write(file.with_name("new"), line("a", body={"model": "tiny", "messages": []})).rename(file)

    assert json.loads(requests.job(requests.requests[0]))["input"]["openai_input"] == line()["body"]


@pytest.mark.parametrize("changed", [line("b"), line("a", body={"model": "tiny", "messages": []}), ""])
def test_a_line_that_has_changed_after_it_was_checked_is_an_error(changed: dict[str, Any] | str, file: Path) -> None:
    requests = RequestFile.read(write(file, line("a")))
    write(file, changed)

    with pytest.raises(InputChangedError, match=r"in\.jsonl:1 has changed since the start: restore the file"):
        requests.job(requests.requests[0])


def test_a_pipe_is_an_error(file: Path) -> None:
    os.mkfifo(file)
    with ThreadPoolExecutor() as threads:
        threads.submit(write, file, line("a"))

        assert errors_of(file) == [f"{file} is not a regular file: its lines are read again to be sent"]


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ("{", "Input data was truncated"),
        ("[]", "Expected `object`, got `array`"),
        ('{"custom_id": "\xff"', "Input data was truncated"),
        ({"custom_id": "b", "method": "POST", "url": CHAT}, "missing required field `body`"),
        (line("b", extra=1), "unknown field `extra`"),
        (line(7), "Expected `str`, got `int` - at `$.custom_id`"),  # type: ignore[arg-type]
        (line("b", body={"model": "tiny", "prompt": "\ud83d"}), "half of a surrogate pair (such as \\ud83d without"),
        (
            json.dumps(line("b", body={"x": 0})).replace("0", "[" * 5000 + "]" * 5000),
            "maximum recursion depth",
        ),
        (line(""), "custom_id is empty"),
        (line("a"), "custom_id 'a' is that of line 1 too: each line needs its own"),
        (line("b", method="GET"), "method 'GET': only POST is supported"),
        (line("b", url="/v1/images/generations"), "url '/v1/images/generations' is not supported: /v1/chat/comp"),
        (line("b", url="/metrics"), "url '/metrics' is not supported"),
        (line("b", body=[]), "body: Expected `object`, got `array`"),
        (line("b", body={"model": 1}), "Expected `str | null`, got `int` - at `$.model`"),
        (line("b", body={"model": "other"}), "model 'other', but line 1 has model 'tiny': a batch has one model"),
        (line("b", body={}), "no model, but line 1 has model 'tiny': a batch has one model"),
        (line("b", body={"model": "tiny", "stream": True}), "body has stream=true: a batch has complete answers only"),
        (line("b", body={"model": "tiny", "stream": "yes"}), "Expected `bool | null`, got `str` - at `$.stream`"),
        (
            line("b", body={"model": "tiny", "prompt": "x" * MAX_JOB_BYTES}),
            "bytes, and the platform accepts at most 10,485,760",
        ),
    ],
)
def test_a_wrong_line_is_an_error_that_names_it(bad: dict[str, Any] | str, error: str, file: Path) -> None:
    found = errors_of(write(file, line("a"), bad, line("c")))

    assert len(found) == 1
    assert found[0].startswith("2: ")
    assert error in found[0]


def test_a_file_that_is_not_in_utf_8_is_an_error(file: Path) -> None:
    file.write_bytes(json.dumps(line("a")).encode() + b"\n" + json.dumps(line("bX")).encode().replace(b"X", b"\xff"))

    assert errors_of(file)[0].startswith("2: ")


def test_all_wrong_lines_are_reported_up_to_twenty(file: Path) -> None:
    found = errors_of(write(file, *["no"] * 33))

    assert [text.partition(":")[0] for text in found[:20]] == [str(number) for number in range(1, 21)]
    assert found[20] == "and 13 more"


def test_a_file_of_another_form_is_told_what_a_line_is(file: Path) -> None:
    assert errors_of(write(file, "[", json.dumps(line("a")) + ",", "]"))[-1].startswith('Each line is one request: {"')
    assert len(errors_of(write(file, line("a"), "[]"))) == 1


def test_an_empty_file_is_an_error(file: Path) -> None:
    assert errors_of(write(file, "", "")) == [" the file has no requests"]


def test_lines_without_a_model_are_accepted_if_none_has_one(file: Path) -> None:
    write(file, line("a", body={"prompt": "x"}), line("b", body={"prompt": "y", "stream": False}))

    assert len(RequestFile.read(file).requests) == 2


def test_the_routes_are_those_of_the_worker_that_take_a_body() -> None:
    assert set(URLS) == SERVING - GET_ONLY
