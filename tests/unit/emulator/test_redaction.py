"""What is shown holds no secrets."""

from __future__ import annotations

from emulator.redaction import Redaction


def test_values_of_variables_that_are_named_like_secrets_are_hidden() -> None:
    environment = {
        "HF_TOKEN": "hf_abcdefgh",
        "AWS_SECRET": "aws-secret-1",
        "DB_PASSWORD": "password-1",
        "PATH": "/usr/bin",
    }
    shown = Redaction(environment, ()).apply("hf_abcdefgh aws-secret-1 password-1 /usr/bin")
    assert shown == "*** *** *** /usr/bin"


def test_api_keys_are_hidden_and_short_words_are_not() -> None:
    redaction = Redaction({"TOKENIZERS_PARALLELISM": "false-alarm"}, ("a-real-key", "local"))
    assert redaction.apply("a-real-key on local false-alarm") == "*** on local false-alarm"


def test_a_secret_that_begins_another_leaves_nothing_of_it() -> None:
    assert Redaction({"A_KEY": "12345678", "B_KEY": "1234567890"}, ()).apply("x1234567890x") == "x***x"


def test_secrets_are_taken_as_they_are_written() -> None:
    assert Redaction({"A_KEY": "a.c+(d)*["}, ()).apply("abccdd a.c+(d)*[") == "abccdd ***"


def test_without_secrets_nothing_changes() -> None:
    assert Redaction({}, ()).apply("as it is") == "as it is"
