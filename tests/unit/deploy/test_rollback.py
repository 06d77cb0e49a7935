"""The way back: the old values of the releases' diffs, as a request."""

from __future__ import annotations

from typing import Any

import pytest

from deploy.errors import DeployError, OptionError
from deploy.rollback import rollback_request
from runpod_api.description import violations
from runpod_api.models import Endpoint, ListEndpointReleasesResponse
from tests.unit.deploy.fakes import FakeRunPod
from tests.unit.deploy.test_plan import IMAGE, created


def diff(field: str, old: Any, new: Any) -> dict[str, Any]:
    return {"field": field, "old": old, "new": new}


def releases(*diffs: list[dict[str, Any]]) -> ListEndpointReleasesResponse:
    """Return releases with these diffs, from the first; the API sends the newest first."""
    found = [
        {
            "id": f"rel{version}", "version": version, "source": "MANUAL", "workerCount": 0,
            "createdAt": f"2026-06-01T12:0{version}:00Z", "diff": changed,
        }
        for version, changed in enumerate(diffs, 1)
    ]  # fmt: skip
    rollout = {"inProgress": False, "workersOnLatest": 0, "workersTotal": 0, "percentOnLatest": 0}
    document = {"endpointVersion": len(found), "rollout": rollout, "releases": found[::-1]}
    assert violations("ListEndpointReleasesResponse", document) == []
    return ListEndpointReleasesResponse.model_validate(document)


ENDPOINT = Endpoint.model_validate(FakeRunPod().add(created(IMAGE)))
NEW_IMAGE = [diff("template.imageName", "x/y:1", "x/y:2")]


def test_the_newest_release_is_undone() -> None:
    body, version = rollback_request(ENDPOINT, releases([], NEW_IMAGE), None)

    assert (body, version) == ({"image": "x/y:1"}, 1)


def test_all_releases_after_one_are_undone() -> None:
    later = [diff("template.imageName", "x/y:2", "x/y:3"), diff("gpuCount", 1, 2)]

    body, version = rollback_request(ENDPOINT, releases([], NEW_IMAGE, later), 1)

    assert (body, version) == ({"image": "x/y:1", "gpu": {"count": 1}}, 1)


@pytest.mark.parametrize(
    ("changed", "body"),
    [
        (diff("template.env", {"A": "1"}, {}), {"env": {"A": "1"}}),
        (diff("template.env", [{"key": "A", "value": "1"}], []), {"env": {"A": "1"}}),
        (diff("template.env", None, {"A": "1"}), {"env": {}}),
        (diff("template.containerRegistryAuthId", None, "cred"), {"registry": None}),
        (diff("gpuIds", "ADA_24,-NVIDIA L4", "ADA_24"), {"gpu": {"pools": ["ADA_24"], "excludedTypes": ["NVIDIA L4"]}}),
        (diff("gpu.pools", ["ADA_24"], ["AMPERE_24"]), {"gpu": {"pools": ["ADA_24"]}}),
        (diff("minCudaVersion", None, "13.0"), {"gpu": {"minCudaVersion": ""}}),
        (diff("locations", "EU-1,EU-2", None), {"dataCenterIds": ["EU-1", "EU-2"]}),
        (diff("locations", None, ["EU-1"]), {"dataCenterIds": []}),
        (diff("workers.max", 5, 10), {"workers": {"max": 5}}),
        (diff("flashBootType", "OFF", "FLASHBOOT"), {"flashboot": "OFF"}),
        (diff("scaling", {"type": "QUEUE_DELAY", "queueDelay": 4}, None),
         {"scaling": {"type": "QUEUE_DELAY", "queueDelay": 4}}),
    ],
    ids=lambda value: value.get("field", "") if isinstance(value, dict) else "",
)  # fmt: skip
def test_each_field_goes_back_to_what_it_was(changed: dict[str, Any], body: dict[str, Any]) -> None:
    made, _ = rollback_request(ENDPOINT, releases([], [changed]), None)

    assert made == body
    assert violations("UpdateEndpointRequest", made) == []


@pytest.mark.parametrize(
    ("version", "says"),
    [(7, r"--to 7: tiny has the releases 2, 1"), (2, "--to 2: that is the current release of tiny")],
)
def test_a_release_that_is_none_is_refused(version: int, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        rollback_request(ENDPOINT, releases([], NEW_IMAGE), version)


def test_there_is_nothing_before_the_first_release() -> None:
    with pytest.raises(OptionError, match="tiny has no earlier release"):
        rollback_request(ENDPOINT, releases([]), None)


def test_a_field_that_no_request_sets_is_named() -> None:
    with pytest.raises(DeployError, match="release 2 has changed instanceIds, which this command cannot change back"):
        rollback_request(ENDPOINT, releases([], [diff("instanceIds", "a", "b")]), None)
