"""Each refusal that the description documents, provoked over HTTP; each answer is a problem of the description."""

from __future__ import annotations

from typing import Any

import pytest

from tests.control_plane import ControlPlaneClient, create_body
from tests.unit.emulator.control_plane.conftest import NO_KEY, READ_KEY, StartPlane

CPU = [{"id": "cpu5c", "vcpuCount": 4}]
REQUEST_COUNT = {"type": "REQUEST_COUNT", "requestCount": 4}
AVAILABILITY = "include=AVAILABILITY"
LOGS = "serverless/GPU/workers/none/logs"


def created(**changes: Any) -> dict[str, Any]:
    return create_body(**changes)


def gpu(**changes: Any) -> dict[str, Any]:
    return create_body(gpu={"pools": ["ADA_24"], **changes})


def make_ids(plane: ControlPlaneClient) -> dict[str, str]:
    """Make the endpoints and templates that stand in the table; return their ids."""
    template = {"name": "t", "image": "me/vllm:1"}
    on_gpu = plane.create(gpu={"pools": ["ADA_24"], "minCudaVersion": "12.4"})["id"]
    bound = [one["id"] for one in plane.get("templates")["templates"]]
    return {
        "GPU": on_gpu,
        "CPU": plane.create(gpu=None, cpu=CPU)["id"],
        "COUNT": plane.create(scaling=REQUEST_COUNT)["id"],
        "LB": plane.create(type="LOAD_BALANCER", scaling=REQUEST_COUNT)["id"],
        "POD": plane.request("POST", "templates", template).json()["id"],
        "BOUND": bound[0],
        "PUBLIC": "public-vllm",
    }


@pytest.fixture(scope="module")
def ids(plane: ControlPlaneClient) -> dict[str, str]:
    return make_ids(plane)


