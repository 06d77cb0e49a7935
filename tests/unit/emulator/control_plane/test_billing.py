"""Buckets and amounts of the billing."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from emulator.control_plane.billing import Meter
from emulator.control_plane.logs import parse_time
from emulator.errors import BadRequestError
from runpod_api import description

NOW = datetime(2026, 7, 15, 10, 30, tzinfo=UTC).timestamp()  # a Wednesday


def meter() -> Meter:
    result = Meter()
    result.add("a", on_gpu=True, seconds=7200, price=1.5, at=NOW)
    result.add("a", on_gpu=True, seconds=3600, price=1.5, at=NOW - 86_400)
    result.add("b", on_gpu=False, seconds=1800, price=0.5, at=NOW)
    return result


def windows(**query: Any) -> list[tuple[str, str]]:
    times = {name: parse_time(value) if name.endswith("Time") else value for name, value in query.items()}
    document = meter().document({"serverlessId": "a", **times}, NOW)
    assert description.violations("ListServerlessBillingResponse", document) == []
    return [(record["startTime"][:13], record["endTime"][:13]) for record in document["records"]]


def test_amounts_are_seconds_of_workers_times_their_price() -> None:
    document = meter().document({"lastN": 2}, NOW)
    amounts = [(one["startTime"][:10], one["serverlessId"], one["totalAmount"]) for one in document["records"]]
    assert amounts == [
        ("2026-07-14", "a", 1.5),
        ("2026-07-14", "b", 0),
        ("2026-07-15", "a", 3.0),
        ("2026-07-15", "b", 0.25),
    ]
    assert document["records"][2]["gpuAmount"] == 3.0
    assert document["records"][3]["cpuAmount"] == 0.25
    assert document["metadata"]["recordCount"] == 4
    assert document["metadata"]["uniqueServerlessCount"] == 2
    assert document["metadata"]["totals"]["totalAmount"] == 4.75


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("hour", [("2026-07-15T09", "2026-07-15T10"), ("2026-07-15T10", "2026-07-15T11")]),
        ("day", [("2026-07-14T00", "2026-07-15T00"), ("2026-07-15T00", "2026-07-16T00")]),
        ("week", [("2026-07-06T00", "2026-07-13T00"), ("2026-07-13T00", "2026-07-20T00")]),
        ("month", [("2026-06-01T00", "2026-07-01T00"), ("2026-07-01T00", "2026-08-01T00")]),
        ("year", [("2025-01-01T00", "2026-01-01T00"), ("2026-01-01T00", "2027-01-01T00")]),
    ],
)
def test_the_last_buckets_end_with_the_current_one(size: str, expected: list[tuple[str, str]]) -> None:
    assert windows(bucketSize=size, lastN=2) == expected


def test_a_window_is_widened_to_whole_buckets() -> None:
    assert windows(startTime="2026-07-01T12:00:00Z", endTime="2026-07-02T00:00:01Z") == [
        ("2026-07-01T00", "2026-07-02T00"),
        ("2026-07-02T00", "2026-07-03T00"),
    ]
    assert windows(startTime="2026-07-01T00:00:00Z", endTime="2026-07-02T00:00:00Z") == [
        ("2026-07-01T00", "2026-07-02T00")
    ]
    assert len(windows()) == 31


def test_december_is_followed_by_january() -> None:
    assert windows(bucketSize="month", startTime="2025-12-05T00:00:00Z", endTime="2026-01-02T00:00:00+00:00") == [
        ("2025-12-01T00", "2026-01-01T00"),
        ("2026-01-01T00", "2026-02-01T00"),
    ]


def test_a_window_with_too_many_buckets_is_refused() -> None:
    with pytest.raises(BadRequestError, match="more than 10000 buckets"):
        windows(bucketSize="hour", startTime="2000-01-01T00:00:00Z")
    with pytest.raises(BadRequestError, match="more than 10000 buckets"):
        windows(lastN=10_001)
