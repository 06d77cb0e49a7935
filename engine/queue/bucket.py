"""Stores results that are larger than the platform accepts in an S3-compatible bucket, and makes links to them.

The variables are those of RunPod's SDK (`runpod.serverless.utils.rp_upload`, 1.12.0).
"""

from __future__ import annotations

import asyncio
import logging
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from http import HTTPStatus
from typing import Any, Self
from urllib.parse import urlsplit

from engine.config.settings import Settings
from engine.errors import BucketError, BucketUnavailableError

# `s3.us-west-2.amazonaws.com`, `NAME.s3.eu-central-003.backblazeb2.com`
_REGION = re.compile(r"(?:^|\.)s3[.-]([a-z0-9]+(?:-[a-z0-9]+)+)\.")
_DEFAULT_REGION = "us-east-1"
# S3's codes for a worker that was slow or frozen, or whose clock is wrong: another may do better.
_PASSING_CODES = {"RequestTimeout", "RequestTimeTooSkewed"}
_ATTEMPTS = 5
_CONNECT_TIMEOUT_S = 10
_READ_TIMEOUT_S = 60

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bucket:
    """A bucket, to which the results of jobs are uploaded.

    Attributes:
        endpoint_url: of the S3 API; its host may begin with the bucket's name, as some services require.
        name: of the bucket.
        region: which requests are signed for.
        link_expires_s: how long a link works, in seconds.
        access_key_id, secret_access_key: a key that may write and read there.
    """

    endpoint_url: str
    name: str
    region: str
    link_expires_s: int
    access_key_id: str = field(repr=False)
    secret_access_key: str = field(repr=False)

    @classmethod
    def of(cls, settings: Settings) -> Self | None:
        """Return the bucket that the settings name, if they do."""
        url, name = settings.bucket_endpoint_url, settings.bucket_name
        key_id, key = settings.bucket_access_key_id, settings.bucket_secret_access_key
        if url is None or name is None or key_id is None or key is None:
            return None
        match = _REGION.search(urlsplit(url).hostname or "")
        region = settings.bucket_region or (match[1] if match else _DEFAULT_REGION)
        expires_s = settings.bucket_link_expires_s
        return cls(url, name, region, expires_s, key_id.get_secret_value(), key.get_secret_value())

    async def store(self, job_id: str, result: bytes) -> dict[str, Any]:
        """Upload a job's result; return what the job yields instead, ready for JSON.

        Args:
            job_id: the job's; the object is called `JOB_ID/output.json`.
            result: JSON.

        Returns:
            `{"output_url": link, "size_bytes": of the object, "expires_at": time in UTC, as in ISO 8601}`.

        Raises:
            BucketError: the bucket does not accept it.
            BucketUnavailableError: it did not answer, in several attempts; or the upload was cancelled, as the worker
                ends: there is time left to say so.
        """
        try:
            return await asyncio.to_thread(self._store, job_id, result)
        except asyncio.CancelledError:
            raise BucketUnavailableError(len(result), self.name, "the worker has ended before") from None

    def _store(self, job_id: str, result: bytes) -> dict[str, Any]:
        from botocore.exceptions import ClientError, ConnectionError, HTTPClientError  # noqa: A004

        place = {"Bucket": self.name, "Key": f"{job_id}/output.json"}
        try:
            self._client.put_object(**place, Body=result, ContentType="application/json")
            expires_at = datetime.now(UTC) + timedelta(seconds=self.link_expires_s)
            url = self._client.generate_presigned_url("get_object", place, self.link_expires_s)
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            code = error.response.get("Error", {}).get("Code", "unknown error")
            reason = f"{code}, status {status}"
            is_passing = (
                status >= HTTPStatus.INTERNAL_SERVER_ERROR
                or status == HTTPStatus.TOO_MANY_REQUESTS
                or code in _PASSING_CODES
            )
        except Exception as error:  # noqa: BLE001 (it ends this job and no other; its message may hold the request)
            reason, is_passing = type(error).__name__, isinstance(error, HTTPClientError | ConnectionError)
        else:
            _log.info("Job %s: its result of %d bytes is in the bucket %s", job_id, len(result), self.name)
            expires = expires_at.isoformat(timespec="seconds").replace("+00:00", "Z")
            return {"output_url": url, "size_bytes": len(result), "expires_at": expires}
        if is_passing:  # It may be tried again.
            _log.warning("Job %s: the upload to the bucket %s failed (%s)", job_id, self.name, reason)
            raise BucketUnavailableError(len(result), self.name, reason)
        failure = BucketError(len(result), self.name, reason)
        _log.error("Job %s: %s", job_id, failure)
        raise failure

    @cached_property
    def _client(self) -> Any:
        """The client, which takes half a second to make."""
        import boto3
        from botocore.config import Config

        parts = urlsplit(self.endpoint_url)
        host = parts.netloc.removeprefix(f"{self.name}.")
        return boto3.session.Session().client(
            "s3",
            endpoint_url=parts._replace(netloc=host).geturl(),
            region_name=self.region,
            aws_access_key_id=self.access_key_id,
            aws_secret_access_key=self.secret_access_key,
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "path" if host == parts.netloc else "virtual"},
                # Other services than AWS may not have them.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                retries={"total_max_attempts": _ATTEMPTS, "mode": "standard"},
                connect_timeout=_CONNECT_TIMEOUT_S,
                read_timeout=_READ_TIMEOUT_S,
            ),
        )
