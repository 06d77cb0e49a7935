"""The bench: its clients, and what it makes of what they saw. Nothing here depends on how fast anything is."""

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
from bench.clients import Address, Exchange, ask, closed_loop, open_loop
from bench.compare import Results, compare
from bench.environment import commit, machine, versions
from bench.metrics import (
    FIGURES,
    Answer,
    FaultyAnswerError,
    Measurement,
    measurement,
    percentile,
    platform_figures,
    read_answer,
)
from bench.scenarios import Scenario, default_scenarios, full_scenarios, poisson_arrivals
from bench.synthetic_model import shapes, write_weights
from bench.systems import OURS, PEER, VLLM, free_port, worker_options
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


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def exchange(*pieces: tuple[float, bytes], due_s: float = 0.0, ended_s: float = 1.0) -> Exchange:
    return Exchange(due_s, list(pieces), ended_s)


# What is read from what came.


def test_percentiles_are_interpolated_between_neighbours() -> None:
    assert percentile([7.0], 0.99) == 7.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert percentile([0.0, 10.0], 0.95) == pytest.approx(9.5)
    assert percentile(list(range(101)), 0.99) == 99


def test_time_between_arrivals_is_shared_by_the_tokens_of_the_later_one() -> None:
    answer = Answer(1.0, [(0.1, 1), (0.4, 3), (0.5, 1)])
    assert list(answer.inter_token_s()) == pytest.approx([0.1, 0.1, 0.1, 0.1])
    assert list(answer.gaps_s()) == pytest.approx([0.3, 0.1])


def test_an_answer_of_one_arrival_has_a_first_token_and_no_latency_between_tokens() -> None:
    found = measurement([exchange((0.25, HEAD + b"".join(map(chunk, EVENTS)) + chunk(b"")))], FOUR).figures
    assert found["ttft_p50_ms"] == pytest.approx(250)
    assert found["itl_p95_ms"] is None
    assert found["gap_p95_ms"] is None


def test_the_first_token_is_the_first_text_and_not_the_role() -> None:
    pieces = [(0.1, HEAD), (0.2, chunk(FIRST)), (0.3, chunk(event("a", 1))), (0.5, chunk(event("b", 3, "length")))]
    answer = read_answer(exchange(*pieces, (0.6, chunk(DONE) + chunk(b"")), due_s=0.05), FOUR)
    assert [at for at, _ in answer.shown] == pytest.approx([0.25, 0.45])
    assert [tokens for _, tokens in answer.shown] == [1, 3]


def test_tokens_without_text_count_with_the_arrival_that_shows_them() -> None:
    half = [chunk(event("a", 1)), chunk(event("", 1)), chunk(event("é", 1)), chunk(event("", 1, "length") + DONE)]
    answer = read_answer(exchange((0.0, HEAD), *((0.1 * at, data) for at, data in enumerate(half, 1))), FOUR)
    assert [tokens for _, tokens in answer.shown] == [1, 2]
    assert answer.tokens == 4


def test_an_answer_is_the_same_however_the_socket_cuts_it() -> None:
    whole = HEAD + b"".join(map(chunk, EVENTS)) + chunk(b"")
    for size in (1, 2, 7, 50, len(whole)):
        pieces = [(0.5, whole[at : at + size]) for at in range(0, len(whole), size)]
        # The status line is looked for in the first piece, which a kernel does not cut so short.
        pieces = [(0.5, whole[:20]), *((0.5, whole[at : at + size]) for at in range(20, len(whole), size))]
        assert read_answer(exchange(*pieces), FOUR).tokens == 4


def test_an_answer_that_does_not_stream_has_its_tokens_from_its_usage() -> None:
    body = json.dumps({"usage": {"completion_tokens": 4}, "choices": [{"finish_reason": "length"}]}).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    found = measurement([exchange((0.5, head + body), ended_s=0.5)], Scenario(clients=1, tokens=4, streamed=False))
    assert found.errors == {}
    assert found.figures["tokens_per_s"] == pytest.approx(8)
    assert found.figures["answer_p50_ms"] == pytest.approx(500)
    assert found.figures["ttft_p50_ms"] is None


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (HEAD + b"".join(map(chunk, EVENTS[:-1])), "the stream does not end with [DONE]"),
        (HEAD + chunk(event("abcd", 4, "stop") + DONE), "finish reason 'stop' instead of 'length'"),
        (HEAD + chunk(event("abc", 3, "length") + DONE), "3 tokens instead of 4"),
        (HEAD + chunk(b'data: {"error": {"code": 500}}\n\n'), 'error event: {"error": {"code": 500}}'),
        (HEAD + chunk(b"data: nothing\n\n"), "not understood: JSONDecodeError"),
        (HEAD + chunk(b"data: 1\n\n"), "not understood: TypeError"),
        (b"HTTP/1.1 429 Too Many\r\nContent-Length: 4\r\n\r\nfull", "status 429: full"),
    ],
)
def test_an_answer_that_is_not_whole_is_an_error(answer: bytes, fault: str) -> None:
    found = measurement([exchange((0.1, answer)), exchange((0.1, answer))], FOUR)
    assert found.errors == {fault: 2}
    assert (found.figures["errors"], found.figures["requests"], found.figures["requests_per_s"]) == (2, 0, 0)


