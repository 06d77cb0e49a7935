"""Fixtures: the config and the weights of a model, and vLLM's own accounting."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from builder.doctor import weights


@pytest.fixture
def written(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Writes a config.json; returns its directory."""

    def write(config: dict[str, Any]) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


@pytest.fixture
def read(written: Callable[[dict[str, Any]], Path]) -> Callable[[dict[str, Any]], Any]:
    """Loads a config.json as transformers' config."""
    return lambda config: weights.read_config(written(config))[0]


@pytest.fixture
def weigh(written: Callable[[dict[str, Any]], Path]) -> Callable[..., weights.Weights]:
    """Returns the weights of the model of a config.json."""

    def weigh(config: dict[str, Any], **options: Any) -> weights.Weights:
        directory = written(config)
        read, known = weights.read_config(directory)
        return weights.weights(directory, read, known=known, **options)

    return weigh


@pytest.fixture(scope="session")
def vllm() -> SimpleNamespace:
    """The accounting of vLLM, imported once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm.config import CacheConfig
        from vllm.config.model import _get_and_verify_max_len
        from vllm.transformers_utils import model_arch_config_convertor as convertors
        from vllm.v1 import kv_cache_interface as specs
        from vllm.v1.kv_cache_layout import KVCacheLayout

        try:
            from vllm.v1.core import kv_cache_planning as planning
        except ImportError:  # vLLM before 0.33
            from vllm.v1.core import kv_cache_utils as planning
    return SimpleNamespace(
        CacheConfig=CacheConfig,
        max_len=_get_and_verify_max_len,
        convertors=convertors,
        specs=specs,
        utils=planning,
        layout=KVCacheLayout.LBNHC,
    )
