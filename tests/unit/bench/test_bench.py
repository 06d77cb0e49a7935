"""The bench: its clients, and the metrics computed from what they record. No test depends on timing."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from bench import cold, goals, plots, report
from bench.__main__ import parser
from bench.clients import Address, RequestTrace, closed_loop, open_loop, send
from bench.compare import Results, compare
from bench.environment import commit, hardware, versions
from bench.metrics import (
    METRICS,
    Chunk,
    InvalidResponseError,
    Measurement,
    Response,
    parse_response,
    percentile,
    platform_metrics,
    summarize,
)
from bench.scenarios import Scenario, default_scenarios, full_scenarios, poisson_arrivals
from bench.synthetic_model import tensor_shapes, write_weights
from bench.systems import OURS, PEER, VLLM, stock_setup, worker_options
from emulator.free_port import free_port
from engine.backend.merging import is_plain_text

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
FOUR = Scenario(clients=2, tokens=4)


def event(text: str, tokens: int, finish: str | None = None) -> bytes:
    choice = {"delta": {"content": text}, "finish_reason": finish, "token_ids": list(range(tokens))}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
# The first event of a chat has a role and no token.
FIRST = b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": null}]}\n\n'
EVENTS = [FIRST, event("a", 1), event("bc", 2), event("d", 1, "length"), DONE]


def framed(data: bytes) -> bytes:
    """One chunk of HTTP's chunked encoding."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def trace(*pieces: tuple[float, bytes], due_s: float = 0.0, ended_s: float = 1.0) -> RequestTrace:
    return RequestTrace(due_s, list(pieces), ended_s)


# Parsing what was received.


def test_percentiles_are_interpolated_between_neighbours() -> None:
    assert percentile([7.0], 0.99) == 7.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert percentile([0.0, 10.0], 0.95) == pytest.approx(9.5)
    assert percentile(list(range(101)), 0.99) == 99


def test_time_between_chunks_is_divided_among_the_tokens_of_the_later_one() -> None:
    response = Response(1.0, [Chunk(0.1, 1), Chunk(0.4, 3), Chunk(0.5, 1)])
    assert list(response.inter_token_latencies_s()) == pytest.approx([0.1, 0.1, 0.1, 0.1])
    assert list(response.inter_chunk_latencies_s()) == pytest.approx([0.3, 0.1])


def test_a_response_of_one_chunk_has_a_first_token_and_no_inter_token_latency() -> None:
    found = summarize([trace((0.25, HEAD + b"".join(map(framed, EVENTS)) + framed(b"")))], FOUR).metrics
    assert found["ttft_p50_ms"] == pytest.approx(250)
    assert found["itl_p95_ms"] is None
    assert found["inter_chunk_p95_ms"] is None


def test_the_first_token_is_the_first_text_and_not_the_role() -> None:
    pieces = [
        (0.1, HEAD),
        (0.2, framed(FIRST)),
        (0.3, framed(event("a", 1))),
        (0.5, framed(event("b", 3, "length"))),
    ]
    response = parse_response(trace(*pieces, (0.6, framed(DONE) + framed(b"")), due_s=0.05), FOUR)
    assert [at for at, _ in response.chunks] == pytest.approx([0.25, 0.45])
    assert [tokens for _, tokens in response.chunks] == [1, 3]


def test_tokens_without_text_count_with_the_chunk_that_shows_them() -> None:
    half = [
        framed(event("a", 1)),
        framed(event("", 1)),
        framed(event("é", 1)),
        framed(event("", 1, "length") + DONE),
    ]
    response = parse_response(trace((0.0, HEAD), *((0.1 * at, data) for at, data in enumerate(half, 1))), FOUR)
    assert [tokens for _, tokens in response.chunks] == [1, 2]
    assert response.tokens == 4


def test_a_response_is_the_same_however_the_socket_splits_it() -> None:
    complete = HEAD + b"".join(map(framed, EVENTS)) + framed(b"")
    for size in (1, 2, 7, 50, len(complete)):
        pieces = [(0.5, complete[at : at + size]) for at in range(0, len(complete), size)]
        # The status line is expected in the first piece; a kernel does not split it.
        pieces = [(0.5, complete[:20]), *((0.5, complete[at : at + size]) for at in range(20, len(complete), size))]
        assert parse_response(trace(*pieces), FOUR).tokens == 4


