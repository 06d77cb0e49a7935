"""Which GPUs an endpoint gets: what the user names, what it has, or the cheapest that the doctor finds to fit."""

from __future__ import annotations

from collections.abc import Sequence

from builder.doctor.checks import advice_for
from deploy import gpus
from deploy.console import Console
from deploy.errors import DoctorError, OptionError
from deploy.gpus import Choice
from deploy.model import Examined
from deploy.options import Options
from runpod_api.models import Endpoint, GpuType

# Below it, a tenth of a request matters.
_EXACT = 10


def choose(
    options: Options, examined: Examined | None, catalogue: Sequence[GpuType], existing: Endpoint | None
) -> Choice | None:
    """Return the GPUs: those that are named, those that the endpoint has if they fit, or the cheapest; None if unknown.

    Raises:
        DeployError: the model does not fit, or nothing is free.
    """
    fits = unknown if examined is None else examined.fit
    counts = (options.gpus_per_worker,) if options.gpus_per_worker else (1,) if examined is None else examined.counts
    if not catalogue:
        return _unchecked(options)
    if options.gpus:
        choice = gpus.named(catalogue, options.gpus, fits, options.gpus_per_worker or counts[0])
        for pool in choice.pools:
            if examined is not None and pool.fit is not None and not pool.fit.fits:
                raise DoctorError(f"on {pool.describe(choice.count)} {advice_for(pool.fit, examined.needs.settings)}")
        return choice
    kept = _kept(existing, catalogue, examined, options)
    if kept is not None:
        return kept
    if examined is None:
        raise OptionError("without the doctor, name the GPUs with --gpu, such as --gpu ADA_24 or --gpu 4090")
    return gpus.choose(catalogue, fits, counts, options.data_centers)


def _kept(
    existing: Endpoint | None, catalogue: Sequence[GpuType], examined: Examined | None, options: Options
) -> Choice | None:
    """Return the GPUs that the endpoint has, if the model still fits them: prices and stock change from day to day."""
    if existing is None or existing.gpu is None:
        return None
    count = existing.gpu.count or 1
    if options.gpus_per_worker not in (None, count):
        return None
    excluded = {str(getattr(one, "root", one)) for one in existing.gpu.excluded_types or ()}
    wanted = [one.id for one in catalogue if one.pool in existing.gpu.pools and one.id not in excluded]
    if not wanted:
        return None
    choice = gpus.named(catalogue, wanted, unknown if examined is None else examined.fit, count)
    fit_all = all(pool.fit is None or pool.fit.fits for pool in choice.pools)
    return choice if fit_all else None


def _unchecked(options: Options) -> Choice | None:
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
        console.log("none of these is free now: the first worker may have to wait")
    if examined is None or fit is None or first.price is None:
        return
    cheaper = gpus.cheaper_with_less_context(catalogue, examined.fit, choice)
    if cheaper is not None:
        console.log(cheaper)


def _number(value: float) -> str:
    return f"{value:.1f}" if value < _EXACT else f"{value:.0f}"
