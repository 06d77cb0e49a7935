"""Which GPU pools a model gets: of those that it fits, the cheapest that are free."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from builder.doctor.gpus import GIB, Gpu, find_gpu
from builder.doctor.memory import Fit
from builder.errors import SettingError
from deploy.errors import CapacityError, OptionError
from runpod_api.models import Endpoint, GpuType

# RunPod places workers on up to three GPU categories, in order of priority.
_MAX_POOLS = 3
# A further pool gives the scheduler room, and may cost this much more than the cheapest.
_MAX_PRICE_RATIO = 1.6
# What CUDA reports of a card's nominal memory, at the least: 22.0 GiB of an L4's 24.
_USABLE = 0.917
COUNTS = (1, 2, 4, 8)
# A shorter part of a type's name would be in too many: `A4`, `10`.
_MIN_PART = 3
# A shorter context is not worth a hint.
_MIN_CONTEXT = 4096

# Whether a model fits a GPU type, with this many of them: None if that is not known.
Fits = Callable[[GpuType, int], Fit | None]


@dataclass(frozen=True)
class Pool:
    """A serverless pool, or what of it is wanted.

    Attributes:
        types: that are wanted.
        excluded: the others' ids.
        price: of one GPU, in USD per hour; None if RunPod names none.
        fit: of the model, on the type with the least memory; None if not known.
    """

    id: str
    types: tuple[GpuType, ...]
    excluded: tuple[str, ...]
    price: float | None
    fit: Fit | None

    @property
    def is_free(self) -> bool:
        """Whether any of its types is free now, as far as the catalogue says."""
        return any(one.availability != "NONE" for one in self.types)

    def describe(self, count: int) -> str:
        """Return its id, types, memory and price."""
        names = ", ".join(one.name for one in self.types)
        memory = f"{min(one.memory for one in self.types)} GB"
        several = f"{count} x " if count > 1 else ""
        price = "price unknown" if self.price is None else f"${self.price * count:.2f}/h"
        return f"{self.id} ({several}{names}, {memory}, {price})"


@dataclass(frozen=True)
class Choice:
    """The pools of an endpoint, the first one preferred, and the number of GPUs of a worker."""

    pools: tuple[Pool, ...]
    count: int

    @property
    def pool_ids(self) -> list[str]:
        """The ids of the pools."""
        return [pool.id for pool in self.pools]

    @property
    def excluded(self) -> list[str]:
        """The ids of the types of these pools that are not wanted."""
        return [one for pool in self.pools for one in pool.excluded]


def gpu_of(gpu: GpuType) -> Gpu:
    """Return a type of the catalogue as the doctor knows it: with the memory that CUDA reports of such a card."""
    nominal_bytes = gpu.memory * GIB
    try:
        known = find_gpu(gpu.name)
    except SettingError:
        return Gpu(gpu.name, int(nominal_bytes * _USABLE))
    return Gpu(gpu.name, min(known.memory_bytes, nominal_bytes))


def choose(catalogue: Sequence[GpuType], fits: Fits, count: int, data_centers: Sequence[str] = ()) -> Choice | None:
    """Return the cheapest pools that the model fits with so many GPUs; None if it fits none.

    Args:
        catalogue: GPU types, with what is free for so many of them.
        fits: whether the model fits.
        count: GPUs of a worker.
        data_centers: where workers may run; empty for anywhere.

    Raises:
        CapacityError: none of the pools that it fits is free.
    """
    fitting = {one.id for one in catalogue if _has_machine(one, count) and _is_fit(fits(one, count))}
    pools = _pools(catalogue, fitting, fits, count)
    if not pools:
        return None
    free = [pool for pool in pools if _is_free_in(pool, data_centers)]
    if not free:
        where = f" in {', '.join(data_centers)}" if data_centers else ""
        raise CapacityError(
            f"the model fits {'; '.join(pool.describe(count) for pool in pools)}, but none is free{where} now: "
            "try again later, allow other data centers, or name a larger GPU with --gpu"
        )
    limit = (free[0].price or float("inf")) * _MAX_PRICE_RATIO
    near = [pool for pool in free if pool.price is not None and pool.price <= limit]
    return Choice(tuple((near or free)[:_MAX_POOLS]), count)


def named(catalogue: Sequence[GpuType], names: Sequence[str], fits: Fits, count: int) -> Choice:
    """Return the pools that the user names: by pool, by type, or by a part of a type's name (`4090`).

    Raises:
        OptionError: there is none of that name.
    """
    chosen: dict[str, list[GpuType]] = {}
    offered = [one for one in catalogue if one.pool and one.manufacturer == "NVIDIA"]
    for name in names:
        wanted = [one for one in offered if (one.pool or "").lower() == name.lower()]
        wanted = wanted or [one for one in offered if name.lower() in (one.id.lower(), one.name.lower())]
        if len(part := _words(name)) >= _MIN_PART:
            wanted = wanted or [one for one in offered if part in _words(f"{one.id} {one.name}")]
        if not wanted:
            pools = ", ".join(sorted({one.pool or "" for one in offered}))
            number = " (--gpus-per-worker is for the number of GPUs)" if name.isdecimal() else ""
            raise OptionError(f"--gpu {name}: there is no such pool or GPU type{number}; RunPod has {pools}")
        for one in wanted:
            types = chosen.setdefault(one.pool or "", [])
            types += [one] if one not in types else []
    ids = {one.id for types in chosen.values() for one in types}
    pools_by_id = {pool.id: pool for pool in _pools(catalogue, ids, fits, count)}
    return Choice(tuple(pools_by_id[pool] for pool in chosen), count)


def excluded_types(endpoint: Endpoint) -> set[str]:
    """Return the ids of the GPU types of its pools on which an endpoint's workers do not run."""
    excluded = () if endpoint.gpu is None else endpoint.gpu.excluded_types or ()
    return {str(getattr(one, "root", one)) for one in excluded}


