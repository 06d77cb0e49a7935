"""What is measured: a kind of load on a platform that is so far away, and the lists of them."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

SEED = 0
_PROMPT = "Tell me a long story."
# Clients all begin at once. So many of them get only a few answers each in the time that is enough for fewer, and the
# first burst and the last answers, for which the engine is half empty, would be most of what is measured.
_MANY_CLIENTS = 64
_TIMES_AS_LONG = 3


@dataclass(frozen=True)
class Scenario:
    """One kind of load.

    Args:
        clients: closed loop: so many clients, each of which asks anew as soon as its last answer has ended; 0 is open
            loop.
        load: open loop: requests come at this share of what vLLM alone was measured to serve, whether the earlier
            ones have been answered or not (Poisson arrivals).
        tokens: length of each answer.
        streamed: whether answers stream.
        token_ids: whether each event says which tokens it brings, so that vLLM makes one for each token, as it does
            where a tool or reasoning parser looks at the stream.
        latency_ms: how far away the platform is, for each call of a worker.
    """

    clients: int = 0
    load: float = 0.0
    tokens: int = 64
    streamed: bool = True
    token_ids: bool = False
    latency_ms: int = 0

    @property
    def name(self) -> str:
        """The scenario in words."""
        load = (
            f"{self.clients} client{'s' if self.clients > 1 else ''}"
            if self.clients
            else f"open loop at {self.load:.0%} of vLLM alone"
        )
        kind = ("streamed, token ids" if self.token_ids else "streamed") if self.streamed else "not streamed"
        return f"{load}, {self.tokens} tokens, {kind}, platform {self.latency_ms} ms away"

    def lasts_s(self, least_s: float) -> float:
        """How long requests are sent in one measurement, in seconds, if few clients are given `least_s`."""
        return least_s * (_TIMES_AS_LONG if self.clients >= _MANY_CLIENTS else 1)

    def body(self) -> bytes:
        """The request's JSON: an answer of exactly `tokens` tokens.

        A stream says how many it had at its end alone (`usage`): asked for `return_token_ids`, vLLM makes an event of
        each token, which users of plain text do not ask for.
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
        return json.dumps(document).encode()


def default_scenarios(clients: list[int]) -> list[Scenario]:
    """A few minutes: each number of clients, and 64 of them 40 ms away, and with an event for each token."""
    return [
        *(Scenario(clients=count) for count in clients),
        Scenario(clients=64, latency_ms=40),
        Scenario(clients=64, token_ids=True),
    ]


def full_scenarios(clients: list[int]) -> list[Scenario]:
    """Everything: each axis on its own around streamed answers of 64 tokens, and the two that matter most together.

    Numbers of clients by distances; answers that do not stream; short and long answers; arrivals that do not wait.
    """
    return [
        *(Scenario(clients=count, latency_ms=latency) for latency in (0, 40, 150) for count in clients),
        *(Scenario(clients=count, streamed=False) for count in clients),
        Scenario(clients=64, token_ids=True),
        *(Scenario(clients=count, tokens=tokens) for tokens in (16, 256) for count in (8, 64)),
        *(Scenario(load=load, latency_ms=latency) for latency in (0, 40) for load in (0.5, 0.8)),
    ]


def poisson_arrivals(rate: float, seconds: float, seed: str) -> list[float]:
    """When requests come, in seconds from the beginning: `rate` a second on average, the same for the same seed."""
    chance = random.Random(f"{SEED}/{seed}")  # noqa: S311 (no secret)
    arrivals: list[float] = []
    at = chance.expovariate(rate)
    while at < seconds:
        arrivals.append(at)
        at += chance.expovariate(rate)
    return arrivals
