"""The advisor's inputs, its search, and its command line."""

from __future__ import annotations

import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.__main__ import main
from bench.advisor import scale
from bench.advisor.errors import InputError
from bench.advisor.search import Goal, Grid, Prices, Result, Search, cheapest, frontier
from bench.advisor.simulation import EndpointPlan, Outcome
from bench.advisor.trace import MadeUpDay, TokenCounts, read_csv, read_worker_log
from bench.advisor.worker_log import WorkerLog
from bench.advisor.worker_profile import Figures, WorkerProfile
from bench.compare import Results
from bench.metrics import Measurement
from bench.scenarios import Scenario
from bench.systems import OURS, VLLM
from engine.cold_start import ColdStart
from engine.jobs import job_log
from engine.telemetry import json_lines
from engine.telemetry.costs import Costs
from engine.telemetry.job_times import JobTimes, RequestStats

TOKENS = TokenCounts(300)
WORKER = ("--throughput", "1=100", "8=400", "--ttft-ms", "1=40", "8=100", "--cold-start", "20s")


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# Traces.


def test_a_csv_has_seconds_or_times_and_tokens_where_they_are_known(tmp_path: Path) -> None:
    seconds = read_csv(written(tmp_path / "a.csv", "time,tokens\n100.5,20\n90,30\n"), TOKENS)
    assert (seconds.arrivals_s, seconds.tokens, seconds.duration_s) == ([0.0, 10.5], [30, 20], 10.5)

    text = "user,time\na,2026-11-30T10:00:00Z\nb,2026-11-30T11:00:02.5+01:00\n"
    times = read_csv(written(tmp_path / "b.csv", text), TOKENS)
    assert times.arrivals_s == [0.0, 2.5]
    assert times.tokens == TOKENS.sample(2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("at\n1\n", "line 1: no column `time`"),
        ("", "line 1: no column `time`"),
        ("time\n", "has no requests"),
        ("time\n1\nsoon\n", "line 3: time='soon': write seconds"),
        ("time\nnan\n", "line 2: time='nan': write seconds"),
        ("time,tokens\n1,5\n2,-5\n", "line 3: tokens='-5': write an integer"),
        ("time,tokens\n1,0\n", "line 2: tokens='0': write an integer"),
        ("time\n12.5\n2026-11-30T10:00:00Z\n", "days: write all times in seconds, or all in ISO 8601"),
        ("time\n0\n86400000\n", "lasts 1,000 days"),
        ("time\n1764496800000\n1764496801000\n", "1764496801000 is a time in milliseconds"),
    ],
)
def test_a_csv_that_cannot_be_used_is_an_error_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path / "trace.csv", text)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_csv(path, TOKENS)
    assert str(path) in str(caught.value)


def test_a_file_that_is_missing_or_not_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_csv(tmp_path / "none.csv", TOKENS)
    (tmp_path / "binary.csv").write_bytes(b"time\n\xff\xfe\n")
    with pytest.raises(InputError, match="no CSV file in UTF-8"):
        read_csv(tmp_path / "binary.csv", TOKENS)


def test_a_made_up_day_has_its_requests_most_of_them_around_its_peak() -> None:
    day = MadeUpDay(10_000, peak=1.8, bursts=0).trace(TOKENS)
    assert len(day.arrivals_s) == len(day.tokens) == 10_000
    assert list(day.arrivals_s) == sorted(day.arrivals_s)
    assert 0 <= day.arrivals_s[0] < day.arrivals_s[-1] < day.duration_s == 86_400
    by_hour = [sum(hour <= at_s / 3600 < hour + 1 for at_s in day.arrivals_s) for hour in range(24)]
    assert max(by_hour[15:17]) == pytest.approx(1.8 * 10_000 / 24, rel=0.15)
    assert min(by_hour) == pytest.approx(0.2 * 10_000 / 24, rel=0.5)
    assert sum(day.tokens) / 10_000 == pytest.approx(300, rel=0.05)
    assert MadeUpDay(10_000, peak=1.8, bursts=0).trace(TOKENS) == day
    assert MadeUpDay(10_000, peak=1.8, bursts=0, seed=1).trace(TOKENS) != day