def _pools(catalogue: Sequence[GpuType], wanted_ids: Collection[str], fits: Fits, count: int) -> list[Pool]:
    """Return the pools with types of these ids, the cheapest first."""
    members: dict[str, list[GpuType]] = {}
    for one in catalogue:
        if one.pool and one.manufacturer == "NVIDIA":
            members.setdefault(one.pool, []).append(one)
    pools = []
    for pool, types in members.items():
        wanted = tuple(one for one in types if one.id in wanted_ids)
        if wanted:
            prices = [one.price.serverless for one in wanted if one.price.serverless is not None]
            smallest = min(wanted, key=lambda one: gpu_of(one).memory_bytes)
            excluded = tuple(one.id for one in types if one not in wanted)
            pools.append(Pool(pool, wanted, excluded, max(prices, default=None), fits(smallest, count)))
    return sorted(pools, key=lambda pool: (pool.price is None, pool.price or 0, pool.id))


def _has_machine(gpu: GpuType, count: int) -> bool:
    """Return whether RunPod has a machine with so many GPUs of this type."""
    return max(gpu.max_count.secure, gpu.max_count.community) >= count


def _is_fit(fit: Fit | None) -> bool:
    return fit is not None and fit.fits is True


def _is_free_in(pool: Pool, data_centers: Sequence[str]) -> bool:
    if not data_centers:
        return pool.is_free
    return any(
        place.id in data_centers and place.availability != "NONE"
        for one in pool.types
        for place in one.data_centers or ()
    )


def _words(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def cheaper_with_less_context(catalogue: Sequence[GpuType], fits: Fits, choice: Choice) -> str | None:
    """Return a line about the cheapest pool that would do for a shorter context, if one costs less than the choice."""
    price = choice.pools[0].price
    if price is None:
        return None
    for pool in _pools(catalogue, {one.id for one in catalogue}, fits, choice.count):
        if pool.price is None or pool.price >= price:
            return None
        length = pool.fit.max_model_len_that_fits if pool.fit is not None else None
        if length and length >= _MIN_CONTEXT and pool.is_free:
            return f"with --max-model-len {length // 1024 * 1024} it would fit {pool.describe(choice.count)}"
    return None
