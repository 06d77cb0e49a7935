"""A result that is too large goes to a real S3 server, and the job yields a link that anyone can fetch, for a while."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import botocore.auth
import botocore.endpoint
import httpx
import pytest
from aiohttp import web

from engine.config.environment import Variable
from engine.config.settings import Settings
from engine.errors import (
    BucketError,
    BucketUnavailableError,
    ConfigurationError,
    DeliveryError,
    RefusedDeliveryError,
)
from engine.queue import delivery
from engine.queue.bucket import Bucket
from engine.queue.delivery import JobDelivery
from engine.queue.protocol import PostKind
from tests.s3_server import KEY, KEY_ID, NAME, S3Server, s3_server
from tests.unit.queue.spirit_site import spirit_site
from tests.unit.queue.test_delivery import FakePost
from tests.virtual_time import in_virtual_time

pytestmark = pytest.mark.anyio
NEVER = float("inf")
RESULT = '{"漢": 1}'.encode()


def bucket_of(variables: dict[str, str]) -> Bucket:
    bucket = Bucket.of(Settings.read({name: Variable(value, "environment") for name, value in variables.items()}))
    assert bucket is not None
    return bucket


async def fetch(url: httpx.URL | str) -> httpx.Response:
    async with httpx.AsyncClient() as client:
        return await client.get(url)


@asynccontextmanager
async def serving(put: Callable[[web.Request], Awaitable[web.Response]]) -> AsyncIterator[str]:
    """Answer uploads with `put`; yield the URL."""
    app = web.Application()
    app.router.add_put("/{path:.*}", put)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def bucket(server: S3Server) -> Bucket:
    return bucket_of(server.environment)


async def test_a_stored_result_is_fetched_with_its_link_alone(bucket: Bucket) -> None:
    before = datetime.now(UTC)

    link = await bucket.store("job/1 漢", RESULT)
    response = await fetch(link["output_url"])

    assert (response.status_code, response.content) == (200, RESULT)
    assert response.headers["content-type"] == "application/json"
    assert link["size_bytes"] == len(RESULT)
    expires_in = datetime.fromisoformat(link["expires_at"]) - before
    assert timedelta(hours=24, seconds=-1) <= expires_in <= timedelta(hours=24, minutes=1)


async def test_an_altered_link_is_refused(bucket: Bucket) -> None:
    url = httpx.URL((await bucket.store("job-1", RESULT))["output_url"])
    await bucket.store("job-2", RESULT)
    without_query = url.copy_with(query=None)
    signature = url.params["X-Amz-Signature"]
    altered = [
        url.copy_with(path=url.path.replace("job-1", "job-2")),
        url.copy_set_param("X-Amz-Expires", "604800"),
        url.copy_set_param("X-Amz-Signature", signature[::-1]),
        without_query,
    ]

    assert [(await fetch(one)).status_code for one in (url, *altered)] == [200, 403, 403, 403, 403]


async def test_a_link_expires(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    now = botocore.auth.get_current_datetime
    link_of = replace(bucket, link_expires_s=600)
    ages_s, statuses = [599 - 60, 601], []

    for age_s in ages_s:
        created = now() - timedelta(seconds=age_s)
        monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda created=created: created)
        url = (await link_of.store("job-1", RESULT))["output_url"]
        statuses.append((await fetch(url)).status_code)

    assert statuses == [200, 403]


async def test_a_result_above_the_limit_becomes_a_link(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "MAX_RESULT_BYTES", 1000)
    post = FakePost()
    job = JobDelivery(post, "job", NEVER, bucket)
    outputs = ["漢" * 200, {"x" * 600: 1}]
    for output in outputs:
        await job.stream(output)

    assert await job.finish() == "completed"

    *streamed, (kind, result) = post.arrived
    assert streamed == [(PostKind.OUTPUT, {"output": output}) for output in outputs]
    assert kind is PostKind.RESULT
    (link,) = result["output"]
    assert link.keys() == {"output_url", "size_bytes", "expires_at"}
    assert (await fetch(link["output_url"])).json() == outputs


async def test_a_smaller_result_is_not_stored(bucket: Bucket) -> None:
    post = FakePost()
    job = JobDelivery(post, "job", NEVER, replace(bucket, name="no-such-bucket"))
    await job.stream("a")

    assert await job.finish() == "completed"

    assert post.arrived[-1] == (PostKind.RESULT, {"output": ["a"]})


async def test_a_result_that_the_platform_refuses_as_too_large_becomes_a_link(bucket: Bucket) -> None:
    post = FakePost(None, RefusedDeliveryError("status 413", 413))
    job = JobDelivery(post, "job", NEVER, bucket)
    await job.stream("a")

    assert await job.finish() == "completed"

    (link,) = post.arrived[-1][1]["output"]
    assert (await fetch(link["output_url"])).json() == ["a"]


async def test_a_link_that_is_refused_too_is_an_error(bucket: Bucket) -> None:
    post = FakePost(*[None, *[RefusedDeliveryError("status 413", 413)] * 2])
    job = JobDelivery(post, "job", NEVER, bucket)
    await job.stream("a")

    assert await job.finish() == "failed"

    assert json.loads(post.arrived[-1][1]["error"])["status"] == 413


async def test_a_failed_upload_fails_the_job_and_says_what_to_do(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "MAX_RESULT_BYTES", 1000)
    post = FakePost()
    job = JobDelivery(post, "job", NEVER, replace(bucket, name="no-such-bucket"))
    await job.stream("a" * 1000)

    assert await job.finish() == "failed"

    error = json.loads(post.arrived[-1][1]["error"])
    assert error["retryable"] is False
    assert "bucket no-such-bucket (NoSuchBucket, status 404): check BUCKET_" in error["error"]["message"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"secret_access_key": "anotherverysecretkey"}, "SignatureDoesNotMatch, status 403"),
        ({"access_key_id": "AKANOTHERKEYID"}, "InvalidAccessKeyId, status 403"),
        ({"name": "no_valid bucket name!"}, "ParamValidationError"),
    ],
)
async def test_a_refused_upload_is_not_retryable_and_shows_no_secret(
    change: dict[str, Any], reason: str, bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    bucket = replace(bucket, **change)

    with pytest.raises(BucketError) as failed:
        await bucket.store("job-1", RESULT)

    assert not failed.value.retryable
    assert reason in str(failed.value)
    for text in (str(failed.value), caplog.text, repr(bucket)):
        assert bucket.secret_access_key not in text
        assert bucket.access_key_id not in text


async def test_a_bucket_that_cannot_be_reached_is_a_retryable_error(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(botocore.endpoint.time, "sleep", lambda _: None)
    nobody = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = nobody.sockets[0].getsockname()[1]
    nobody.close()
    await nobody.wait_closed()

    with pytest.raises(BucketUnavailableError, match=r"EndpointConnectionError.*send the job again") as failed:
        await replace(bucket, endpoint_url=f"http://127.0.0.1:{port}").store("job-1", RESULT)

    assert (failed.value.retryable, failed.value.document()["status"]) == (True, 503)


@pytest.mark.parametrize(("failures", "succeeds"), [(4, True), (5, False)])
async def test_an_upload_that_fails_is_tried_again(
    failures: int, succeeds: bool, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(botocore.endpoint.time, "sleep", pauses.append)
    attempts: list[bytes] = []

    async def put(request: web.Request) -> web.Response:
        attempts.append(await request.read())
        return web.Response(status=503 if len(attempts) <= failures else 200)

    async with serving(put) as url:
        failing = replace(bucket, endpoint_url=url)
        if succeeds:
            await failing.store("job-1", RESULT)
        else:
            with pytest.raises(BucketUnavailableError, match="status 503"):
                await failing.store("job-1", RESULT)

    assert attempts == [RESULT] * 5
    assert len(pauses) == 4


@pytest.mark.parametrize(
    ("status", "code", "retryable"),
    [(403, "RequestTimeTooSkewed", True), (400, "RequestTimeout", True), (403, "AccessDenied", False)],
)
async def test_a_refusal_because_of_the_time_is_retryable(
    status: int, code: str, retryable: bool, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a freeze, or on a machine whose clock is wrong."""
    monkeypatch.setattr(botocore.endpoint.time, "sleep", lambda _: None)

    async def put(_: web.Request) -> web.Response:
        return web.Response(status=status, text=f"<Error><Code>{code}</Code></Error>", content_type="application/xml")

    async with serving(put) as url:
        with pytest.raises(BucketError, match=f"{code}, status {status}") as failed:
            await replace(bucket, endpoint_url=url).store("job-1", RESULT)

    assert failed.value.retryable is retryable


