"""What a key step makes up for: the errors of the skipped steps before it, which show once both their ends are known.

The predictions of a hop are extrapolated. When the next key step has been computed, the same hop can be interpolated,
which is far more exact. The difference, times how far the sampler moved on it, is where the sample should be and is
not; it is added, in that key step, to what the sampler is given. A solver's predictor and corrector, at no further call
of the model (UniPC, arXiv 2302.04867, raises the order of solvers so).

All of it is linear in the values of key steps, so the coefficients travel in the schedule.
"""

import numpy as np
import numpy.typing as npt

from .grids import Frame
from .schedule import Schedule, Term

Array = npt.NDArray[np.float64]

#: Of the least squares that interpolate, as a share of the mean square of what they interpolate between.
_RIDGE = 1e-6


def corrected(schedule: Schedule, gram: Array, frame: Frame) -> Schedule:
    """The schedule with a correction at every key step that comes after skipped ones.

    Args:
        schedule: on the grid of the frame.
        gram: float64 [T, T], mean products of what the scheduler receives at every two steps: says how to interpolate,
            by least squares.
        frame: how the scheduler moves the sample.
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
        missed[known] = interpolation(gram, moves, skipped, known)
        for step in skipped:
            for term in schedule.predictions[step]:
                missed[term.key_step] -= moves[step] * term.coefficient
        found[key] = tuple(
            Term(key_step=step, coefficient=float(strength * missed[step] / moves[key])) for step in known
        )
    return schedule.model_copy(update={"corrections": found})


def interpolation(gram: Array, moves: Array, skipped: list[int], known: list[int]) -> Array:
    """float64 [known]: multiples of the known values whose sum is nearest to what moves the sample in skipped steps."""
    among = gram[known][:, known]
    ridge = _RIDGE * np.trace(among) / len(known) * np.eye(len(known))
    solution: Array = np.linalg.solve(among + ridge, gram[known][:, skipped] @ moves[skipped])
    return solution


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
