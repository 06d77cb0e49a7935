"""The scenarios: kinds of load, each at some platform latency, and the lists that are measured."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

SEED = 0
_PROMPT = "Tell me a long story."
# All clients start at the same time. In a short measurement, many clients get only a few responses each, and most of
# what is measured is the first burst and the last responses, during which the engine is half empty.
_MANY_CLIENTS = 64
_MANY_CLIENTS_DURATION_FACTOR = 3


@dataclass(frozen=True)
class Scenario:
    """One kind of load.

    Args:
        clients: closed loop: the number of clients, each of which sends its next request as soon as its last response
            has ended; 0 means open loop.
        capacity_share: open loop: the request rate as a share of what vLLM alone was measured to serve; requests do
            not wait for earlier responses (Poisson arrivals).
        tokens: output tokens of each response.
        streamed: whether responses are streamed.
        token_ids: whether each event lists its token ids. vLLM then sends one event per token, as it does for streams
            that a tool or reasoning parser reads.
        latency_ms: platform latency of each call that a worker makes.
    """

    clients: int = 0
    capacity_share: float = 0.0
    tokens: int = 64
    streamed: bool = True
    token_ids: bool = False
    latency_ms: int = 0

    @property
    def name(self) -> str:
        """A readable name, unique among scenarios."""
        load = (
            f"{self.clients} client{'s' if self.clients > 1 else ''}"
            if self.clients
            else f"open loop at {self.capacity_share:.0%} of capacity"
        )
        kind = ("streamed, token ids" if self.token_ids else "streamed") if self.streamed else "not streamed"
        return f"{load}, {self.tokens} tokens, {kind}, platform latency {self.latency_ms} ms"

    def duration_s(self, base_s: float) -> float:
        """Return for how long requests are sent in one measurement; `base_s` applies below 64 clients."""
        return base_s * (_MANY_CLIENTS_DURATION_FACTOR if self.clients >= _MANY_CLIENTS else 1)

    def body(self) -> bytes:
        """Return the request's JSON."""
        return json.dumps(self.request()).encode()

    def request(self) -> dict[str, Any]:
        """Return the request; the response has exactly `tokens` tokens.

        A stream reports its token count only at its end (`usage`). `return_token_ids` would report it in each event,
        but makes vLLM send one event per token, and users of plain text do not set it.
        """
        document: dict[str, Any] = {
            "model": "tiny",
            "messages": [{"role": "user", "content": _PROMPT}],
            "max_tokens": self.tokens,
            "ignore_eos": True,
        }
        if self.streamed:
            document |= {"stream": True, "stream_options": {"include_usage": True}}
            if self.token_ids:
                document["return_token_ids"] = True
        return document


def default_scenarios(clients: list[int]) -> list[Scenario]:
    """Return the short list: each number of clients, and 64 clients at 40 ms latency and with one event per token."""
    return [
        *(Scenario(clients=count) for count in clients),
        Scenario(clients=64, latency_ms=40),
        Scenario(clients=64, token_ids=True),
    ]


def full_scenarios(clients: list[int]) -> list[Scenario]:
    """Return the full list: each axis varied on its own around streamed responses of 64 tokens.

    Clients by platform latency; responses that are not streamed; short and long responses; open-loop arrivals.
    """
    return [
        *(Scenario(clients=count, latency_ms=latency) for latency in (0, 40, 150) for count in clients),
        *(Scenario(clients=count, streamed=False) for count in clients),
        Scenario(clients=64, token_ids=True),
        *(Scenario(clients=count, tokens=tokens) for tokens in (16, 256) for count in (8, 64)),
        *(Scenario(capacity_share=share, latency_ms=latency) for latency in (0, 40) for share in (0.5, 0.8)),
    ]


def poisson_arrivals(rate: float, seconds: float, seed: str) -> list[float]:
    """Return arrival times in seconds from the start: on average `rate` a second, the same for the same seed."""
    rng = random.Random(f"{SEED}/{seed}")  # noqa: S311 (not used for security)
    arrivals_s: list[float] = []
    next_s = rng.expovariate(rate)
    while next_s < seconds:
        arrivals_s.append(next_s)
        next_s += rng.expovariate(rate)
    return arrivals_s
