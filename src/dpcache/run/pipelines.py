"""Pipelines of diffusers that follow a schedule: `enable`, `disable`, `enabled`, `stats`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from typing_extensions import Never

from dpcache.checks import no_more_arguments
from dpcache.errors import CacheStateError
from dpcache.plan.recipe import RECIPE_FIELDS, Recipe

from .entry import Entry
from .follower import Following
from .placement import ENTRY
from .plans import Source, plans_for
from .stats import Stats


def enable(
    pipeline: Any,
    schedule: Source = None,
    *,
    num_key_steps: int | None = None,
    speedup: float | None = None,
    max_error: float | None = None,
    recipe: Recipe | None = None,
    offload: bool = False,
    **unknown: Never,
) -> None:
    """Makes every following call of the pipeline compute some steps in full and predict the others, until `disable`.

    With nothing but `num_key_steps` or `speedup`, the key steps lie on a smooth curve over the steps of each call,
    however many, and a saturating trend predicts the others: no calibration is needed (see `Schedule.smooth`).

    Given a schedule, every call of as many steps follows it.

    Given a calibration, every call follows a schedule planned for its own noise levels, whatever its number of
    steps, shift or resolution: planned when such a call first comes, and remembered. How is said by one of
    `num_key_steps`, `speedup` and `max_error`, and by `recipe`.

    A call is followed from its beginning to its end, however it ends; what other pipelines do with the same parts, what
    runs in a callback or in another thread, is none of its business. Shallow copies of the pipeline follow it as well.

    A loop that begins at a later step of the schedule's grid, like image-to-image with a strength, follows what is left
    of the schedule (see `Schedule.from_step`). So does, within a loop, a branch whose cached values fit no longer: it
    has another shape, was not called for a while, or a callback replaced what the model is told. What the schedule does
    not cover is computed in full, with one warning.

    Args:
        pipeline: a pipeline of diffusers, modular ones included, or one of your own that calls a `transformer` or
            `unet` and steps a `scheduler`.
        schedule: what to follow: a schedule, the path of a schedule's file, a calibration, or None.
        num_key_steps: with a calibration or nothing, K; a call with no more steps is computed in full.
        speedup: with a calibration or nothing, T / K instead.
        max_error: with a calibration, the largest expected error instead (see `Calibration.plan`).
        recipe: with a calibration, how to plan.
        offload: keep the cached values in host memory (pinned, for a GPU) and bring them back a piece at a time. Takes
            next to nothing of the device's memory, and at every skipped step the time to copy up to order + 1 values:
            worth it for long videos, where a value takes hundreds of megabytes and a full step many seconds.
        unknown: refused.

    Raises:
        CacheStateError: it is enabled already.
        ScheduleMismatchError: the schedule was made for another model.
        UnsupportedPipelineError: the pipeline cannot be followed, or not at the schedule's boundary, or another cache
            is at work in it.
        CalibrationError, InfeasibleBudgetError, ValueError: as `Calibration.plan`.
        FileNotFoundError, FileFormatError: as `Schedule.load`.
        TypeError: neither a schedule nor a number; what only a calibration can do was asked for without one; or an
            argument that there is none of.
    """
    no_more_arguments(enable, unknown, RECIPE_FIELDS)
    require_disabled(pipeline)
    plans = plans_for(schedule, num_key_steps=num_key_steps, speedup=speedup, max_error=max_error, recipe=recipe)
    following = Following(plans, offload=offload)
    Entry(pipeline, plans.boundary, following, following.admit)


def disable(pipeline: Any) -> None:
    """Takes everything off the pipeline again and frees the cached values.

    Raises:
        CacheStateError: it is not enabled.
    """
    entry = entry_of(pipeline)
    if entry is None:
        raise CacheStateError(
            "dpcache is not enabled on this pipeline: call dpcache.enable(pipe, num_key_steps=13) first."
        )
    entry.leave(pipeline)


@contextmanager
def enabled(pipeline: Any, schedule: Source = None, **how: Any) -> Iterator[Any]:
    """`enable` on entering, with its arguments; `disable` on leaving, also after an exception. Yields the pipeline."""
    enable(pipeline, schedule, **how)
    try:
        yield pipeline
    finally:
        if entry_of(pipeline) is not None:
            disable(pipeline)


def stats(pipeline: Any) -> Stats:
    """What happened on this pipeline, and on shallow copies of it, since `enable`.

    Raises:
        CacheStateError: it is not enabled.
    """
    entry = entry_of(pipeline)
    if entry is None or not isinstance(entry.watcher, Following):
        raise CacheStateError(
            "dpcache is not enabled on this pipeline, so there are no statistics: call dpcache.stats(pipe) between "
            "dpcache.enable(pipe, schedule) and dpcache.disable(pipe)."
        )
    return entry.watcher.stats()


def require_disabled(pipeline: Any) -> None:
    """Raises CacheStateError where a full run is wanted but dpcache is enabled."""
    if entry_of(pipeline) is not None:
        raise CacheStateError(
            "dpcache is enabled on this pipeline already: call dpcache.disable(pipe) first, or use "
            "`with dpcache.enabled(pipe, schedule):`."
        )


def entry_of(pipeline: Any) -> Entry | None:
    """The entry of a pipeline; None if it has none."""
    return vars(pipeline).get(ENTRY) if hasattr(pipeline, "__dict__") else None
