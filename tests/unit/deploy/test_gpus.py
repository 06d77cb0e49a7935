"""Which pools a model gets."""

from __future__ import annotations

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


def test_the_cheapest_pool_that_fits_is_first() -> None:
    choice = gpus.choose(types(), needing(15), (1, 2))

    assert choice.pool_ids[0] == "AMPERE_24"
    assert choice.count == 1


def test_further_pools_are_named_if_they_cost_little_more() -> None:
    assert gpus.choose(types(), needing(15), (1,)).pool_ids == ["AMPERE_24"]
    assert gpus.choose(types(*CATALOGUE[:1], *CATALOGUE[3:]), needing(15), (1,)).pool_ids == ["ADA_24", "AMPERE_48"]


def test_types_of_a_pool_that_are_too_small_are_excluded() -> None:
    """An L4 has 22.0 GiB, an A5000 is unknown and counts as little; the 4090 has 23.5."""
    pool = [gpu("NVIDIA L4", "POOL", 24, 1.0), gpu("NVIDIA GeForce RTX 4090", "POOL", 24, 1.0)]

    choice = gpus.choose(types(*pool), needing(23), (1,))

    assert (choice.pool_ids, choice.excluded) == (["POOL"], ["NVIDIA L4"])


def test_one_gpu_is_preferred_to_two_cheaper_ones() -> None:
    choice = gpus.choose(types(), needing(40), (1, 2, 4))

    assert (choice.pool_ids, choice.count) == (["AMPERE_48"], 1)


def test_a_model_too_large_for_one_gpu_is_split() -> None:
    choice = gpus.choose(types(), needing(140), (1, 2, 4))

    assert (choice.pool_ids, choice.count) == (["ADA_80_PRO"], 2)


def test_a_type_without_a_machine_of_so_many_gpus_is_passed_over() -> None:
    single = gpu("NVIDIA H100 PCIe", "HERE", 80, 1.0, maxCount={"secure": 1, "community": 0})

    assert gpus.choose(types(single, CATALOGUE[4]), needing(140), (1, 2)).pool_ids == ["ADA_80_PRO"]


def test_a_pool_without_free_gpus_is_passed_over() -> None:
    taken = gpu("NVIDIA L4", "AMPERE_24", 24, 0.68, "NONE")

    assert gpus.choose(types(taken, *CATALOGUE[3:4]), needing(15), (1,)).pool_ids == ["AMPERE_48"]
    with pytest.raises(CapacityError, match=r"AMPERE_24 \(L4, 24 GB, \$0.68/h\), but none is free now: try again"):
        gpus.choose(types(taken), needing(15), (1,))


def test_a_pool_counts_only_where_workers_may_run() -> None:
    here = [{"id": "EU-1", "name": "EU", "availability": "LOW"}]
    pools = [CATALOGUE[1], gpu("NVIDIA A40", "AMPERE_48", 48, 1.22, dataCenters=here)]

    assert gpus.choose(types(*pools), needing(15), (1,), ["EU-1"]).pool_ids == ["AMPERE_48"]
    with pytest.raises(CapacityError, match="none is free in US-1 now"):
        gpus.choose(types(*pools), needing(15), (1,), ["US-1"])


def test_a_model_that_fits_nothing_says_what_to_change() -> None:
    with pytest.raises(OptionError, match="shorten --max-model-len"):
        gpus.choose(types(), needing(2000), (1, 2, 4, 8))


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
    choice = gpus.choose(types(), fits, (1,))

    hint = gpus.cheaper_with_less_context(types(), fits, choice)

    assert choice.pool_ids == ["AMPERE_48"]
    assert hint is not None
    assert hint.startswith("with --max-model-len 14336 it would fit AMPERE_24 (L4, RTX A5000, 24 GB, $0.68/h)")