def test_a_connection_that_fails_is_an_error() -> None:
    with pytest.raises(FaultyAnswerError, match="closed without an answer"):
        read_answer(exchange(), FOUR)
    broken = Exchange(0.0, [(0.1, HEAD)], 1.0, "ConnectionResetError: reset")
    with pytest.raises(FaultyAnswerError, match="ConnectionResetError: reset"):
        read_answer(broken, FOUR)


def test_throughput_is_from_the_first_request_to_the_last_end() -> None:
    whole = HEAD + b"".join(map(chunk, EVENTS)) + chunk(b"")
    found = measurement([exchange((2.0, whole), due_s=1.0, ended_s=2.0), exchange((3.0, whole), ended_s=3.0)], FOUR)
    assert found.figures["requests_per_s"] == pytest.approx(2 / 3)
    assert found.figures["tokens_per_s"] == pytest.approx(8 / 3)


def test_the_platform_tells_the_time_in_queue_and_deliveries_per_token() -> None:
    jobs: list[dict[str, Any]] = [
        {"status": "COMPLETED", "delayTime": 10, "outputs": 1},
        {"status": "COMPLETED", "delayTime": 30, "outputs": 3},
        {"status": "FAILED", "delayTime": None, "outputs": 0},
    ]
    found = platform_figures(jobs, FOUR)
    assert found["queue_p50_ms"] == pytest.approx(20)
    assert found["deliveries_per_token"] == 0.5
    assert found.keys() <= FIGURES.keys()
    assert platform_figures([], FOUR) == {}


# Loads.


def test_arrivals_are_the_same_for_the_same_seed_and_as_many_as_asked_for() -> None:
    one = poisson_arrivals(50, 20, "a")
    assert one == poisson_arrivals(50, 20, "a")
    assert one != poisson_arrivals(50, 20, "b")
    assert one == sorted(one)
    assert one[0] > 0
    assert one[-1] < 20
    # Five standard deviations.
    assert abs(len(one) - 1000) < 160


def test_a_request_asks_for_exactly_so_many_tokens() -> None:
    streamed = json.loads(Scenario(clients=1, tokens=16).body())
    assert (streamed["max_tokens"], streamed["ignore_eos"], streamed["stream"]) == (16, True, True)
    assert "stream" not in json.loads(Scenario(clients=1, streamed=False).body())


def test_plain_text_is_asked_for_as_its_users_do_and_token_ids_only_where_they_are_the_point() -> None:
    assert is_plain_text("/v1/chat/completions", json.loads(Scenario(clients=1).body()))
    assert not is_plain_text("/v1/chat/completions", json.loads(Scenario(clients=1, token_ids=True).body()))


def said(text: str, finish: str | None = None) -> bytes:
    return (
        b"data: " + json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": finish}]}).encode() + b"\n\n"
    )


USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 4}}\n\n'


def test_tokens_that_no_event_tells_are_shared_by_their_characters() -> None:
    pieces = [(0.1, FIRST + said("ab")), (0.2, said("abc") + said("defgh")), (0.4, said("xy", "length") + USAGE + DONE)]
    found = read_answer(exchange((0.0, HEAD), *((at, chunk(data)) for at, data in pieces), (0.5, chunk(b""))), FOUR)

    assert found.tokens == 4
    assert found.shown == [(0.1, 1), (0.2, 2), (0.4, 1)]


def test_an_answer_without_usage_and_token_ids_is_not_whole() -> None:
    pieces = [(0.1, FIRST + said("abcd", "length") + DONE)]

    with pytest.raises(FaultyAnswerError, match="0 tokens instead of 4"):
        read_answer(exchange((0.0, HEAD), *((at, chunk(data)) for at, data in pieces), (0.5, chunk(b""))), FOUR)