def test_bursts_are_part_of_the_day() -> None:
    day = MadeUpDay(10_000, peak=1, bursts=4).trace(TOKENS)
    minutes = [int(at_s // 60) for at_s in day.arrivals_s]
    assert len(minutes) == 10_000
    assert max(map(minutes.count, set(minutes))) >= 50


# A worker's log.

STARTED = '{"job": "%s", "route": "/v1/chat/completions", "status": "started"}'
ENDED = (
    '{"job": "%s", "route": null, "status": "completed", "tokens_in": 9, "tokens_out": 100, "first_output_s": 0.5, '
    '"duration_s": %s, "batches": 3}'
)
LOG = f"""\
2026-11-30T09:59:00Z INFO   | Cold start {{"total_s": 41.5, "phases_s": {{}}}}
2026-11-30T10:00:00.123456789Z INFO   | {STARTED % "a"}
2026-11-30T10:00:03Z INFO   | something else
2026-11-30T10:00:10Z INFO   | {ENDED % ("a", 10)}
2026-11-30T10:00:20Z INFO   | {STARTED % "b"}
2026-11-30T10:00:20Z INFO   | {STARTED % "c"}
2026-11-30T10:00:32Z INFO   | {ENDED % ("c", 12.5)}
2026-11-30T10:00:33Z INFO   | {ENDED % ("b", 12.5)}
2026-11-30T10:00:34Z INFO   | {ENDED % ("unknown", 1)}
"""


def test_a_workers_log_shows_throughput_by_concurrency_and_starts(tmp_path: Path) -> None:
    figures = Figures()
    figures.read_log(WorkerLog(written(tmp_path / "worker.log", LOG)))
    assert figures.tokens_per_s == {1: 10, 2: 2 * 100 / 12.5}
    assert figures.ttft_s == {1: 0.5, 2: 0.5}
    assert figures.cold_starts_s == [41.5]


def test_a_log_of_objects_shows_the_same(tmp_path: Path) -> None:
    """As LOG_FORMAT=json writes it; the last line is cut off, but is of no job."""
    lines = []
    for line in LOG.splitlines():
        time_text, _, text = line.partition(" ")
        lines.append(json.dumps({"time": time_text, **json_lines.record(text)}))
    text = "\n".join([*lines, '{"time": "2026-11-30T10:00:34Z", "level": "INFO", "mess'])
    log, same = WorkerLog(written(tmp_path / "a.log", text)), WorkerLog(written(tmp_path / "b.log", LOG))
    assert (log.by_concurrency(), log.cold_starts_s) == (same.by_concurrency(), same.cold_starts_s)
    assert log.arrivals() == same.arrivals()


def test_what_a_worker_logs_is_what_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = {"id": "a", "batchId": "b", "input": {"openai_route": "/v1/chat/completions"}}
    with caplog.at_level(logging.INFO, "engine"):
        ColdStart(started_at=time.monotonic() - 30).log("Cold start")
        job_log.log_started("a", job, with_input=True)
        times = JobTimes("a", outcome="completed", taken_at=1.0, first_output_at=1.25, ended_at=6.0)
        times.requests.append(RequestStats(9, 50))
        job_log.log_ended(job, times, Costs(0.0).document(times), 4)
    text = "\n".join(f"INFO   | {message}" for message in caplog.messages)
    figures = Figures()
    figures.read_log(WorkerLog(written(tmp_path / "worker.log", text)))
    assert (figures.tokens_per_s, figures.ttft_s, len(figures.cold_starts_s)) == ({1: 10.0}, {1: 0.25}, 1)


def test_an_answer_in_one_piece_does_not_show_the_time_to_first_token(tmp_path: Path) -> None:
    lines = [STARTED % "a", (ENDED % ("a", 10)).replace('"batches": 3', '"batches": 1')]
    log = WorkerLog(written(tmp_path / "worker.log", "\n".join(lines)))
    assert log.by_concurrency() == ({1: 10}, {})


def test_lines_that_lack_something_are_no_error(tmp_path: Path) -> None:
    lines = [
        "Cold start {}",
        '2026-99-01T00:00:00Z {"job": "a", "status": "started"}',
        '{"job": "a", "status": "completed"}',
    ]
    log = WorkerLog(written(tmp_path / "worker.log", "\n".join(lines)))
    assert (log.cold_starts_s, len(log.jobs), log.by_concurrency()) == ([], 1, ({}, {}))


def test_without_times_the_order_of_the_lines_shows_how_many_jobs_ran(tmp_path: Path) -> None:
    lines = [STARTED % "a", STARTED % "b", ENDED % ("a", 20), ENDED % ("b", 20)]
    tokens_per_s, _ = WorkerLog(written(tmp_path / "worker.log", "\n".join(lines))).by_concurrency()
    assert tokens_per_s == {2: 2 * 100 / 20}


def test_a_workers_log_with_times_is_a_trace(tmp_path: Path) -> None:
    trace = read_worker_log(WorkerLog(written(tmp_path / "worker.log", LOG)), TOKENS)
    assert trace.arrivals_s == [0, pytest.approx(19.876544), pytest.approx(19.876544)]
    assert trace.tokens == [100, 100, 100]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"INFO | {STARTED % 'a'}\n", "line 1: no time; export the log with times"),
        (f"\nINFO | {STARTED % 'a'}"[:-3], "line 2: the JSON is cut off or damaged"),
        ("INFO | hello\n", "has no line of a job that starts"),
    ],
)
def test_a_log_that_is_no_trace_is_an_error_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path / "worker.log", text)
    with pytest.raises(InputError, match=re.escape(message)):
        read_worker_log(WorkerLog(path), TOKENS)


