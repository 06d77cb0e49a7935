"""The interval between the outputs of a stream: it follows the number of streams and the loop's measured load."""

from __future__ import annotations

import threading
import time
from itertools import count

import pytest

from engine.backend import stream_interval
from engine.backend.stream_interval import MIN_DELIVERIES_PER_S, LoopLoad, StreamInterval


@pytest.fixture(autouse=True)
def _samples_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a sample of the load be due at each call."""
    seconds = count(start=1.0)
    monkeypatch.setattr(stream_interval, "_now_s", lambda: next(seconds))


def settled(load: float, streams: int) -> float:
    """Return the interval once it has followed this load for long."""
    interval = StreamInterval(sample_load=lambda: load)
    return [interval.seconds(streams) for _ in range(50)][-1]


def test_a_set_interval_is_used_at_any_number_of_streams_and_load() -> None:
    for fixed_s in (0.0, 0.02, 3.0):
        interval = StreamInterval(fixed_s, sample_load=lambda: 1.0)
        assert [interval.seconds(streams) for streams in (1, 64, 1024) * 20] == [fixed_s] * 60


def test_each_token_is_an_event_of_its_own_if_the_set_interval_is_zero() -> None:
    assert [StreamInterval(0.0).tokens(streams, 0.004) for streams in (1, 64, 1024)] == [1, 1, 1]


def test_few_streams_are_delivered_every_20_ms_at_any_load() -> None:
    assert settled(0.1, 1) == settled(0.1, 3) == settled(1.0, 1) == settled(1.0, 3) == 0.02


def test_many_streams_are_delivered_every_50_ms_while_the_loop_has_time_to_spare() -> None:
    assert settled(0.5, 8) == settled(0.5, 64) == settled(0.7, 1024) == 0.05


def test_an_overloaded_loop_delivers_less_and_less_often_down_to_a_minimum_for_all_streams() -> None:
    for streams in (16, 64, 1024):
        interval = StreamInterval(sample_load=lambda: 0.95)
        followed = [interval.seconds(streams) for _ in range(50)]
        assert followed == sorted(followed)
        assert streams / followed[-1] == pytest.approx(MIN_DELIVERIES_PER_S)


def test_the_interval_settles_where_the_load_is_as_high_as_allowed() -> None:
    """Half of this loop's time goes to the streams themselves, and a delivery costs 0.2 ms."""
    streams = 256
    interval_s = 0.05

    def load() -> float:
        return min(0.5 + streams / interval_s * 0.0002, 1.0)

    interval = StreamInterval(sample_load=load)
    for _ in range(100):
        interval_s = interval.seconds(streams)
    assert load() == pytest.approx(stream_interval.MAX_LOAD, abs=0.02)


def test_the_interval_shrinks_again_when_the_load_has_passed() -> None:
    loads = [1.0] * 20 + [0.2] * 20
    interval = StreamInterval(sample_load=lambda: loads.pop(0))
    followed = [interval.seconds(64) for _ in range(40)]
    assert max(followed) > 0.3
    assert followed[-1] == 0.05


def test_few_streams_have_one_event_per_token() -> None:
    assert StreamInterval().tokens(3, 0.004) == 1


def test_before_the_engines_first_step_streams_have_one_event_per_token() -> None:
    assert StreamInterval().tokens(64, 0.0) == 1


def test_many_streams_have_one_event_per_output() -> None:
    for streams, step_s in ((5, 0.01), (24, 0.009), (64, 0.02), (256, 0.5)):
        interval = StreamInterval(sample_load=lambda: 0.0)
        tokens = interval.tokens(streams, step_s)

        # At most one step after the next output is due, so that each event is delivered at once.
        assert interval.seconds(streams) <= tokens * step_s < interval.seconds(streams) + step_s


def test_the_load_is_that_of_the_thread_that_asks() -> None:
    """Another thread that works, while this one sleeps, is no load of the event loop."""
    load = LoopLoad()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            pass

    worker = threading.Thread(target=work)
    worker.start()
    time.sleep(0.3)
    stop.set()
    worker.join()
    assert load.sample() < 0.5

    until_s = time.monotonic() + 0.3
    while time.monotonic() < until_s:
        pass
    assert 0.1 < load.sample() < 1.2
