"""Secrets, kept out of what the worker prints: they are known by the names that their values stand beside."""

from __future__ import annotations

import re

HIDDEN = "(hidden)"
_WORD = "(?:token|secret|password|passwd|credentials?|keys?)"
# `API_KEY`, `hf-token`, `aws_secret_access_key`; not `tokenizer` or `max_num_batched_tokens`.
_NAME = re.compile(rf"(?:^|[-_.]){_WORD}$", re.IGNORECASE)
_HUB_TOKEN = re.compile(r"hf_\w+")
# On a command line, all up to the next option.
_OPTION = re.compile(rf"(--?(?:[\w.-]*[-_.])?{_WORD}(?:=|\s+))(?!-)(?:(?!\s-).)+", re.IGNORECASE | re.DOTALL)
# In JSON, YAML and what Python prints: `"api_key": "…"`, `api_key: …`, `api_key='…'`.
_FIELD = re.compile(
    rf"""(?P<name>(?<![\w-])(?:[\w.-]*(?:[-_.]|(?-i:[a-z](?=[A-Z]))))?{_WORD}["']?\s*[:=]\s*)"""
    r"""(?!(?:None|null)\b)(?:"(?:[^"\\]|\\.)*"?|'(?:[^'\\]|\\.)*'?|\[[^\]]*\]?|[^\s,{}\]\[()"']+)""",
    re.IGNORECASE,
)
# What pydantic shows of a value, which it cuts in the middle: a name may be gone, and the secret still be there.
_CUT_VALUE = re.compile(r", input_value=.*?, input_type=\w+", re.DOTALL)


def names_secret(name: str) -> bool:
    """Whether what has this name is a secret."""
    return _NAME.search(name) is not None


def redacted(text: str) -> str:
    """The text without the hub's tokens, and without what stands after an option or in a field named as a secret."""
    text = _OPTION.sub(rf"\1{HIDDEN}", _CUT_VALUE.sub("", text))
    return _HUB_TOKEN.sub("hf_...", _FIELD.sub(rf"\g<name>{HIDDEN}", text))
