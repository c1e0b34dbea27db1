"""Ways to run a pipeline with fewer full calls: schedules, the sampler's own fewer steps, diffusers' TaylorSeer."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from dpcache.errors import CacheStateError, MissingExtraError
from dpcache.plan.schedule import Schedule
from dpcache.run.denoisers import find_denoisers
from dpcache.run.pipelines import enabled, stats

#: Of shapes that take the same number of full calls, so many are tried.
_MOST_SHAPES = 4
_ORDERS = (1, 2)


@dataclass(frozen=True)
class Way:
    """One way to run a pipeline.

    Attributes:
        applied: makes the pipeline run that way, and undoes it.
        told: what a reader needs to set it up again.
        steps: of the sampling loop, where they are fewer than those of the full run.
        schedule: what it follows, if it follows one.
    """

    applied: Callable[[Any], AbstractContextManager[Any]] = nullcontext
    told: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    schedule: Schedule | None = None


#: In full.
FULL = Way()


def scheduled(schedule: Schedule) -> Way:
    """By a schedule of this library."""
    told = {"key_steps": schedule.key_steps, "source": schedule.source}
    return Way(partial(enabled, schedule=schedule), told, schedule=schedule)


def fewer_steps(num_steps: int, scheduler: str) -> Way:
    """Fewer steps of the sampler of this name."""
    return Way(told={"scheduler": scheduler}, steps=num_steps)


def taylorseers(num_key_steps: int, num_steps: int, dtype: torch.dtype) -> list[Way]:
    """Settings of diffusers' TaylorSeer that take this many full calls, or come nearest to it.

    Its lite mode, which skips whole blocks: its interval, first and last full steps, and order.

    Raises:
        MissingExtraError: this release of diffusers has no TaylorSeer.
    """
    import diffusers

    if not hasattr(diffusers, "TaylorSeerCacheConfig"):
        raise MissingExtraError(f"diffusers {diffusers.__version__} has no TaylorSeer: pip install -U diffusers")

    def calls(interval: int, before: int, after: int | None) -> int:
        full = (s < before or (s - before - 1) % interval == 0 or (after or num_steps) <= s for s in range(num_steps))
        return sum(full)

    grid = itertools.product(range(2, 1 + num_steps // 2), (1, 2, 3, 5), (None, num_steps - 1))
    shapes = sorted(grid, key=lambda shape: abs(calls(*shape) - num_key_steps))
    near = [shape for shape in shapes if calls(*shape) == calls(*shapes[0])][:_MOST_SHAPES]
    return [_taylorseer(*shape, order, dtype) for shape in near for order in _ORDERS]


def _taylorseer(interval: int, before: int, after: int | None, order: int, dtype: torch.dtype) -> Way:
    import diffusers
    from diffusers.hooks import apply_taylorseer_cache

    told = {
        "cache_interval": interval,
        "disable_cache_before_step": before,
        "disable_cache_after_step": after,
        "max_order": order,
    }
    config = diffusers.TaylorSeerCacheConfig(**told, taylor_factors_dtype=dtype, use_lite_mode=True)
    return Way(partial(diffusers_cache, config=config, apply=apply_taylorseer_cache), told)


@contextmanager
def diffusers_cache(pipe: Any, config: Any, apply: Callable[[Any, Any], object]) -> Iterator[None]:
    """A cache of diffusers, through `enable_cache` where the denoiser has it, else through what that would call.

    Args:
        pipe: the pipeline.
        config: of the cache.
        apply: diffusers' function that puts it on a denoiser.
    """
    denoisers: list[Any] = find_denoisers(pipe)
    before = {id(hook) for denoiser in denoisers for _, _, hook in _hooks(denoiser)}
    try:
        for denoiser in denoisers:
            if hasattr(denoiser, "enable_cache"):
                denoiser.enable_cache(config)
            else:
                apply(denoiser, config)
        yield
    finally:
        for denoiser in denoisers:
            if getattr(denoiser, "is_cache_enabled", False):
                denoiser.disable_cache()
            # What an exception on the way has left, or `apply`, which has no reverse.
            for registry, name, hook in list(_hooks(denoiser)):
                if id(hook) not in before:
                    registry.remove_hook(name, recurse=False)


def _hooks(denoiser: torch.nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """Diffusers' hooks inside: where each hangs, its name there, itself."""
    for module in denoiser.modules():
        if (registry := vars(module).get("_diffusers_hook")) is not None:
            yield from ((registry, name, hook) for name, hook in registry.hooks.items())


class Held:
    """Bytes that a cache keeps from one call of a denoiser to the next, the most at any time.

    Attributes:
        most: None where nothing is cached.
    """

    def __init__(self) -> None:
        self.most: int | None = None

    @contextmanager
    def watched(self, pipeline: Any) -> Iterator[None]:
        """Watches calls of the pipeline, in whatever way it runs."""
        taps = []
        for denoiser in find_denoisers(pipeline):
            managers = [m for _, _, hook in _hooks(denoiser) if (m := getattr(hook, "state_manager", None)) is not None]
            if managers:
                taps.append(denoiser.register_forward_hook(lambda *_, managers=managers: self._add(_states(managers))))
        try:
            yield
            try:
                self._add(stats(pipeline).peak_cached_bytes)
            except CacheStateError:
                return  # it runs in another way
        finally:
            for tap in taps:
                tap.remove()

    def _add(self, count: int) -> None:
        self.most = max(self.most or 0, count)


def _states(managers: Sequence[Any]) -> int:
    return sum(_size(vars(state)) for manager in managers for state in manager._state_cache.values())


def _size(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(_size, parts))
