"""The catalog of GPU types."""

from __future__ import annotations

from typing import Any

import pytest

from emulator.control_plane import catalog
from emulator.control_plane.rules import create
from emulator.errors import NotFoundError
from tests.control_plane import ControlPlaneClient, create_body

SERVERLESS = {"include": ["AVAILABILITY"], "product": ["SERVERLESS"]}
B200, H200, L4, L40S, MI300X = "NVIDIA B200", "NVIDIA H200", "NVIDIA L4", "NVIDIA L40S", "AMD Instinct MI300X OAM"


def gpu(gpu_id: str, **query: Any) -> dict[str, Any]:
    return catalog.get_gpu_type(gpu_id, {**SERVERLESS, **query})


def centers(document: dict[str, Any]) -> list[str]:
    return [center["id"] for center in document.get("dataCenters", [])]


def test_availability_comes_only_when_it_is_asked_for(plane: ControlPlaneClient) -> None:
    plain = plane.get("catalog/gpus")["gpus"]
    assert not any({"availability", "dataCenters", "cudaVersions"} & one.keys() for one in plain)
    full = plane.get("catalog/gpus?include=AVAILABILITY&product=SERVERLESS,POD")["gpus"]
    assert [one["id"] for one in full] == [one["id"] for one in plain]
    assert all("availability" in one for one in full)
    assert plane.get("catalog/gpus/NVIDIA%20L4")["pool"] == "AMPERE_24"


def test_the_most_available_data_center_gives_the_level() -> None:
    document = gpu(L4)
    assert document["availability"] == "HIGH"
    assert document["dataCenters"] == [
        {"id": "EU-RO-1", "name": "EU Romania 1", "availability": "HIGH"},
        {"id": "US-KS-2", "name": "US Kansas 2", "availability": "MEDIUM"},
    ]


def test_a_type_in_no_pool_is_not_available_for_serverless() -> None:
    document = gpu(MI300X)
    assert (document["pool"], document["availability"], centers(document)) == (None, "NONE", [])
    assert "serverless" not in document["price"]
    assert "cudaVersions" not in document
    assert gpu(MI300X, product=["SERVERLESS", "POD"])["availability"] == "LOW"


def test_count_and_cloud_scope_the_availability() -> None:
    assert gpu(L4, product=["POD"], count=8)["availability"] == "HIGH"
    assert gpu(L4, product=["POD"], count=9)["availability"] == "NONE"
    assert gpu(L4, product=["POD"], cloud="COMMUNITY")["availability"] == "NONE"
    assert gpu(L40S, product=["POD"], cloud="COMMUNITY")["availability"] == "MEDIUM"
    assert gpu(L40S, product=["CLUSTER"], cloud="COMMUNITY")["availability"] == "NONE"


def test_countries_narrow_the_list_but_not_a_single_type() -> None:
    query = {**SERVERLESS, "countryCodes": ["FR", "JP"]}
    listed = catalog.list_gpu_types(query)
    assert [one["id"] for one in listed] == ["NVIDIA RTX A5000", L40S, H200]
    assert [centers(one) for one in listed] == [["EU-FR-1"], ["AP-JP-1"], ["EU-FR-1"]]
    elsewhere = catalog.get_gpu_type(B200, query)
    assert (elsewhere["availability"], "dataCenters" in elsewhere) == ("NONE", False)
    with pytest.raises(NotFoundError):
        catalog.get_gpu_type("B200", query)


def test_cuda_versions_are_exact_and_a_floor_is_compared_numerically() -> None:
    def versions(**query: Any) -> list[str]:
        return [one["version"] for one in gpu(L4, **query).get("cudaVersions", [])]

    assert versions() == ["12.4", "12.6", "12.8", "12.9"]
    assert versions(cudaVersions=["12.6", "12.7"]) == ["12.6"]
    assert versions(minCudaVersion="12.8") == ["12.8", "12.9"]
    assert versions(minCudaVersion="12") == ["12.4", "12.6", "12.8", "12.9"]
    assert gpu(L4, minCudaVersion="12.10")["availability"] == "NONE"
    assert gpu(L4, cudaVersions=["12.9"])["availability"] == "NONE"
    assert gpu(L4, cudaVersions=["12.9"])["cudaVersions"] == [{"version": "12.9", "available": False}]


@pytest.mark.parametrize(
    ("selection", "data_centers", "expected"),
    [
        ({"pools": ["AMPERE_24"]}, [], (L4, "EU-RO-1")),
        ({"pools": ["AMPERE_24"]}, ["US-KS-2"], (L4, "US-KS-2")),
        ({"pools": ["AMPERE_24"]}, ["EU-FR-1"], ("NVIDIA RTX A5000", "EU-FR-1")),
        ({"pools": ["AMPERE_24"], "excludedTypes": [L4]}, [], ("NVIDIA RTX A5000", "EU-FR-1")),
        ({"pools": ["BLACKWELL_180", "ADA_24"], "minCudaVersion": "13.0"}, [], ("NVIDIA GeForce RTX 4090", "US-KS-2")),
        ({"pools": ["ADA_24"]}, ["XX-1"], ("NVIDIA GeForce RTX 4090", "XX-1")),
    ],
)
def test_workers_are_placed_where_the_selection_has_most_stock(
    selection: dict[str, Any], data_centers: list[str], expected: tuple[str, str]
) -> None:
    body = create_body(gpu={**selection, "count": 2}, dataCenterIds=data_centers)
    placed = catalog.place(create(body, lambda _id: {}))
    assert (placed.gpu_type, placed.data_center, placed.gpu_count) == (*expected, 2)
    assert placed.price == 2 * catalog.GPU_TYPES[expected[0]].document()["price"]["serverless"]
