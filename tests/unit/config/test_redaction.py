"""What is a secret is known by the name that it stands beside."""

from __future__ import annotations

import pytest

from engine.config.redaction import is_secret_name, redacted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("--api-key sk-x", "--api-key (hidden)"),
        ("--api-key=sk-x --seed 3", "--api-key=(hidden) --seed 3"),
        ("--api-key 'two words' three --seed 3", "--api-key (hidden) --seed 3"),
        ("--kv-transfer-config.token x --seed 3", "--kv-transfer-config.token (hidden) --seed 3"),
        ('{"api_key": "a\\"b", "n": 1}', '{"api_key": (hidden), "n": 1}'),
        ('{"accessToken":"x","keys": ["a", "b"], "n": 1}', '{"accessToken":(hidden),"keys": (hidden), "n": 1}'),
        ('{"api_key": "cut of', '{"api_key": (hidden)'),
        ("Config(password='x', token=None)", "Config(password=(hidden), token=None)"),
        ("secret: x\nseed: 1", "secret: (hidden)\nseed: 1"),
        ("a token of the hub, hf_verysecret", "a token of the hub, hf_..."),
        ("the path /data/hf_models/llama", "the path /data/hf_models/llama"),
        ("--hf_overrides {}", "--hf_overrides {}"),
        ("http://user:pass@host/x", "http://(hidden)@host/x"),
        ('no JSON [type=json, input_value=\'{"a": [1]...sword": "x"}\', input_type=str]', "no JSON [type=json]"),
    ],
)
def test_a_secret_is_hidden(text: str, shown: str) -> None:
    assert redacted(text) == shown


@pytest.mark.parametrize(
    "text",
    ["MAX_NUM_BATCHED_TOKENS=1", "--tokenizer /a --seed 1", "TOKENIZER_MODE=auto", '{"monkey": 1, "key_size": 2}'],
)
def test_what_is_no_secret_is_shown(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("hf_token", True),
        ("API_KEY", True),
        ("password", True),
        ("tokenizer", False),
        ("tokenizer_mode", False),
        ("long_prefill_token_threshold", False),
        ("max_num_batched_tokens", False),
        ("dbo_decode_token_threshold", False),
        ("monkey", False),
    ],
)
def test_a_name_tells_a_secret_by_its_last_word(name: str, secret: bool) -> None:
    assert is_secret_name(name) is secret
