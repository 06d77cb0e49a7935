"""OpenTelemetry's variables are checked when the worker starts, and secrets stay out of the message."""

from __future__ import annotations

import logging

import pytest

from engine.errors import ConfigurationError
from engine.telemetry import otlp_variables


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318", "a URL like"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://user:hidden@collector", "belongs in the headers"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://collector:port", "a URL like"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", "http/protobuf, grpc; it is 'http/json'"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "Authorization: Bearer hidden", "name=value"),
        ("OTEL_EXPORTER_OTLP_LOGS_HEADERS", "a=b,hidden", "name=value"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/nowhere.pem", "a file; there is none at '/nowhere.pem'"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s", "a positive number; it is '10s'"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "0", "a positive number"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "-1", "a positive integer"),
    ],
)
def test_a_bad_value_is_an_error(name: str, value: str, message: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), pytest.raises(ConfigurationError, match=f"{name} must be") as caught:
        otlp_variables.check({name: value})

    assert message in str(caught.value)
    assert "hidden" not in str(caught.value) + caplog.text


def test_good_values_pass() -> None:
    otlp_variables.check(
        {
            "OTEL_EXPORTER_OTLP_ENDPOINT": "https://collector:4318/otlp",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
            "OTEL_EXPORTER_OTLP_HEADERS": "Authorization=Basic%20abc==,x=Bearer y,",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "2.5",
            "OTEL_BSP_SCHEDULE_DELAY": "",
            "PATH": "@",
        }
    )
