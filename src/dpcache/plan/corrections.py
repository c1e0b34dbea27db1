"""What a key step makes up for: the errors of the skipped steps before it, which show once both their ends are known.

The predictions of a hop are extrapolated. When the next key step has been computed, the same hop can be interpolated,
which is far more exact. The difference, times how far the sampler moved on it, is where the sample should be and is
not; it is added, in that key step, to what the sampler is given. A solver's predictor and corrector, at no further call
of the model (UniPC, arXiv 2302.04867, raises the order of solvers so).

All of it is linear in the values of key steps, so the coefficients travel in the schedule.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .grids import Frame, NoiseGrid, frame, lagrange
from .schedule import Schedule, Term

Array = npt.NDArray[np.float64]
Interpolate = Callable[[list[int], list[int]], Array]
"""Skipped steps and known ones -> float64 [known]: multiples of the known values whose sum is nearest to what moves the
sample in the skipped steps."""

#: Of the least squares that interpolate, as a share of the mean square of what they interpolate between.
_RIDGE = 1e-6


def corrected(schedule: Schedule, frame: Frame, interpolate: Interpolate) -> Schedule:
    """The schedule with a correction at every key step that comes after skipped ones.

    Args:
        schedule: on the grid of the frame.
        frame: how the scheduler moves the sample.
        interpolate: knows the skipped steps once both their ends are known.
    """
    found = {}
    moves = frame.moves
    keys = [*schedule.key_steps, len(moves)]
    for before, key, after in zip(keys, keys[1:], keys[2:], strict=False):
        strength = _strength(schedule, frame, key, after)
        if key == before + 1 or not strength or not moves[key]:
            continue
        skipped = list(range(before + 1, key))
        passed = [step for step in schedule.key_steps if step <= before]
        known = [*passed[-schedule.order - 1 :], key]
        missed = np.zeros(len(moves))
        missed[known] = interpolate(skipped, known)
        for step in skipped:
            for term in schedule.predictions[step]:
                missed[term.key_step] -= moves[step] * term.coefficient
        found[key] = tuple(
            Term(key_step=step, coefficient=float(strength * missed[step] / moves[key])) for step in known
        )
    return schedule.model_copy(update={"corrections": found})


def by_gram(gram: Array, moves: Array) -> Interpolate:
    """Interpolates by least squares over recorded runs.

    Args:
        gram: float64 [T, T], mean products of what the scheduler receives at every two steps.
        moves: of the frame.
    """

    def interpolate(skipped: list[int], known: list[int]) -> Array:
        among = gram[known][:, known]
        ridge = _RIDGE * np.trace(among) / len(known) * np.eye(len(known))
        solution: Array = np.linalg.solve(among + ridge, gram[known][:, skipped] @ moves[skipped])
        return solution

    return interpolate


SAFE_HOP = 4.0
"""Where nothing was recorded, corrections do good up to a mean hop, T / K, of so many steps. With longer ones they
raise the mean still, and lower the worst."""


def corrected_by_levels(schedule: Schedule, grid: NoiseGrid) -> Schedule:
    """`corrected` where nothing was recorded: values lie on a parabola over the (warped) noise level.

    Returns:
        the schedule as it is, where hops are longer than is safe, or the grid's steps of no known kind.
    """
    found, places = frame(grid), grid.warped()
    is_safe = schedule.ideal_speedup <= SAFE_HOP
    if found is None or not is_safe or not (np.diff(places) > 0).all():
        return schedule
    moves = found.moves

    def interpolate(skipped: list[int], known: list[int]) -> Array:
        weights: Array = moves[skipped] @ lagrange(places[known], places[skipped])
        return weights

    return corrected(schedule, found, interpolate)


def _strength(schedule: Schedule, frame: Frame, key: int, after: int) -> float:
    """Of the whole correction, the share that is left to do.

    The denoiser sees the sample off the path at the key step and draws it back; and its value there is used until the
    next key step. What that amounts to is left out.
    """
    moved = frame.moves[key]
    for step in range(key + 1, after):
        share = sum(term.coefficient for term in schedule.predictions[step] if term.key_step == key)
        moved += frame.moves[step] * share
    return float(np.clip(1 + frame.reaction[key] * moved, 0, 1))
