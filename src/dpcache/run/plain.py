"""Loops without a pipeline: `following` around a plain Python loop that calls a transformer or UNet."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from dpcache.errors import UnsupportedPipelineError
from dpcache.plan.recipe import Recipe
from dpcache.plan.schedule import Boundary

from . import scope as scopes
from .caches import other_cache
from .denoisers import unwrapped
from .follower import Following
from .loop import Loop, Observer
from .placement import Placement
from .plans import Source, plans_for
from .scope import Scope, Told
from .stats import Stats

T = TypeVar("T")

#: What denoisers call the argument that tells them the noise level, the likeliest first.
_TIMESTEP = ("timestep", "timesteps", "t", "sigma", "sigmas", "time", "noise_level", "noise_levels", "c_noise")


class PlainLoop:
    """One `with` block around loops of one's own: knows at which step they are.

    Args:
        denoisers: the networks that the loop calls.
        boundary: where values are read.
        begin: makes the observer of each sampling loop in the block.
        num_steps: T, if known.

    Raises:
        UnsupportedPipelineError: one of them is no `nn.Module`, or the boundary is not known of it.
    """

    def __init__(
        self,
        denoisers: Sequence[nn.Module],
        boundary: Boundary,
        begin: Callable[[], Observer],
        num_steps: int | None = None,
    ) -> None:
        self._begin, self._num_steps = begin, num_steps
        self.scope = Scope(object(), self._begun, self._before_call)
        self._denoisers = [unwrapped(denoiser) for denoiser in denoisers]
        self._readers = [_Timestep(denoiser) for denoiser in self._denoisers]
        self._is_told = False
        self._seen: list[float] = []
        self._placements = [
            Placement(self.scope.key, denoiser, number, boundary) for number, denoiser in enumerate(self._denoisers)
        ]

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Follows the loops in the body; leaves the denoisers as they were, whatever happens."""
        with ExitStack() as undo:
            for placement in self._placements:
                undo.callback(placement.remove)
                placement.place()
            undo.callback(self.scope.close)
            undo.enter_context(scopes.opened(self.scope))
            yield

    def steps(self, iterable: Iterable[T]) -> Iterator[T]:
        """Goes through an iterable of the loop's steps, as a progress bar does: each item is one step.

        Nothing is read from the device then to find out where the loop is.
        """
        self._is_told = self.scope.fresh = True
        try:
            for number, item in enumerate(iterable):
                if number and self.scope.loop is not None:
                    self.scope.loop.advance()
                yield item
        finally:
            if self.scope.loop is not None:
                self.scope.loop.close()
            self._is_told, self._seen = False, []

    @property
    def timesteps(self) -> list[float]:
        """What the denoiser was told at every step of the loop that begins, growing; none where `steps` tells them."""
        return self._seen

    def _begun(self) -> Loop:
        return Loop(self._begin(), by_hand=True)

    def _before_call(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Finds out whether this call begins a step, or another loop: by the timestep it is given, unless told."""
        if self._is_told:
            return
        level = self._readers[number].read(args, kwargs)
        if self._seen and level == self._seen[-1]:
            return
        loop = self.scope.loop
        over = loop is None or loop.is_over or (self._num_steps is not None and len(self._seen) >= self._num_steps)
        if over or (len(self._seen) > 1 and _turns_back(self._seen, level)):
            self.scope.fresh, self._seen = True, []
        elif loop is not None:
            loop.advance()
        self._seen.append(level)


class _Timestep:
    """Reads the noise level out of the arguments of a denoiser's call."""

    def __init__(self, denoiser: nn.Module) -> None:
        parameters = list(inspect.signature(inspect.unwrap(type(denoiser).forward)).parameters)[1:]
        self._name = next((name for name in _TIMESTEP if name in parameters), None)
        self._place = parameters.index(self._name) if self._name is not None else -1
        self._kind = type(denoiser).__name__

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        value = kwargs.get(self._name) if self._name in kwargs else None
        if value is None and 0 <= self._place < len(args):
            value = args[self._place]
        if value is None:
            raise UnsupportedPipelineError(
                f"{self._kind} is not told the step by an argument named {', '.join(_TIMESTEP[:4])}, ...: say "
                "`with dpcache.following(...) as loop:` and go through the steps with `for step in loop.steps(...):`."
            )
        return float(value.reshape(-1)[0]) if isinstance(value, torch.Tensor) else float(value)


def _turns_back(seen: Sequence[float], level: float) -> bool:
    """Whether the noise level goes back up: another picture is begun."""
    return (level - seen[-1]) * (seen[1] - seen[0]) < 0


class FollowedLoop:
    """What `following` yields.

    Methods `steps` and `stats` are of use in the body.
    """

    def __init__(self, loop: PlainLoop, following: Following) -> None:
        self._loop, self._following = loop, following

    def steps(self, iterable: Iterable[T]) -> Iterator[T]:
        """See `PlainLoop.steps`."""
        return self._loop.steps(iterable)

    def stats(self) -> Stats:
        """What happened so far (see `dpcache.stats`)."""
        return self._following.stats()


@contextmanager
def following(
    denoiser: "nn.Module | Sequence[nn.Module]",
    schedule: Source = None,
    *,
    sigmas: Sequence[float] | None = None,
    num_key_steps: int | None = None,
    speedup: float | None = None,
    max_error: float | None = None,
    recipe: Recipe | None = None,
    offload: bool = False,
) -> Iterator[FollowedLoop]:
    """Has a loop of one's own follow a schedule: computes the key steps, predicts the others.

    Every call of the denoiser in the body belongs to the loop. Calls with the same timestep are one step, conditional
    and unconditional ones for example; a new timestep begins a new step, and one that goes back up a new picture. To
    see it one number is read from the device at every call. Where that should not be, go through the loop by
    `loop.steps`, as through a progress bar.

    Args:
        denoiser: the transformer or UNet that the loop calls, or several where it switches between them.
        schedule: as in `dpcache.enable`; with a calibration or nothing say for how many key steps to plan.
        sigmas: the loop's noise levels, T and where the last step ends. With a schedule they are compared with those it
            was planned for; a calibration plans for them; with neither they say how many steps there are.
        num_key_steps: as in `dpcache.enable`.
        speedup: as in `dpcache.enable`.
        max_error: as in `dpcache.enable`.
        recipe: as in `dpcache.enable`.
        offload: as in `dpcache.enable`.

    Raises:
        UnsupportedPipelineError: it is no `nn.Module`; the schedule needs blocks that are not known; or another cache
            is at work in it.
        ScheduleMismatchError: the schedule was made for another model.
        TypeError: as `dpcache.enable`; or nothing says how many steps the loop takes.

    Example:
        ```python
        with dpcache.following(transformer, schedule):
            for sigma, after in pairwise(sigmas):
                x = x + (after - sigma) * transformer(x, timestep=sigma, ...)
        ```
    """
    denoisers = as_modules(denoiser)
    plans = plans_for(schedule, num_key_steps=num_key_steps, speedup=speedup, max_error=max_error, recipe=recipe)
    levels = tuple(float(level) for level in sigmas) if sigmas is not None else None
    steps = len(levels) - 1 if levels is not None else plans.num_inference_steps
    if steps is None:
        raise TypeError(
            "say how many steps the loop takes: give sigmas, its T noise levels and where the last step ends."
        )
    told = Following(plans, offload=offload)
    told.admit(denoisers)
    tell = Told()
    loop = PlainLoop(denoisers, plans.boundary, lambda: told.begin_at(levels, steps, tell), steps)
    with loop.opened():
        yield FollowedLoop(loop, told)


def as_modules(denoiser: Any) -> list[nn.Module]:
    """The denoisers of a loop of one's own, free of other caches."""
    found = list(denoiser) if isinstance(denoiser, list | tuple) else [denoiser]
    for module in found:
        if not isinstance(module, nn.Module):
            raise UnsupportedPipelineError(
                f"a {type(module).__name__} cannot be followed: give the nn.Module that the loop calls at every step, "
                "the transformer or UNet. For a pipeline use dpcache.enable(pipe, schedule)."
            )
        if (another := other_cache(None, module)) is not None:
            raise UnsupportedPipelineError(another)
    return found
