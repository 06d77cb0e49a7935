"""What a preview installs in addition to vLLM's sources."""

from __future__ import annotations

from tools.vllm_preview import new_requirements

METADATA = """Name: vllm
Requires-Dist: torch==9.9
Requires-Dist: A_Known.name>=2
Requires-Dist: orjson>=3.11.6
Requires-Dist: with-extras[cu13]==4.8.0
Requires-Dist: only-elsewhere>=1; platform_machine == "s390x"
"""


def test_only_what_is_new_and_required_everywhere_is_installed() -> None:
    locked = "# Made by make lock\ntorch==9.8\na-known-name==1.0\n"

    assert new_requirements(METADATA, locked) == ["orjson>=3.11.6", "with-extras[cu13]==4.8.0"]
