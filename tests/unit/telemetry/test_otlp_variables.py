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
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/nowhere.pem", "the path of a file; it is '/nowhere.pem'"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s", "a positive number; it is '10s'"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "0", "a positive number"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "-1", "a positive integer"),
        ("OTEL_BLRP_MAX_QUEUE_SIZE", "100", "at least OTEL_BLRP_MAX_EXPORT_BATCH_SIZE, which is 512; it is 100"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zip", "none, gzip; it is 'zip'"),
        ("OTEL_LOGS_EXPORTER", "console", "otlp, none; it is 'console'"),
        ("OTEL_TRACES_SAMPLER", "ratio", "parentbased_traceidratio; it is 'ratio'"),
        ("OTEL_TRACES_SAMPLER_ARG", "10%", "a number from 0 to 1; it is '10%'"),
        ("OTEL_TRACES_SAMPLER_ARG", "2", "a number from 0 to 1; it is '2'"),
        ("OTEL_METRICS_EXEMPLAR_FILTER", "on", "trace_based, always_on, always_off"),
        ("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "deltas", "cumulative, delta, lowmemory"),
        ("OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION", "explicit", "explicit_bucket_histogram"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "all", "an integer of at least 0"),
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
            "OTEL_BSP_MAX_QUEUE_SIZE": "100",
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "50",
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": ".5",
            "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "DELTA",
            "PATH": "@",
        }
    )


def test_what_counts_as_not_set_is_removed_as_the_sdk_cannot_read_it() -> None:
    kept = {"OTEL_EXPORTER_OTLP_COMPRESSION": "gzip", "OTEL_TRACES_EXPORTER": "none", "OTHER": ""}
    variables = {"OTEL_EXPORTER_OTLP_TIMEOUT": "", "OTEL_EXPORTER_OTLP_LOGS_COMPRESSION": "none", **kept}

    otlp_variables.remove_defaults(variables)

    assert variables == kept