def test_the_default_scenarios_are_those_that_the_targets_speak_of() -> None:
    names = [scenario.name for scenario in default_scenarios([1, 8, 24, 64])]
    assert names == [
        "1 client, 64 tokens, streamed, platform 0 ms away",
        "8 clients, 64 tokens, streamed, platform 0 ms away",
        "24 clients, 64 tokens, streamed, platform 0 ms away",
        "64 clients, 64 tokens, streamed, platform 0 ms away",
        "64 clients, 64 tokens, streamed, platform 40 ms away",
        "64 clients, 64 tokens, streamed, token ids, platform 0 ms away",
    ]


def test_the_full_list_has_every_axis_and_nothing_twice() -> None:
    scenarios = full_scenarios([1, 8, 24, 64, 256])
    assert set(default_scenarios([1, 8, 24, 64])) <= set(scenarios)
    assert len(set(scenarios)) == len(scenarios)
    assert {scenario.tokens for scenario in scenarios} == {16, 64, 256}
    assert {scenario.latency_ms for scenario in scenarios} == {0, 40, 150}
    assert {scenario.streamed for scenario in scenarios} == {True, False}
    assert any(scenario.load for scenario in scenarios)


@asynccontextmanager
async def server(answers: list[list[bytes] | int]) -> AsyncIterator[tuple[Address, list[dict[str, Any]]]]:
    """A server that gives these answers in turn, over and over: events of a stream, or a status."""
    asked: list[dict[str, Any]] = []

    async def chat(request: web.Request) -> web.StreamResponse:
        answer = answers[len(asked) % len(answers)]
        asked.append(await request.json())
        if isinstance(answer, int):
            return web.json_response({"error": "busy"}, status=answer)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for data in answer:
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
        yield Address(port, "/v1/chat"), asked
    finally:
        await runner.cleanup()


@pytest.mark.anyio
async def test_closed_loop_clients_ask_anew_and_their_answers_are_read() -> None:
    async with server([EVENTS]) as (address, asked):
        exchanges = await closed_loop(address, FOUR.body(), clients=3, seconds=0.05)
    assert len(exchanges) == len(asked) >= 3
    assert asked[0] == json.loads(FOUR.body())
    found = measurement(exchanges, FOUR)
    assert found.errors == {}
    assert found.figures["requests"] == len(exchanges)
    assert all(found.figures[name] is not None for name in ("ttft_p99_ms", "answer_p95_ms", "requests_per_s"))


@pytest.mark.anyio
async def test_open_loop_sends_every_request_and_counts_from_when_it_was_due() -> None:
    async with server([EVENTS]) as (address, asked):
        exchanges = await open_loop(address, FOUR.body(), [0.0, 0.01, 0.02])
    assert len(asked) == 3
    first = exchanges[0].due_s
    assert [it.due_s - first for it in exchanges] == pytest.approx([0.0, 0.01, 0.02])
    assert all(it.arrivals[0][0] >= it.due_s for it in exchanges)


@pytest.mark.anyio
async def test_errors_are_counted_by_kind_and_do_not_count_as_answers() -> None:
    async with server([EVENTS, 503, EVENTS[:-1]]) as (address, _):
        exchanges = [await ask(address, FOUR.body()) for _ in range(6)]
    found = measurement(exchanges, FOUR)
    assert found.figures["requests"] == 2
    assert found.errors == {'status 503: {"error": "busy"}': 2, "the stream does not end with [DONE]": 2}


@pytest.mark.anyio
async def test_a_server_that_is_not_there_is_an_error_and_not_an_exception() -> None:
    found = await ask(Address(free_port(), "/v1/chat"), FOUR.body())
    assert found.refused
    assert str(found.failure).startswith("ConnectionRefusedError")


@pytest.mark.anyio
async def test_a_request_without_an_end_is_given_up() -> None:
    hung_up = asyncio.Event()

    async def answer_never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await reader.read()
        writer.close()
        hung_up.set()

    async with await asyncio.start_server(answer_never, "127.0.0.1", 0) as listening:
        port: int = listening.sockets[0].getsockname()[1]
        found = await ask(Address(port, "/"), FOUR.body(), limit_s=0.1)
        await hung_up.wait()
    assert found.failure == "no end within 0.1 s"
    assert found.arrivals == []


class StandIn:
    """A server that is ready, as `compare` takes it; the emulator behind it has seen one job a request."""

    def __init__(self, name: str, address: Address, order: list[str]) -> None:
        self.name = name
        self.address = address
        self.platform = None
        self._order = order

    def cpu_s(self) -> float:
        self._order.append(self.name)
        return 0.0

    def memory_mib(self) -> float:
        return 1.0