def test_the_tokens_of_a_response_that_is_not_streamed_are_read_from_usage() -> None:
    body = json.dumps({"usage": {"completion_tokens": 4}, "choices": [{"finish_reason": "length"}]}).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    found = summarize([trace((0.5, head + body), ended_s=0.5)], Scenario(clients=1, tokens=4, streamed=False))
    assert found.errors == {}
    assert found.metrics["tokens_per_s"] == pytest.approx(8)
    assert found.metrics["e2e_p50_ms"] == pytest.approx(500)
    assert found.metrics["ttft_p50_ms"] is None


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (HEAD + b"".join(map(framed, EVENTS[:-1])), "the stream does not end with [DONE]"),
        (HEAD + framed(event("abcd", 4, "stop") + DONE), "finish reason 'stop' instead of 'length'"),
        (HEAD + framed(event("abc", 3, "length") + DONE), "3 tokens instead of 4"),
        (HEAD + framed(b'data: {"error": {"code": 500}}\n\n'), 'error event: {"error": {"code": 500}}'),
        (HEAD + framed(b"data: nothing\n\n"), "malformed response: JSONDecodeError"),
        (HEAD + framed(b"data: 1\n\n"), "malformed response: TypeError"),
        (b"HTTP/1.1 429 Too Many\r\nContent-Length: 4\r\n\r\nfull", "status 429: full"),
    ],
)
def test_an_incomplete_response_is_an_error(response: bytes, message: str) -> None:
    found = summarize([trace((0.1, response)), trace((0.1, response))], FOUR)
    assert found.errors == {message: 2}
    assert (found.metrics["errors"], found.metrics["requests"], found.metrics["requests_per_s"]) == (2, 0, 0)


def test_a_failed_connection_is_an_error() -> None:
    with pytest.raises(InvalidResponseError, match="connection closed without a response"):
        parse_response(trace(), FOUR)
    for malformed in (b"garbage", HEAD + b"zz\r\n"):
        with pytest.raises(InvalidResponseError, match="malformed response"):
            parse_response(trace((0.1, malformed)), FOUR)
    broken = RequestTrace(0.0, [(0.1, HEAD)], 1.0, "ConnectionResetError: reset")
    with pytest.raises(InvalidResponseError, match="ConnectionResetError: reset"):
        parse_response(broken, FOUR)


def test_throughput_is_from_the_first_request_to_the_last_end() -> None:
    complete = HEAD + b"".join(map(framed, EVENTS)) + framed(b"")
    found = summarize([trace((2.0, complete), due_s=1.0, ended_s=2.0), trace((3.0, complete), ended_s=3.0)], FOUR)
    assert found.metrics["requests_per_s"] == pytest.approx(2 / 3)
    assert found.metrics["tokens_per_s"] == pytest.approx(8 / 3)


def test_the_platform_reports_time_in_queue_and_deliveries_per_token() -> None:
    jobs: list[dict[str, Any]] = [
        {"status": "COMPLETED", "delayTime": 10, "outputs": 1},
        {"status": "COMPLETED", "delayTime": 30, "outputs": 3},
        {"status": "FAILED", "delayTime": None, "outputs": 0},
    ]
    found = platform_metrics(jobs, FOUR)
    assert found["queue_p50_ms"] == pytest.approx(20)
    assert found["deliveries_per_token"] == 0.5
    assert found.keys() <= METRICS.keys()
    assert platform_metrics([], FOUR) == {}


# Load.


def test_arrivals_are_the_same_for_the_same_seed_and_have_the_requested_rate() -> None:
    one = poisson_arrivals(50, 20, "a")
    assert one == poisson_arrivals(50, 20, "a")
    assert one != poisson_arrivals(50, 20, "b")
    assert one == sorted(one)
    assert one[0] > 0
    assert one[-1] < 20
    # Five standard deviations.
    assert abs(len(one) - 1000) < 160


