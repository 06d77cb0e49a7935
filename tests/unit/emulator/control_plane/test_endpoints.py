"""What requests for endpoints and templates mean, over HTTP; each answer is checked against the description."""

from __future__ import annotations

import copy
import json
import threading
from typing import Any

import pytest

from runpod_api import description
from tests.control_plane import ControlPlaneClient
from tests.unit.emulator.control_plane.conftest import StartPlane

L4, A5000, RTX_3090 = "NVIDIA L4", "NVIDIA RTX A5000", "NVIDIA GeForce RTX 3090"


def template(plane: ControlPlaneClient, **changes: Any) -> str:
    """Create a serverless template; return its id."""
    body = {"name": "t", "image": "me/vllm:t", "serverless": True, **changes}
    template_id: str = plane.request("POST", "templates", body).raise_for_status().json()["id"]
    return template_id


def test_a_created_endpoint_has_the_documented_defaults(plane: ControlPlaneClient) -> None:
    endpoint = plane.create()
    root = f"{plane.http.base_url}/v2/{endpoint['id']}".replace("//v2", "/v2")
    assert endpoint["workers"] == {"min": 0, "max": 3, "idleTimeout": 10}
    assert (endpoint["timeout"], endpoint["flashboot"]) == (300_000, "OFF")
    assert endpoint["gpu"] == {"pools": ["ADA_24"], "count": 1, "allowedCudaVersions": [], "minCudaVersion": None}
    assert endpoint["requestUrls"]["runSync"] == f"{root}/runsync"
    assert endpoint["requestUrls"]["status"] == f"{root}/status/{{job_id}}"
    assert plane.get(f"serverless/{endpoint['id']}") == endpoint
    assert endpoint in plane.get("serverless")["endpoints"]
    assert plane.http.get(endpoint["requestUrls"]["health"]).json()["workers"]["idle"] == 0


@pytest.mark.parametrize("path", ["/v2/serverless", "/v2/serverless/{id}", "/v2/templates"])
def test_the_descriptions_own_requests_are_accepted(plane: ControlPlaneClient, path: str) -> None:
    methods = description.document()["paths"][path]
    method = "patch" if "{id}" in path else "post"
    examples = methods[method]["requestBody"]["content"]["application/json"]["examples"]
    for example in examples.values():
        target = path.removeprefix("/v2/").format(id=plane.create()["id"])
        assert plane.request(method.upper(), target, example["value"]).is_success


def test_a_load_balancing_endpoint_has_a_url_of_its_own(plane: ControlPlaneClient) -> None:
    scaling = {"type": "REQUEST_COUNT", "requestCount": 4}
    endpoint = plane.create(type="LOAD_BALANCER", scaling=scaling, workers={"idleTimeout": 7})
    base = endpoint["requestUrls"]["base"]
    assert endpoint["requestUrls"] == {"base": base, "health": f"{base}/ping"}
    assert endpoint["workers"] == {"min": 0, "max": 3, "idleTimeout": 7}
    assert plane.http.get(base, headers={"Authorization": ""}).status_code == 401
    changed = plane.patch(endpoint["id"], env={"HEALTH_CHECK_PATH": "/healthz", "PORT": "80"})
    assert changed["requestUrls"] == {"base": base, "health": f"{base}/healthz"}
    plane.delete(endpoint["id"])
    assert endpoint["id"] not in [one["id"] for one in plane.get("serverless")["endpoints"]]


def test_a_cpu_endpoint_has_the_memory_of_its_flavor_and_no_gpu(plane: ControlPlaneClient) -> None:
    endpoint = plane.create(gpu=None, cpu=[{"id": "cpu5g", "vcpuCount": 4}, {"id": "cpu3c", "vcpuCount": 2}])
    assert endpoint["cpu"] == [
        {"id": "cpu5g", "vcpuCount": 4, "memory": 16},
        {"id": "cpu3c", "vcpuCount": 2, "memory": 4},
    ]
    assert "gpu" not in endpoint
    changed = plane.patch(endpoint["id"], cpu=[{"id": "cpu3c", "vcpuCount": 8}])
    assert changed["cpu"] == [{"id": "cpu3c", "vcpuCount": 8, "memory": 16}]


