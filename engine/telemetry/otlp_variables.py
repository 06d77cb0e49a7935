"""Checks OpenTelemetry's variables before the model is loaded: its SDK would fail later, or log a header, a secret."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from engine.errors import ConfigurationError

_SIGNAL = r"OTEL_EXPORTER_OTLP(_TRACES|_METRICS|_LOGS)?"
_ENDPOINT, _PROTOCOL, _HEADERS = (re.compile(f"{_SIGNAL}_{name}") for name in ("ENDPOINT", "PROTOCOL", "HEADERS"))
_FILE = re.compile(f"{_SIGNAL}_(CERTIFICATE|CLIENT_CERTIFICATE|CLIENT_KEY)")
_NUMBER = re.compile(f"{_SIGNAL}_TIMEOUT|OTEL_METRIC_EXPORT_(INTERVAL|TIMEOUT)")
_INTEGER = re.compile(r"OTEL_(BSP|BLRP)_(SCHEDULE_DELAY|EXPORT_TIMEOUT|MAX_QUEUE_SIZE|MAX_EXPORT_BATCH_SIZE)")
_PROTOCOLS = ("http/protobuf", "grpc")


def check(variables: Mapping[str, str]) -> None:
    """Check the variables that say where and how telemetry is sent; an empty one counts as not set.

    Raises:
        ConfigurationError: one has a value that cannot be used. The message has no header and no password.
    """
    for name, value in variables.items():
        if value and (problem := _problem(name, value)) is not None:
            raise ConfigurationError(f"{name} must be {problem}")


def _problem(name: str, value: str) -> str | None:  # noqa: PLR0911 (one for each kind)
    """Return what the value of a variable must be, if it is not."""
    if _ENDPOINT.fullmatch(name):
        return None if _is_url(value) else "a URL like http://collector:4318; a password belongs in the headers"
    if _PROTOCOL.fullmatch(name):
        return None if value in _PROTOCOLS else f"one of {', '.join(_PROTOCOLS)}; it is {value!r}"
    if _HEADERS.fullmatch(name):
        return None if _are_headers(value) else "like name=value,name=value, with a space as %20 and a comma as %2C"
    if _FILE.fullmatch(name):
        return None if Path(value).is_file() else f"a file; there is none at {value!r}"
    if _NUMBER.fullmatch(name):
        return None if re.fullmatch(r"\d*\.?\d+", value) and float(value) else f"a positive number; it is {value!r}"
    if _INTEGER.fullmatch(name):
        return None if re.fullmatch(r"\d+", value) and int(value) else f"a positive integer; it is {value!r}"
    return None


def _is_url(value: str) -> bool:
    try:
        url = urlsplit(value)
        return url.scheme in ("http", "https") and bool(url.hostname) and "@" not in url.netloc and url.port != 0
    except ValueError:
        return False


def _are_headers(value: str) -> bool:
    from opentelemetry.util import re as otel

    logging.getLogger(otel.__name__).disabled = True  # It logs the whole header that it cannot read.
    given = [header for header in value.split(",") if header.strip()]
    return all(otel.parse_env_headers(header, liberal=True) for header in given)