def test_a_request_fixes_the_number_of_output_tokens() -> None:
    streamed = json.loads(Scenario(clients=1, tokens=16).body())
    assert (streamed["max_tokens"], streamed["ignore_eos"], streamed["stream"]) == (16, True, True)
    assert "stream" not in json.loads(Scenario(clients=1, streamed=False).body())


def test_token_ids_are_requested_only_by_the_scenario_that_measures_them() -> None:
    assert is_plain_text("/v1/chat/completions", json.loads(Scenario(clients=1).body()))
    assert not is_plain_text("/v1/chat/completions", json.loads(Scenario(clients=1, token_ids=True).body()))


def text_event(text: str, finish: str | None = None) -> bytes:
    return (
        b"data: " + json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": finish}]}).encode() + b"\n\n"
    )


USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 4}}\n\n'


def test_without_token_ids_tokens_are_divided_by_characters() -> None:
    pieces = [
        (0.1, FIRST + text_event("ab")),
        (0.2, text_event("abc") + text_event("defgh")),
        (0.4, text_event("xy", "length") + USAGE + DONE),
    ]
    found = parse_response(trace((0.0, HEAD), *((at, framed(data)) for at, data in pieces), (0.5, framed(b""))), FOUR)

    assert found.tokens == 4
    assert found.chunks == [(0.1, 1), (0.2, 2), (0.4, 1)]


def test_a_response_without_usage_and_token_ids_is_an_error() -> None:
    pieces = [(0.1, FIRST + text_event("abcd", "length") + DONE)]

    with pytest.raises(InvalidResponseError, match="0 tokens instead of 4"):
        parse_response(trace((0.0, HEAD), *((at, framed(data)) for at, data in pieces), (0.5, framed(b""))), FOUR)


def test_the_default_scenarios_are_those_of_the_targets() -> None:
    names = [scenario.name for scenario in default_scenarios([1, 8, 24, 64])]
    assert names == [
        "1 client, 64 tokens, streamed, platform latency 0 ms",
        "8 clients, 64 tokens, streamed, platform latency 0 ms",
        "24 clients, 64 tokens, streamed, platform latency 0 ms",
        "64 clients, 64 tokens, streamed, platform latency 0 ms",
        "64 clients, 64 tokens, streamed, platform latency 40 ms",
        "64 clients, 64 tokens, streamed, token ids, platform latency 0 ms",
    ]


def test_the_full_list_has_every_axis_and_no_duplicates() -> None:
    scenarios = full_scenarios([1, 8, 24, 64, 256])
    assert set(default_scenarios([1, 8, 24, 64])) <= set(scenarios)
    assert len(set(scenarios)) == len(scenarios)
    assert {scenario.tokens for scenario in scenarios} == {16, 64, 256}
    assert {scenario.latency_ms for scenario in scenarios} == {0, 40, 150}
    assert {scenario.streamed for scenario in scenarios} == {True, False}
    assert any(scenario.capacity_share for scenario in scenarios)


@asynccontextmanager
async def server(responses: list[list[bytes] | int]) -> AsyncIterator[tuple[Address, list[dict[str, Any]]]]:
    """Run a server that repeats these responses in turn: events of a stream, or a status. Yield its requests, too."""
    received: list[dict[str, Any]] = []

    async def chat(request: web.Request) -> web.StreamResponse:
        planned = responses[len(received) % len(responses)]
        received.append(await request.json())
        if isinstance(planned, int):
            return web.json_response({"error": "busy"}, status=planned)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for data in planned:
            await response.write(data)
        return response

    app = web.Application()
    app.router.add_post("/v1/chat", chat)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        port: int = runner.addresses[0][1]
        yield Address(port, "/v1/chat"), received
    finally:
        await runner.cleanup()


@pytest.mark.anyio
async def test_closed_loop_clients_send_again_and_their_responses_are_parsed() -> None:
    async with server([EVENTS]) as (address, received):
        traces = await closed_loop(address, FOUR.body(), clients=3, seconds=0.05)
    assert len(traces) == len(received) >= 3
    assert received[0] == json.loads(FOUR.body())
    found = summarize(traces, FOUR)
    assert found.errors == {}
    assert found.metrics["requests"] == len(traces)
    assert all(found.metrics[name] is not None for name in ("ttft_p99_ms", "e2e_p95_ms", "requests_per_s"))