def test_pools_and_excluded_types_are_one_selection(plane: ControlPlaneClient) -> None:
    endpoint = plane.create(gpu={"pools": ["AMPERE_24"], "excludedTypes": [f" {L4}", L4, RTX_3090]})
    assert endpoint["gpu"]["excludedTypes"] == [L4, RTX_3090]
    kept = plane.patch(endpoint["id"], gpu={"minCudaVersion": "12.6"})
    assert kept["gpu"]["excludedTypes"] == [L4, RTX_3090]
    replaced = plane.patch(endpoint["id"], gpu={"pools": ["AMPERE_24"]})
    assert "excludedTypes" not in replaced["gpu"]
    assert replaced["gpu"]["minCudaVersion"] == "12.6"


def test_cuda_constraints_are_cleared_explicitly(plane: ControlPlaneClient) -> None:
    endpoint = plane.create(gpu={"pools": ["ADA_24"], "allowedCudaVersions": ["12.8"]})
    floor = plane.patch(endpoint["id"], gpu={"allowedCudaVersions": [], "minCudaVersion": "12.4"})["gpu"]
    assert (floor["allowedCudaVersions"], floor["minCudaVersion"]) == ([], "12.4")
    exact = plane.patch(endpoint["id"], gpu={"allowedCudaVersions": ["12.8"], "minCudaVersion": ""})["gpu"]
    assert (exact["allowedCudaVersions"], exact["minCudaVersion"]) == (["12.8"], None)


def test_the_idle_timeout_is_shown_where_it_applies(plane: ControlPlaneClient) -> None:
    endpoint = plane.create(workers={"max": 2, "idleTimeout": 77})
    counting = plane.patch(endpoint["id"], scaling={"type": "REQUEST_COUNT", "requestCount": 3})
    assert counting["workers"] == {"min": 0, "max": 2}
    delayed = plane.patch(endpoint["id"], scaling={"type": "QUEUE_DELAY", "queueDelay": 2})
    assert delayed["workers"] == {"min": 0, "max": 2, "idleTimeout": 77}


def test_an_update_changes_only_what_it_names_and_replaces_the_variables(plane: ControlPlaneClient) -> None:
    endpoint = plane.create(env={"A": "1", "B": "2"}, args="--x", networkVolumes=["v1"])
    changed = plane.patch(endpoint["id"], env={"A": "3"}, name="other", workers={"max": 1})
    assert changed == {**endpoint, "env": {"A": "3"}, "name": "other", "workers": {**endpoint["workers"], "max": 1}}
    assert plane.patch(endpoint["id"]) == changed


def test_a_template_is_copied_at_creation_and_the_body_overrides_it(plane: ControlPlaneClient) -> None:
    made_from = template(
        plane, env={"A": "template", "B": "template"}, args="--t", disk=7, allowedCudaVersions=["12.8"]
    )
    endpoint = plane.create(image=None, templateId=made_from, args="--mine", env={"A": "body", "C": "body"})
    assert (endpoint["image"], endpoint["args"], endpoint["disk"]) == ("me/vllm:t", "--mine", 7)
    assert endpoint["env"] == {"A": "body", "B": "template", "C": "body"}
    assert endpoint["gpu"]["allowedCudaVersions"] == ["12.8"]
    plane.request("PATCH", f"templates/{made_from}", {"image": "me/vllm:later"}).raise_for_status()
    assert plane.get(f"serverless/{endpoint['id']}") == endpoint
    assert plane.request("DELETE", f"templates/{made_from}").status_code == 204


def test_a_templates_cuda_versions_give_way_to_the_bodys_constraint(plane: ControlPlaneClient) -> None:
    made_from = template(plane, allowedCudaVersions=["12.8"])

    def gpu(**changes: Any) -> dict[str, Any]:
        endpoint = plane.create(image=None, templateId=made_from, gpu={"pools": ["ADA_24"], **changes})
        result: dict[str, Any] = endpoint["gpu"]
        return result

    assert gpu(minCudaVersion="12.4")["allowedCudaVersions"] == []
    assert gpu(allowedCudaVersions=[])["allowedCudaVersions"] == []
    on_cpu = plane.create(image=None, templateId=made_from, gpu=None, cpu=[{"id": "cpu5c", "vcpuCount": 2}])
    assert "gpu" not in on_cpu


