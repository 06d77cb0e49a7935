"""Draws the dashboard, and traces, from real data: Prometheus evaluates the panels' queries, Matplotlib draws them.

Prometheus scrapes what a collector has received, under the names that OpenTelemetry's rules for Prometheus give it.
"""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from bench.collector import OTLPReceiver, attributes
from emulator.free_port import free_port

DASHBOARD = Path(__file__).parents[1] / "dashboards" / "vllm-serverless.json"
_LONG_NS = 2_000_000_000
# Of Grafana, as an axis has them.
_UNITS = {"s": "seconds", "ops": "a second", "percentunit": "share"}
_COLOURS = ("#3274d9", "#e0752d", "#56a64b", "#b877d9", "#e02f44", "#8f8f8f", "#f2cc0c")


def exposition(receiver: OTLPReceiver) -> str:
    """Return the last value of each metric in Prometheus' text format.

    Exponential histograms become ones with the same buckets' bounds.
    """
    lines: list[str] = []
    for metric in receiver.metrics.values():
        name = re.sub(r"[^a-zA-Z0-9_:]", "_", metric.name)
        kind = metric.WhichOneof("data")
        if not metric.name.startswith("vllm:"):
            if metric.unit == "s" and not name.endswith("_seconds"):
                name += "_seconds"
            elif metric.unit == "1" and kind == "gauge":
                name += "_ratio"
        points = getattr(metric, kind).data_points
        if kind == "sum" and getattr(metric, kind).is_monotonic:
            name += "" if name.endswith("_total") else "_total"
        for point in points:
            labels = {re.sub(r"\W", "_", key): str(value) for key, value in attributes(point).items()}
            if kind in ("sum", "gauge"):
                lines.append(f"{name}{_labels(labels)} {getattr(point, point.WhichOneof('value'))}")
                continue
            count = 0
            for bound, in_bucket in _buckets(point, kind):
                count += in_bucket
                lines.append(f"{name}_bucket{_labels({**labels, 'le': bound})} {count}")
            lines.append(f"{name}_count{_labels(labels)} {point.count}")
            lines.append(f"{name}_sum{_labels(labels)} {point.sum}")
    return "\n".join(lines) + "\n"


