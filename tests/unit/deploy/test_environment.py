"""The worker's variables: where they come from, and that no secret is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy import environment
from deploy.environment import Redaction
from deploy.errors import OptionError

HUB_TOKEN = "hf_abcdefghijklmnopqrst"  # noqa: S105 (not a real one)


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("# settings\nA=1\n\nB=1\nC\n")

    read = environment.read(["B=2", "D=a=b"], [file], ["HF_TOKEN=hub"], {"C": "3"})

    assert read == {"A": "1", "B": "2", "C": "3", "D": "a=b", "HF_TOKEN": "{{ RUNPOD_SECRET_hub }}"}


def test_a_secret_comes_from_the_environment_and_is_masked() -> None:
    read = environment.read(["HF_TOKEN"], [], [], {"HF_TOKEN": HUB_TOKEN})

    assert read == {"HF_TOKEN": HUB_TOKEN}
    assert environment.masked(read) == {"HF_TOKEN": "***"}
    assert environment.secrets_in(read) == [HUB_TOKEN]


def test_a_reference_is_no_secret() -> None:
    read = environment.read([], [], ["HF_TOKEN=hub"], {})

    assert environment.masked(read) == read
    assert environment.secrets_in(read) == []


@pytest.mark.parametrize(
    "text",
    [
        f"HF_TOKEN={HUB_TOKEN}",
        "MY_API_KEY=12345",
        "BUCKET_ACCESS_KEY_ID=12345",
        f"VLLM_EXTRA_ARGS=--hf-token {HUB_TOKEN}",
    ],
)
def test_a_secret_on_the_command_line_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(OptionError, match=r"set .* in the environment") as raised:
        environment.read([text], [], [], {})

    assert text.partition("=")[2] not in str(raised.value)


def test_a_file_may_be_one_for_the_shell(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text('export A=1\nB="two words # and more"\n  export  C=\'3\'\nD=4 # 5\nE=""\nexport F\n')

    read = environment.read([], [file], [], {"F": "6"})

    assert read == {"A": "1", "B": "two words # and more", "C": "3", "D": "4 # 5", "E": "", "F": "6"}


@pytest.mark.parametrize("line", ["A='1", "A='", 'A="1" # why', "A=\"1'"])
def test_a_quote_in_a_file_that_does_not_end_is_an_error(tmp_path: Path, line: str) -> None:
    file = tmp_path / "env"
    file.write_text(f"# settings\n{line}\n")

    with pytest.raises(OptionError, match="line 2: the value of A must end with the quote"):
        environment.read([], [file], [], {})


@pytest.mark.parametrize(
    ("texts", "secrets", "says"),
    [
        (["=x"], [], "write NAME=VALUE or NAME"),
        (["A B=x"], [], "write NAME=VALUE or NAME"),
        (["MISSING"], [], "--env: MISSING is not set in the environment"),
        ([], ["HF_TOKEN"], r"--secret HF_TOKEN=\*\*\*: give NAME=SECRET"),
        ([], ["HF_TOKEN=my-secret"], r"not the value, but the name that a secret of the account has"),
        ([], [f"HF_TOKEN={HUB_TOKEN}"], r"--secret HF_TOKEN=\*\*\*: give NAME=SECRET"),
    ],
)
def test_what_cannot_be_read_says_how_to_write_it(texts: list[str], secrets: list[str], says: str) -> None:
    with pytest.raises(OptionError, match=says) as raised:
        environment.read(texts, [], secrets, {})

    assert HUB_TOKEN not in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--env-file .*none cannot be read"):
        environment.read([], [tmp_path / "none"], [], {})


def test_known_secrets_and_hub_tokens_are_hidden_in_any_text() -> None:
    redaction = Redaction(["rpa_key", "ab"])

    assert redaction.apply(f"ab rpa_key {HUB_TOKEN}") == "ab *** ***"


@pytest.mark.parametrize(
    "text",
    [
        "OTEL_EXPORTER_OTLP_HEADERS=api-key=12345",
        "HTTPS_PROXY=http://user:12345@proxy:3128",
        "API_KEYS=12345",
    ],
)
def test_a_header_or_a_urls_password_is_a_secret(text: str) -> None:
    name, _, value = text.partition("=")

    assert environment.masked({name: value}) == {name: "***"}
    with pytest.raises(OptionError, match=r"set .* in the environment"):
        environment.read([text], [], [], {})


def test_a_line_of_a_file_that_may_be_the_secret_itself_is_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("\ufeffA=1\nrpa_ABCDEFGH\n")

    with pytest.raises(OptionError, match="line 2: the variable that it names is not set") as raised:
        environment.read([], [file], [], {})

    assert "ABCDEFGH" not in str(raised.value)