def test_a_template_in_an_update_replaces_the_variables_merged_with_the_bodys(plane: ControlPlaneClient) -> None:
    endpoint = plane.create(env={"OLD": "1"}, args="--old", name="kept")
    applied = template(plane, env={"A": "template", "B": "template"})
    changed = plane.patch(endpoint["id"], templateId=applied, env={"A": "body"})
    assert (changed["image"], changed["args"], changed["name"]) == ("me/vllm:t", "", "kept")
    assert changed["env"] == {"A": "body", "B": "template"}


def test_a_public_template_can_be_read_and_used_but_is_not_listed(plane: ControlPlaneClient) -> None:
    public = plane.get("templates/public-vllm")
    assert public["public"]
    assert public["id"] not in [one["id"] for one in plane.get("templates")["templates"]]
    assert plane.create(image=None, templateId=public["id"])["image"] == public["image"]


def test_templates_are_created_with_defaults_changed_in_part_and_deleted(plane: ControlPlaneClient) -> None:
    body = {"name": "t", "image": "a", "mounts": {"persistent": {"size": 20, "path": "/workspace"}}}
    created = plane.request("POST", "templates", body).json()
    assert (created["category"], created["serverless"], created["public"]) == ("NVIDIA", False, False)
    assert (created["startSsh"], created["startJupyter"], created["allowedCudaVersions"]) == (True, True, [])
    path = f"templates/{created['id']}"
    changed = plane.request("PATCH", path, {"name": "u", "mounts": {}, "env": {"A": "1"}}).json()
    assert changed == {**created, "name": "u", "env": {"A": "1"}}
    assert plane.get(path) == changed
    assert plane.request("DELETE", path).status_code == 204
    assert plane.request("GET", path).status_code == 404


def test_an_endpoints_own_template_follows_it_and_is_deleted_with_it(plane: ControlPlaneClient) -> None:
    before = [one["id"] for one in plane.get("templates")["templates"]]
    endpoint = plane.create()
    plane.patch(endpoint["id"], image="me/vllm:2")
    (bound,) = [one for one in plane.get("templates")["templates"] if one["id"] not in before]
    assert (bound["image"], bound["serverless"]) == ("me/vllm:2", True)
    plane.request("PATCH", f"templates/{bound['id']}", {"image": "me/vllm:3"}).raise_for_status()
    assert plane.get(f"serverless/{endpoint['id']}")["image"] == "me/vllm:2"
    plane.delete(endpoint["id"])
    assert [one["id"] for one in plane.get("templates")["templates"]] == before


def test_container_changes_are_releases_and_scaling_is_not(plane: ControlPlaneClient) -> None:
    endpoint = plane.create(env={"A": "1"})["id"]
    plane.patch(endpoint, workers={"max": 1}, scaling={"type": "QUEUE_DELAY", "queueDelay": 9}, timeout=1000, name="n")
    assert plane.releases(endpoint)["endpointVersion"] == 1
    plane.patch(endpoint, image="me/vllm:2", env={"A": "2"})
    plane.patch(endpoint, image="me/vllm:2")
    plane.patch(endpoint, gpu={"count": 2}, dataCenterIds=["EU-RO-1"])
    plane.patch(endpoint, image="me/vllm:1", env={"A": "1"})
    document = plane.releases(endpoint)
    assert document["endpointVersion"] == 4
    assert [release["version"] for release in document["releases"]] == [4, 3, 2, 1]
    assert [release["diff"] for release in document["releases"]] == [
        [
            {"field": "template.imageName", "old": "me/vllm:2", "new": "me/vllm:1"},
            {"field": "template.env", "old": {"A": "2"}, "new": {"A": "1"}},
        ],
        [{"field": "gpuCount", "old": 1, "new": 2}, {"field": "locations", "old": [], "new": ["EU-RO-1"]}],
        [
            {"field": "template.imageName", "old": "me/vllm:1", "new": "me/vllm:2"},
            {"field": "template.env", "old": {"A": "1"}, "new": {"A": "2"}},
        ],
        [],
    ]
    assert document["rollout"] == {
        "inProgress": False,
        "workersOnLatest": 0,
        "workersTotal": 0,
        "percentOnLatest": 0,
    }


