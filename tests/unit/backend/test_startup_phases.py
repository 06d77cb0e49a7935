"""The parts of the engine's start, from the log of vLLM's processes: they do not overlap, and add up to its total."""

from __future__ import annotations

import pytest

from engine.backend.startup_logs import Line
from engine.backend.startup_phases import CompileCache, compile_cache, phases

CORE, GPU_0, GPU_1 = 10, 11, 12
# As vLLM 0.32 logs a start on two GPUs, which compile and capture in parallel. It began at 96.0, before the first line.
COMPILING = [
    Line(95.0, GPU_0, "Loading weights took 2.50 seconds"),
    Line(95.5, GPU_1, "Loading weights took 3.00 seconds"),
    Line(96.5, GPU_0, "Starting torch.compile"),
    Line(106.4, GPU_0, "Compiling a graph for compile range (1, 2048) takes 7.80 s"),
    Line(107.0, GPU_1, "torch.compile took 9.50 s in total"),
    Line(107.1, GPU_0, "saved AOT compiled function to /cache/torch_compile_cache/model"),
    Line(107.2, GPU_0, "torch.compile took 10.00 s in total"),
    Line(107.7, GPU_0, "Initial profiling/warmup run took 0.50 s"),
    Line(109.0, CORE, "GPU KV cache size: 123,456 tokens, Maximum concurrency for 2,048 tokens per request: 60.28x"),
    Line(116.0, GPU_0, "Graph capturing finished in 4 secs, took 0.50 GiB"),
    Line(116.1, GPU_1, "Graph capturing finished in 3 secs, took 0.50 GiB"),
    Line(
        116.5, CORE, "init engine (profile, create kv cache, warmup model) took 20.50 s (compilation: 10.00 s)"
    ),
]  # fmt: skip


def test_the_slowest_process_counts_and_the_parts_add_up_to_the_total() -> None:
    found = phases(COMPILING)

    assert found == {"weights": 3.0, "compile": 10.0, "profile": 3.0, "capture": 4.0, "kernels": 3.5}
    assert sum(found.values()) - found["weights"] == 20.5


def test_what_one_process_compiles_in_turn_adds_up() -> None:
    """As with a model that drafts tokens for another, or one that encodes images."""
    lines = [
        Line(101.0, CORE, "[vision] torch.compile took 1.00 s in total"),
        Line(102.0, CORE, "torch.compile and initial profiling/warmup run together took 2.00 s in total"),
        Line(110.0, CORE, "init engine (profile, create kv cache, warmup model) took 10.00 s"),
    ]

    assert phases(lines) == {"weights": 0.0, "compile": 3.0, "profile": 7.0, "capture": 0.0, "kernels": 0.0}


def test_without_compilation_and_graphs_there_are_profile_and_kernels() -> None:
    lines = [
        Line(100.75, CORE, "CPU KV cache size: 9,000 tokens, Maximum concurrency for 2,048 tokens per request: 4.4x"),
        Line(101.0, CORE, "init engine (profile, create kv cache, warmup model) took 1.00 s"),
    ]

    assert phases(lines) == {"weights": 0.0, "compile": 0.0, "profile": 0.75, "capture": 0.0, "kernels": 0.25}


def test_nothing_is_negative_and_the_total_holds_if_the_log_is_inconsistent() -> None:
    """Graph capture is logged in whole seconds, and a clock may be set during a start."""
    lines = [
        Line(100.9, CORE, "GPU KV cache size: 9,000 tokens"),
        Line(101.0, GPU_0, "Graph capturing finished in 1 secs, took 0.50 GiB"),
        Line(101.0, GPU_0, "torch.compile took 9.00 s in total"),
        Line(101.0, CORE, "init engine (profile, create kv cache, warmup model) took 1.25 s"),
    ]

    assert phases(lines) == {"weights": 0.0, "compile": 1.25, "profile": 0.0, "capture": 0.0, "kernels": 0.0}


def test_what_is_not_logged_took_no_time() -> None:
    assert set(phases([]).values()) == {0.0}


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        (["Directly load AOT compilation from path /x"], CompileCache.USED),
        (["Directly load the compiled graph(s) for compile range (1, 2) from the cache"], CompileCache.USED),
        (["Compiling a graph for compile range (1, 2) takes 9.00 s"], CompileCache.EMPTY),
        (
            ["Compiling model again due to a load failure from /x, reason: y", "saved AOT compiled function"],
            CompileCache.UNLOADABLE,
        ),
        (["Loading weights took 1.00 s"], None),
    ],
)  # fmt: skip
def test_a_start_says_what_it_found_of_compiled_code(messages: list[str], found: CompileCache | None) -> None:
    assert compile_cache([Line(100.0, CORE, message) for message in messages]) == found