def _buckets(point: Any, kind: str) -> Iterator[tuple[str, int]]:
    if kind == "histogram":
        bounds = [*(f"{bound:g}" for bound in point.explicit_bounds), "+Inf"]
        yield from zip(bounds, point.bucket_counts, strict=True)
        return
    base = 2.0 ** (2.0**-point.scale)
    yield "0", point.zero_count
    # Coarser buckets, as a scrape has to send each: eight of them become one.
    step = 8
    counts, first = list(point.positive.bucket_counts), point.positive.offset
    by_bound: dict[int, int] = {}
    for index, count in enumerate(counts, first):
        end = -(-(index + 1) // step) * step
        by_bound[end] = by_bound.get(end, 0) + count
    for end, count in sorted(by_bound.items()):
        yield f"{base**end:.9g}", count
    yield "+Inf", 0


def _labels(labels: dict[str, str]) -> str:
    inner = ",".join(f"{name}={json.dumps(text)}" for name, text in labels.items())
    return f"{{{inner}}}" if inner else ""


@contextmanager
def prometheus(program: Path, receiver: OTLPReceiver, directory: Path) -> Iterator[str]:
    """Run Prometheus during the block; yield its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = exposition(receiver).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = directory / "prometheus.yml"
    config.write_text(
        json.dumps(
            {
                "global": {"scrape_interval": "2s"},
                "scrape_configs": [
                    {
                        "job_name": "vllm-serverless",
                        "static_configs": [{"targets": [f"127.0.0.1:{server.server_port}"]}],
                    }
                ],
            }
        )
    )
    port = free_port()
    process = subprocess.Popen(
        [
            str(program),
            f"--config.file={config}",
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=error",
        ]
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)
        server.shutdown()
        server.server_close()


def draw(url: str, receiver: OTLPReceiver, directory: Path) -> None:
    """Draw the dashboard's panels over all of the data, a cold job's trace, and a warm job's."""
    import matplotlib as mpl

    mpl.use("Agg")
    directory.mkdir(parents=True, exist_ok=True)
    _draw_panels(url, directory / "dashboard.png")
    jobs = sorted((span for span in receiver.spans if span.name == "job"), key=lambda span: span.start_time_unix_nano)
    cold = next(job for job in jobs if job.links)
    start = next(span for span in receiver.spans if span.name == "cold start")
    warm = jobs[len(jobs) // 2]
    _draw_trace(receiver, [start, cold], directory / "trace-cold.svg")
    _draw_trace(receiver, [warm], directory / "trace-warm.svg")


def _draw_panels(url: str, path: Path) -> None:
    from matplotlib import pyplot as plt

    panels = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]
    end = time.time()
    series = httpx.get(f"{url}/api/v1/query", params={"query": "min_over_time(timestamp(up)[1h:2s])"}).json()
    start = float(series["data"]["result"][0]["value"][1])
    columns = 3
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(15, 2.7 * rows), constrained_layout=True)
    for panel, axis in zip(panels, axes.flat, strict=False):
        axis.set_title(panel["title"], fontsize=9, loc="left")
        axis.tick_params(labelsize=7)
        axis.set_ylabel(_UNITS.get(panel["fieldConfig"]["defaults"]["unit"], ""), fontsize=7)
        axis.set_xlabel("s", fontsize=7, loc="right", labelpad=1)
        axis.grid(visible=True, alpha=0.3)
        colours = iter(_COLOURS * 3)
        for target in panel["targets"]:
            query = (
                target["expr"]
                .replace("$__rate_interval", "15s")
                .replace("$__range", "5m")
                .replace('instance=~"$instance"', "")
            )
            query = query.replace("{,", "{").replace(",}", "}")
            answer = httpx.get(
                f"{url}/api/v1/query_range", params={"query": query, "start": start, "end": end, "step": 2}
            )
            answer.raise_for_status()
            for one in answer.json()["data"]["result"]:
                legend = target["legendFormat"]
                for name in re.findall(r"{{\s*(\w+)\s*}}", legend):
                    legend = legend.replace(f"{{{{{name}}}}}", one["metric"].get(name, ""))
                times = [float(moment) - start for moment, _ in one["values"]]
                values = [float(value) for _, value in one["values"]]
                axis.plot(times, values, label=legend, linewidth=1.2, color=next(colours))
        axis.set_ylim(bottom=0)
        if axis.lines:
            axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(0, -0.1), ncols=3, frameon=False)
        else:
            axis.text(0.5, 0.5, "no data", ha="center", transform=axis.transAxes)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=75)


def _draw_trace(receiver: OTLPReceiver, roots: list[Any], path: Path) -> None:
    from matplotlib import pyplot as plt

    rows: list[tuple[str, Any, int]] = []
    for index, root in enumerate(roots):
        children = [span for span in receiver.spans if span.parent_span_id == root.span_id]
        rows += [
            (f"{'' if span is root else '    '}{span.name}", span, index)
            for span in (root, *sorted(children, key=lambda span: span.start_time_unix_nano))
        ]
    origin = min(span.start_time_unix_nano for _, span, _ in rows)
    figure, axis = plt.subplots(figsize=(8, 0.55 + 0.21 * len(rows)), constrained_layout=True)
    total = max(span.end_time_unix_nano for _, span, _ in rows) - origin
    scale, unit = (1e9, "s") if total > _LONG_NS else (1e6, "ms")
    for row, (_, span, index) in enumerate(rows):
        begun, duration = (
            (span.start_time_unix_nano - origin) / scale,
            (span.end_time_unix_nano - span.start_time_unix_nano) / scale,
        )
        axis.barh(row, max(duration, total / scale / 400), left=begun, color=_COLOURS[index], height=0.7)
        axis.text(begun + duration, row, f" {duration:.3f} {unit}", va="center", fontsize=6)
    axis.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=7)
    axis.invert_yaxis()
    axis.tick_params(axis="x", labelsize=7)
    axis.set_xlabel(unit, fontsize=7)
    axis.margins(x=0.08)
    figure.savefig(path, metadata={"Date": None})
