"""The WebSocket `/v1/realtime` through the balancer: the worker as it is (`python handler.py`), and a tiny Voxtral."""

from __future__ import annotations

import base64
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import aiohttp
import pytest

from tests.integration.balancer.conftest import Site, served_by_worker
from tests.integration.emulator.conftest import KEY, eventually
from tests.processes import VLLM_ENVIRONMENT
from tests.voxtral import RATE_HZ, SETTINGS, realtime_model
from tests.whisper import tone

WAV_HEADER_BYTES = 44
PIECE_BYTES = RATE_HZ  # Half a second.
AUDIO = tone(3, rate_hz=RATE_HZ)[WAV_HEADER_BYTES:]

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Return a site whose worker runs one request at a time: what is not aborted is in the way of the next."""
    model = realtime_model(tmp_path_factory.mktemp("realtime") / "model")
    variables = {**VLLM_ENVIRONMENT, **SETTINGS, "MODEL_NAME": model, "SERVED_MODEL_NAME": "tiny", "MAX_NUM_SEQS": "1"}
    with served_by_worker(variables) as site:
        yield site


class Session:
    """A session of realtime transcription.

    Args:
        connection: of the session.
    """

    def __init__(self, connection: aiohttp.ClientWebSocketResponse) -> None:
        self.connection = connection

    async def send(self, kind: str, **fields: Any) -> None:
        await self.connection.send_json({"type": kind, **fields})

    async def append(self, audio: bytes) -> None:
        for begin in range(0, len(audio), PIECE_BYTES):
            piece = base64.b64encode(audio[begin : begin + PIECE_BYTES]).decode()
            await self.send("input_audio_buffer.append", audio=piece)

    async def event(self) -> dict[str, Any]:
        event: dict[str, Any] = await self.connection.receive_json(timeout=30)
        return event


@asynccontextmanager
async def session(site: Site) -> AsyncIterator[Session]:
    headers = {"Authorization": f"Bearer {KEY}"}
    async with aiohttp.ClientSession(headers=headers) as client, client.ws_connect(f"{site.url}/v1/realtime") as opened:
        begun = Session(opened)
        assert (await begun.event())["type"] == "session.created"
        yield begun


async def transcribed(site: Site) -> tuple[list[str], dict[str, Any]]:
    """Return the parts of a transcription, the first of which comes before the last of the audio is sent; its end."""
    async with session(site) as begun:
        await begun.send("session.update", model="tiny")
        await begun.send("input_audio_buffer.commit")
        await begun.append(AUDIO[: len(AUDIO) // 2])
        events = [await begun.event()]
        await begun.append(AUDIO[len(AUDIO) // 2 :])
        await begun.send("input_audio_buffer.commit", final=True)
        while events[-1]["type"] == "transcription.delta":
            events.append(await begun.event())
    *parts, end = events
    return [part["delta"] for part in parts], end


async def test_audio_is_transcribed_while_it_comes(site: Site) -> None:
    parts, end = await transcribed(site)

    assert end["type"] == "transcription.done"
    assert "".join(parts) == end["text"] != ""
    assert end["usage"]["completion_tokens"] == len(parts)
    assert (parts, end) == await transcribed(site)


async def test_vllms_errors_arrive(site: Site) -> None:
    async with session(site) as begun:
        await begun.send("input_audio_buffer.commit")
        await begun.send("session.update", model="gpt-5")
        await begun.send("input_audio_buffer.append", audio="AA==")
        await begun.send("no such event")
        codes = [(await begun.event())["code"] for _ in range(4)]

    assert codes == ["model_not_validated", "model_not_found", "invalid_audio", "unknown_event"]


async def test_a_client_that_leaves_frees_its_place_in_the_engine_for_the_next(site: Site) -> None:
    async with session(site) as begun:
        await begun.send("session.update", model="tiny")
        await begun.send("input_audio_buffer.commit")
        await begun.append(AUDIO)
        await begun.event()
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            async with session(site):
                pass
        begun.connection.get_extra_info("socket").shutdown(socket.SHUT_RDWR)

    assert refused.value.status == HTTPStatus.TOO_MANY_REQUESTS
    eventually(lambda: not site.workers("running"))
    _, end = await transcribed(site)
    assert end["type"] == "transcription.done"


async def test_a_request_without_an_upgrade_gets_vllms_answer(site: Site) -> None:
    assert site.client.get("/v1/realtime").json() == {"detail": "Not Found"}
