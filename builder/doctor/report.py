"""The `doctor` command: checks whether a model with its settings would run, and reports what to do if not."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from builder import hf_hub
from builder.doctor import gpus
from builder.doctor.checks import Doctor, format_gib
from builder.doctor.gpus import GIB
from builder.doctor.settings import read_settings
from builder.doctor.worker_config import query_worker
from builder.errors import DiagnosisError


def diagnose(
    options: Mapping[str, str | None],
    *,
    as_json: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Run the checks and print the report.

    Args:
        options: `model`, `revision`, `gpu` and the fields of `Settings` as texts; None for an option that is not given.
        as_json: print a JSON object instead of text.
        environment: the worker's variables.

    Raises:
        SettingError: an option or a variable has an invalid value.
        DiagnosisError: there are problems.
    """
    worker = query_worker(options.get("model"), environment)
    texts = {name.lower(): text for name, text in worker.values.items()}
    settings = read_settings({**texts, **{name: text for name, text in options.items() if text}})
    gpu = gpus.find_gpu(name) if (name := options.get("gpu")) else gpus.local_gpu()
    token = hf_hub.token_of(environment)
    model, revision = options.get("model"), options.get("revision")
    if not model:  # the environment's revision is that of its model
        model, revision = worker.model, revision or worker.revision
    doctor = Doctor(model, revision, worker, settings, gpu, token)
    findings = doctor.run()
    text = json.dumps(findings, indent=2) if as_json else "\n".join(_lines(findings))
    sys.stdout.write((text.replace(token, "(hidden)") if token else text) + "\n")
    if count := len(doctor.problems):
        raise DiagnosisError("1 problem found" if count == 1 else f"{count} problems found")


def _lines(findings: Mapping[str, Any]) -> Iterator[str]:
    yield f"Model     {findings['model'] or 'not named'}"
    if fit := findings.get("fit"):
        yield from _fit_lines(fit, findings["gpu"])
    versions = findings["versions"].items()
    yield "Versions  " + ", ".join(f"{name} {version or '(missing)'}" for name, version in versions)
    if disk := findings.get("disk"):
        free, needed = format_gib(disk["free_bytes"]), format_gib(disk["needed_bytes"])
        yield f"Disk      {disk['directory']}: {free} free, {needed} needed"
    token = findings["token"]
    accepted = {True: ", and the hub accepts it", False: ", and the hub does not accept it", None: ""}
    yield f"Token     HF_TOKEN is set{accepted[token['accepted']]}" if token["set"] else "Token     HF_TOKEN is not set"
    warnings = findings["settings"]["warnings"]
    no_warnings = "no warnings" if findings["settings"]["checked"] else "not checked, as vLLM is not installed"
    yield f"Settings  {warnings[0] if warnings else no_warnings}"
    for warning in warnings[1:]:
        yield f"          {warning}"
    for problem in findings["problems"]:
        if problem not in (*warnings, findings["summary"]):
            yield f"Problem   {problem}"
    yield f"Summary   {findings['summary']}"


def _fit_lines(fit: Mapping[str, Any], gpu: Mapping[str, Any] | None) -> Iterator[str]:
    parameters = f"{fit['parameters'] / 1e9:.2f} billion parameters" if fit["parameters"] else "unknown parameter count"
    yield f"          {fit['architecture']}, {parameters}, {fit['quantization'] or 'not quantized'}"
    if gpu:
        share = f"{format_gib(fit['budget_bytes'])} of {format_gib(gpu['memory_bytes'])}"
        yield f"GPU       {gpu['name']}: vLLM uses {share} (GPU_MEMORY_UTILIZATION={fit['gpu_memory_utilization']})"
    else:
        yield "GPU       none is named or installed: only the needed memory is computed"
    each = f", on each of {fit['tensor_parallel_size']} GPUs" if fit["tensor_parallel_size"] > 1 else ""
    overhead = fit["overhead_bytes"]
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in overhead.items())
    files = f" (the files: {format_gib(fit['checkpoint_bytes'])})" if fit["checkpoint_bytes"] else ""
    yield f"Memory    {format_gib(fit['weights_bytes']):>10}  weights{each}{files}"
    yield f"          {format_gib(sum(overhead.values())):>10}  overhead, an estimate: {parts}"
    if gpu:
        yield f"          {format_gib(fit['available_kv_cache_bytes']):>10}  left for the KV cache"
    length, request = fit["max_model_len"], format_gib(fit["kv_cache_bytes_per_request"])
    yield f"          {request:>10}  KV cache of one request of {length} tokens"
    for note in fit["notes"]:
        yield f"          {note}"
    if gpu:
        seqs, longest = fit["max_num_seqs"], fit["max_model_len_that_fits"]
        verdict, concurrency = "yes" if fit["fits"] else "no", fit["max_concurrency"]
        holds = f"the KV cache holds {concurrency:.2f} requests of MAX_MODEL_LEN={length} tokens at once"
        yield f"Fits      {verdict}: {holds}"
        if concurrency < seqs:
            yield f"          fewer than MAX_NUM_SEQS={seqs}: excess requests are queued unless they are shorter"
        else:
            yield f"          enough for MAX_NUM_SEQS={seqs}"
        limit = ", the model's limit" if longest == fit["context_limit"] else ""
        yield f"          the longest request that fits has {longest} tokens{limit}"
