"""The command `up` before anything runs: the doctor's choice, the request, and what is shown of it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import httpx
import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors

from builder.doctor.worker_config import WorkerConfig
from deploy import __main__ as command_line
from deploy import model as doctor
from deploy.context import Context
from deploy.errors import CapacityError, DoctorError, OptionError
from deploy.options import Options
from deploy.up import up
from runpod_api.description import violations
from tests.unit.deploy.conftest import Terminal
from tests.unit.deploy.fakes import FakeRunPod, gpu
from tests.unit.deploy.test_api import body

# Llama's shape with 8 billion parameters: 15 GiB in 16 bits.
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a model's directory. The worker is not asked for its settings: that takes seconds."""

    def query(_: str | None, variables: Any) -> WorkerConfig:
        warnings = ("MAX_MODEL_LENN is not a setting",) if "MAX_MODEL_LENN" in variables else ()
        return WorkerConfig(variables, warnings=warnings)

    monkeypatch.setattr(doctor, "query_worker", query)
    directory = tmp_path / "Llama-8B"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return str(directory)


def made(context: Context, model: str, runpod: FakeRunPod, **options: Any) -> dict[str, Any]:
    """Return the request that `up` sends."""
    asyncio.run(up(context, model, Options(image="x/y:1", **options), wait=False))
    return runpod.bodies[-1]


def test_the_doctor_chooses_the_cheapest_gpus_that_fit(
    context: Context, model: str, runpod: FakeRunPod, terminal: Terminal
) -> None:
    body = made(context, model, runpod, env={"MAX_MODEL_LEN": "8192"})

    assert body["gpu"] == {"pools": ["AMPERE_24"], "count": 1, "minCudaVersion": "13.0"}
    assert body["name"] == "llama-8b"
    assert body["disk"] == 40, "16 GB of weights and their copies"
    assert (
        "deploy: GPU: AMPERE_24 (L4, RTX A5000, 24 GB, $0.68/h): 3.6 requests of 8192 tokens fit at once"
        in terminal.messages
    )


def test_a_longer_context_needs_a_larger_gpu_and_says_what_a_shorter_one_would_cost(
    context: Context, model: str, runpod: FakeRunPod, terminal: Terminal
) -> None:
    body = made(context, model, runpod)

    assert body["gpu"]["pools"] == ["AMPERE_48"]
    assert "it would fit AMPERE_24 (L4, RTX A5000, 24 GB, $0.68/h)" in terminal.messages


def test_a_named_gpu_that_is_too_small_is_refused_in_the_doctors_words(
    context: Context, model: str, runpod: FakeRunPod
) -> None:
    with pytest.raises(DoctorError, match=r"on ADA_24 .* it does not fit: set MAX_MODEL_LEN=\d+ or less"):
        made(context, model, runpod, gpus=("4090",))

    assert runpod.bodies == []


def test_the_pools_of_an_endpoint_are_kept_when_prices_change(
    context: Context, model: str, runpod: FakeRunPod, terminal: Terminal
) -> None:
    made(context, model, runpod)
    runpod.catalogue[3]["availability"] = "NONE"

    asyncio.run(up(context, model, Options(image="x/y:1"), wait=False))

    assert len(runpod.bodies) == 1
    assert "is as wanted: no change" in terminal.messages
    runpod.catalogue[3]["availability"] = "HIGH"


def test_a_misspelt_setting_is_refused(context: Context, model: str, runpod: FakeRunPod) -> None:
    with pytest.raises(DoctorError, match=r"MAX_MODEL_LENN is not a setting\ncorrect the settings, or .*--skip-doctor"):
        made(context, model, runpod, env={"MAX_MODEL_LENN": "1"})


def test_without_the_doctor_gpus_are_named(context: Context, runpod: FakeRunPod) -> None:
    with pytest.raises(OptionError, match="without the doctor, name the GPUs with --gpu"):
        asyncio.run(up(context, "org/tiny", Options(image="x/y:1"), skip_doctor=True))

    assert runpod.bodies == []


def test_an_image_is_needed(context: Context) -> None:
    with pytest.raises(OptionError, match="--image or VLLM_SERVERLESS_IMAGE"):
        asyncio.run(up(context, "org/tiny", Options()))


def test_two_endpoints_of_one_name_are_an_error_with_their_ids(
    context: Context, model: str, runpod: FakeRunPod
) -> None:
    body = made(context, model, runpod)
    runpod.add(body)

    with pytest.raises(OptionError, match="2 endpoints are called llama-8b: give one of their ids, ep1, ep2"):
        asyncio.run(up(context, model, Options(image="x/y:1"), wait=False))


