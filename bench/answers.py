"""The tiny model's answers, which are known: are they right?"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

import httpx

from bench.clients import REQUEST_TIMEOUT_S, Address
from builder.tiny_model.corpus import CORPUS, Example


@dataclass
class Answers:
    """How many questions were asked and answered right, and of each wrong answer its question's name and itself."""

    asked: int
    right: int
    wrong: list[str]


async def check(address: Address, *, streamed: bool) -> Answers:
    """Ask all chats of the tiny model's corpus at once, and compare the answers."""
    chats = [example for example in CORPUS if example.turns]
    limits = httpx.Limits(max_connections=len(chats))
    async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S, limits=limits, trust_env=False) as client:
        answers = await asyncio.gather(*(_ask(client, address, chat, streamed=streamed) for chat in chats))
    wrong = [f"{chat.name}: {it[:200]!r}" for chat, it in zip(chats, answers, strict=True) if it != chat.answer]
    return Answers(len(chats), len(chats) - len(wrong), wrong)


async def _ask(client: httpx.AsyncClient, address: Address, chat: Example, *, streamed: bool) -> str:
    """Return the answer to a chat; of a response that is none, its text."""
    body = {"model": "tiny", "messages": chat.messages, "temperature": 0, "stream": streamed}
    url = f"http://{address.host}:{address.port}{address.path}"
    response = await client.post(url, json=body, headers={"Authorization": "Bearer local"})
    try:
        if not streamed:
            return str(response.json()["choices"][0]["message"]["content"])
        events = [line.removeprefix("data: ") for line in response.text.split("\n\n")]
        if response.status_code != httpx.codes.OK or "[DONE]" not in events:
            return response.text
        choices = [choice for event in events if event.startswith("{") for choice in json.loads(event)["choices"]]
        return "".join(choice["delta"].get("content") or "" for choice in choices)
    except (ValueError, LookupError, TypeError):
        return response.text