@pytest.mark.anyio
async def test_open_loop_sends_every_request_and_measures_from_when_it_was_due() -> None:
    async with server([EVENTS]) as (address, received):
        traces = await open_loop(address, FOUR.body(), [0.0, 0.01, 0.02])
    assert len(received) == 3
    first = traces[0].due_s
    assert [it.due_s - first for it in traces] == pytest.approx([0.0, 0.01, 0.02])
    assert all(it.received[0][0] >= it.due_s for it in traces)


@pytest.mark.anyio
async def test_errors_are_counted_by_kind_and_do_not_count_as_responses() -> None:
    async with server([EVENTS, 503, EVENTS[:-1]]) as (address, _):
        traces = [await send(address, FOUR.body()) for _ in range(6)]
    found = summarize(traces, FOUR)
    assert found.metrics["requests"] == 2
    assert found.errors == {'status 503: {"error": "busy"}': 2, "the stream does not end with [DONE]": 2}


@pytest.mark.anyio
async def test_an_unreachable_server_is_an_error_and_not_an_exception() -> None:
    found = await send(Address(free_port(), "/v1/chat"), FOUR.body())
    assert not found.ok
    assert str(found.error).startswith("ConnectionRefusedError")


@pytest.mark.anyio
async def test_a_request_that_does_not_end_times_out() -> None:
    disconnected = asyncio.Event()

    async def never_respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await reader.read()
        writer.close()
        disconnected.set()

    async with await asyncio.start_server(never_respond, "127.0.0.1", 0) as listening:
        port: int = listening.sockets[0].getsockname()[1]
        found = await send(Address(port, "/"), FOUR.body(), timeout_s=0.1)
        await disconnected.wait()
    assert found.error == "timed out after 0.1 s"
    assert found.received == []


class FakeSystem:
    """A `SystemUnderTest` without processes that records when it is measured."""

    def __init__(self, name: str, address: Address, order: list[str]) -> None:
        self.name = name
        self.address = address
        self.platform = None
        self._order = order

    def worker_cpu_s(self) -> float:
        self._order.append(self.name)
        return 0.0

    def memory_mib(self) -> float:
        return 1.0


def test_many_clients_are_measured_for_longer() -> None:
    assert [Scenario(clients=count).duration_s(4.0) for count in (1, 24, 64, 256)] == [4.0, 4.0, 12.0, 12.0]
    assert Scenario(capacity_share=0.5).duration_s(4.0) == 4.0


@pytest.mark.anyio
async def test_rounds_rotate_the_order_of_the_systems() -> None:
    order: list[str] = []
    reported: list[int] = []
    async with server([EVENTS]) as (address, _):
        names = [VLLM, OURS, PEER]
        fakes: list[Any] = [FakeSystem(name, address, order) for name in names]
        found = await compare(fakes, [FOUR], 3, 0.01, lambda _, rounds: reported.append(rounds))
    # CPU is read before and after a measurement; the first measurement of each system is the warm-up.
    assert order[6::2] == [VLLM, OURS, PEER, OURS, PEER, VLLM, PEER, VLLM, OURS]
    assert reported == [1, 2, 3]
    assert all(len(found.rounds[FOUR][name]) == 3 for name in names)
    assert found.values(FOUR, OURS, "memory_mib") == [1.0, 1.0, 1.0]


# Results.

ONE, EIGHT, MANY, MOST = (Scenario(clients=count) for count in (1, 8, 24, 64))
FAR = Scenario(clients=64, latency_ms=40)


def results(**ours: list[float]) -> Results:
    """Make results in which the other systems' metrics are 100 in each round."""
    found = Results([ONE, EIGHT, MANY, MOST, FAR], [VLLM, OURS, PEER])
    rounds = len(next(iter(ours.values())))
    for by_system in found.rounds.values():
        for name, measurements in by_system.items():
            for number in range(rounds):
                metrics: dict[str, float | None] = dict.fromkeys(METRICS)
                metrics |= {metric: values[number] if name == OURS else 100.0 for metric, values in ours.items()}
                measurements.append(Measurement(metrics, {"status 500: oh": 2} if name == PEER else {}))
    return found


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    found = results(requests_per_s=[50, 100, 400])
    found.rounds[MOST][VLLM][0].metrics["requests_per_s"] = 10.0
    assert found.ratio(MOST, "requests_per_s", OURS, VLLM) == 4.0
    assert found.ratio(MOST, "requests_per_s", OURS, PEER) == 1.0
    assert found.ratio(MOST, "ttft_p50_ms", OURS, PEER) is None


