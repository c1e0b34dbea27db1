"""What a schedule does at every step, in words."""

from collections.abc import Sequence
from dataclasses import dataclass

from dpcache.plan.schedule import Schedule


@dataclass(frozen=True)
class Step:
    """One step of a schedule: its number, whether it is a key step, and a sentence about it."""

    number: int
    key: bool
    about: str


def timeline(schedule: Schedule, timesteps: Sequence[float] = ()) -> list[Step]:
    """Every step of a schedule.

    Args:
        schedule: T steps.
        timesteps: the scheduler's T timesteps; none where they are not known.
    """
    keys = set(schedule.key_steps)
    steps = []
    for number in range(schedule.num_inference_steps):
        timestep = f", timestep {timesteps[number]:.5g}" if timesteps else ""
        how = "computed in full" if number in keys else f"predicted as {_weighted_sum(schedule, number)}"
        steps.append(Step(number, number in keys, f"Step {number}{timestep}: {how}."))
    return steps


def _weighted_sum(schedule: Schedule, step: int) -> str:
    """The prediction of a step, the latest key step first: 2.1 × step 10 − 1.1 × step 6."""
    text = ""
    for term in sorted(schedule.predictions[step], key=lambda term: -term.key_step):
        sign = "−" if term.coefficient < 0 else "+" if text else ""
        text += f"{' ' if text else ''}{sign}{' ' if text else ''}{abs(term.coefficient):.3g} × step {term.key_step}"
    return text