async def test_whatever_an_upload_raises_is_the_jobs_error(bucket: Bucket) -> None:
    class Broken:
        def put_object(self, **_: Any) -> None:
            raise RuntimeError(KEY)

    vars(bucket)["_client"] = Broken()

    with pytest.raises(BucketError, match=r"\(RuntimeError\)") as failed:
        await bucket.store("job-1", RESULT)

    assert KEY not in str(failed.value)


@in_virtual_time
async def test_after_a_long_upload_the_link_is_delivered_for_as_long_as_any_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class SlowBucket(Bucket):
        async def store(self, job_id: str, result: bytes) -> dict[str, Any]:
            await asyncio.sleep(100)
            return {"output_url": f"http://host/{job_id}", "size_bytes": len(result)}

    monkeypatch.setattr(delivery, "MAX_RESULT_BYTES", 1000)
    post = FakePost(None, *[RefusedDeliveryError("a key is being replaced", 401), DeliveryError("down")] * 2)
    job = JobDelivery(post, "job", time.monotonic() + 10, SlowBucket("http://host", NAME, "us-east-1", 60, "", ""))
    await job.stream("a" * 1000)

    assert await job.finish() == "completed"

    assert post.arrived[-1][1]["output"][0]["output_url"] == "http://host/job"


class AbsentBucket(Bucket):
    """A bucket that does not answer for some time."""

    def __init__(self, until: float) -> None:
        super().__init__("http://host", NAME, "us-east-1", 60, "", "")
        vars(self).update(back_at=until, uploads=0)

    async def store(self, job_id: str, result: bytes) -> dict[str, Any]:
        vars(self)["uploads"] += 1
        if time.monotonic() < vars(self)["back_at"]:
            raise BucketUnavailableError(len(result), self.name, "EndpointConnectionError")
        return {"output_url": f"http://host/{job_id}", "size_bytes": len(result)}