def test_a_round_without_a_metric_is_left_out_of_the_ratios() -> None:
    found = results(requests_per_s=[50, 100, 400])
    found.rounds[MOST][OURS][1].metrics["requests_per_s"] = None
    assert found.pairs(MOST, "requests_per_s", OURS, VLLM) == [(50, 100), (400, 100)]


def test_the_table_shows_medians_spreads_ratios_and_errors() -> None:
    text = report.render_text(results(requests_per_s=[50, 100, 400]), {"CPU": "a fast one"}, rounds=3)
    assert "CPU: a fast one" in text
    assert MOST.name in text
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "requests/s 100 (100 .. 100) 100 (50 .. 400) 100 (100 .. 100) 1.00 1.00" in rows
    assert "worker-vllm: 6 x status 500: oh" in text
    # The report includes the definitions.
    assert "divided equally among the tokens" in text
    assert "only 3 rounds; a verdict needs 7" in text


def test_the_report_leaves_out_a_system_that_did_not_start() -> None:
    found = Results([ONE], [OURS])
    found.rounds[ONE][OURS].append(Measurement(dict.fromkeys(METRICS) | {"requests_per_s": 5.0}, {}))
    text = report.render_text(found, {}, rounds=1)
    assert "requests/s" in text
    assert text.count("not measured") == 10


def test_targets_are_judged_by_medians() -> None:
    found = results(
        requests_per_s=[90, 110, 350],
        ttft_p50_ms=[10, 14, 16],
        ttft_p95_ms=[119, 120, 130],
        itl_p95_ms=[61, 62, 10],
        inter_chunk_p95_ms=[110, 120, 130],
        cpu_s_per_1000_tokens=[35, 36, 37],
    )
    verdicts = [target.verdict for target in goals.load_targets(found)]
    assert verdicts == [
        "met",  # 1.1 of vLLM alone's throughput
        "MISSED",  # 1.1 of worker-vllm's
        "met",  # at 40 ms platform latency
        "met",  # 0.14 of worker-vllm's first token
        "met",  # 86 ms less than vLLM's
        "met",  # 1.2 of its 95th percentile: the bound itself is met
        "MISSED",  # 61 ms
        "met",
        "met",  # 120 ms
        "MISSED",  # 0.36
    ]


