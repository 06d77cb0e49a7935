"""Checks OpenTelemetry's variables before the model is loaded: its SDK would fail later, or log a header, a secret."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from engine.errors import ConfigurationError

SIGNALS = ("traces", "metrics", "logs")
_SIGNAL = f"OTEL_EXPORTER_OTLP(_{'|_'.join(SIGNALS).upper()})?"
_COMPRESSION = f"{_SIGNAL}_COMPRESSION"
# OpenTelemetry's default of OTEL_BSP_MAX_EXPORT_BATCH_SIZE and OTEL_BLRP_MAX_EXPORT_BATCH_SIZE.
_BATCH_SIZE = 512


def check(variables: Mapping[str, str]) -> None:
    """Check the variables that say where and how telemetry is sent; an empty one counts as not set.

    Raises:
        ConfigurationError: one has a value that cannot be used. The message has no header and no password.
    """
    for name, value in variables.items():
        if value and (problem := _problem(name, value)) is not None:
            raise ConfigurationError(f"{name} must be {problem}")
    for kind in ("BSP", "BLRP"):
        batch, queue = f"OTEL_{kind}_MAX_EXPORT_BATCH_SIZE", f"OTEL_{kind}_MAX_QUEUE_SIZE"
        size = int(variables.get(batch) or _BATCH_SIZE)
        if variables.get(queue) and int(variables[queue]) < size:
            raise ConfigurationError(f"{queue} must be at least {batch}, which is {size}; it is {variables[queue]}")


def remove_defaults(variables: MutableMapping[str, str]) -> None:
    """Remove values that mean the default by OpenTelemetry's specification, but that its SDK cannot read.

    They are empty ones, and `none` as the compression with gRPC.
    """
    for name, value in list(variables.items()):
        is_none = re.fullmatch(_COMPRESSION, name) is not None and value.strip().lower() == "none"
        if name.startswith("OTEL_") and (not value or is_none):
            del variables[name]


def _problem(name: str, value: str) -> str | None:
    """Return what the value of a variable must be, if it is not."""
    kind = next((kind for kind in _KINDS if re.fullmatch(kind.names, name)), None)
    if kind is None or kind.accepts(value):
        return None
    return kind.allowed if kind.is_secret else f"{kind.allowed}; it is {value!r}"


@dataclass(frozen=True)
class _Kind:
    """Variables of one kind.

    Args:
        names: a regular expression.
        allowed: what their values must be.
        accepts: whether a value is allowed.
        is_secret: whether values may have a secret.
    """

    names: str
    allowed: str
    accepts: Callable[[str], bool]
    is_secret: bool = False


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


def _is_file(value: str) -> bool:
    return Path(value).is_file()


def _is_protocol(value: str) -> bool:
    return value in ("http/protobuf", "grpc")


def _is_integer(value: str) -> bool:
    return re.fullmatch(r"\d+", value, re.ASCII) is not None


def _is_positive_integer(value: str) -> bool:
    return _is_integer(value) and int(value) > 0


def _is_number(value: str) -> bool:
    return re.fullmatch(r"\d*\.?\d+", value, re.ASCII) is not None


def _is_positive_number(value: str) -> bool:
    return _is_number(value) and float(value) > 0


def _is_ratio(value: str) -> bool:
    return _is_number(value) and float(value) <= 1


def _choice(names: str, *values: str) -> _Kind:
    """Return variables that have one of some values, in upper or lower case."""
    return _Kind(names, f"one of {', '.join(values)}", lambda value: value.strip().lower() in values)


_KINDS = (
    _Kind(
        f"{_SIGNAL}_ENDPOINT",
        "a URL like http://collector:4318 (gRPC: 4317); a password belongs in the headers",
        _is_url,
        is_secret=True,
    ),
    _Kind(f"{_SIGNAL}_PROTOCOL", "one of http/protobuf, grpc", _is_protocol),
    _Kind(
        f"{_SIGNAL}_HEADERS",
        "like name=value,name=value, with a space as %20 and a comma as %2C",
        _are_headers,
        is_secret=True,
    ),
    _Kind(f"{_SIGNAL}_(CERTIFICATE|CLIENT_CERTIFICATE|CLIENT_KEY)", "the path of a file", _is_file),
    _Kind(f"{_SIGNAL}_TIMEOUT|OTEL_METRIC_EXPORT_(INTERVAL|TIMEOUT)", "a positive number", _is_positive_number),
    _Kind(
        "OTEL_(BSP|BLRP)_(SCHEDULE_DELAY|EXPORT_TIMEOUT|MAX_QUEUE_SIZE|MAX_EXPORT_BATCH_SIZE)",
        "a positive integer",
        _is_positive_integer,
    ),
    _Kind(r"OTEL_\w+_(COUNT|LENGTH)_LIMIT", "an integer of at least 0", _is_integer),
    _Kind("OTEL_TRACES_SAMPLER_ARG", "a number from 0 to 1", _is_ratio),
    _choice(
        "OTEL_TRACES_SAMPLER",
        *(f"{parent}{name}" for parent in ("", "parentbased_") for name in ("always_on", "always_off", "traceidratio")),
    ),
    _choice(f"OTEL_({'|'.join(SIGNALS).upper()})_EXPORTER", "otlp", "none"),
    _choice(_COMPRESSION, "none", "gzip"),
    _choice("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "cumulative", "delta", "lowmemory"),
    _choice(
        "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION",
        "explicit_bucket_histogram",
        "base2_exponential_bucket_histogram",
    ),
    _choice("OTEL_METRICS_EXEMPLAR_FILTER", "trace_based", "always_on", "always_off"),
)