@pytest.mark.parametrize(("created_at", "kept"), [("2026-06-01T11:59:59Z", "other"), ("2026-06-01T12:00:01Z", "ep2")])
def test_of_two_commands_at_once_one_deletes_its_endpoint(  # noqa: PLR0913, PLR0917 (fixtures)
    context: Context, model: str, runpod: FakeRunPod, terminal: Terminal, created_at: str, kept: str
) -> None:
    """The other command has created its endpoint between this one's look and its request."""

    def create_another(_: httpx.Request) -> None:
        endpoint = runpod.add({"name": "llama-8b", "type": "QUEUE", "image": "x/y:1", "gpu": {"pools": ["ADA_24"]},
                               "scaling": {"type": "REQUEST_COUNT", "requestCount": 1}})  # fmt: skip
        runpod.endpoints = {"other": endpoint | {"id": "other", "createdAt": created_at}}

    runpod.script = [lambda _: None, lambda _: None, create_another]
    made(context, model, runpod)

    assert f"llama-8b ({kept})" in terminal.result
    assert ("ep2" in runpod.endpoints) == (kept == "ep2")
    assert "other" in runpod.endpoints, "which is for the other command to delete"
    assert ("another command has created llama-8b (other)" in terminal.messages) == (kept == "other")


def test_a_request_that_nobody_answers_ends_after_the_timeout(context: Context, runpod: FakeRunPod) -> None:
    runpod.workers = [{"id": "w", "status": "THROTTLED", "isStale": False, "gpuCount": 0}]

    with pytest.raises(CapacityError, match="no GPU was free for 0 s"):
        asyncio.run(
            up(
                dataclasses.replace(context, timeout_s=0.05),
                "org/tiny", Options(image="x/y:1", gpus=("4090",)), skip_doctor=True,
            )
        )  # fmt: skip


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str, dict[str, Any]]:
    assert command_line.main([*arguments, "--dry-run", "--api-url", "http://127.0.0.1:9"]) == 0
    printed = capsys.readouterr()
    first, _, rest = printed.out.partition("\n")
    return first, printed.err, json.loads(rest)


def test_a_dry_run_without_a_key_prints_the_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """Nothing is sent: nobody listens at the URL."""
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    monkeypatch.setenv("MY_TOKEN", "abcdefgh")

    first, messages, body = dry_run(
        capsys, "up", model, "--image", "x/y:1", "--gpu", "ADA_24", "--env", "MY_TOKEN", "--secret", "HF_TOKEN=hub"
    )

    assert first == "POST http://127.0.0.1:9/v2/serverless"
    secrets = {"MY_TOKEN": "***", "HF_TOKEN": "{{ RUNPOD_SECRET_hub }}"}
    assert body["env"] == {"MODEL_NAME": model, "WARM_UP": "true", **secrets}
    assert body["gpu"]["pools"] == ["ADA_24"]
    assert violations("CreateEndpointRequest", body) == []
    assert "abcdefgh" not in messages


def test_a_dry_run_without_a_key_and_a_pool_says_how_much_memory_the_model_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)

    _, messages, body = dry_run(capsys, "up", model, "--image", "x/y:1", "--max-model-len", "8192")

    assert body["gpu"]["pools"][0].startswith("(the cheapest of at least ")
    assert "RUNPOD_API_KEY is not set: prices and stock are not known; --gpu names pools" in messages


@pytest.mark.parametrize("env", [{"MODEL_NAME": "other-org/tiny"}, {}])
def test_an_endpoint_for_something_else_is_changed_only_by_its_name(
    context: Context, runpod: FakeRunPod, env: dict[str, str]
) -> None:
    """Models of two organizations may have the same name; and it may be an endpoint that `up` has not made."""
    runpod.add(body(env=env))
    options = Options(image="x/y:1", gpus=("4090",))

    with pytest.raises(OptionError, match=r"tiny \(ep1\) .*: give another --name, or `--name tiny` to change it"):
        asyncio.run(up(context, "org/tiny", options, skip_doctor=True, wait=False))
    assert runpod.bodies == []

    asyncio.run(up(context, "org/tiny", options, name="tiny", skip_doctor=True, wait=False))
    assert runpod.bodies[-1]["env"]["MODEL_NAME"] == "org/tiny"


def test_the_number_of_gpus_that_is_enough_is_named(context: Context, model: str, runpod: FakeRunPod) -> None:
    with pytest.raises(DoctorError, match=r"\(--gpus-per-worker 2 is enough\)"):
        made(context, model, runpod, gpus=("4090",))


