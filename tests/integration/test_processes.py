"""Tensor parallelism: a real engine with two worker processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from builder.tiny_model.corpus import example
from tests.emulator_queue import EmulatorQueue, emulator_queue
from tests.integration.conftest import START_S
from tests.integration.emulator.conftest import alive, eventually
from tests.integration.test_costs import APP, SDK, imports
from tests.processes import VLLM_ENVIRONMENT, running

GREEDY = {"temperature": 0}
END_S = 60.0


def on_two_cores(queue: EmulatorQueue, model: str, **flags: str) -> dict[str, str]:
    """Return the environment of a worker whose engine has two worker processes, each bound to a core."""
    first, *_, last = sorted(os.sched_getaffinity(0)) * 2
    binding = {"VLLM_CPU_OMP_THREADS_BIND": f"{first}|{last}"}
    return {**VLLM_ENVIRONMENT, **queue.environment, "MODEL_NAME": model, **binding, **flags}


def test_a_worker_with_tensor_parallelism_imports_once_and_leaves_no_process_after_sigkill(
    tiny_model: str, tmp_path: Path
) -> None:
    with emulator_queue() as queue:
        environment = on_two_cores(queue, tiny_model, TENSOR_PARALLEL_SIZE="2", PYTHONPROFILEIMPORTTIME="1")
        with running(["handler.py"], environment, tmp_path / "log") as process:
            job = queue.submit({"messages": example("ok").messages, "sampling_params": GREEDY, "stream": True})
            process.wait_for(queue.has_worker, START_S)

            assert "".join(output["text"] for output in job.wait()) == example("ok").answer
            family = process.family()
            assert len([member for member in family if "Worker_TP" in member.name()]) == 2

            process.popen.kill()

            assert process.popen.wait(END_S) == -signal.SIGKILL
            eventually(lambda: not any(alive(member.pid) for member in family))
            imported = imports(process.log)
            once = ("torch", "transformers", "vllm.config", APP, SDK)
            assert {name: imported[name] for name in once} == dict.fromkeys(once, 1)
