"""What is wrong is said before anything is sent, with an exit code."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from batch.__main__ import main

LINE = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "x"}}


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run against a port on which nothing listens."""
    for name in ("RUNPOD_ENDPOINT_ID", "RUNPOD_ENDPOINT_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RUNPOD_API_KEY", "rpa_notarealkey")
    (tmp_path / "in.jsonl").write_text(json.dumps(LINE) + "\n")
    return ["run", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--base-url", "http://127.0.0.1:1/v2"]


@pytest.mark.parametrize("key", ["", "  ", "one two", "k\xe9y"])
def test_a_key_that_is_missing_or_none_is_an_error(
    key: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RUNPOD_API_KEY", key)

    assert main([*arguments, "--endpoint", "ep"]) == 2
    assert capsys.readouterr().err == "batch: RUNPOD_API_KEY is not set, or has characters that no key has\n"


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ([], "'' is not an endpoint's id: name it with --endpoint or RUNPOD_ENDPOINT_ID"),
        (["--endpoint", "a/b"], "'a/b' is not an endpoint's id: name it with --endpoint or RUNPOD_ENDPOINT_ID"),
        (["--endpoint", "ep", "-o", ""], "'.' is not the name of a file: name the output with -o"),
        (["--endpoint", "ep", "--base-url", "http://[::1"], "'http://[::1/ep' is not a URL: Invalid port"),
        (["--endpoint", "ep", "--base-url", "http://a b/"], "'http://a b/' is not a URL: --base-url is one such as"),
        (["--endpoint", "ep", "--base-url", "http://u:p@h/"], "the base URL has an @: the API key is only taken from"),
        (["--endpoint", "ep", "--base-url", "api"], "'api' is not a URL: --base-url is one such as https://api.run"),
        (["--endpoint", "ep", "-o", "IN"], "input, output, errors file and journal must be four"),
        (["--endpoint", "ep", "--errors", "OUT"], "input, output, errors file and journal must be four"),
    ],
)
def test_a_wrong_option_is_an_error(
    more: list[str], error: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"IN": arguments[1], "OUT": arguments[3]}

    assert main([*arguments, *(names.get(value, value) for value in more)]) == 2
    assert capsys.readouterr().err.startswith(f"batch: {error}")


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5"])
def test_a_number_of_jobs_below_one_is_an_error(value: str, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--endpoint", "ep", f"--max-jobs={value}"])

    assert ended.value.code == 2


def test_an_invalid_line_is_an_error_before_the_platform_is_called(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(arguments[1])
    path.write_text(json.dumps(LINE) + "\n" + json.dumps(LINE) + "\n")

    assert main([*arguments, "--endpoint", "ep"]) == 4
    assert capsys.readouterr().err.startswith(f"batch: {path}:2: custom_id 'a' is that of line 1 too")
    assert [file.name for file in path.parent.iterdir()] == ["in.jsonl"]


def test_an_input_that_does_not_exist_is_an_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments[1] += ".gone"

    assert main([*arguments, "--endpoint", "ep"]) == 1
    assert "No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("SSL_CERT_FILE", "/gone"), ("HTTPS_PROXY", "ftp://proxy")])
def test_a_wrong_variable_of_the_http_client_is_an_error(
    name: str,
    value: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, value)

    assert main([*arguments, "--endpoint", "ep"]) == 2
    assert "SSL_CERT_FILE, or a variable such as HTTPS_PROXY, is invalid: " in capsys.readouterr().err


@pytest.fixture
def complete(arguments: list[str]) -> Path:
    """The journal of a run that is complete."""
    sha256 = hashlib.sha256(Path(arguments[1]).read_bytes()).hexdigest()
    endpoint = "http://127.0.0.1:1/v2/ep"
    header = {"version": 1, "input_sha256": sha256, "endpoint": endpoint, "errors": "out.errors.jsonl"}
    path = Path(f"{arguments[3]}.journal")
    path.write_text(json.dumps(header) + "\n")
    return path


@pytest.mark.usefixtures("complete")
def test_a_run_that_is_complete_needs_no_platform(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path(arguments[3]).write_text(json.dumps({"custom_id": "a"}) + "\n")

    assert main([*arguments, "--endpoint", "ep"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{arguments[3]}: 1 of 1 lines\n"
    assert captured.err == "batch: nothing to do: 1 of 1 lines are answered\n"


@pytest.mark.usefixtures("complete")
def test_a_run_whose_lines_have_failed_says_where_they_are(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    errors = Path(arguments[3]).with_suffix(".errors.jsonl")
    errors.write_text(json.dumps({"custom_id": "a"}) + "\n")

    assert main([*arguments, "--endpoint", "ep"]) == 5
    captured = capsys.readouterr()
    assert captured.out == f"{arguments[3]}: 0 of 1 lines\n"
    assert f"batch: 1 line failed: see {errors}\n" in captured.err
