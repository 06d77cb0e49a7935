"""Remove secrets from what is shown: API keys, and values of variables whose names say that they are secrets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_SECRET_NAME = re.compile(r"(?i)(?:^|_)(?:token|key|secret|password|credentials?)$")
# Anything shorter may be an ordinary word, such as the default key `local`.
_MIN_SECRET_CHARACTERS = 8


class Redaction:
    """Replaces each known secret with `***`.

    Args:
        environment: variables; those with a secret's name have secret values.
        keys: further secrets.
    """

    def __init__(self, environment: Mapping[str, str], keys: Iterable[str]) -> None:
        named = [value for name, value in environment.items() if _SECRET_NAME.search(name)]
        self._secrets = {secret for secret in (*named, *keys) if len(secret) >= _MIN_SECRET_CHARACTERS}
        # The longest first: one secret may be a prefix of another.
        alternatives = map(re.escape, sorted(self._secrets, key=len, reverse=True))
        self._pattern = re.compile("|".join(alternatives)) if self._secrets else None

    def including(self, *keys: str, environment: Mapping[str, str] | None = None) -> Redaction:
        """Return a redaction of these secrets, of these keys and of these variables' secrets."""
        return Redaction(environment or {}, (*self._secrets, *keys))

    def apply(self, text: str) -> str:
        """Return the text without secrets."""
        return text if self._pattern is None else self._pattern.sub("***", text)
