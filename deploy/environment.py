"""The worker's variables: read from options and files, checked for secrets, and shown without them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from deploy.errors import OptionError

MASK = "***"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_EXPORT = re.compile(r"^export\s+")
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:TOKENS?|KEYS?|KEY_ID|SECRET|PASSWORD|PASSWD|CREDENTIALS?|HEADERS)$", re.IGNORECASE
)
# `http://user:password@host`
_URL_CREDENTIALS = re.compile(r"://[^/\s:@]+:[^/\s@]+@")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{10,}\b")
# RunPod replaces it by the account's secret when a worker starts.
_REFERENCE = re.compile(r"\{\{ *RUNPOD_SECRET_\w+ *\}\}")
_MIN_SECRET_CHARACTERS = 4


def read(
    texts: Sequence[str], files: Sequence[Path], secrets: Sequence[str], environment: Mapping[str, str]
) -> dict[str, str]:
    """Return the variables; later sources win: files, `NAME=VALUE` or `NAME`, secrets.

    Args:
        texts: `NAME=VALUE`, or `NAME` for the value of the environment.
        files: of such lines, which may begin with `export` and have their value in quotes; empty lines and those that
            begin with # are ignored.
        secrets: `NAME=SECRET`, the name of a secret of the RunPod account.
        environment: of this process.

    Raises:
        OptionError: a text is none of these, or has a secret, which the command line would show.
    """
    variables: dict[str, str] = {}
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise OptionError(f"--env-file {file} cannot be read: {error}") from None
        for number, line in enumerate(lines, 1):
            if line.strip() and not line.lstrip().startswith("#"):
                source = f"--env-file {file}, line {number}"
                variables |= _variable(_unquoted(line, source), environment, source)
    for text in texts:
        name, separator, value = text.partition("=")
        if separator and is_secret(name, value) and not _REFERENCE.search(value):
            raise OptionError(
                f"--env {name}={MASK} would show a secret to every user of this machine: set {name} in the environment "
                f"and give --env {name}, or name a secret of the account with --secret {name}=SECRET"
            )
        variables |= _variable(text, environment, "--env")
    for text in secrets:
        name, _, secret = text.partition("=")
        if not _NAME.fullmatch(name) or not re.fullmatch(r"\w+", secret) or _HUB_TOKEN.fullmatch(secret):
            raise OptionError(
                f"--secret {name}={MASK}: give NAME=SECRET, where SECRET is not the value, but the name that a secret "
                "of the account has in the console (letters, digits, _)"
            )
        variables[name] = f"{{{{ RUNPOD_SECRET_{secret} }}}}"
    return variables


def _unquoted(line: str, source: str) -> str:
    """Return a line of a file without `export` and the quotes around the value, as a shell would read it."""
    name, separator, value = _EXPORT.sub("", line.strip()).partition("=")
    if value[:1] in ("'", '"'):
        quote, end = value[0], value.rfind(value[0])
        if end == 0 or end + 1 < len(value):
            raise OptionError(
                f"{source}: the value of {name} must end with the quote {quote} that it begins with; "
                "a comment needs a line of its own"
            )
        value = value[1:-1]
    return f"{name}{separator}{value}"


def _variable(text: str, environment: Mapping[str, str], source: str) -> dict[str, str]:
    name, separator, value = text.partition("=")
    if not _NAME.fullmatch(name):
        raise OptionError(f"{source}: the name of a variable is missing or not allowed; write NAME=VALUE or NAME")
    if not separator:
        if name not in environment:
            # A line of a file that has no name in it may be the secret itself.
            shown = "the variable that it names" if source.startswith("--env-file") else name
            raise OptionError(f"{source}: {shown} is not set in the environment; write NAME=VALUE")
        value = environment[name]
    return {name: value}


def is_secret(name: str, value: str) -> bool:
    """Return whether a variable is a secret, by its name or because its value has a hub token or a URL's password."""
    return bool(value) and any(
        found is not None
        for found in (_SECRET_NAME.search(name), _HUB_TOKEN.search(value), _URL_CREDENTIALS.search(value))
    )


def masked(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables as they may be shown."""
    return {
        name: MASK if is_secret(name, value) and not _REFERENCE.fullmatch(value) else value
        for name, value in variables.items()
    }


def secrets_in(variables: Mapping[str, str]) -> list[str]:
    """Return the values that must not be shown."""
    return [value for name, value in variables.items() if is_secret(name, value) and not _REFERENCE.fullmatch(value)]


class Redaction:
    """Replaces known secrets and hub tokens in texts; more can be added."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets: set[str] = set()
        self.add(secrets)

    def add(self, secrets: Iterable[str]) -> None:
        """Hide these from now on; a very short one may be an ordinary word, and is not hidden."""
        self._secrets |= {secret for secret in secrets if len(secret) >= _MIN_SECRET_CHARACTERS}

    def apply(self, text: str) -> str:
        """Return the text without secrets."""
        for secret in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(secret, MASK)
        return _HUB_TOKEN.sub(MASK, text)
