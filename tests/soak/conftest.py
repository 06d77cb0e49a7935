"""Fixtures for the soak tests: model, queue and worker of the integration tests, and a way to print results."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.integration.conftest import job_queue, tiny_model, worker

__all__ = ["job_queue", "show", "tiny_model", "worker"]

Show = Callable[[str], None]


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    """Return a function that prints a line even if the test passes."""

    def line(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}", flush=True)  # noqa: T201

    return line
