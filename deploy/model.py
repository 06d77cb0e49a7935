"""What the doctor says of a model and its settings, without a GPU: settings first, then its memory on each GPU type."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from builder.doctor.memory import Fit
from builder.doctor.requirements import Requirements, requirements_of
from builder.doctor.settings import read_settings
from builder.doctor.worker_config import WorkerConfig, query_worker
from builder.hf_hub import token_of
from deploy.errors import DoctorError
from deploy.gpus import COUNTS, gpu_of
from runpod_api.models import GpuType

# What the worker's command needs of this process: where programs and files are, but no settings.
_INHERITED = (
    "CURL_CA_BUNDLE", "HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "HOME", "LANG", "LD_LIBRARY_PATH", "PATH",
    "PYTHONPATH", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "TMPDIR", "VIRTUAL_ENV", "XDG_CACHE_HOME",
)  # fmt: skip


@dataclass
class Examined:
    """A model that the doctor has looked at.

    Attributes:
        needs: its requirements.
        notes: what was not checked.
    """

    needs: Requirements
    notes: list[str] = field(default_factory=list)
    _by_count: dict[int, Requirements] = field(default_factory=dict)

    @property
    def download_bytes(self) -> int:
        """What a worker downloads, unless the image or a volume has it."""
        return self.needs.weights.stored_bytes

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of GPUs that the model can be split across; the setting, if it is set."""
        if (chosen := self.needs.settings.tensor_parallel_size) > 1:
            return (chosen,)
        heads = getattr(self.needs.config.get_text_config(), "num_attention_heads", 1)
        return tuple(count for count in COUNTS if isinstance(heads, int) and heads % count == 0) or (1,)

    def fit(self, gpu: GpuType, count: int) -> Fit:
        """Return whether it fits this many GPUs of a type."""
        if count not in self._by_count:
            self._by_count[count] = self.needs.on_gpus(count)
        return self._by_count[count].fit(gpu_of(gpu))


def check_settings(
    model: str | None, variables: Mapping[str, str], environ: Mapping[str, str] = os.environ
) -> WorkerConfig:
    """Check the settings as the worker does.

    Raises:
        DoctorError: the worker would refuse or warn of one; a line for each.
    """
    inherited = {name: environ[name] for name in _INHERITED if name in environ}
    worker = query_worker(model, {**inherited, **variables})
    if worker.warnings:
        raise DoctorError("\n".join((*worker.warnings, "correct the settings, or skip this check with --skip-doctor")))
    return worker


def examine(
    model: str, revision: str | None, variables: Mapping[str, str], environ: Mapping[str, str] = os.environ
) -> Examined:
    """Check the settings as the worker does, and read what the model needs.

    Args:
        model: hub id or directory.
        revision: branch, tag or commit.
        variables: the worker's.
        environ: of this process, for the hub's token.

    Raises:
        DoctorError: the worker would refuse or warn of a setting; a line for each.
        BuilderError: the model cannot be read.
    """
    worker = check_settings(model, variables, environ)
    texts = {name.lower(): text for name, text in {**worker.values, **variables}.items()}
    needs = requirements_of(model, revision, token_of(environ), read_settings(texts))
    fit = needs.fit(None)
    if fit.max_model_len > fit.context_limit:
        raise DoctorError(f"MAX_MODEL_LEN={fit.max_model_len} exceeds the model's limit of {fit.context_limit}")
    notes = [] if worker.queried else ["vLLM is not installed: the names and values of settings were not checked"]
    return Examined(needs, [*needs.weights.notes, *needs.cache.notes, *notes])
