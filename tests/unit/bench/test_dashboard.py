"""The dashboard asks for metrics that exist, under the names that Prometheus gives them."""

from __future__ import annotations

import json
import re

from bench.collector import receiving
from bench.dashboard import DASHBOARD, exposition
from engine.backend.statistics import Statistics
from engine.run_clock import CLOCK
from engine.telemetry.costs import Costs
from engine.telemetry.export import Export
from engine.telemetry.job_times import JobTimes, RequestStats

# Words of PromQL, and labels.
_OTHER = {"sum", "by", "rate", "or", "le", "increase", "histogram_quantile", "instance", "kind", "outcome"}
_OTHER |= {"gen_ai_request_model", "__rate_interval", "__range"}


def metric_names() -> set[str]:
    """Return the names of all metrics that the dashboard's queries have."""
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    queries = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    return {name for name in re.findall(r"[a-zA-Z_][\w:]*", queries) if name not in _OTHER}


def test_each_query_names_a_metric_that_is_exported() -> None:
    with receiving() as receiver:
        costs = Costs(CLOCK.now(), 0.001)
        costs.seconds.ready()
        export = Export(receiver.url, {}, costs, Statistics(), variables={})
        times = JobTimes("job-1", submitted_at_s=1.0, outcome="completed", requests=[RequestStats(3, 2, 0.1, 0.1, 0.1)])
        costs.begin(times)
        times.first_output_at = CLOCK.now()
        times.add_delivery(CLOCK.now())
        times.ended_at = CLOCK.now()
        costs.end(times)
        export.job_ended(times)
        export.shutdown(10.0)
        lines = exposition(receiver).splitlines()

    exported = {re.split(r"[{ ]", line)[0] for line in lines}
    exported |= {name.removesuffix("_bucket") for name in exported}
    own = {name for name in metric_names() if not name.startswith("vllm:")}
    assert own
    assert own <= exported