Case = tuple[int, str, str, Any, str]
# Status, method, path, body, and what the problem says.
CASES: list[Case] = [
    # What must be there, and be well-formed.
    (422, "POST", "serverless", created(name=None), "'name' is a required property"),
    (422, "POST", "serverless", created(name=""), "$.name"),
    (422, "POST", "serverless", created(type=None), "'type' is a required property"),
    (422, "POST", "serverless", created(type="POD"), "$.type"),
    (422, "POST", "serverless", created(scaling=None), "'scaling' is a required property"),
    (422, "POST", "serverless", created(image=None), "'image' is a required property"),
    (422, "POST", "serverless", created(bogus=1), "bogus"),
    (422, "POST", "serverless", created(workers={"idleTimeout": 0}), "$.workers.idleTimeout"),
    (422, "POST", "serverless", created(workers={"idleTimeout": 3601}), "$.workers.idleTimeout"),
    (422, "POST", "serverless", created(workers={"size": 1}), "size"),
    (422, "POST", "serverless", created(scaling={"type": "QUEUE_DELAY", "queueDelay": 0.1}), "$.scaling"),
    (422, "POST", "serverless", created(scaling={"type": "REQUEST_COUNT", "queueDelay": 1}), "$.scaling"),
    (422, "POST", "serverless", created(type="LOAD_BALANCER"), "$.scaling"),
    (422, "POST", "serverless", created(env={"A": 1}), "$.env.A"),
    (422, "POST", "serverless", created(disk=0), "$.disk"),
    (422, "POST", "serverless", gpu(pools=[]), "$.gpu.pools"),
    (422, "POST", "serverless", gpu(count=0), "$.gpu.count"),
    (422, "POST", "serverless", gpu(minCudaVersion="12"), "$.gpu.minCudaVersion"),
    (422, "POST", "serverless", gpu(allowedCudaVersions=["12"]), "$.gpu.allowedCudaVersions[0]"),
    (422, "POST", "serverless", gpu(excludedTypes=["-NVIDIA L4"]), "$.gpu.excludedTypes[0]"),
    (422, "POST", "serverless", created(allowedCudaVersions=["12.8"]), "allowedCudaVersions"),
    (422, "POST", "serverless", created(gpu=None, cpu=[{"id": "cpu5c", "vcpuCount": 1}]), "$.cpu[0].vcpuCount"),
    (422, "POST", "serverless", created(gpu=None, cpu=[*CPU, *CPU]), "non-unique"),
    (422, "POST", "serverless", created(gpu=None, cpu=[{**CPU[0], "minCudaVersion": "12.8"}]), "minCudaVersion"),
    (422, "POST", "serverless", [], "is not of type 'object'"),
    (422, "PATCH", "serverless/GPU", {"type": "LOAD_BALANCER"}, "type"),
    (422, "PATCH", "serverless/GPU", {"name": None}, "$.name"),
    (422, "PATCH", "serverless/GPU", {"gpu": {"excludedTypes": ["NVIDIA GeForce RTX 4090"]}}, "dependency"),
    (422, "POST", "templates", {"name": "t"}, "'image' is a required property"),
    (422, "POST", "templates", {"name": "t", "image": "a", "mounts": {"network": {}}}, "network"),
    (422, "POST", "templates", {"name": "t", "image": "a", "category": "TPU"}, "$.category"),
    (422, "PATCH", "templates/POD", {"mounts": {"persistent": {"size": 9, "path": "/a"}}}, "size"),
    # Compute: exactly one of GPU and CPU, which cannot be changed.
    (400, "POST", "serverless", created(gpu=None), "exactly one of gpu and cpu"),
    (400, "POST", "serverless", created(cpu=CPU), "exactly one of gpu and cpu"),
    (400, "PATCH", "serverless/GPU", {"cpu": CPU}, "cpu: "),
    (400, "PATCH", "serverless/CPU", {"gpu": {"count": 2}}, "gpu: "),
    (400, "PATCH", "serverless/GPU", {"gpu": {"count": 2}, "cpu": CPU}, "at most one"),
    (400, "POST", "serverless", gpu(pools=["ADA_25"]), "ADA_25"),
    (400, "PATCH", "serverless/GPU", {"gpu": {"pools": ["ADA_25"]}}, "ADA_25"),
    (400, "POST", "serverless", gpu(excludedTypes=["NVIDIA L4"]), "NVIDIA L4"),
    (400, "POST", "serverless", gpu(excludedTypes=["NVIDIA GeForce RTX 4090"]), "no GPU type is left"),
    (400, "POST", "serverless", created(gpu=None, cpu=[{"id": "cpu5c", "vcpuCount": 6}]), "not 6"),
    (400, "POST", "serverless", created(gpu=None, cpu=[{"id": "cpu9", "vcpuCount": 4}]), "cpu9"),
    # CUDA: an exact set or a floor.
    (400, "POST", "serverless", gpu(allowedCudaVersions=["12.8"], minCudaVersion="12.4"), "mutually exclusive"),
    (400, "PATCH", "serverless/GPU", {"gpu": {"allowedCudaVersions": ["12.8"]}}, "mutually exclusive"),
    # Scaling.
    (400, "POST", "serverless", created(scaling=REQUEST_COUNT, workers={"idleTimeout": 5}), "idleTimeout"),
    (400, "PATCH", "serverless/COUNT", {"workers": {"idleTimeout": 5}}, "idleTimeout"),
    (400, "PATCH", "serverless/GPU", {"workers": {"idleTimeout": 5}, "scaling": REQUEST_COUNT}, "idleTimeout"),
    (400, "PATCH", "serverless/LB", {"scaling": {"type": "QUEUE_DELAY", "queueDelay": 1}}, "needs REQUEST_COUNT"),
    (400, "POST", "serverless", created(workers={"min": 4}), "min=4 exceeds max=3"),
    (400, "PATCH", "serverless/GPU", {"workers": {"max": 2, "min": 3}}, "min=3 exceeds max=2"),
    (400, "POST", "serverless", created(timeout=0), "timeout"),
    (400, "POST", "serverless", created(ports=["http"]), "ports"),
    (400, "POST", "serverless", created(env={"A=B": "c"}), "env"),
    (400, "POST", "serverless", created(env={"RUNPOD_INIT_TIMEOUT": "soon"}), "RUNPOD_INIT_TIMEOUT"),
    (400, "POST", "templates", {"name": "t", "image": "a", "ports": ["0/http"]}, "ports"),
    # Templates.
    (404, "POST", "serverless", created(image=None, templateId="none"), "template none not found"),
    (404, "PATCH", "serverless/GPU", {"templateId": ""}, "not found"),
    (422, "POST", "serverless", created(image=None, templateId="POD"), "not a serverless template"),
    (422, "PATCH", "serverless/GPU", {"templateId": "POD"}, "not a serverless template"),
    (404, "PATCH", "templates/PUBLIC", {"name": "mine"}, "not found"),
    (404, "DELETE", "templates/PUBLIC", None, "not found"),
    (400, "DELETE", "templates/BOUND", None, "bound to the serverless endpoint"),
    # What does not exist.
    (404, "GET", "serverless/none", None, "endpoint none not found"),
    (404, "PATCH", "serverless/none", {}, "endpoint none not found"),
    (404, "DELETE", "serverless/none", None, "endpoint none not found"),
    (404, "GET", "serverless/none/workers", None, "endpoint none not found"),
    (404, "GET", "serverless/none/releases", None, "endpoint none not found"),
    (404, "GET", "serverless/none/workers/none/logs", None, "endpoint none not found"),
    (404, "GET", LOGS, None, "worker none not found"),
    (404, "GET", "templates/none", None, "template none not found"),
    (404, "PATCH", "templates/none", {}, "template none not found"),
    (404, "DELETE", "templates/none", None, "template none not found"),
    (404, "GET", "catalog/gpus/RTX%205090", None, "not found"),
    # Parameters of the logs.
    (422, "GET", f"{LOGS}?tail=5001", None, "tail"),
    (422, "GET", f"{LOGS}?tail=-1", None, "tail"),
    (422, "GET", f"{LOGS}?tail=all", None, "tail"),
    (422, "GET", f"{LOGS}?since=yesterday", None, "since"),
    (422, "GET", f"{LOGS}?since=2026-06-01", None, "since"),
    (422, "GET", f"{LOGS}?source=stdout", None, "source"),
    # Parameters of the catalog.
    (400, "GET", f"catalog/gpus?{AVAILABILITY}", None, "requires product"),
    (400, "GET", "catalog/gpus?product=POD", None, "product: valid only with include=AVAILABILITY"),
    (400, "GET", "catalog/gpus?count=2", None, "count: valid only"),
    (400, "GET", "catalog/gpus?cloud=SECURE", None, "cloud: valid only"),
    (400, "GET", "catalog/gpus?countryCodes=FR", None, "countryCodes: valid only"),
    (400, "GET", "catalog/gpus?cudaVersions=12.8", None, "cudaVersions: valid only"),
    (400, "GET", "catalog/gpus?minCudaVersion=12", None, "minCudaVersion: valid only"),
    (400, "GET", f"catalog/gpus?{AVAILABILITY}&product=POD&cudaVersions=12.8&minCudaVersion=12", None, "exclusive"),
    (400, "GET", "catalog/gpus/NVIDIA%20L4?count=2", None, "count: valid only"),
    (422, "GET", "catalog/gpus?include=PRICES", None, "include"),
    (422, "GET", "catalog/gpus?include=AVAILABILITY,AVAILABILITY&product=POD", None, "include"),
    (422, "GET", f"catalog/gpus?{AVAILABILITY}&product=VM", None, "product"),
    (422, "GET", f"catalog/gpus?{AVAILABILITY}&product=POD&count=0", None, "count"),
    (422, "GET", f"catalog/gpus?{AVAILABILITY}&product=POD&cloud=MOON", None, "cloud"),
    (422, "GET", f"catalog/gpus?{AVAILABILITY}&product=POD&countryCodes=fr", None, "countryCodes"),
    (422, "GET", f"catalog/gpus?{AVAILABILITY}&product=POD&cudaVersions=12", None, "cudaVersions"),
    (422, "GET", f"catalog/gpus?{AVAILABILITY}&product=POD&minCudaVersion=new", None, "minCudaVersion"),
    # Parameters of the billing.
    (400, "GET", "billing/serverless?lastN=1&startTime=2026-06-01T00:00:00Z", None, "mutually exclusive"),
    (400, "GET", "billing/serverless?startTime=2026-06-02T00:00:00Z&endTime=2026-06-01T00:00:00Z", None, "before"),
    (422, "GET", "billing/serverless?lastN=0", None, "lastN"),
    (422, "GET", "billing/serverless?bucketSize=minute", None, "bucketSize"),
    (422, "GET", "billing/serverless?startTime=yesterday", None, "startTime"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[1]} {case[2]} {case[4]}")
def test_what_breaks_a_documented_rule_is_refused(plane: ControlPlaneClient, ids: dict[str, str], case: Case) -> None:
    status, method, path, body, text = case
    path = "/".join(ids.get(part, part) for part in path.split("/"))
    if isinstance(body, dict) and body.get("templateId") in ids:
        body = {**body, "templateId": ids[body["templateId"]]}
    before = plane.get("serverless"), plane.get("templates")
    response = plane.request(method, path, body)
    problem = response.json()
    assert (response.status_code, problem["title"]) == (status, response.reason_phrase)
    assert text in " ".join([problem["detail"], *problem.get("errors", [])])
    assert (plane.get("serverless"), plane.get("templates")) == before


def test_a_body_that_is_not_json_is_refused(plane: ControlPlaneClient) -> None:
    assert plane.request("POST", "serverless", content=b"{").status_code == 400


def test_a_cursor_that_is_no_time_is_refused(plane: ControlPlaneClient, ids: dict[str, str]) -> None:
    response = plane.request("GET", LOGS.replace("GPU", ids["GPU"]), headers={"Last-Event-ID": "42"})
    assert response.status_code == 422
    assert "Last-Event-ID" in response.json()["errors"][0]


@pytest.mark.parametrize("value", [None, "a-key-of-the-tests", "Bearer", "Bearer other", "Basic a-key-of-the-tests"])
def test_a_request_without_a_valid_bearer_token_is_refused(plane: ControlPlaneClient, value: str | None) -> None:
    headers = {"Authorization": value or ""}
    assert plane.request("GET", "serverless", headers=headers).status_code == 401
    assert plane.request("POST", "serverless", {"bogus": 1}, headers=headers).status_code == 401


def test_a_key_may_do_only_what_its_permission_says(plane: ControlPlaneClient) -> None:
    def status(method: str, path: str, key: str) -> int:
        body = {"bogus": 1} if method in ("POST", "PATCH") else None
        return plane.request(method, path, body, headers={"Authorization": f"Bearer {key}"}).status_code

    assert status("GET", "serverless", READ_KEY) == 200
    assert status("GET", "serverless", NO_KEY) == 403
    for method, path in [
        ("POST", "serverless"),
        ("PATCH", "serverless/none"),
        ("DELETE", "serverless/none"),
        ("POST", "templates"),
        ("DELETE", "templates/none"),
    ]:
        assert status(method, path, READ_KEY) == 403


def test_requests_beyond_the_quota_are_refused_until_the_window_ends(start_plane: StartPlane) -> None:
    limited = start_plane(rateLimits={"minute": 2, "day": 9})
    first = limited.request("GET", "serverless")
    assert first.headers["RateLimit-Policy"] == '"minute";q=2;w=60, "day";q=9;w=86400'
    assert first.headers["RateLimit"].startswith('"minute";r=1;t=60, "day";r=8;t=')
    assert limited.request("GET", "serverless/none").headers["RateLimit"].startswith('"minute";r=0')
    refused = limited.request("GET", "serverless")
    assert refused.status_code == 429
    assert refused.json()["detail"] == "rate limit exceeded for the minute window"
    assert 0 < int(refused.headers["Retry-After"]) <= 60
    assert refused.headers["RateLimit"].startswith('"minute";r=0')
    unknown = limited.request("GET", "serverless", headers={"Authorization": "Bearer other"})
    assert (unknown.status_code, "RateLimit" in unknown.headers) == (401, False)


def test_without_limits_there_are_no_headers_about_them(plane: ControlPlaneClient) -> None:
    assert "RateLimit" not in plane.request("GET", "serverless").headers


def test_a_path_that_the_emulator_does_not_have_is_a_problem(plane: ControlPlaneClient) -> None:
    for method, path in [("GET", "serverless/a/builds"), ("PUT", "serverless/a"), ("GET", "catalog/cpus")]:
        response = plane.http.request(method, f"/v2/{path}")
        assert (response.status_code, response.headers["content-type"]) == (404, "application/problem+json")
