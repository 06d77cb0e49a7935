"""A client's whole HTTP request as a job's input; its outputs are the answer, as an HTTP server would send it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class ProxiedRequest(dict[str, Any]):
    """The input of a job that is an HTTP request: `{"method", "route", "content_type", "body"}`, ready for JSON.

    The client's other headers are not in it: its key is the platform's, and the length is that of the body.
    """

    @classmethod
    def of(cls, method: str, uri: str, body: bytes, content_type: str = "") -> ProxiedRequest:
        """Return the input for a request with these bytes as its body."""
        text = body.decode(errors="surrogateescape")
        return cls(method=method.upper(), route=uri, content_type=content_type, body=text)

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
