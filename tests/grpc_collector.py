"""A collector that receives OTLP over gRPC; that of `bench.collector` does so over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc

from bench.collector import REQUESTS, OTLPReceiver


@contextmanager
def receiving_grpc(credentials: grpc.ServerCredentials | None = None) -> Iterator[OTLPReceiver]:
    """Run a collector during the block, as `localhost`; with credentials by TLS."""
    receiver = OTLPReceiver()

    def handler(path: str, kind: Any) -> grpc.RpcMethodHandler:
        def export(request: Any, _: grpc.ServicerContext) -> bytes:
            receiver.asked.set()
            receiver.answers.wait()
            receiver.requests[path].append(request)
            return b""  # An answer that says nothing.

        return grpc.unary_unary_rpc_method_handler(export, request_deserializer=kind.FromString)

    server = grpc.server(ThreadPoolExecutor(len(REQUESTS)))
    for path, kind in REQUESTS.items():
        service = kind.DESCRIPTOR.full_name.replace(".Export", ".").removesuffix("Request")
        methods = {"Export": handler(path, kind)}
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, methods)])
    if credentials is None:
        receiver.url = f"http://localhost:{server.add_insecure_port('localhost:0')}"
    else:
        receiver.url = f"https://localhost:{server.add_secure_port('localhost:0', credentials)}"
    server.start()
    try:
        yield receiver
    finally:
        receiver.answers.set()
        server.stop(None).wait()
