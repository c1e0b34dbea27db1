"""What a sampling loop follows of a schedule that may have been planned for another."""

from collections.abc import Sequence

from .schedule import Schedule

#: A noise level is a planned one if it is nearer than this share of the way to the next.
_SAME_LEVEL = 0.25


def same_levels(planned: Sequence[float], levels: Sequence[float]) -> bool:
    """Whether a loop's steps are at the planned noise levels, as many of them as both have.

    Args:
        planned: one for every step, and one where the last step ends.
        levels: one for every step.
    """
    return all(_is_level(planned, step, level) for step, level in enumerate(levels[: len(planned) - 1]))


def part_by_levels(schedule: Schedule, levels: Sequence[float]) -> Schedule | None:
    """What a loop over these noise levels follows of a schedule; None if they are not among the planned ones.

    Args:
        schedule: knows its noise levels.
        levels: the loop's, one for every step and one where the last step ends. It may begin later or end earlier than
            what is planned, and its sampler's grid may have one step more that the loop never takes.
    """
    assert schedule.sigmas is not None
    steps = len(levels) - 1
    for start in range(min(schedule.num_inference_steps, schedule.num_inference_steps - steps + 2)):
        if same_levels(schedule.sigmas[start:], levels[:-1]):
            return schedule.from_step(start)
    return None


def part_by_number(schedule: Schedule, size: int, start: int) -> Schedule | None:
    """Likewise, where noise levels say nothing: by the number of steps.

    Args:
        schedule: what was planned.
        size: steps of the sampler's grid.
        start: which of them the loop begins with; not 0 where it begins with a picture that is given.
    """
    if size - start == schedule.num_inference_steps:
        return schedule
    return schedule.from_step(start) if size == schedule.num_inference_steps else None


def _is_level(planned: Sequence[float], step: int, level: float) -> bool:
    gaps = [abs(planned[step] - planned[other]) for other in (step - 1, step + 1) if 0 <= other < len(planned)]
    return abs(level - planned[step]) <= _SAME_LEVEL * min(gaps)