def test_a_deleted_endpoint_cancels_its_jobs_and_is_gone(plane: ControlPlaneClient) -> None:
    endpoint = plane.create()
    urls = copy.deepcopy(endpoint["requestUrls"])
    assert plane.http.post(urls["run"], json={"input": {}}).json()["status"] == "IN_QUEUE"
    plane.delete(endpoint["id"])
    assert plane.http.post(urls["run"], json={"input": {}}).status_code == 404
    assert endpoint["id"] not in [one["id"] for one in plane.get("serverless")["endpoints"]]
    assert plane.request("GET", f"serverless/{endpoint['id']}").status_code == 404


def test_an_external_worker_is_listed_without_a_version(plane: ControlPlaneClient) -> None:
    endpoint = plane.create()["id"]
    plane.http.get(f"/v2/{endpoint}/job-take/w1?gpu=x&job_in_progress=0").raise_for_status()
    document = plane.workers(endpoint)
    assert document["summary"] == {
        "running": 0,
        "idle": 1,
        "initializing": 0,
        "throttled": 0,
        "unhealthy": 0,
        "total": 1,
    }
    (worker,) = document["workers"]
    assert (worker["id"], worker["version"], worker["isStale"]) == ("w1", None, False)
    assert (worker["gpuTypeId"], worker["dataCenterId"]) == ("NVIDIA GeForce RTX 4090", "US-KS-2")
    plane.patch(endpoint, image="me/vllm:2")
    assert not plane.workers(endpoint)["workers"][0]["isStale"]


def test_faults_can_be_injected_into_the_control_plane(plane: ControlPlaneClient) -> None:
    rule = {"kind": "error", "route": "control-plane", "status": 503, "times": 1}
    plane.http.put("/faults", json={"rules": [rule]}).raise_for_status()
    assert [plane.http.get("/v2/serverless").status_code for _ in range(2)] == [503, 200]
    plane.http.put("/faults", json={}).raise_for_status()


def test_a_log_is_streamed_from_a_time_on_and_ends_with_its_worker(plane: ControlPlaneClient) -> None:
    endpoint = plane.create()["id"]
    plane.http.get(f"/v2/{endpoint}/job-take/w1?gpu=x&job_in_progress=0").raise_for_status()
    deleted = threading.Timer(0.2, plane.delete, (endpoint,))
    deleted.start()
    # An external worker has no log: the stream is empty, and ends when the worker is gone.
    response = plane.request("GET", f"serverless/{endpoint}/workers/w1/logs?since=2999-01-01T00:00:00Z")
    deleted.join()
    assert (response.status_code, response.text.replace(": keep-alive\n\n", "")) == (200, "")


def test_the_page_is_kept_up_to_date_without_an_endpoint(start_plane: StartPlane) -> None:
    with start_plane().http.stream("GET", "/state/events") as events:
        lines = (line for line in events.iter_lines() if line)
        assert [json.loads(next(lines).removeprefix("data: "))["endpoints"] for _ in range(2)] == [[], []]


def test_billing_has_a_record_of_each_endpoint_and_bucket(plane: ControlPlaneClient) -> None:
    endpoint = plane.create()["id"]
    document = plane.get("billing/serverless", params={"lastN": 3, "bucketSize": "hour"})
    assert document["metadata"]["recordCount"] == 3 * document["metadata"]["uniqueServerlessCount"]
    unknown = plane.get("billing/serverless", params={"serverlessId": "none"})
    assert (unknown["records"], unknown["metadata"]["query"]["serverlessId"]) == ([], "none")
    assert endpoint
