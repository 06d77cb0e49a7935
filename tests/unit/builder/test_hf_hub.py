"""Settings of the hub's client are checked before the first request."""

from __future__ import annotations

import pytest

from builder import hf_hub
from builder.errors import SettingError


@pytest.mark.parametrize("endpoint", ["localhost:1234", "hf-mirror.com", "ftp://mirror", "https://"])
def test_an_endpoint_that_is_not_a_url_is_refused(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setattr(hf_hub, "HfApi", None)

    with pytest.raises(SettingError, match=f"HF_ENDPOINT={endpoint.rstrip('/')} is not a URL: set it to one such as"):
        hf_hub.repository("an-org/a-model", None, 8)


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
@pytest.mark.parametrize("token", ["hf_gehëim", "hf_one hf_two", "hf_one\nhf_two"])
def test_a_token_that_no_header_can_have_is_refused_and_not_shown(
    name: str, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv(name, token)
    monkeypatch.setattr(hf_hub, "HfApi", None)

    with pytest.raises(SettingError, match=f"{name} has a space or a character that is not ASCII") as raised:
        hf_hub.repository("an-org/a-model", None, 8)

    assert "hf_" not in str(raised.value)
