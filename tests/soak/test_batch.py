"""Ten thousand lines of a batch file are answered once each, though workers and the client are killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.batch_runs import run_with_kills
from tests.soak.conftest import Show

LINES = 10_000


@pytest.mark.timeout(1800)
def test_ten_thousand_lines_are_answered_once_with_two_workers_and_the_client_killed(
    tmp_path: Path, show: Show
) -> None:
    outcome = run_with_kills(tmp_path, LINES, kill_workers_at=[2000, 7000], kill_client_at=4500, tls=True)

    show(
        f"{LINES} lines in {outcome.seconds:.0f} s, {LINES / outcome.seconds:.1f} lines/s: {outcome.right} answered "
        f"once with their own answer, {outcome.others} other lines; {outcome.killed_in_progress} jobs were running on "
        f"killed workers; the platform completed {outcome.jobs} jobs"
    )
    assert (outcome.right, outcome.others) == (LINES, 0)
    assert outcome.killed_in_progress > 0
    assert "lines are answered" in outcome.logs[1]
