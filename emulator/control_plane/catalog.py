"""The hardware that the emulated platform has: GPU types in pools, data centers with their stock, CPU flavors.

Ids, pools and memory are the platform's; prices (USD an hour) and stock are examples, and do not change.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from emulator.errors import BadRequestError, NotFoundError

_LEVELS: Final = ("NONE", "LOW", "MEDIUM", "HIGH")
_AVAILABILITY: Final = "AVAILABILITY"
# Parameters that scope the availability, and so need it.
_SCOPES: Final = ("product", "count", "cloud", "countryCodes", "cudaVersions", "minCudaVersion")
_CLUSTER_COUNT: Final = 8


@dataclass(frozen=True)
class DataCenter:
    """A data center: its name, and its country's code."""

    name: str
    country: str


DATA_CENTERS: Final = {
    "US-KS-2": DataCenter("US Kansas 2", "US"),
    "US-GA-2": DataCenter("US Georgia 2", "US"),
    "CA-MTL-1": DataCenter("Canada Montreal 1", "CA"),
    "EU-RO-1": DataCenter("EU Romania 1", "RO"),
    "EU-FR-1": DataCenter("EU France 1", "FR"),
    "AP-JP-1": DataCenter("Asia Japan 1", "JP"),
}


@dataclass(frozen=True)
class GpuType:
    """A GPU type.

    Args:
        memory: GB.
        prices: USD an hour: secure, community (0: not there), serverless (None: in no pool).
        max_counts: GPUs of the largest machine: secure, community.
        stock: index into the levels, by data center.
        cuda: CUDA versions, and whether a machine with it is free.
    """

    id: str
    name: str
    pool: str | None
    memory: int
    prices: tuple[float, float, float | None]
    max_counts: tuple[int, int]
    stock: Mapping[str, int]
    cuda: Mapping[str, bool]
    manufacturer: str = "NVIDIA"

    def document(self) -> dict[str, Any]:
        """Return the type without its availability."""
        secure, community, serverless = self.prices
        price = {"secure": secure, "community": community}
        return {
            "id": self.id,
            "name": self.name,
            "pool": self.pool,
            "manufacturer": self.manufacturer,
            "memory": self.memory,
            "secure": True,
            "community": community > 0,
            "price": price if serverless is None else {**price, "serverless": serverless},
            "maxCount": {"secure": self.max_counts[0], "community": self.max_counts[1]},
        }

    def availability(self, query: Mapping[str, Any]) -> dict[str, Any]:
        """Return what `include=AVAILABILITY` adds, scoped by the query's parameters."""
        cuda = {version: free for version, free in self.cuda.items() if _accepts(query, version)}
        levels = self._stock(query) if not self.cuda or any(cuda.values()) else {}
        result: dict[str, Any] = {"availability": _LEVELS[max(levels.values(), default=0)]}
        if levels:
            result["dataCenters"] = [
                {"id": id_, "name": DATA_CENTERS[id_].name, "availability": _LEVELS[level]}
                for id_, level in levels.items()
            ]
        if cuda:
            result["cudaVersions"] = [{"version": version, "available": free} for version, free in cuda.items()]
        return result

    def _stock(self, query: Mapping[str, Any]) -> dict[str, int]:
        """Return the levels of the data centers that have it in the requested configuration."""
        is_community = query.get("cloud") == "COMMUNITY"
        count = query.get("count", 1)
        largest = self.max_counts[1 if is_community else 0]
        possible = (
            ("POD" in query["product"])
            or ("CLUSTER" in query["product"] and largest >= _CLUSTER_COUNT)
            or ("SERVERLESS" in query["product"] and self.pool is not None and not is_community)
        )
        if not possible or count > largest:
            return {}
        return {id_: level for id_, level in self.stock.items() if level and _is_in_countries(query, id_)}

    def is_in_countries(self, query: Mapping[str, Any]) -> bool:
        """Return whether a data center in the query's countries offers it, or the query names none."""
        return any(_is_in_countries(query, id_) for id_ in self.stock)


def _is_in_countries(query: Mapping[str, Any], data_center: str) -> bool:
    return DATA_CENTERS[data_center].country in query.get("countryCodes", (DATA_CENTERS[data_center].country,))


def _accepts(query: Mapping[str, Any], version: str) -> bool:
    """Return whether a CUDA version is one of `cudaVersions`, or at least `minCudaVersion`, compared numerically."""
    floor = query.get("minCudaVersion")
    return version in query.get("cudaVersions", (version,)) and (floor is None or _numbers(version) >= _numbers(floor))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