def test_stock_counts_for_as_many_gpus_as_a_worker_needs(context: Context, model: str, runpod: FakeRunPod) -> None:
    """One 4090 is free here and there, but two in one machine only of another type."""
    runpod.catalogue = [gpu("NVIDIA GeForce RTX 4090", "ADA_24", 24, 1.10), gpu("NVIDIA L4", "AMPERE_24", 24, 1.50)]
    taken = [gpu("NVIDIA GeForce RTX 4090", "ADA_24", 24, 1.10, "NONE"), runpod.catalogue[1]]

    def two_gpus(request: httpx.Request) -> httpx.Response | None:
        if request.url.params.get("count") == "2":
            return httpx.Response(200, json={"gpus": taken})
        return None

    runpod.script = [two_gpus] * 9

    asked = made(context, model, runpod, env={"MAX_MODEL_LEN": "65536"})

    assert (asked["gpu"]["pools"], asked["gpu"]["count"]) == (["AMPERE_24"], 2)


def test_a_model_that_fits_nothing_says_what_to_change(context: Context, model: str, runpod: FakeRunPod) -> None:
    runpod.catalogue = [gpu("NVIDIA RTX A2000", "AMPERE_6", 6, 0.2, maxCount={"secure": 1, "community": 1})]

    with pytest.raises(OptionError, match="shorten --max-model-len"):
        made(context, model, runpod)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--execution-timeout", "nan"), ("--execution-timeout", "inf"), ("--queue-delay", "nan"), ("--timeout", "0"),
        ("--timeout", "nan"), ("--gpus-per-worker", "0"), ("--gpus-per-worker", "-1"), ("--min-cuda", "12"),
    ],
)  # fmt: skip
def test_a_number_that_is_none_is_refused_at_once(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        command_line.main(["update", "tiny", *arguments])

    assert raised.value.code == 2
    assert f"argument {arguments[0]}: {arguments[1]!r} is not a " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("refusal", "code", "says"),
    [
        (errors.LocalEntryNotFoundError("offline"), 6, "the hub cannot be reached: check the network and HF_ENDPOINT"),
        (errors.RepositoryNotFoundError("404", response=httpx2.Response(404, request=httpx2.Request("GET", "http://hub"))),
         3, "there is no such model, or it is private"),
    ],
)  # fmt: skip
def test_a_model_that_the_hub_does_not_give_ends_as_the_exit_codes_say(  # noqa: PLR0913, PLR0917 (fixtures)
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    refusal: Exception,
    code: int,
    says: str,
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise refusal

    del model  # whose fixture keeps the worker from being asked
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)

    assert command_line.main(["up", "org/none", "--image", "x/y:1", "--dry-run"]) == code
    assert says in capsys.readouterr().err


def test_a_model_without_a_name_is_refused(context: Context) -> None:
    with pytest.raises(OptionError, match="name the model: a hub id"):
        asyncio.run(up(context, " ", Options(image="x/y:1")))


def test_an_endpoint_keeps_its_volume_and_data_centers(context: Context, model: str, runpod: FakeRunPod) -> None:
    """Neither is given again: the disk stays without room for the model, and GPUs are chosen where workers may run."""
    here = [{"id": "EU-1", "name": "EU", "availability": "LOW"}]
    runpod.catalogue = [gpu("NVIDIA L4", "CHEAP", 24, 0.1), gpu("NVIDIA A40", "THERE", 48, 1.22, dataCenters=here)]
    first = made(context, model, runpod, volumes=("vol",), data_centers=("EU-1",))

    asyncio.run(up(context, model, Options(image="x/y:2"), wait=False))

    assert (first["disk"], first["gpu"]["pools"]) == (20, ["THERE"])
    assert runpod.bodies[1:] == [{"image": "x/y:2"}]


def test_an_endpoint_without_its_volume_gets_a_disk_for_the_model(
    context: Context, model: str, runpod: FakeRunPod
) -> None:
    made(context, model, runpod, volumes=("vol",))

    asyncio.run(up(context, model, Options(image="x/y:1", volumes=()), wait=False))

    assert runpod.bodies[1:] == [{"networkVolumes": [], "disk": 40}]


def test_a_split_that_a_setting_asks_for_needs_as_many_gpus(context: Context, runpod: FakeRunPod) -> None:
    options = Options(image="x/y:1", gpus=("4090",), env={"TENSOR_PARALLEL_SIZE": "2"})

    asyncio.run(up(context, "org/tiny", options, skip_doctor=True, wait=False))

    assert runpod.bodies[-1]["gpu"]["count"] == 2


def test_no_answer_is_waited_for_where_no_worker_may_start(
    context: Context, runpod: FakeRunPod, terminal: Terminal
) -> None:
    asyncio.run(up(context, "org/tiny", Options(image="x/y:1", gpus=("4090",), workers_max=0), skip_doctor=True))

    assert "no worker can start while --workers-max is 0" in terminal.messages
    assert "Endpoint  tiny (ep1)" in terminal.result
    assert not [one for one in runpod.requests if one.endswith("/run")]
