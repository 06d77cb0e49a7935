"""Which GPUs an endpoint gets: what the user names, what it has, or the cheapest that the doctor finds to fit."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from builder.doctor.checks import advice_for
from deploy import gpus
from deploy.console import Console
from deploy.errors import CapacityError, DoctorError, OptionError
from deploy.gpus import Choice
from deploy.model import Examined
from deploy.options import Options
from runpod_api.models import Endpoint, GpuType

# Below it, a tenth of a request matters.
_EXACT = 10


Catalogue = Callable[[int], Awaitable[list[GpuType]]]
"""Returns the GPU types, with what is free for workers with so many of them."""


async def choose(
    options: Options, examined: Examined | None, catalogue_for: Catalogue, existing: Endpoint | None
) -> tuple[Choice, list[GpuType]]:
    """Return the GPUs, and the catalogue: those that are named, those that the endpoint has, or the cheapest that fit.

    Raises:
        DeployError: the model does not fit, or nothing is free.
    """
    if options.gpus:
        return await _named(options, examined, catalogue_for)
    if existing is not None and existing.gpu is not None:
        count = existing.gpu.count or 1
        catalogue = await catalogue_for(count)
        kept = _kept(existing, catalogue, examined, count) if options.gpus_per_worker in (None, count) else None
        if kept is not None:
            return kept, catalogue
    if examined is None:
        raise OptionError("without the doctor, name the GPUs with --gpu, such as --gpu ADA_24 or --gpu 4090")
    taken: CapacityError | None = None
    for count in _counts(options, examined):
        catalogue = await catalogue_for(count)
        try:
            choice = gpus.choose(catalogue, examined.fit, count, options.data_centers or ())
        except CapacityError as error:
            taken = taken or error
            continue
        if choice is not None:
            return choice, catalogue
    raise taken or OptionError(
        "the model fits none of RunPod's pools with these settings: shorten --max-model-len, quantize it "
        "(--env QUANTIZATION=...), or allow more GPUs with --gpus-per-worker"
    )


def _counts(options: Options, examined: Examined | None) -> tuple[int, ...]:
    """Return the numbers of GPUs that a worker may have, the smallest first."""
    if options.gpus_per_worker is not None:
        return (options.gpus_per_worker,)
    if examined is not None:
        return examined.counts
    size = (options.env or {}).get("TENSOR_PARALLEL_SIZE", "")
    return (int(size) if size.isdecimal() and int(size) > 0 else 1,)


async def _named(options: Options, examined: Examined | None, catalogue_for: Catalogue) -> tuple[Choice, list[GpuType]]:
    """Return the GPUs that the user names.

    Raises:
        DoctorError: the model does not fit so many of them; the message names the number that would do.
    """
    counts = _counts(options, examined)
    catalogue = await catalogue_for(counts[0])
    if examined is None:
        return gpus.named(catalogue, options.gpus, unknown, counts[0]), catalogue
    choice = gpus.named(catalogue, options.gpus, examined.fit, counts[0])
    for pool in choice.pools:
        if pool.fit is None or pool.fit.fits:
            continue
        advice = advice_for(pool.fit, examined.needs.settings)
        for count in examined.counts:
            if all(examined.fit(one, count).fits for one in pool.types):
                advice += f" (--gpus-per-worker {count} is enough)"
                break
        raise DoctorError(f"on {pool.describe(choice.count)} {advice}")
    return choice, catalogue


def _kept(existing: Endpoint, catalogue: Sequence[GpuType], examined: Examined | None, count: int) -> Choice | None:
    """Return the GPUs that the endpoint has, if the model still fits them: prices and stock change from day to day."""
    if existing.gpu is None:
        return None
    excluded = gpus.excluded_types(existing)
    wanted = [one.id for one in catalogue if one.pool in existing.gpu.pools and one.id not in excluded]
    if not wanted:
        return None
    choice = gpus.named(catalogue, wanted, unknown if examined is None else examined.fit, count)
    fit_all = all(pool.fit is None or pool.fit.fits for pool in choice.pools)
    return choice if fit_all else None


def unchecked(options: Options) -> Choice | None:
    """Return pools as they are named, for a dry run without a key."""
    if not options.gpus:
        return None
    pools = tuple(gpus.Pool(name, (), (), None, None) for name in options.gpus)
    return Choice(pools, options.gpus_per_worker or 1)


def unknown(gpu: GpuType, count: int) -> None:
    """Say of no GPU whether the model fits it."""
    del gpu, count


def explain(console: Console, choice: Choice, examined: Examined | None, catalogue: Sequence[GpuType]) -> None:
    """Say in a line or two why these GPUs."""
    if not all(pool.types for pool in choice.pools):
        return
    first, *others = choice.pools
    fit = first.fit
    text = f"GPU: {first.describe(choice.count)}"
    if fit is not None and fit.fits:
        text += f": {_number(fit.max_concurrency or 0)} requests of {fit.max_model_len} tokens fit at once"
    if others:
        text += f"; also {', '.join(pool.describe(choice.count) for pool in others)}"
    console.log(text)
    if all(not pool.is_free for pool in choice.pools):
        console.log(
            "none of these is free now with the driver that --min-cuda asks for: the first worker may wait long"
        )
    if examined is None or fit is None or first.price is None:
        return
    cheaper = gpus.cheaper_with_less_context(catalogue, examined.fit, choice)
    if cheaper is not None:
        console.log(cheaper)


def _number(value: float) -> str:
    return f"{value:.1f}" if value < _EXACT else f"{value:.0f}"