_OLD = {"12.4": True, "12.6": True, "12.8": True, "12.9": False}
_NEW = {"12.8": True, "12.9": True, "13.0": True}
_BY_ID: Final = (
    GpuType("NVIDIA RTX A4000", "RTX A4000", "AMPERE_16", 16, (0.25, 0.17, 0.58), (8, 4), {"EU-RO-1": 3}, _OLD),
    GpuType(
        "NVIDIA RTX 2000 Ada Generation", "RTX 2000 Ada", "AMPERE_16", 16, (0.24, 0, 0.58), (8, 0), {"EU-RO-1": 2}, _OLD
    ),
    GpuType("NVIDIA L4", "L4", "AMPERE_24", 24, (0.43, 0, 0.69), (8, 0), {"EU-RO-1": 3, "US-KS-2": 2}, _OLD),
    GpuType("NVIDIA RTX A5000", "RTX A5000", "AMPERE_24", 24, (0.27, 0.16, 0.69), (8, 4), {"EU-FR-1": 2}, _OLD),
    GpuType("NVIDIA GeForce RTX 3090", "RTX 3090", "AMPERE_24", 24, (0.46, 0.22, 0.69), (8, 4), {"CA-MTL-1": 1}, _OLD),
    GpuType(
        "NVIDIA GeForce RTX 4090",
        "RTX 4090",
        "ADA_24",
        24,
        (0.44, 0.31, 1.1),
        (8, 4),
        {"US-KS-2": 3, "EU-RO-1": 3},
        {**_OLD, "13.0": True},
    ),
    GpuType("NVIDIA GeForce RTX 5090", "RTX 5090", "ADA_32_PRO", 32, (0.89, 0.69, 1.58), (8, 4), {"EU-RO-1": 2}, _NEW),
    GpuType("NVIDIA A40", "A40", "AMPERE_48", 48, (0.4, 0, 1.22), (10, 0), {"CA-MTL-1": 3}, _OLD),
    GpuType("NVIDIA RTX A6000", "RTX A6000", "AMPERE_48", 48, (0.49, 0.33, 1.22), (8, 4), {"US-KS-2": 2}, _OLD),
    GpuType("NVIDIA L40", "L40", "ADA_48_PRO", 48, (0.99, 0.69, 1.9), (8, 4), {"US-KS-2": 1}, _OLD),
    GpuType("NVIDIA L40S", "L40S", "ADA_48_PRO", 48, (0.86, 0.79, 1.9), (8, 4), {"US-KS-2": 2, "AP-JP-1": 1}, _OLD),
    GpuType(
        "NVIDIA RTX 6000 Ada Generation",
        "RTX 6000 Ada",
        "ADA_48_PRO",
        48,
        (0.77, 0.74, 1.9),
        (8, 4),
        {"EU-RO-1": 2},
        _OLD,
    ),
    GpuType("NVIDIA A100 80GB PCIe", "A100 PCIe", "AMPERE_80", 80, (1.64, 1.19, 2.72), (8, 4), {"US-KS-2": 2}, _OLD),
    GpuType("NVIDIA A100-SXM4-80GB", "A100 SXM", "AMPERE_80", 80, (1.74, 0, 2.72), (8, 0), {"CA-MTL-1": 2}, _OLD),
    GpuType("NVIDIA H100 PCIe", "H100 PCIe", "ADA_80_PRO", 80, (2.39, 1.99, 4.18), (8, 4), {"US-GA-2": 1}, _NEW),
    GpuType("NVIDIA H100 80GB HBM3", "H100 SXM", "ADA_80_PRO", 80, (2.99, 0, 4.18), (8, 0), {"US-GA-2": 2}, _NEW),
    GpuType("NVIDIA H200", "H200 SXM", "HOPPER_141", 141, (3.99, 0, 5.58), (8, 0), {"EU-FR-1": 1, "US-GA-2": 2}, _NEW),
    GpuType("NVIDIA B200", "B200", "BLACKWELL_180", 180, (5.98, 0, 8.64), (8, 0), {"US-GA-2": 1}, _NEW),
    GpuType(
        "AMD Instinct MI300X OAM", "MI300X", None, 192, (2.49, 0, None), (8, 0), {"EU-RO-1": 1}, {}, manufacturer="AMD"
    ),
)
GPU_TYPES: Final = {gpu.id: gpu for gpu in _BY_ID}
POOLS: Final = {
    pool: tuple(gpu for gpu in _BY_ID if gpu.pool == pool) for pool in dict.fromkeys(gpu.pool for gpu in _BY_ID) if pool
}

# GB of memory for each vCPU, the numbers of vCPUs, and USD an hour for each vCPU.
_CPU_COUNTS: Final = (2, 4, 8, 16, 32)
CPU_FLAVORS: Final = {
    "cpu3c": (2, 0.03),
    "cpu3g": (4, 0.04),
    "cpu3m": (8, 0.05),
    "cpu5c": (2, 0.035),
    "cpu5g": (4, 0.045),
    "cpu5m": (8, 0.055),
}


