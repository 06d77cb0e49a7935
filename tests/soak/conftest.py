"""What the long tests share: the model, the queue and the worker of the integration tests, and where figures go."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.integration.conftest import job_queue, tiny_model, worker

__all__ = ["job_queue", "show", "tiny_model", "worker"]

Show = Callable[[str], None]


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    """Print a line, whatever becomes of the test."""

    def line(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}", flush=True)  # noqa: T201

    return line
