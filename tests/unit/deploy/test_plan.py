"""From options to requests: what is created is what the API's description allows, and only differences are changed."""

from __future__ import annotations

from typing import Any

import pytest

from deploy import plan
from deploy.errors import OptionError
from deploy.gpus import Choice, Pool
from deploy.options import LOAD_BALANCER, Options, option_names
from runpod_api.description import violations
from runpod_api.models import Endpoint
from tests.unit.deploy.fakes import FakeRunPod

CHOICE = Choice((Pool("ADA_24", (), (), 1.1, None),), 1)
IMAGE = Options(image="x/y:1")


def created(options: Options, choice: Choice = CHOICE, download_bytes: int | None = None) -> dict[str, Any]:
    body = plan.create_request("tiny", "org/tiny", options, choice, download_bytes)
    assert violations("CreateEndpointRequest", body) == []
    return body


def endpoint(body: dict[str, Any]) -> Endpoint:
    return Endpoint.model_validate(FakeRunPod().add(body))


@pytest.mark.parametrize(
    ("model", "name"),
    [("Qwen/Qwen3-8B", "qwen3-8b"), ("/models/tiny/", "tiny"), ("a/b c", "b-c"), ("/", "model")],
)
def test_an_endpoint_is_called_like_its_model(model: str, name: str) -> None:
    assert plan.endpoint_name(model) == name


def test_a_queue_scales_by_requests_on_machines_that_vllm_runs_on() -> None:
    body = created(IMAGE)

    assert body["gpu"] == {"pools": ["ADA_24"], "count": 1, "minCudaVersion": "13.0"}
    assert body["scaling"] == {"type": "REQUEST_COUNT", "requestCount": 16}
    assert body["workers"] == {"min": 0, "max": 3}, "idleTimeout is rejected for a queue that scales by requests"
    assert body["env"] == {"MODEL_NAME": "org/tiny", "WARM_UP": "true"}
    assert (body["flashboot"], body["timeout"], body["disk"]) == ("FLASHBOOT", 600_000, 20)


def test_a_load_balancer_gets_what_its_worker_needs() -> None:
    body = created(Options(image="x/y:1", type=LOAD_BALANCER))

    assert body["env"] == {
        "MODEL_NAME": "org/tiny", "WARM_UP": "true",
        "ENDPOINT_TYPE": "load_balancer", "PORT": "8080", "PORT_HEALTH": "8080",
    }  # fmt: skip
    assert body["ports"] == ["8080/http"]
    assert body["workers"]["idleTimeout"] == 60


@pytest.mark.parametrize(
    ("env", "health", "ports"),
    [
        ({"PORT": "9000"}, "9000", ["9000/http"]),
        ({"PORT": "9000", "PORT_HEALTH": "9001"}, "9001", ["9000/http", "9001/http"]),
    ],
)
def test_a_load_balancers_own_ports_are_opened(env: dict[str, str], health: str, ports: list[str]) -> None:
    body = created(Options(image="x/y:1", type=LOAD_BALANCER, env=env))

    assert (body["env"]["PORT_HEALTH"], body["ports"]) == (health, ports)


def test_the_disk_has_room_for_the_model_unless_a_volume_has() -> None:
    assert created(IMAGE, download_bytes=15_000_000_000)["disk"] == 40
    assert created(Options(image="x/y:1", volumes=("vol",)), download_bytes=15_000_000_000)["disk"] == 20


def test_a_long_download_gets_time_to_start() -> None:
    assert created(IMAGE, download_bytes=60_000_000_000)["env"]["RUNPOD_INIT_TIMEOUT"] == "720"
    assert "RUNPOD_INIT_TIMEOUT" not in created(IMAGE, download_bytes=15_000_000_000)["env"]


def test_without_the_doctor_an_endpoint_keeps_what_its_models_size_asked_for() -> None:
    before = endpoint(created(IMAGE, download_bytes=60_000_000_000))
    body = created(IMAGE)

    plan.keep_size(body, before, IMAGE)

    assert plan.changes(before, body) == ({}, [])


def test_several_gpus_split_the_model() -> None:
    body = created(IMAGE, Choice(CHOICE.pools, 2))

    assert body["gpu"]["count"] == 2
    assert body["env"]["TENSOR_PARALLEL_SIZE"] == "2"


def test_the_users_variables_win() -> None:
    env = {"MODEL_NAME": "other", "WARM_UP": "false"}

    assert created(Options(image="x/y:1", env=env))["env"] == env


def test_without_flashboot_there_is_no_warm_up() -> None:
    assert "WARM_UP" not in created(Options(image="x/y:1", flashboot="OFF"))["env"]


