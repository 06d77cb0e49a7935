"""Which pools a model gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from builder.doctor.gpus import GIB
from builder.doctor.memory import Fit
from deploy import gpus
from deploy.errors import CapacityError, OptionError
from runpod_api.models import GpuType
from tests.unit.deploy.fakes import CATALOGUE, gpu


def types(*documents: dict[str, Any]) -> list[GpuType]:
    return [GpuType.model_validate(one) for one in documents or CATALOGUE]


def needing(gib: float, length: int = 8192) -> gpus.Fits:
    """Return a model that needs this much memory, half of it for a request of `length` tokens."""

    def fits(one: GpuType, count: int) -> Fit:
        share = int(gib * GIB / count)
        budget = gpus.gpu_of(one).memory_bytes
        longest = max(int((budget - share / 2) / (share / 2) * length), 0)
        return Fit(length, length, 8, share // 2, {}, share // 2, budget, min(longest, length), share)

    return fits


def choose(catalogue: list[GpuType], fits: gpus.Fits, count: int = 1, data_centers: Sequence[str] = ()) -> gpus.Choice:
    choice = gpus.choose(catalogue, fits, count, data_centers)
    assert choice is not None
    return choice


def test_the_cheapest_pool_that_fits_is_first() -> None:
    choice = choose(types(), needing(15))

    assert choice.pool_ids[0] == "AMPERE_24"
    assert choice.count == 1


def test_further_pools_are_named_if_they_cost_little_more() -> None:
    assert choose(types(), needing(15)).pool_ids == ["AMPERE_24"]
    assert choose(types(*CATALOGUE[:1], *CATALOGUE[3:]), needing(15)).pool_ids == ["ADA_24", "AMPERE_48"]


def test_types_of_a_pool_that_are_too_small_are_excluded() -> None:
    """An L4 has 22.0 GiB, an A5000 is unknown and counts as little; the 4090 has 23.5."""
    pool = [gpu("NVIDIA L4", "POOL", 24, 1.0), gpu("NVIDIA GeForce RTX 4090", "POOL", 24, 1.0)]

    choice = choose(types(*pool), needing(23))

    assert (choice.pool_ids, choice.excluded) == (["POOL"], ["NVIDIA L4"])


def test_a_model_too_large_for_one_gpu_is_split() -> None:
    assert gpus.choose(types(), needing(140), 1) is None
    choice = choose(types(), needing(140), 2)

    assert (choice.pool_ids, choice.count) == (["ADA_80_PRO"], 2)


def test_a_type_without_a_machine_of_so_many_gpus_is_passed_over() -> None:
    single = gpu("NVIDIA H100 PCIe", "HERE", 80, 1.0, maxCount={"secure": 1, "community": 0})

    assert choose(types(single, CATALOGUE[4]), needing(140), 2).pool_ids == ["ADA_80_PRO"]


def test_a_pool_without_free_gpus_is_passed_over() -> None:
    taken = gpu("NVIDIA L4", "AMPERE_24", 24, 0.68, "NONE")

    assert choose(types(taken, *CATALOGUE[3:4]), needing(15)).pool_ids == ["AMPERE_48"]
    with pytest.raises(CapacityError, match=r"AMPERE_24 \(L4, 24 GB, \$0.68/h\), but none is free now: try again"):
        choose(types(taken), needing(15))


def test_a_pool_counts_only_where_workers_may_run() -> None:
    here = [{"id": "EU-1", "name": "EU", "availability": "LOW"}]
    pools = [CATALOGUE[1], gpu("NVIDIA A40", "AMPERE_48", 48, 1.22, dataCenters=here)]

    assert choose(types(*pools), needing(15), 1, ["EU-1"]).pool_ids == ["AMPERE_48"]
    with pytest.raises(CapacityError, match="none is free in US-1 now"):
        choose(types(*pools), needing(15), 1, ["US-1"])


@pytest.mark.parametrize(
    ("name", "pools", "excluded"),
    [
        ("ADA_24", ["ADA_24"], []),
        ("ampere_24", ["AMPERE_24"], []),
        ("4090", ["ADA_24"], []),
        ("NVIDIA L4", ["AMPERE_24"], ["NVIDIA RTX A5000"]),
        ("h100", ["ADA_80_PRO"], []),
    ],
)
def test_pools_are_named_by_pool_or_type(name: str, pools: list[str], excluded: list[str]) -> None:
    choice = gpus.named(types(), [name], needing(15), 1)

    assert (choice.pool_ids, choice.excluded) == (pools, excluded)


def test_named_pools_keep_their_order() -> None:
    assert gpus.named(types(), ["H100", "ADA_24"], needing(15), 1).pool_ids == ["ADA_80_PRO", "ADA_24"]


def test_an_unknown_name_lists_the_pools() -> None:
    with pytest.raises(OptionError, match=r"--gpu ADA_25: .* RunPod has ADA_24, ADA_80_PRO, AMPERE_24, AMPERE_48"):
        gpus.named(types(), ["ADA_25"], needing(15), 1)


def test_a_cheaper_pool_for_a_shorter_context_is_named() -> None:
    fits = needing(30, length=32768)
    choice = choose(types(), fits)

    hint = gpus.cheaper_with_less_context(types(), fits, choice)

    assert choice.pool_ids == ["AMPERE_48"]
    assert hint is not None
    assert hint.startswith("with --max-model-len 14336 it would fit AMPERE_24 (L4, RTX A5000, 24 GB, $0.68/h)")


@pytest.mark.parametrize("name", ["", "-", "2", "MI300X"])
def test_what_would_name_nearly_all_types_or_another_makers_is_refused(name: str) -> None:
    amd = gpu("AMD Instinct MI300X", "AMD_192", 192, 2.0, manufacturer="AMD")
    few = ", ".join(one["pool"] for one in CATALOGUE[:2])

    with pytest.raises(OptionError, match=f"--gpu {name}: there is no such pool or GPU type.*; RunPod has {few}$"):
        gpus.named(types(*CATALOGUE[:2], amd), [name], needing(15), 1)


def test_a_number_of_gpus_is_not_taken_for_a_name() -> None:
    with pytest.raises(OptionError, match="--gpus-per-worker is for the number of GPUs"):
        gpus.named(types(), ["2"], needing(15), 1)
