"""The real engine is frozen with its worker, in mid-stream and while it is idle, and goes on."""

from __future__ import annotations

import json
import time
from typing import Any

from builder.tiny_model.corpus import example
from tests.integration.emulator.conftest import Site, eventually

LONG = {
    "prompt": "January,",
    "sampling_params": {"max_tokens": 900, "ignore_eos": True, "temperature": 0},
    "stream": True,
}
FROZEN_S = 10.5


def text_of(outputs: list[dict[str, Any]]) -> str:
    return "".join(output["text"] for output in outputs)


def restores(site: Site, worker: str) -> list[dict[str, Any]]:
    """Return what the worker has logged of its first output since each restore."""
    text = "First output since the restore "
    return [json.loads(line[line.index("{") :]) for line in site.log_of(worker) if text in line]


def test_an_engine_that_is_frozen_in_mid_stream_and_while_idle_goes_on(llm: Site) -> None:
    (worker,) = [one["id"] for one in llm.idle_workers(1)]
    expected = llm.ended(llm.submit(LONG))["output"]
    before = len(restores(llm, worker))

    job = llm.submit(LONG)
    eventually(lambda: llm.state()["jobs"][0]["outputs"] >= 1, interval_s=0.005)
    llm.freeze(worker)
    frozen = llm.status(job)
    time.sleep(FROZEN_S)
    llm.thaw(worker)
    ended = llm.ended(job)

    assert frozen["status"] == "IN_PROGRESS"
    assert (ended["status"], ended.get("retries")) == ("COMPLETED", None)
    assert text_of(ended["output"]) == text_of(expected)
    streamed = [item["output"] for item in llm.client.get(f"/stream/{job}").json()["stream"]]
    # The one that was on its way when its connection was dropped may be there twice.
    once = [streamed[:at] + streamed[at + 1 :] for at in range(1, len(streamed)) if streamed[at] == streamed[at - 1]]
    assert text_of(expected) in map(text_of, [streamed, *once])
    (line,) = [line for line in llm.log_of(worker) if "Restored: the process did not run for 10." in line]
    assert line.endswith("1 jobs in progress")

    llm.idle_workers(1)
    llm.freeze(worker)
    time.sleep(2.5)
    job = llm.submit({"messages": example("ok").messages, "sampling_params": {"temperature": 0}, "stream": True})
    llm.thaw(worker)
    assert text_of(llm.ended(job)["output"]) == example("ok").answer
    in_mid_stream, while_idle = restores(llm, worker)[before:]
    assert list(in_mid_stream["phases_s"]) == ["first_output"]
    assert list(while_idle["phases_s"]) == ["first_take", "first_output"]
