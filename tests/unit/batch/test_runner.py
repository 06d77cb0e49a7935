"""Every line is answered once: with failures, lost jobs, and runs that end at any moment; in virtual time."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from tqdm import tqdm

from batch.endpoint import Endpoint
from batch.errors import RefusedError
from batch.journal import Journal
from batch.request_file import RequestFile
from batch.runner import Limits, Run
from tests.unit.batch.fake_platform import BUCKET, COMPLETED, KEY, URL, FakePlatform
from tests.virtual_time import in_virtual_time

RETRYABLE = {"status": "FAILED", "error": json.dumps({"error": {"message": "x"}, "status": 503, "retryable": True})}
WRONG = {"status": "FAILED", "error": json.dumps({"error": {"message": "x"}, "status": 400, "retryable": False})}


class Files:
    """Input and output of a run."""

    def __init__(self, directory: Path, count: int) -> None:
        self.input = directory / "in.jsonl"
        self.output, self.errors = directory / "out.jsonl", directory / "out.errors.jsonl"
        self.ids = [f"line-{number}" for number in range(count)]
        lines = [
            {"custom_id": one, "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": one}}
            for one in self.ids
        ]
        self.input.write_text("".join(json.dumps(line) + "\n" for line in lines))

    async def run(self, platform: FakePlatform, *, max_jobs: int = 50, attempts: int = 5) -> None:
        requests = RequestFile.read(self.input)
        journal = Journal(self.output, self.errors)
        journal.open(self.ids, requests.sha256, URL)
        complete = False
        try:
            async with Endpoint(URL, KEY, print, transport=platform.transport) as endpoint:
                bar = tqdm(total=len(self.ids), disable=True)
                await Run(requests, journal, endpoint, Limits(max_jobs, attempts), bar).run()
            complete = True
        finally:
            requests.close()
            journal.close(complete=complete)

    def lines(self, path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def answered(self) -> list[str]:
        return [line["custom_id"] for line in self.lines(self.output)]


@in_virtual_time
async def test_every_line_is_answered_by_one_job(tmp_path: Path) -> None:
    files, platform = Files(tmp_path, 300), FakePlatform()

    await files.run(platform)

    assert sorted(files.answered) == sorted(files.ids)
    assert platform.submitted == dict.fromkeys(files.ids, 1)
    assert not files.errors.exists()
    assert [line["response"]["body"] for line in files.lines(files.output)] == [COMPLETED["output"][0]] * 300  # type: ignore[index]


@pytest.mark.parametrize("max_jobs", [1, 7])
@in_virtual_time
async def test_no_more_jobs_than_allowed_are_open(max_jobs: int, tmp_path: Path) -> None:
    files, platform = Files(tmp_path, 30), FakePlatform()

    await files.run(platform, max_jobs=max_jobs)

    assert platform.most_running == max_jobs
    assert len(files.answered) == 30


@pytest.mark.parametrize("end", [RETRYABLE, {"status": "TIMED_OUT", "error": "ttl exceeded"}, 404])
@in_virtual_time
async def test_a_job_that_failed_expired_or_was_lost_is_sent_again(end: dict[str, Any] | int, tmp_path: Path) -> None:
    files = Files(tmp_path, 10)
    platform = FakePlatform(ends=lambda prompt, before: end if prompt == "line-3" and before < 4 else COMPLETED)

    await files.run(platform)

    assert sorted(files.answered) == sorted(files.ids)
    assert platform.submitted["line-3"] == 5
    assert platform.submitted.total() == 14


@in_virtual_time
async def test_a_line_that_fails_at_each_attempt_is_in_the_errors_file(tmp_path: Path) -> None:
    files = Files(tmp_path, 3)
    platform = FakePlatform(ends=lambda prompt, _: RETRYABLE if prompt == "line-1" else COMPLETED)

    await files.run(platform, attempts=3)

    assert sorted(files.answered) == ["line-0", "line-2"]
    (failed,) = files.lines(files.errors)
    assert failed["custom_id"] == "line-1"
    assert failed["response"]["status_code"] == 503
    assert platform.submitted["line-1"] == 3


@in_virtual_time
async def test_a_wrong_request_is_sent_once(tmp_path: Path) -> None:
    files = Files(tmp_path, 3)
    platform = FakePlatform(ends=lambda prompt, _: WRONG if prompt == "line-1" else COMPLETED)

    await files.run(platform)

    assert [line["response"]["status_code"] for line in files.lines(files.errors)] == [400]
    assert platform.submitted == dict.fromkeys(files.ids, 1)


@in_virtual_time
async def test_a_request_that_the_platform_rejects_fails_alone(tmp_path: Path) -> None:
    files = Files(tmp_path, 3)
    too_large = httpx.Response(413, text="too large")
    platform = FakePlatform(refuses=lambda operation, before: too_large if (operation, before) == ("run", 1) else None)

    await files.run(platform)

    (failed,) = files.lines(files.errors)
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("line-1", 413)
    assert sorted(files.answered) == ["line-0", "line-2"]


@in_virtual_time
async def test_a_job_whose_status_cannot_be_read_fails_alone(tmp_path: Path) -> None:
    files = Files(tmp_path, 20)
    platform = FakePlatform(ends=lambda prompt, _: 500 if prompt == "line-1" else COMPLETED, job_s=60.0)

    await files.run(platform, max_jobs=2)

    (failed,) = files.lines(files.errors)
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("line-1", 500)
    assert failed["response"]["request_id"] == "job-1"
    assert len(files.answered) == 19


@in_virtual_time
async def test_a_disk_that_keeps_nothing_ends_the_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    files, platform = Files(tmp_path, 600), FakePlatform()

    with monkeypatch.context() as patches:
        asyncio.get_running_loop().call_later(5.0, patches.setattr, os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output error"):
            await files.run(platform)

    assert 0 < len(files.answered) < 500
    await files.run(platform)
    assert sorted(files.answered) == sorted(files.ids)


LINK = {"output_url": f"https://{BUCKET}/a?signature=secret", "size_bytes": 7, "expires_at": "2026-11-30T12:00:00Z"}


@in_virtual_time
async def test_a_result_in_a_bucket_is_read_from_there(tmp_path: Path) -> None:
    files = Files(tmp_path, 1)
    platform = FakePlatform(ends=lambda _prompt, _before: {"status": "COMPLETED", "output": [LINK]})
    platform.bucket = [httpx.Response(503), httpx.Response(200, json=[{"id": "large"}])]

    await files.run(platform)

    assert [line["response"]["body"] for line in files.lines(files.output)] == [{"id": "large"}]


@in_virtual_time
async def test_a_result_whose_link_has_expired_is_made_again_and_its_link_is_in_no_error(tmp_path: Path) -> None:
    files = Files(tmp_path, 1)
    platform = FakePlatform(ends=lambda _prompt, _before: {"status": "COMPLETED", "output": [LINK]})
    platform.bucket = [httpx.Response(403), httpx.Response(200, text="<xml>")]

    await files.run(platform, attempts=2)

    (failed,) = files.lines(files.errors)
    expected = {"code": "result_unavailable", "message": "the bucket of the result answered 200, but not with JSON"}
    assert failed["error"] == expected
    assert platform.submitted["line-0"] == 2


@in_virtual_time
async def test_a_key_that_is_revoked_ends_the_run_which_continues_with_a_new_one(tmp_path: Path) -> None:
    files, platform = Files(tmp_path, 100), FakePlatform()
    platform.refuses = lambda operation, before: httpx.Response(401) if (operation, before) == ("status", 30) else None

    with pytest.raises(RefusedError, match="refuses RUNPOD_API_KEY"):
        await files.run(platform)
    sent = platform.submitted.copy()
    platform.refuses = lambda _operation, _before: None
    await files.run(platform)

    assert 0 < len(sent) < 100
    assert sorted(files.answered) == sorted(files.ids)
    # At most those on their way when the run ended are sent twice.
    assert platform.submitted.total() <= 105


@in_virtual_time
async def test_a_run_that_is_ended_at_any_moment_continues(tmp_path: Path) -> None:
    for number, ended_after_s in enumerate([0.005, 0.015, 0.1, 0.3, 1.0, 2.05, 2.1, 2.5, 3.0, 4.2]):
        directory = tmp_path / str(number)
        directory.mkdir()
        files, platform = Files(directory, 40), FakePlatform()

        with suppress(TimeoutError):
            async with asyncio.timeout(ended_after_s):
                await files.run(platform, max_jobs=20)
        answered = files.answered
        await files.run(platform, max_jobs=20)

        assert sorted(files.answered) == sorted(files.ids)
        assert files.answered[: len(answered)] == answered
        # One job a line, but for those whose id was on its way when the run ended.
        assert platform.submitted.total() <= 42


@in_virtual_time
async def test_jobs_whose_results_have_expired_meanwhile_are_sent_again(tmp_path: Path) -> None:
    files, platform = Files(tmp_path, 20), FakePlatform(ends=lambda _prompt, before: 404 if before == 0 else COMPLETED)

    with suppress(TimeoutError):
        async with asyncio.timeout(1.0):
            await files.run(platform)
    await asyncio.sleep(3600)
    await files.run(platform, attempts=1)

    assert sorted(files.answered) == sorted(files.ids)
    assert platform.submitted == dict.fromkeys(files.ids, 2)


@in_virtual_time
async def test_a_job_is_asked_for_a_few_times_and_within_half_a_minute(tmp_path: Path) -> None:
    """Results are kept for 30 minutes, and calls of /status are limited."""
    end = {**COMPLETED, "delayTime": 500_000, "executionTime": 100_000}
    files, platform = Files(tmp_path, 100), FakePlatform(ends=lambda _prompt, _before: end, job_s=600.0)

    await files.run(platform, max_jobs=50)

    calls = platform.calls["status"]
    assert len(calls) < 100 * 35
    assert max(calls) < 2 * 600 + 2 * 35
