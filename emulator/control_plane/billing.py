"""Billing of serverless endpoints: seconds of their workers, times the price of where they run.

Amounts are kept for each hour; all buckets are whole hours of UTC. Disk and platform fee are 0 here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from emulator.errors import BadRequestError

_HOUR_S: Final = 3600
_DEFAULT_DAYS: Final = 30
_MAX_BUCKETS: Final = 10_000
_DECEMBER: Final = 12


class Meter:
    """What endpoints have cost, deleted ones too."""

    def __init__(self) -> None:
        # USD by endpoint, then by kind (gpuAmount or cpuAmount) and the hour's start in seconds since 1970.
        self._amounts: dict[str, defaultdict[tuple[str, int], float]] = {}

    def add(self, endpoint: str, *, on_gpu: bool, seconds: float, price: float, at: float) -> None:
        """Add the time of workers.

        Args:
            endpoint: the endpoint's id.
            on_gpu: whether they run on GPUs.
            seconds: time of all workers together.
            price: USD an hour.
            at: seconds since 1970.
        """
        kind = "gpuAmount" if on_gpu else "cpuAmount"
        hours = self._amounts.setdefault(endpoint, defaultdict(float))
        hours[kind, int(at) // _HOUR_S * _HOUR_S] += seconds * price / _HOUR_S

    def document(self, query: Mapping[str, Any], now: float) -> dict[str, Any]:
        """Return the records of each endpoint and bucket; the query is valid by the description.

        Raises:
            BadRequestError: its parameters contradict each other.
        """
        size: str = query.get("bucketSize", "day")
        buckets = _buckets(query, size, now)
        serverless_id = query.get("serverlessId")
        endpoints = [one for one in self._amounts if serverless_id in (None, one)]
        records = [
            {**_range(start, end), "serverlessId": endpoint, **self._amounts_between(endpoint, start, end)}
            for start, end in buckets
            for endpoint in endpoints
        ]
        names = ("totalAmount", "gpuAmount", "cpuAmount", "diskAmount", "feeAmount")
        return {
            "records": records,
            "metadata": {
                "query": {
                    **_range(buckets[0][0], buckets[-1][1]),
                    "bucketSize": size,
                    "serverlessId": serverless_id,
                },
                "recordCount": len(records),
                "uniqueServerlessCount": len(endpoints) if records else 0,
                "totals": {name: sum(record[name] for record in records) for name in names},
            },
        }

    def _amounts_between(self, endpoint: str, start: datetime, end: datetime) -> dict[str, float]:
        amounts = {"gpuAmount": 0.0, "cpuAmount": 0.0}
        for (kind, hour), amount in self._amounts[endpoint].items():
            if start.timestamp() <= hour < end.timestamp():
                amounts[kind] += amount
        return {"totalAmount": sum(amounts.values()), **amounts, "diskAmount": 0.0, "feeAmount": 0.0}


def _buckets(query: Mapping[str, Any], size: str, now: float) -> list[tuple[datetime, datetime]]:
    """Return start and end of each bucket in the query's window, which is widened to whole buckets."""
    current = _floor(datetime.fromtimestamp(now, UTC), size)
    if "lastN" in query:
        if "startTime" in query or "endTime" in query:
            raise BadRequestError("lastN and startTime/endTime are mutually exclusive")
        if query["lastN"] > _MAX_BUCKETS:
            raise BadRequestError(f"lastN: more than {_MAX_BUCKETS} buckets")
        start = current
        for _ in range(query["lastN"] - 1):
            start = _floor(start - timedelta(seconds=1), size)
        end = _next(current, size)
    else:
        ends_at = query.get("endTime", now)
        starts_at = query.get("startTime", now - _DEFAULT_DAYS * 24 * _HOUR_S)
        if starts_at >= ends_at:
            raise BadRequestError("startTime must be before endTime")
        start, end = (datetime.fromtimestamp(at, UTC) for at in (starts_at, ends_at))
        start = _floor(start, size)
    buckets: list[tuple[datetime, datetime]] = []
    while start < end:
        if len(buckets) == _MAX_BUCKETS:
            raise BadRequestError(f"the window has more than {_MAX_BUCKETS} buckets of one {size}")
        buckets.append((start, _next(start, size)))
        start = buckets[-1][1]
    return buckets


def _floor(time: datetime, size: str) -> datetime:
    """Return the start of the bucket that a time is in; weeks begin on Monday."""
    hour = time.replace(minute=0, second=0, microsecond=0)
    match size:
        case "hour":
            return hour
        case "week":
            return hour.replace(hour=0) - timedelta(days=time.weekday())
        case "month":
            return hour.replace(hour=0, day=1)
        case "year":
            return hour.replace(hour=0, day=1, month=1)
        case _:
            return hour.replace(hour=0)


def _next(start: datetime, size: str) -> datetime:
    """Return the start of the bucket after the one that starts here."""
    match size:
        case "hour":
            return start + timedelta(hours=1)
        case "week":
            return start + timedelta(weeks=1)
        case "month":
            following = start.month % _DECEMBER + 1
            return start.replace(year=start.year + (start.month == _DECEMBER), month=following)
        case "year":
            return start.replace(year=start.year + 1)
        case _:
            return start + timedelta(days=1)


def _range(start: datetime, end: datetime) -> dict[str, str]:
    return {"startTime": f"{start:%Y-%m-%dT%H:%M:%SZ}", "endTime": f"{end:%Y-%m-%dT%H:%M:%SZ}"}
