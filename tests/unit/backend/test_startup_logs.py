"""Log lines of the engine's processes reach the worker, although vLLM configures its own logging."""

from __future__ import annotations

import logging
import logging.config
import multiprocessing
import os
import time

from engine.backend import startup_errors, startup_logs


def test_errors_are_captured_although_vllm_configures_its_logging_later() -> None:
    with startup_logs.captured() as captured:
        logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, "loggers": {"vllm": {}}})
        logger = logging.getLogger("vllm.v1.engine.core")
        logger.warning("loading took %.2f seconds", 1.5)
        try:
            raise ValueError("the reason")  # noqa: TRY301 (a traceback is wanted)
        except ValueError:
            logger.exception("EngineCore failed to start.")

        assert "ValueError: the reason" in captured.errors
        (line,) = captured.records
        assert line.message == "loading took 1.50 seconds"
        assert line.process == os.getpid()
        assert 0 <= time.time() - line.time_s < 60
        assert (
            startup_errors.explain(RuntimeError("see above"), captured.errors, "org/model") == "ValueError: the reason"
        )
    assert (captured.errors, captured.records) == ("", [])
    assert startup_logs._DIRECTORY not in os.environ


def _child() -> None:
    startup_logs.install()
    logging.getLogger("vllm.v1.engine.core").error("from a child")


def test_a_spawned_process_is_captured() -> None:
    with startup_logs.captured() as captured:
        process = multiprocessing.get_context("spawn").Process(target=_child)
        process.start()
        process.join(60)

        assert captured.errors == "from a child\n"


def test_nothing_is_captured_outside_of_a_start() -> None:
    before = list(logging.getLogger("vllm.v1.engine.core").filters)

    startup_logs.install()

    assert logging.getLogger("vllm.v1.engine.core").filters == before


def test_a_message_is_one_line_and_one_that_was_cut_off_is_skipped() -> None:
    """As on a full disk: what the log says of a start must not end it."""
    with startup_logs.captured() as captured:
        logging.getLogger("vllm.v1.engine.core").warning("two\nlines")
        with (captured._directory / "lines").open("a") as file:
            file.write("17000")

        assert [line.message for line in captured.records] == ["two lines"]
