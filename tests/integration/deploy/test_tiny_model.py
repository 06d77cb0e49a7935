"""From a model to a streamed token: the doctor, the real worker and the tiny model, on the emulator."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

from tests.integration.deploy.conftest import Account
from tests.processes import VLLM_ENVIRONMENT


def test_a_model_is_brought_to_an_answer_with_one_command(account: Callable[..., Account], tiny_model: str) -> None:
    site = account(command=[sys.executable, "handler.py"], env={**VLLM_ENVIRONMENT, "ENFORCE_EAGER": "true"})

    ran = site.run(
        "up", tiny_model, "--name", "tiny", "--image", "x/y:1", "--env", "SERVED_MODEL_NAME=tiny", timeout_s=240
    )

    assert ran.code == 0, ran.err
    assert re.search(r"deploy: GPU: ADA_24 \(RTX 4090, .*\): \d+ requests of 2048 tokens fit at once", ran.err)
    phases = re.findall(r"^deploy: +[\d.]+ s  (.*)$", ran.err, re.MULTILINE)
    assert phases == ["image", "start", "load", "first token"]
    assert re.search(
        r"^Answer +chat, first token after .* s: Hello! How can I help you today\?$", ran.out, re.MULTILINE
    )
    assert re.search(r"^Worker +cold start .* s: .*imports [\d.]+.*engine [\d.]+", ran.out, re.MULTILINE)
    assert '{"model": "tiny", "messages": [{"role": "user", "content": "Hello!"}]' in ran.out


def test_a_misspelt_setting_ends_before_anything_is_made(account: Callable[..., Account], tiny_model: str) -> None:
    """The worker itself reads the settings, as it would on its start."""
    site = account()

    ran = site.run("up", tiny_model, "--image", "x/y:1", "--env", "MAX_MODEL_LENGHT=1024")

    assert ran.code == 4
    assert "MAX_MODEL_LENGHT is not a setting" in ran.err
    assert site.endpoints() == []