def test_many_clients_are_measured_for_longer() -> None:
    assert [Scenario(clients=count).lasts_s(4.0) for count in (1, 24, 64, 256)] == [4.0, 4.0, 12.0, 12.0]
    assert Scenario(load=0.5).lasts_s(4.0) == 4.0


@pytest.mark.anyio
async def test_rounds_rotate_the_order_of_the_servers() -> None:
    order: list[str] = []
    told: list[int] = []
    async with server([EVENTS]) as (address, _):
        names = [VLLM, OURS, PEER]
        standing: list[Any] = [StandIn(name, address, order) for name in names]
        found = await compare(standing, [FOUR], 3, 0.01, lambda _, rounds: told.append(rounds))
    # Each is looked at before and after a measurement; the first of each server is for warmth.
    assert order[6::2] == [VLLM, OURS, PEER, OURS, PEER, VLLM, PEER, VLLM, OURS]
    assert told == [1, 2, 3]
    assert all(len(found.rounds[FOUR][name]) == 3 for name in names)
    assert found.values(FOUR, OURS, "memory_mib") == [1.0, 1.0, 1.0]


# Results.

ONE, EIGHT, MANY, MOST = (Scenario(clients=count) for count in (1, 8, 24, 64))
FAR = Scenario(clients=64, latency_ms=40)


def results(**of_ours: list[float]) -> Results:
    """Results in which the figures of the others are 100 in each round."""
    found = Results([ONE, EIGHT, MANY, MOST, FAR], [VLLM, OURS, PEER])
    rounds = len(next(iter(of_ours.values())))
    for by_server in found.rounds.values():
        for name, measured in by_server.items():
            for number in range(rounds):
                figures: dict[str, float | None] = dict.fromkeys(FIGURES)
                figures |= {figure: values[number] if name == OURS else 100.0 for figure, values in of_ours.items()}
                measured.append(Measurement(figures, {"status 500: oh": 2} if name == PEER else {}))
    return found


def test_a_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    found = results(requests_per_s=[50, 100, 400])
    found.rounds[MOST][VLLM][0].figures["requests_per_s"] = 10.0
    assert found.ratio(MOST, "requests_per_s", OURS, VLLM) == 4.0
    assert found.ratio(MOST, "requests_per_s", OURS, PEER) == 1.0
    assert found.ratio(MOST, "ttft_p50_ms", OURS, PEER) is None


def test_a_round_without_a_figure_is_left_out_of_the_ratios() -> None:
    found = results(requests_per_s=[50, 100, 400])
    found.rounds[MOST][OURS][1].figures["requests_per_s"] = None
    assert found.pairs(MOST, "requests_per_s", OURS, VLLM) == [(50, 100), (400, 100)]


def test_the_table_shows_medians_spreads_ratios_and_errors() -> None:
    text = report.text(results(requests_per_s=[50, 100, 400]), {"CPU": "a fast one"}, rounds=3)
    assert "CPU: a fast one" in text
    assert MOST.name in text
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "requests/s 100 (100 .. 100) 100 (50 .. 400) 100 (100 .. 100) 1.00 1.00" in rows
    assert "worker-vllm: 6 x status 500: oh" in text
    # The definitions stand beside the figures.
    assert "shared equally among the tokens" in text
    assert "only 3 rounds; 7 are needed" in text


def test_a_server_that_did_not_start_is_missing_and_nothing_else_is() -> None:
    found = Results([ONE], [OURS])
    found.rounds[ONE][OURS].append(Measurement(dict.fromkeys(FIGURES) | {"requests_per_s": 5.0}, {}))
    text = report.text(found, {}, rounds=1)
    assert "requests/s" in text
    assert text.count("not measured") == 10


def test_targets_are_judged_by_medians() -> None:
    found = results(
        requests_per_s=[90, 110, 350],
        ttft_p50_ms=[10, 14, 16],
        ttft_p95_ms=[119, 120, 130],
        itl_p95_ms=[61, 62, 10],
        deliveries_per_token=[0.07, 0.08, 0.09],
        cpu_s_per_1000_tokens=[35, 36, 37],
    )
    verdicts = [target.verdict for target in goals.speed_targets(found)]
    assert verdicts == [
        "reached",  # 1.1 of vLLM alone's throughput
        "NOT REACHED",  # 1.1 of worker-vllm's
        "reached",  # far away
        "reached",  # 0.14 of worker-vllm's first token
        "reached",  # 86 ms before vLLM's
        "reached",  # 1.2 of its 95th percentile: a bound is within
        "NOT REACHED",  # 61 ms
        "reached",
        "reached",
        "NOT REACHED",  # 0.36
    ]