def list_gpu_types(query: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return all GPU types, those in `countryCodes` only; the query is valid by the description.

    Raises:
        BadRequestError: its parameters contradict each other.
    """
    check_query(query)
    return [_document(gpu, query) for gpu in _BY_ID if gpu.is_in_countries(query)]


def get_gpu_type(gpu_id: str, query: Mapping[str, Any]) -> dict[str, Any]:
    """Return one GPU type, also one that is not in `countryCodes`.

    Raises:
        BadRequestError: the query's parameters contradict each other.
        NotFoundError: there is no such type.
    """
    check_query(query)
    if gpu_id not in GPU_TYPES:
        raise NotFoundError(f"GPU type {gpu_id!r} not found")
    return _document(GPU_TYPES[gpu_id], query)


def _document(gpu: GpuType, query: Mapping[str, Any]) -> dict[str, Any]:
    return {**gpu.document(), **(gpu.availability(query) if _AVAILABILITY in query.get("include", ()) else {})}


def check_query(query: Mapping[str, Any]) -> None:
    """Check what the description's texts say of the parameters together.

    Raises:
        BadRequestError: availability without a product, a parameter of the availability without it, or two constraints
            on CUDA.
    """
    if _AVAILABILITY in query.get("include", ()):
        if "product" not in query:
            raise BadRequestError("include=AVAILABILITY requires product: POD, CLUSTER or SERVERLESS")
    elif given := [name for name in _SCOPES if name in query]:
        raise BadRequestError(f"{', '.join(given)}: valid only with include=AVAILABILITY")
    if "cudaVersions" in query and "minCudaVersion" in query:
        raise BadRequestError("cudaVersions and minCudaVersion are mutually exclusive")


def select(pools: Sequence[str], excluded: Collection[str]) -> list[GpuType]:
    """Return the GPU types of pools, minus the excluded ones.

    Raises:
        BadRequestError: a pool is unknown, an excluded type is in none of the pools, or no type is left.
    """
    if unknown := [pool for pool in pools if pool not in POOLS]:
        raise BadRequestError(f"gpu.pools: unknown {', '.join(unknown)}; GET /v2/catalog/gpus lists the pools")
    types = [gpu for pool in dict.fromkeys(pools) for gpu in POOLS[pool]]
    ids = [gpu.id for gpu in types]
    if foreign := [id_ for id_ in excluded if id_ not in ids]:
        raise BadRequestError(f"gpu.excludedTypes: {', '.join(foreign)}: the pools have only {', '.join(ids)}")
    left = [gpu for gpu in types if gpu.id not in excluded]
    if not left:
        raise BadRequestError("gpu.excludedTypes: no GPU type is left")
    return left


def cpu_config(flavor: str, vcpus: int) -> dict[str, Any]:
    """Return a CPU configuration with its memory.

    Raises:
        BadRequestError: the flavor is unknown, or does not have this number of vCPUs.
    """
    if flavor not in CPU_FLAVORS:
        raise BadRequestError(f"cpu: unknown flavor {flavor}; there are {', '.join(CPU_FLAVORS)}")
    if vcpus not in _CPU_COUNTS:
        raise BadRequestError(f"cpu: {flavor} has {', '.join(map(str, _CPU_COUNTS))} vCPUs, not {vcpus}")
    return {"id": flavor, "vcpuCount": vcpus, "memory": CPU_FLAVORS[flavor][0] * vcpus}


@dataclass(frozen=True)
class Placement:
    """Where a worker runs: GPU type (None: on CPUs), number of GPUs, data center, USD an hour."""

    gpu_type: str | None
    gpu_count: int
    data_center: str
    price: float


def place(config: Mapping[str, Any]) -> Placement:
    """Return where an endpoint's workers run: on the type that the stock prefers, in a data center that it prefers.

    Args:
        config: the endpoint's configuration, as the API shows it.
    """
    preferred: list[str] = config["dataCenterIds"]
    if config.get("cpu"):
        cpu = config["cpu"][0]
        price = CPU_FLAVORS[cpu["id"]][1] * cpu["vcpuCount"]
        return Placement(None, 0, next(iter(preferred), next(iter(DATA_CENTERS))), price)
    gpu = config["gpu"]
    count: int = gpu["count"]
    cuda = {"minCudaVersion": gpu["minCudaVersion"], "cudaVersions": gpu["allowedCudaVersions"]}
    query = {name: value for name, value in cuda.items() if value}

    def stock(candidate: GpuType) -> int:
        fits = any(free and _accepts(query, version) for version, free in candidate.cuda.items())
        levels = [level for id_, level in candidate.stock.items() if not preferred or id_ in preferred]
        return max(levels, default=0) if fits else -1

    best = max(select(gpu["pools"], gpu.get("excludedTypes", ())), key=stock)
    centers = [id_ for id_ in best.stock if not preferred or id_ in preferred] or preferred
    center = max(centers, key=lambda id_: best.stock.get(id_, -math.inf))
    return Placement(best.id, count, center, (best.prices[2] or 0) * count)
