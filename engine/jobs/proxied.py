"""A client's whole HTTP request as a job's input; its outputs are the answer, as an HTTP server would send it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class ProxiedRequest(dict[str, Any]):
    """The input of a job that is an HTTP request: `{"method", "route", "body"}`, ready for JSON.

    The client's headers are not in it: its key is the platform's, and the length is that of the body.
    """

    @classmethod
    def of(cls, method: str, uri: str, body: bytes) -> ProxiedRequest:
        """Return the input for a request with these bytes as its body."""
        return cls(method=method.upper(), route=uri, body=body.decode(errors="surrogateescape"))

    @property
    def content(self) -> bytes:
        """The body, byte for byte."""
        text: str = self["body"]
        return text.encode(errors="surrogateescape")


@dataclass(frozen=True, slots=True)
class AnswerStart:
    """The first output of such a job; the others are the bytes of the body, as they come.

    Attributes:
        status: the app's.
        content_type: the app's header `Content-Type`; empty if it has none.
    """

    status: int
    content_type: str
