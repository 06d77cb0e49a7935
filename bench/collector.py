"""A collector that receives OTLP over HTTP and keeps what it has received; on request, it does not answer."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

# What comes, by the path of OTLP over HTTP.
REQUESTS: dict[str, Any] = {
    "/v1/traces": ExportTraceServiceRequest,
    "/v1/metrics": ExportMetricsServiceRequest,
    "/v1/logs": ExportLogsServiceRequest,
}


class OTLPReceiver:
    """What a collector has received.

    Attributes:
        url: of the collector, as `OTEL_EXPORTER_OTLP_ENDPOINT` wants it.
        answers: while it is clear, requests get no answer.
        requests: what came, by path, decoded.
        asked: is set when a request has come.
    """

    def __init__(self) -> None:
        self.url = ""
        self.answers = threading.Event()
        self.answers.set()
        self.asked = threading.Event()
        self.requests: dict[str, list[Any]] = {path: [] for path in REQUESTS}

    @property
    def spans(self) -> list[Any]:
        """All spans."""
        return [
            span
            for request in list(self.requests["/v1/traces"])
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    @property
    def metrics(self) -> dict[str, Any]:
        """The last value of each metric, by name."""
        return {metric.name: metric for metric in self._all_metrics()}

    def all_of(self, name: str) -> list[Any]:
        """Return all values of a metric, in the order in which they came."""
        return [metric for metric in self._all_metrics() if metric.name == name]

    def _all_metrics(self) -> Iterator[Any]:
        for request in list(self.requests["/v1/metrics"]):
            for resource in request.resource_metrics:
                for scope in resource.scope_metrics:
                    yield from scope.metrics

    @property
    def logs(self) -> list[Any]:
        """All log records."""
        return [
            record
            for request in list(self.requests["/v1/logs"])
            for resource in request.resource_logs
            for scope in resource.scope_logs
            for record in scope.log_records
        ]

    def resource(self) -> dict[str, Any]:
        """Return the attributes of who has sent the spans."""
        return attributes(self.requests["/v1/traces"][0].resource_spans[0].resource)


def attributes(thing: Any) -> dict[str, Any]:
    """Return the attributes of a span, a data point, a log record or a resource."""
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in thing.attributes}


@contextmanager
def receiving() -> Iterator[OTLPReceiver]:
    """Run a collector during the block."""
    receiver = OTLPReceiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            receiver.asked.set()
            receiver.answers.wait()
            receiver.requests[self.path].append(REQUESTS[self.path].FromString(body))
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    receiver.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.answers.set()
        server.shutdown()
        server.server_close()
        thread.join()