def test_the_json_has_every_round_and_can_be_read_back(tmp_path: Path) -> None:
    found = results(requests_per_s=[50, 100])
    report.write_json(tmp_path / "new" / "results.json", report.to_document(found, {"CPU": "one"}))
    read = json.loads((tmp_path / "new" / "results.json").read_text(encoding="utf-8"))
    most = next(it for it in read["scenarios"] if it["name"] == MOST.name)
    assert [it["metrics"]["requests_per_s"] for it in most["systems"][OURS]] == [50, 100]
    assert most["ratios"][f"{OURS} / {VLLM}"]["requests_per_s"] == 0.75
    assert len(read["targets"]) == 10
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["results.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    report.write_text(path, "old")

    def broken(temporary: Path) -> None:
        temporary.write_text("half", encoding="utf-8")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        report.write_atomically(path, broken)
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_plots_are_written_as_png_and_svg(tmp_path: Path) -> None:
    found = results(requests_per_s=[50, 100], ttft_p50_ms=[1, 2], ttft_p95_ms=[2, 3], itl_p50_ms=[1, 1])
    files = plots.write_plots(found, tmp_path)
    assert {file.name for file in files} == {
        f"{name}{ending}" for name in ("throughput", "ttft", "itl") for ending in (".png", ".svg")
    }
    assert set(tmp_path.iterdir()) == set(files)
    for file in files:
        begins = file.read_bytes()[:8]
        assert begins == b"\x89PNG\r\n\x1a\n" if file.suffix == ".png" else begins.startswith(b"<?xml")


def test_without_a_closed_loop_there_is_nothing_to_plot(tmp_path: Path) -> None:
    assert plots.write_plots(Results([Scenario(capacity_share=0.5)], [OURS]), tmp_path) == []


# Cold starts.


def test_the_phases_of_a_start_are_read_from_the_log() -> None:
    line = 'INFO   | Cold start {"total_s": 13.2, "phases_s": {"interpreter": 0.1, "engine": 9}}'
    assert cold.read_phases(["Cold start comes", "Cold start {half", line]) == {"interpreter": 0.1, "engine": 9.0}
    assert cold.read_phases(["nothing"]) == {}


def test_starts_are_compared_in_pairs_and_failed_starts_are_left_out() -> None:
    ours: list[cold.ColdStart | None] = [cold.ColdStart(10.0, 9.0, {"engine": 5.0}), None, cold.ColdStart(12.0, 11.0)]
    peers: list[cold.ColdStart | None] = [cold.ColdStart(20.0, 19.0) for _ in range(3)]
    found = {OURS: ours, PEER: peers}
    assert cold.ratios(found) == [0.5, 0.6]
    assert goals.cold_start_target(cold.ratios(found), "tiny", "cold").verdict == "met"
    assert goals.cold_start_target([], "tiny", "cold").verdict == "not measured"
    rows = [" ".join(line.split()) for line in cold.table(found)]
    assert rows[1:] == [
        "first token 11 (10 .. 12) 20 (20 .. 20)",
        "ready 10 (9 .. 11) 19 (19 .. 19)",
        "engine 5",
    ]


def test_synthetic_weights_match_their_header(tmp_path: Path) -> None:
    config = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    shapes = tensor_shapes(config)
    assert shapes["model.layers.1.self_attn.qkv_proj.weight"] == (16, 8)
    write_weights(shapes, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["weight_map"].keys() == shapes.keys()
    files = set(index["weight_map"].values())
    assert len(files) > 1
    for file in files:
        content = (tmp_path / file).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        data = content[8 + length :]
        for name, (begin, end) in ((name, it["data_offsets"]) for name, it in header.items() if name[0] != "_"):
            assert header[name]["dtype"] == "BF16"
            assert tuple(header[name]["shape"]) == shapes[name]
            if len(shapes[name]) == 1:
                assert data[begin:end] == b"\x80\x3f" * shapes[name][0]


# The command line and the environment.


def test_the_command_line_has_two_commands() -> None:
    load = parser().parse_args(["--peer", "dir", "--rounds", "3", "--clients", "1", "2"])
    assert (load.command, load.peer, load.rounds, load.clients) == (None, Path("dir"), 3, [1, 2])
    before = parser().parse_args(["--rounds", "2", "--peer", "dir", "cold"])
    assert (before.command, before.rounds, before.peer, before.out) == ("cold", 2, Path("dir"), Path("bench-results"))
    start = parser().parse_args(["cold", "--model", "1gb", "--cache", "warm", "--rounds", "2", "--peer", "dir"])
    assert (start.command, start.model, start.cache, start.rounds, start.peer) == (
        "cold",
        "1gb",
        "warm",
        2,
        Path("dir"),
    )


def test_a_peer_must_be_a_checkout_of_worker_vllm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench.__main__ import main

    assert main(["--peer", str(tmp_path)]) == 2
    assert "it has no src/main.py" in capsys.readouterr().err


def test_hardware_and_versions_are_reported(tmp_path: Path) -> None:
    assert all(hardware().values())
    found = versions(tmp_path)
    assert {"vllm", "torch", "runpod", "python", "kernel", "this repository"} <= found.keys()
    assert found["worker-vllm"] == commit(tmp_path) == "not a git checkout"


def test_all_workers_get_the_same_settings() -> None:
    options = worker_options(stock_setup(Path("dir"), gpu=False))
    assert options == [
        *("--env=MODEL_NAME=dir", "--env=SERVED_MODEL_NAME=tiny"),
        *("--env=ENFORCE_EAGER=true", "--env=DTYPE=float32"),
    ]
    assert "--env=GPU_MEMORY_UTILIZATION=0.25" in worker_options(stock_setup(Path("dir"), gpu=True))