def test_the_worker_delivers_for_as_long_as_a_request_may_run() -> None:
    body = created(Options(image="x/y:1", execution_timeout_s=1200))

    assert body["timeout"] == 1_200_000
    assert body["env"]["DELIVERY_TIMEOUT_S"] == "1200"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (Options(requests_per_worker=1, queue_delay_s=4), "--requests-per-worker and --queue-delay exclude each other"),
        (Options(type=LOAD_BALANCER, queue_delay_s=4), "--queue-delay is for --type queue"),
        (Options(idle_timeout_s=5), "--idle-timeout is not for queues that scale by requests"),
        (Options(workers_min=4), "--workers-min 4 exceeds --workers-max 3"),
    ],
)
def test_options_that_exclude_each_other_are_named(options: Options, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        plan.create_request("tiny", "org/tiny", options, CHOICE, None)


def test_what_was_created_needs_no_change() -> None:
    for options in (IMAGE, Options(image="x/y:1", type=LOAD_BALANCER), Options(image="x/y:1", queue_delay_s=4)):
        body = created(options)

        assert plan.changes(endpoint(body), body) == ({}, [])


def test_only_differences_are_sent_and_no_secret_is_shown() -> None:
    before = endpoint(created(Options(image="x/y:1", env={"A": "1", "HF_TOKEN": "hf_oldoldoldold"})))
    choice = Choice((Pool("ADA_48_PRO", (), ("NVIDIA L40",), 1.9, None),), 1)
    wanted = created(Options(image="x/y:2", workers_max=5, env={"B": "2", "HF_TOKEN": "hf_newnewnewnew"}), choice)

    body, lines = plan.changes(before, wanted)

    assert violations("UpdateEndpointRequest", body) == []
    assert body == {
        "image": "x/y:2",
        "env": {"MODEL_NAME": "org/tiny", "WARM_UP": "true", "B": "2", "HF_TOKEN": "hf_newnewnewnew"},
        "gpu": {"pools": ["ADA_48_PRO"], "excludedTypes": ["NVIDIA L40"]},
        "workers": {"max": 5},
    }
    assert sorted(lines) == [
        "env: + B=2",
        "env: - A",
        "env: HF_TOKEN=*** -> ***",
        "gpu.excludedTypes: none -> NVIDIA L40",
        "gpu.pools: ADA_24 -> ADA_48_PRO",
        "image: x/y:1 -> x/y:2",
        "workers.max: 3 -> 5",
    ]


def test_excluded_types_are_cleared_with_the_pools() -> None:
    excluding = Choice((Pool("ADA_24", (), ("NVIDIA L4",), 1.1, None),), 1)

    body, _ = plan.changes(endpoint(created(IMAGE, excluding)), created(IMAGE))

    assert body == {"gpu": {"pools": ["ADA_24"]}}


def test_a_floor_replaces_a_set_of_cuda_versions() -> None:
    body = created(IMAGE)
    body["gpu"] = {"pools": ["ADA_24"], "count": 1, "allowedCudaVersions": ["12.8"]}

    change, _ = plan.changes(endpoint(body), created(IMAGE))

    assert change == {"gpu": {"minCudaVersion": "13.0", "allowedCudaVersions": []}}
    assert violations("UpdateEndpointRequest", change) == []


def test_an_update_to_more_gpus_splits_the_model() -> None:
    before = endpoint(created(IMAGE))

    body, _ = plan.changes(before, plan.update_request(before, Options(gpus_per_worker=2), None))

    assert body["gpu"] == {"count": 2}
    assert body["env"]["TENSOR_PARALLEL_SIZE"] == "2"


def test_an_update_changes_only_what_it_names() -> None:
    before = endpoint(created(Options(image="x/y:1", env={"A": "1", "B": "2"})))

    wanted = plan.update_request(before, Options(image="x/y:2", env={"C": "3"}, unset=("A",)), None)

    assert plan.changes(before, wanted)[0] == {
        "image": "x/y:2", "env": {"MODEL_NAME": "org/tiny", "WARM_UP": "true", "B": "2", "C": "3"}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (Options(unset=("A",)), "--unset A: the endpoint does not have it; it has MODEL_NAME, WARM_UP"),
        (Options(idle_timeout_s=5), "--idle-timeout is not for queues that scale by requests"),
    ],
)
def test_an_update_that_is_not_possible_says_why(options: Options, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        plan.update_request(endpoint(created(IMAGE)), options, None)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("$.workers.max: -1 is less than the minimum of 0", "--workers-max: -1 is less than the minimum of 0"),
        ("$: 'image' is a required property", "'image' is a required property"),
        ("$.gpu.pools[0]: 3 is not a string", "--gpu: 3 is not a string"),
        ("$.env.X: 1 is not of type 'string'", "--env X: 1 is not of type 'string'"),
        ("idleTimeout is not applicable", "--idle-timeout is not applicable"),
        ("the image is missing", "the image is missing"),
    ],
)
def test_fields_of_a_request_are_named_by_their_options(text: str, named: str) -> None:
    assert option_names(text) == named