def test_a_log_without_answers_says_nothing_of_the_worker(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no line of a completed job"):
        Figures().read_log(WorkerLog(written(tmp_path / "worker.log", STARTED % "a")))


# Reports.


def results_document() -> dict[str, Any]:
    """Return a report as the bench writes it: rounds of one and of eight clients, and loads that do not count."""
    scenarios = [
        Scenario(clients=1),
        Scenario(clients=8),
        Scenario(clients=8, latency_ms=40),
        Scenario(capacity_share=1),
    ]
    results = Results(scenarios, [VLLM, OURS])
    for scenario in scenarios:
        for factor in (1.0, 1.1, 0.9):
            tokens_per_s = 100.0 * factor if scenario.clients == 1 else 500.0 * factor
            metrics: dict[str, float | None] = {"tokens_per_s": tokens_per_s, "ttft_p50_ms": 40.0 * factor}
            results.rounds[scenario][OURS].append(Measurement(metrics, {}))
    return {"scenarios": report.scenarios_document(results)}


def test_a_report_of_the_bench_has_throughput_and_time_to_first_token(tmp_path: Path) -> None:
    figures = Figures()
    figures.read_report(written(tmp_path / "results.json", json.dumps(results_document())))
    assert figures.tokens_per_s == {1: 100.0, 8: 500.0}
    assert figures.ttft_s == {1: 0.04, 8: 0.04}


def test_a_report_of_cold_starts_has_their_durations(tmp_path: Path) -> None:
    figures = Figures()
    starts = {OURS: [{"first_token_s": 20.5, "ready_s": 19, "phases_s": {}}, None]}
    figures.read_report(written(tmp_path / "cold.json", json.dumps({"starts": starts})))
    assert figures.cold_starts_s == [20.5]


def test_a_report_of_a_gpu_has_both(tmp_path: Path) -> None:
    stages = [
        {"stage": "load", "figures": results_document()},
        {"stage": "warm-start", "figures": {"start": {"first_token_s": 41.0}}},
        {"stage": "4-bit", "figures": {}},
    ]
    figures = Figures()
    figures.read_report(written(tmp_path / "gpu.json", json.dumps({"stages": stages})))
    assert (figures.tokens_per_s, figures.cold_starts_s) == ({1: 100.0, 8: 500.0}, [41.0])


@pytest.mark.parametrize("text", ["[]", "{}", '{"scenarios": [{}]}', '{"starts": {"vLLM alone": []}}', "no JSON"])
def test_a_file_that_is_no_report_is_an_error(tmp_path: Path, text: str) -> None:
    path = written(tmp_path / "results.json", text)
    with pytest.raises(InputError, match=re.escape(str(path))):
        Figures().read_report(path)


def test_what_is_not_known_of_a_worker_is_asked_for() -> None:
    with pytest.raises(InputError, match="throughput is not known: give --report"):
        Figures(cold_starts_s=[1.0]).profile(1.0)
    with pytest.raises(InputError, match="cold start is not known: give --report"):
        Figures({1: 10.0}).profile(1.0)


# The search.


def result(cost: float, ttft_s: float, *, rejected: int = 0) -> Result:
    return Result(EndpointPlan(), {95: ttft_s}, cost, Outcome(rejected=rejected))


def test_the_cheapest_is_one_that_meets_the_goal() -> None:
    results = [result(9, 1), result(5, 3), result(7, 2), result(7, 1), result(1, 1, rejected=1)]
    assert cheapest(results, Goal(95, 2)) is results[3]
    assert cheapest(results, Goal(95, 3)) is results[1]
    assert cheapest(results, Goal(95, 0.5)) is None


def test_the_frontier_has_what_nothing_else_beats() -> None:
    results = [result(9, 1), result(5, 3), result(7, 2), result(8, 2.5), result(1, 1, rejected=1)]
    assert frontier(results, 95) == [results[1], results[2], results[0]]


def test_the_grid_has_every_combination_that_the_platform_accepts() -> None:
    plans = list(Grid((1.0, 4.0), (4.0,), (8,), (5.0, 60.0), (0, 3), (2, 3)).plans())
    assert len(plans) == (2 * 2 + 1) * 3
    # RunPod refuses an idle timeout for it.
    assert {plan.idle_timeout_s for plan in plans if plan.scaler_type == "REQUEST_COUNT"} == {5.0}
    assert all(plan.workers_min <= plan.workers_max for plan in plans)


def test_active_workers_have_a_price_of_their_own() -> None:
    outcome = Outcome(gpu_s=7200, active_gpu_s=3600)
    assert Prices(flex=3.0, active=2.0).money(outcome) == 5.0
    worker = WorkerProfile({1: 10.0}, {1: 0.1}, (5.0,))
    search = Search(worker, MadeUpDay(10, duration_s=3600).trace(TokenCounts(10)), Prices(3.0, 2.0))
    (found,) = search.run([EndpointPlan(workers_min=1, workers_max=1)])
    assert found.money == pytest.approx(2.0)


# The command line.


def test_the_cheapest_settings_are_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.svg"))
    day = ("--day", "200", "--duration", "1h", "--workers-max", "3", "--idle-timeout", "60s")
    assert main(["advise", *WORKER, *day, "--ttft-p95", "2s", "--price", "2.5", *files]) == 0
    shown = capsys.readouterr().out
    document = json.loads((tmp_path / "a.json").read_text())
    best = document["cheapest"]
    assert f"Cheapest: scalerType={best['scaler_type']}, scalerValue={best['scaler_value']:g}" in shown
    assert f"workersMin={best['workers_min']}, workersMax=3, MAX_CONCURRENCY={best['concurrency']}" in shown
    meeting = [one for one in document["results"] if one["ttft_p95_s"] <= 2 and not one["rejected"]]
    assert min(meeting, key=lambda one: one["money_usd"]).items() >= best.items()
    assert len(document["results"]) == (2 + 3) * 2 * 3
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_an_impossible_goal_is_said_to_be_so(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--day", "50", "--duration", "1h", "--workers-min", "0", "--workers-max", "1", "--all")
    assert main(["advise", *WORKER, *options, "--ttft-p95", "1ms"]) == 1
    shown = capsys.readouterr().out
    assert "No settings can: the worker alone takes 0.04 s" in shown
    assert shown.count("QUEUE_DELAY") == 2 * 2 * 3


def test_figures_that_are_doubtful_are_said_to_be_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worker = ("--throughput", "1=100", "--cold-start", "41s", "--workers-max", "3")
    path = written(tmp_path / "trace.csv", "time\n5\n")
    plot = tmp_path / "a.svg"
    assert main(["advise", *worker, "--trace", str(path), "--ttft-p95", "2s", "--plot", str(plot)]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith("1 request in 0 s, ")
    assert "time to first token is not known and counts as 0" in shown
    assert "The requests last 0 s, a cold start 41 s" in shown
    assert "No settings meet it. Try more workers" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--day", "0", "--ttft-p95", "1s"), "not a positive integer"),
        (("--day", "9", "--duration", "0h", "--ttft-p95", "1s"), "more than 0"),
        (("--day", "9", "--ttft-p95", "soon"), "write a time like 500ms"),
        (("--day", "9", "--ttft-p95", "1s", "--idle-timeout", "0.5s"), "from 1s to 3600s"),
        (("--day", "9", "--ttft-p95", "1s", "--queue-delay", "0.1s"), "accepts 0.5s and more"),
        (("--day", "9", "--ttft-p95", "1s", "--throughput", "8:20"), "write N=VALUE"),
        (("--day", "9", "--ttft-p95", "1s", "--peak", "0.5"), "at least the mean rate"),
        (("--day", "9", "--trace", "a.csv", "--ttft-p95", "1s"), "not allowed with"),
        (("--day", "9", "--ttft-p95", "1s", "--throughput", "1=1e300"), "like 8=480, from 0.001"),
        (("--day", "9", "--ttft-p95", "1s", "--concurrency", "1000000"), "no worker runs more than 10000"),
        (("--day", "9", "--ttft-p95", "1s", "--cold-start", "48h"), "less than 24h"),
        (("--day", "9"), "--ttft-p50 --ttft-p95 --ttft-p99 is required"),
    ],
)
def test_a_wrong_option_is_a_usage_error(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["advise", *WORKER, *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_bad_trace_is_a_usage_error_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "trace.csv", "time\nsoon\n")
    assert main(["advise", *WORKER, "--trace", str(path), "--ttft-p95", "1s"]) == 2
    assert f"{path}, line 2: time='soon'" in capsys.readouterr().err


def test_a_price_of_active_workers_alone_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", *WORKER, "--day", "9", "--ttft-p95", "1s", "--active-price", "1"]) == 2
    assert "give --price, that of the others, too" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused_before_the_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "file", "") / "a.json"
    assert main(["advise", *WORKER, "--day", "9", "--ttft-p95", "1s", "--json", str(path)]) == 2
    assert f"{path} cannot be written" in capsys.readouterr().err


def test_a_plot_of_another_kind_is_refused_before_the_search(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", *WORKER, "--day", "9", "--ttft-p95", "1s", "--plot", "a.gif"]) == 2
    assert "--plot a.gif: the name must end with .svg or .png" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [("--workers-min", "4", "--workers-max", "3"), ("--queue-delay", "--request-count")]
)
def test_without_settings_to_try_nothing_is_simulated(
    options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["advise", *WORKER, "--day", "9", "--ttft-p95", "1s", *options]) == 2
    assert "no settings to try: give --queue-delay" in capsys.readouterr().err


def test_without_figures_of_the_worker_nothing_is_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", "--day", "9", "--ttft-p95", "1s"]) == 2
    assert "throughput is not known" in capsys.readouterr().err


# A million requests a day, here 2,000.


def test_the_study_of_scale_has_a_line_for_each_settings_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "REQUESTS", 2000)
    monkeypatch.setattr(scale, "SERVICES", scale.SERVICES[:1])
    assert scale.main([str(tmp_path)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 10 |")]
    assert [row.split(" | ")[1] for row in rows] == list(scale.plans(scale.SERVICES[0]))
    assert "10 workers, 2,500 tokens a request" in (tmp_path / "million.svg").read_text()