@in_virtual_time
@pytest.mark.parametrize(("away_s", "outcome"), [(250, "completed"), (1000, "failed")])
async def test_a_bucket_that_is_away_is_waited_for_as_long_as_the_platform_is(
    monkeypatch: pytest.MonkeyPatch, away_s: float, outcome: str
) -> None:
    monkeypatch.setattr(delivery, "MAX_RESULT_BYTES", 1000)
    post, began = FakePost(), time.monotonic()
    bucket = AbsentBucket(began + away_s)
    job = JobDelivery(post, "job", began + 300, bucket)
    await job.stream("a" * 1000)

    assert await job.finish() == outcome

    assert time.monotonic() - began <= 301
    assert vars(bucket)["uploads"] > 3
    if outcome == "failed":
        assert json.loads(post.arrived[-1][1]["error"])["retryable"] is True


@in_virtual_time
async def test_a_worker_that_ends_does_not_wait_for_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "MAX_RESULT_BYTES", 1000)
    post = FakePost()
    job = JobDelivery(post, "job", NEVER, AbsentBucket(NEVER))
    await job.stream("a" * 1000)
    finishing = asyncio.create_task(job.finish())
    await asyncio.sleep(100)

    finishing.cancel()

    assert await finishing == "failed"
    assert json.loads(post.arrived[-1][1]["error"])["retryable"] is True


async def test_a_job_whose_upload_the_workers_end_cuts_off_fails_as_retryable(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "MAX_RESULT_BYTES", 1000)
    uploading, go_on = asyncio.Event(), asyncio.Event()

    async def put(_: web.Request) -> web.Response:
        uploading.set()
        await go_on.wait()
        return web.Response()

    async with serving(put) as url:
        post = FakePost()
        job = JobDelivery(post, "job", NEVER, replace(bucket, endpoint_url=url))
        await job.stream("a" * 1000)
        finishing = asyncio.create_task(job.finish())
        await uploading.wait()
        finishing.cancel()
        assert await finishing == "failed"
        go_on.set()

    error = json.loads(post.arrived[-1][1]["error"])
    assert (error["status"], error["retryable"]) == (503, True)
    assert "the worker has ended before" in error["error"]["message"]


