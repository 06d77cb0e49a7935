"""Keeps secrets out of logs and errors: values with the name of a secret, and what looks like a hub token."""

from __future__ import annotations

import re

MASK = "(hidden)"
_WORD = "(?:token|secret|password|passwd|credentials?|keys?)"
# `API_KEY`, `hf-token`, `aws_secret_access_key`; not `tokenizer` or `max_num_batched_tokens`.
_NAME = re.compile(rf"(?:^|[-_.]){_WORD}$", re.IGNORECASE)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{10,}\b")
# `http://user:password@host`
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
# On a command line, everything up to the next option.
_OPTION = re.compile(rf"(--?(?:[\w.-]*[-_.])?{_WORD}(?:=|\s+))(?!-)(?:(?!\s-).)+", re.IGNORECASE | re.DOTALL)
# In JSON, YAML and Python's repr: `"api_key": "…"`, `api_key: …`, `api_key='…'`.
_FIELD = re.compile(
    rf"""(?P<name>(?<![\w-])(?:[\w.-]*(?:[-_.]|(?-i:[a-z](?=[A-Z]))))?{_WORD}["']?\s*[:=]\s*)"""
    r"""(?!(?:None|null)\b)(?:"(?:[^"\\]|\\.)*"?|'(?:[^'\\]|\\.)*'?|\[[^\]]*\]?|[^\s,{}\]\[()"']+)""",
    re.IGNORECASE,
)
# pydantic truncates a value in the middle: a secret may remain without its name.
_CUT_VALUE = re.compile(r", input_value=.*?, input_type=\w+", re.DOTALL)


def is_secret_name(name: str) -> bool:
    """Return whether values with this name are secrets."""
    return _NAME.search(name) is not None


def redacted(text: str) -> str:
    """Return the text without hub tokens, and without the values of options and fields with the name of a secret."""
    text = _URL_CREDENTIALS.sub(MASK, text)
    text = _OPTION.sub(rf"\1{MASK}", _CUT_VALUE.sub("", text))
    return _HUB_TOKEN.sub("hf_...", _FIELD.sub(rf"\g<name>{MASK}", text))
