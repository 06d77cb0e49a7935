"""Makes the multipart request that vLLM's audio routes take of a job's JSON: its fields, and the file that it names."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from urllib3.fields import RequestField
from urllib3.filepost import encode_multipart_formdata

from engine.backend.files import File, Files
from engine.errors import InvalidInputError
from engine.jobs.request import Request
from engine.jobs.request_body import encode_json

# The field that vLLM reads, and what others call it: vLLM's batches, RunPod's worker for faster-whisper, chats.
FILE = "file"
FILE_FIELDS = (FILE, "file_url", "audio", "audio_url", "audio_base64")


async def with_form(request: Request, files: Files) -> Request:
    """Return the request with its form as the body; one without a form as it is.

    Without a file in it, the form has none: vLLM says what is missing.

    Raises:
        InvalidInputError: the form names no readable file, or cannot be encoded.
        JobError: as `Files.read`.
    """
    if request.form is None:
        return request
    fields = {name: value for name, value in request.form.items() if value is not None}
    references = {name: fields.pop(name) for name in FILE_FIELDS if name in fields}
    if len(references) > 1:
        raise InvalidInputError(f"{' and '.join(references)} are the same: give one of them")
    encode_json(fields)
    file = None
    for name, reference in references.items():
        if not isinstance(reference, str) or not reference:
            raise InvalidInputError(f"{name} must be text: a URL, base64, or a path on the network volume")
        file = await files.read(reference)
    body, content_type = await asyncio.to_thread(encode_multipart_formdata, list(_parts(fields, file)))
    return replace(request, form=None, body=body, content_type=content_type)


def _parts(fields: dict[str, Any], file: File | None) -> Iterator[RequestField]:
    for name, value in fields.items():
        # OpenAI's clients write a list as fields of the same name, which ends with brackets.
        several = isinstance(value, list)
        form_name = f"{name.removesuffix('[]')}[]" if several else name
        for one in value if several else [value]:
            text = one.encode() if isinstance(one, str) else encode_json(one)
            yield RequestField.from_tuples(form_name, text)
    if file is not None:
        yield RequestField.from_tuples(FILE, (file.name, file.data, file.content_type))
