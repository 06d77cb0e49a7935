"""The bench's commands with real servers: whether they run, and never how fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.streams import EMULATED
from bench.systems import OURS, VLLM
from tests.processes import ROOT


def bench(out: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "bench", "--out", str(out), *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def measured(scenario: dict[str, Any], system: str, metric: str) -> list[float]:
    return [of_round["metrics"][metric] for of_round in scenario["systems"][system]]


@pytest.mark.timeout(600)
def test_a_rehearsal_of_the_gpu_bench_has_the_figures_of_every_stage(tmp_path: Path, tiny_model: str) -> None:
    """What runs on a GPU has run here before, in the same stages."""
    bench(tmp_path, "gpu", "--rehearse", "--tiny", tiny_model)

    document = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    stages = {stage["stage"]: stage for stage in document["stages"]}
    assert {name: stage["state"] for name, stage in stages.items()} == dict.fromkeys(
        ("smoke", "cold-start", "load", "warm-start", "4-bit"), "done"
    )
    smoke, load, four_bits = (stages[name]["figures"] for name in ("smoke", "load", "4-bit"))
    assert smoke["streamed"]["right"] == smoke["not streamed"]["right"] == smoke["streamed"]["asked"] > 40
    for start in (
        stages["cold-start"]["figures"]["start"],
        stages["warm-start"]["figures"]["start"],
        four_bits["start"],
    ):
        assert start["first_token_s"] > 0
        assert {"imports", "engine"} <= start["phases_s"].keys()
    assert load["rounds"] == 2
    assert [scenario["clients"] for scenario in load["scenarios"]] == [1, 4]
    for scenario in load["scenarios"]:
        for system in (VLLM, OURS):
            for metric in (
                "requests_per_s",
                "ttft_p50_ms",
                "ttft_p95_ms",
                "inter_chunk_p95_ms",
                "cpu_s_per_1000_tokens",
            ):
                assert all(value > 0 for value in measured(scenario, system, metric)), (system, metric)
    assert four_bits["quantizing_s"] > 0
    assert all(measured(scenario, OURS, "tokens_per_s")[0] > 0 for scenario in four_bits["scenarios"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gpu.json", "gpu.txt"]
    assert document["environment"]["vllm"] in (tmp_path / "gpu.txt").read_text(encoding="utf-8")


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("tiny_model")
def test_vllms_load_tool_completes_the_same_requests_and_tokens_with_the_worker_as_with_vllm(tmp_path: Path) -> None:
    """`vllm bench serve` counts a request as completed only if its stream has text and ends as one of vLLM's does."""
    bench(tmp_path, "vllm-bench", "--requests", "12", "--concurrency", "4", "--tokens", "16")

    results = json.loads((tmp_path / "vllm-bench.json").read_text(encoding="utf-8"))["systems"]
    for name in (VLLM, OURS):
        assert {key: results[name][key] for key in ("completed", "failed", "total_output_tokens")} == {
            "completed": 12,
            "failed": 0,
            "total_output_tokens": 12 * 16,
        }, name
    assert results[VLLM]["total_input_tokens"] == results[OURS]["total_input_tokens"]


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("tiny_model")
def test_streams_at_a_gpus_pace_arrive_complete_from_each_system(tmp_path: Path) -> None:
    """The engine is real but for its model, and a response counts only if all of its tokens have arrived."""
    bench(tmp_path, "--rounds", "1", "streams", "--clients", "6", "--latency-ms", "0", "20", "--seconds", "1")

    measurements = json.loads((tmp_path / "streams.json").read_text(encoding="utf-8"))["measurements"]
    assert {(one["system"], one["latency_ms"]) for one in measurements} == {
        (VLLM, 0),
        (EMULATED, 0),
        (OURS, 0),
        (OURS, 20),
    }
    for one in measurements:
        (figures,) = one["rounds"]
        assert figures["errors"] == 0, one
        assert figures["requests"] >= 6
        # A step for one to 64 requests takes 3.5 to 4.5 ms, so no response is faster than that.
        assert figures["e2e_p50_ms"] > 127 * 3.5
    assert all(one["rounds"][0]["deliveries_per_token"] > 0 for one in measurements if one["system"] == OURS)
