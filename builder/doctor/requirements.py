"""What a model needs, whichever GPU it gets: its config, the size of its weights, and its KV cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from builder.doctor import kv_cache, memory, weights
from builder.doctor.gpus import Gpu
from builder.doctor.kv_cache import KVCache
from builder.doctor.settings import Settings
from builder.doctor.weights import Weights
from builder.errors import (
    BuilderError,
    ConfigError,
    HubError,
    HubUnreachableError,
    MissingPackageError,
    ModelNotFoundError,
)  # fmt: skip

_CONFIG_ERRORS = (AttributeError, ArithmeticError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class Requirements:
    """What a model needs with these settings.

    Attributes:
        directory: that has its config.json.
        config: transformers' config of the model.
        is_known: whether transformers knows its architecture.
        weights: their sizes.
        cache: its KV cache.
        settings: vLLM's, on which memory depends.
    """

    directory: Path
    config: Any
    is_known: bool
    weights: Weights
    cache: KVCache
    settings: Settings

    def on_gpus(self, count: int) -> Requirements:
        """Return what it needs if it is split across this many GPUs."""
        settings = replace(self.settings, tensor_parallel_size=count)
        return replace(self, settings=settings, cache=kv_cache.kv_cache_of(self.config, settings))

    def fit(self, gpu: Gpu | None) -> memory.Fit:
        """Return the memory that it needs and has on this GPU.

        Raises:
            ConfigError: the config lacks a value, or has an invalid one.
        """
        try:
            return memory.fit(self.config, self.weights.size_bytes, self.cache, self.settings, gpu)
        except _CONFIG_ERRORS as error:
            raise _config_error(error) from None


def requirements_of(model: str, revision: str | None, token: str | None, settings: Settings) -> Requirements:
    """Return what a model needs; the config.json of a model of the hub is downloaded.

    Args:
        model: directory or hub id.
        revision: branch, tag or commit; None for the main branch.
        token: of the hub, for gated and private models.
        settings: vLLM's, on which memory depends.

    Raises:
        BuilderError: there is no such model, it cannot be read, or a package is missing.
    """
    try:
        directory = _config_directory(model, revision, token)
        config, is_known = weights.read_config(directory)
        dtype, quantization = settings.dtype, settings.quantization
        size = weights.weights(directory, config, known=is_known, dtype=dtype, quantization=quantization)
        cache = kv_cache.kv_cache_of(config, settings)
    except ImportError as error:
        raise MissingPackageError(f"computing the memory needs {error.name}, which is not installed") from None
    except _CONFIG_ERRORS as error:
        raise _config_error(error) from None
    return Requirements(directory, config, is_known, size, cache, settings)


def _config_directory(model: str, revision: str | None, token: str | None) -> Path:
    """Return the directory with the model's config.json; download it for a model of the hub.

    Raises:
        ModelNotFoundError: there is none.
        HubError: the hub refuses it, or cannot be reached.
    """
    if (Path(model) / "config.json").is_file():
        return Path(model)
    if Path(model).is_dir() or model.startswith(("/", "./", "../", "~")):
        raise ModelNotFoundError(f"there is no config.json in {model}")
    import huggingface_hub
    from huggingface_hub import errors

    def fetch(*, local_files_only: bool) -> Path:
        return Path(
            huggingface_hub.hf_hub_download(
                model, "config.json", revision=revision, token=token or False, local_files_only=local_files_only
            )
        ).parent

    kind: type[BuilderError] = HubError
    try:
        try:
            return fetch(local_files_only=True)
        except errors.LocalEntryNotFoundError:
            return fetch(local_files_only=False)
    except errors.GatedRepoError:
        reason = "it is gated: set HF_TOKEN to a token of an account with access"
    except errors.RevisionNotFoundError:
        reason = f"it has no revision {revision}"
    except errors.RepositoryNotFoundError:
        reason = "there is no such model, or it is private and HF_TOKEN gives no access to it"
    except errors.LocalEntryNotFoundError:
        kind = HubUnreachableError
        reason = "the hub cannot be reached: check the network and HF_ENDPOINT, or name a directory with the model"
    except (errors.HTTPError, errors.EntryNotFoundError, OSError, ValueError) as error:  # type: ignore[attr-defined]
        kind = ModelNotFoundError
        reason = " ".join(str(error).split())[:200]
    raise kind(f"cannot download the config.json of {model}: {reason}")


def _config_error(error: Exception) -> ConfigError:
    return ConfigError(f"the config lacks a value on which memory depends, or has an invalid one: {error}")