def test_the_json_has_every_round_and_can_be_read_back(tmp_path: Path) -> None:
    found = results(requests_per_s=[50, 100])
    report.write_json(tmp_path / "new" / "results.json", report.document(found, {"CPU": "one"}))
    read = json.loads((tmp_path / "new" / "results.json").read_text(encoding="utf-8"))
    most = next(it for it in read["scenarios"] if it["name"] == MOST.name)
    assert [it["figures"]["requests_per_s"] for it in most["servers"][OURS]] == [50, 100]
    assert most["ratios"][f"{OURS} / {VLLM}"]["requests_per_s"] == 0.75
    assert len(read["targets"]) == 10
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["results.json"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    report.write_text(path, "old")

    def broken(unfinished: Path) -> None:
        unfinished.write_text("half", encoding="utf-8")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        report.write_whole(path, broken)
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
    assert plots.write_plots(Results([Scenario(load=0.5)], [OURS]), tmp_path) == []


# Cold starts.


def test_the_phases_of_a_start_are_read_from_the_log() -> None:
    line = 'INFO   | Cold start {"total_s": 13.2, "phases_s": {"interpreter": 0.1, "engine": 9}}'
    assert cold.read_phases(["Cold start comes", "Cold start {half", line]) == {"interpreter": 0.1, "engine": 9.0}
    assert cold.read_phases(["nothing"]) == {}


def test_starts_are_compared_in_pairs_and_a_failed_one_is_left_out() -> None:
    ours: list[cold.Start | None] = [cold.Start(10.0, 9.0, {"engine": 5.0}), None, cold.Start(12.0, 11.0)]
    peers: list[cold.Start | None] = [cold.Start(20.0, 19.0), cold.Start(20.0, 19.0), cold.Start(20.0, 19.0)]
    found = {OURS: ours, PEER: peers}
    assert cold.ratios(found) == [0.5, 0.6]
    assert goals.cold_target(cold.ratios(found), "tiny", "cold").verdict == "reached"
    assert goals.cold_target([], "tiny", "cold").verdict == "not measured"
    rows = [" ".join(line.split()) for line in cold.table(found)]
    assert rows[1:] == [
        "to the first token 11 (10 .. 12) 20 (20 .. 20)",
        "to ready 10 (9 .. 11) 19 (19 .. 19)",
        "engine 5",
    ]


def test_made_up_weights_are_what_their_header_says(tmp_path: Path) -> None:
    config = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    wanted = shapes(config)
    assert wanted["model.layers.1.self_attn.qkv_proj.weight"] == (16, 8)
    write_weights(wanted, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["weight_map"].keys() == wanted.keys()
    files = set(index["weight_map"].values())
    assert len(files) > 1
    for file in files:
        content = (tmp_path / file).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        data = content[8 + length :]
        for name, (begin, end) in ((name, it["data_offsets"]) for name, it in header.items() if name[0] != "_"):
            assert header[name]["dtype"] == "BF16"
            assert tuple(header[name]["shape"]) == wanted[name]
            if len(wanted[name]) == 1:
                assert data[begin:end] == b"\x80\x3f" * wanted[name][0]


# The command line and the machine.


def test_the_command_line_has_two_commands() -> None:
    load = parser().parse_args(["--peer", "dir", "--rounds", "3", "--clients", "1", "2"])
    assert (load.command, load.peer, load.rounds, load.clients) == (None, Path("dir"), 3, [1, 2])
    start = parser().parse_args(["cold", "--model", "1gb", "--cache", "warm", "--rounds", "2", "--peer", "dir"])
    assert (start.command, start.model, start.cache, start.rounds, start.peer) == (
        "cold",
        "1gb",
        "warm",
        2,
        Path("dir"),
    )


def test_a_directory_without_a_worker_is_no_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench.__main__ import main

    assert main(["--peer", str(tmp_path)]) == 2
    assert "it has no src/main.py" in capsys.readouterr().err


def test_hardware_and_versions_are_told(tmp_path: Path) -> None:
    assert all(machine().values())
    found = versions(tmp_path)
    assert {"vllm", "torch", "runpod", "python", "kernel", "this repository"} <= found.keys()
    assert found["worker-vllm"] == commit(tmp_path) == "not a git checkout"


def test_workers_get_the_same_settings() -> None:
    options = worker_options("dir", gpu=False)
    assert options == [
        *("--env=MODEL_NAME=dir", "--env=SERVED_MODEL_NAME=tiny"),
        *("--env=ENFORCE_EAGER=true", "--env=DTYPE=float32"),
    ]
    assert "--env=GPU_MEMORY_UTILIZATION=0.25" in worker_options("dir", gpu=True)