async def test_an_upload_does_not_block_the_event_loop(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not the first one, which imports boto3 and makes the client."""
    going_on = asyncio.Event()

    def make_client(*_: object, **__: object) -> Any:
        # In the event loop's thread, this would wait for itself.
        asyncio.run_coroutine_threadsafe(_set(going_on), loop).result(10)
        raise ValueError

    loop = asyncio.get_running_loop()
    monkeypatch.setattr("boto3.session.Session", make_client)

    with pytest.raises(BucketError):
        await bucket.store("job-1", RESULT)

    assert going_on.is_set()


async def test_on_spirit_a_result_above_its_smaller_limits_becomes_a_link(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.queue.spirit_delivery.MAX_RESULT_BYTES", {"sync": 1000, "async": 1000})
    async with spirit_site(monkeypatch, bucket=bucket_of(server.environment)) as site:
        small, large = await site.handled("x"), await site.handled("漢" * 1000)
        (task, _) = await site.ended(2)

    assert small.json() == {"said": "x"}
    assert (await fetch(large.json()["output_url"])).json() == {"said": "漢" * 1000}
    assert task["answers"] == [200]


async def test_on_spirit_a_failed_upload_is_an_error_that_says_so(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.queue.spirit_delivery.MAX_RESULT_BYTES", {"sync": 1000, "async": 1000})
    missing = bucket_of(server.environment | {"BUCKET_NAME": "no-such-bucket"})
    async with spirit_site(monkeypatch, bucket=missing) as site:
        response = await site.handled("x" * 2000)
        await site.ended()

    assert "NoSuchBucket, status 404" in response.json()["error"]


@pytest.mark.parametrize(
    ("url", "region", "expected"),
    [
        ("https://s3.us-west-2.amazonaws.com", None, ("us-west-2", "https://s3.us-west-2.amazonaws.com/results/")),
        ("https://s3.amazonaws.com", None, ("us-east-1", "https://s3.amazonaws.com/results/")),
        (
            "https://results.s3.eu-central-003.backblazeb2.com",
            None,
            ("eu-central-003", "https://results.s3.eu-central-003.backblazeb2.com/"),
        ),
        ("https://account.r2.cloudflarestorage.com", "auto", ("auto", "https://account.r2.cloudflarestorage.com/results/")),
        ("http://127.0.0.1:9000/", None, ("us-east-1", "http://127.0.0.1:9000/results/")),
    ],
)  # fmt: skip
def test_the_url_says_the_region_and_where_the_buckets_name_is(
    url: str, region: str | None, expected: tuple[str, str]
) -> None:
    variables = {
        "BUCKET_ENDPOINT_URL": url,
        "BUCKET_NAME": NAME,
        "BUCKET_ACCESS_KEY_ID": KEY_ID,
        "BUCKET_SECRET_ACCESS_KEY": KEY,
    }
    bucket = bucket_of(variables | ({"BUCKET_REGION": region} if region else {}))

    link = bucket._client.generate_presigned_url("get_object", {"Bucket": NAME, "Key": "a"}, 60)

    assert (bucket.region, link.partition("a?")[0]) == expected


def test_a_part_of_the_settings_is_refused(server: S3Server) -> None:
    for missing in server.environment:
        some = {name: Variable(value, "environment") for name, value in server.environment.items() if name != missing}
        with pytest.raises(ConfigurationError, match=rf"^BUCKET_\w+=.* is not allowed.* with {missing}\."):
            Settings.read(some)
    with pytest.raises(ConfigurationError, match=r"^BUCKET_ACCESS_KEY_ID=\(hidden\) is not allowed"):
        Settings.read({"BUCKET_ACCESS_KEY_ID": Variable(KEY_ID, "environment")})
    with pytest.raises(ConfigurationError, match="is not allowed") as refused:
        Settings.read({"BUCKET_ENDPOINT_URL": Variable(f"https://user:{KEY}@host", "environment")})
    assert KEY not in str(refused.value)
    assert Bucket.of(Settings.read({})) is None


async def _set(event: asyncio.Event) -> None:
    event.set()
