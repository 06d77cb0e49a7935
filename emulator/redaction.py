"""Takes secrets out of what is shown: API keys, and values of variables that are named like secrets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_SECRET_NAME = re.compile(r"(?i)(?:^|_)(?:token|key|secret|password|credentials?)$")
# Anything shorter is a word of its own, such as the default key `local`.
_SHORTEST = 8


class Redaction:
    """Replaces each secret that it was told of by `***`."""

    def __init__(self, environment: Mapping[str, str], keys: Iterable[str]) -> None:
        named = [value for name, value in environment.items() if _SECRET_NAME.search(name)]
        # The longest first: one secret may be the beginning of another.
        secrets = sorted({secret for secret in (*named, *keys) if len(secret) >= _SHORTEST}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, secrets))) if secrets else None

    def apply(self, text: str) -> str:
        """The text without secrets."""
        return text if self._pattern is None else self._pattern.sub("***", text)
