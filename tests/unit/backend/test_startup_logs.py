"""What the engine's processes log reaches the worker, though vLLM sets up its logging in its own way."""

from __future__ import annotations

import logging
import logging.config
import multiprocessing
import os

from engine.backend import startup_errors, startup_logs


def test_errors_are_noted_though_vllm_sets_up_its_logging_after_us() -> None:
    with startup_logs.captured() as noted:
        logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, "loggers": {"vllm": {}}})
        logger = logging.getLogger("vllm.v1.engine.core")
        logger.warning("loading took %.2f seconds", 1.5)
        try:
            raise ValueError("the reason")  # noqa: TRY301 (a traceback is wanted)
        except ValueError:
            logger.exception("EngineCore failed to start.")

        assert "ValueError: the reason" in noted.errors
        assert noted.lines == "loading took 1.50 seconds\n"
        assert startup_errors.explain(RuntimeError("see above"), noted.errors, "org/model") == "ValueError: the reason"
    assert noted.errors == noted.lines == ""
    assert startup_logs._DIRECTORY not in os.environ


def _child() -> None:
    startup_logs.install()
    logging.getLogger("vllm.v1.engine.core").error("from a child")


def test_a_process_that_is_spawned_takes_notes_too() -> None:
    with startup_logs.captured() as noted:
        process = multiprocessing.get_context("spawn").Process(target=_child)
        process.start()
        process.join(60)

        assert noted.errors == "from a child\n"


def test_without_a_worker_that_reads_them_nothing_is_noted() -> None:
    before = list(logging.getLogger("vllm.v1.engine.core").filters)

    startup_logs.install()

    assert logging.getLogger("vllm.v1.engine.core").filters == before
