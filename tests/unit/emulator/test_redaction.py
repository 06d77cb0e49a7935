"""Redaction of secrets."""

from __future__ import annotations

from emulator.redaction import Redaction


def test_values_of_variables_with_secret_names_are_redacted() -> None:
    environment = {
        "HF_TOKEN": "hf_abcdefgh",
        "AWS_SECRET": "aws-secret-1",
        "DB_PASSWORD": "password-1",
        "PATH": "/usr/bin",
    }
    shown = Redaction(environment, ()).apply("hf_abcdefgh aws-secret-1 password-1 /usr/bin")
    assert shown == "*** *** *** /usr/bin"


def test_api_keys_are_redacted_and_short_words_are_not() -> None:
    redaction = Redaction({"TOKENIZERS_PARALLELISM": "false-alarm"}, ("a-real-key", "local"))
    assert redaction.apply("a-real-key on local false-alarm") == "*** on local false-alarm"


def test_a_secret_that_is_a_prefix_of_another_leaves_no_remainder() -> None:
    assert Redaction({"A_KEY": "12345678", "B_KEY": "1234567890"}, ()).apply("x1234567890x") == "x***x"


def test_secrets_with_regular_expression_characters_match_literally() -> None:
    assert Redaction({"A_KEY": "a.c+(d)*["}, ()).apply("abccdd a.c+(d)*[") == "abccdd ***"


def test_without_secrets_text_is_unchanged() -> None:
    assert Redaction({}, ()).apply("as it is") == "as it is"
