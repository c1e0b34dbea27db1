"""Coefficients tuned in closed loop: what a schedule's predictions do to the final sample is measured, then mended.

At every hop one number is free: how much the highest difference of the prediction counts. Changing it a little at one
hop and finishing the run tells what it does to the final sample; least squares over several runs then finds the numbers
that bring the outputs nearest to those of the full runs. No gradients, no training: some runs with K full calls.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from dpcache.measure.calibration import Calibration
from dpcache.measure.trials import AVERAGED_POWER, NO_ERROR, Trial
from dpcache.plan.costs import hop_error
from dpcache.plan.predictors import backward_differences, taylor_weights
from dpcache.plan.schedule import Schedule, Term

Array = npt.NDArray[np.float64]
#: Ridges that are tried, as fractions of the mean diagonal of the normal equations.
RIDGES = (0.01, 0.1, 1.0)


@dataclass(frozen=True)
class Direction:
    """One way in which the predictions of a hop may change.

    Attributes:
        start: the first step that changes.
        changes: step -> what is added to each of its coefficients, for a change by one.
    """

    start: int
    changes: dict[int, Array]


def directions(schedule: Schedule, calibration: Calibration) -> list[Direction]:
    """For every hop, more of the highest difference of its prediction: so much that it makes up for an error as large
    as is to be expected there.
    """
    gram, weights = calibration.gram.mean(axis=0), calibration.weights()
    found = []
    for key, after in pairwise([*schedule.key_steps, schedule.num_inference_steps]):
        if after == key + 1:
            continue
        keys = [term.key_step for term in schedule.predictions[key + 1]]
        highest = backward_differences(keys, len(keys) - 1)[-1]
        skipped = np.arange(key + 1, after)
        # Before there are differences to extrapolate, the value itself grows the longer the hop.
        growth = taylor_weights(skipped - key, max(1, len(keys) - 1))[:, -1]
        changes = growth[:, None] * highest
        error, change = hop_error(weights, schedule, key, after), np.zeros(len(weights))
        change[keys] = weights[skipped] @ changes
        size = np.sqrt(max(error @ gram @ error, 1e-30) / max(change @ gram @ change, 1e-30))
        found.append(Direction(key + 1, dict(zip(skipped.tolist(), size * changes, strict=True))))
    return found


def moved(schedule: Schedule, ways: Sequence[Direction], amounts: "Sequence[float] | Array") -> Schedule:
    """The schedule with its predictions changed, by so much along each of the directions."""
    predictions = dict(schedule.predictions)
    for way, amount in zip(ways, amounts, strict=True):
        for step, change in way.changes.items() if amount else ():
            predictions[step] = tuple(
                Term(key_step=term.key_step, coefficient=term.coefficient + float(amount * more))
                for term, more in zip(predictions[step], change, strict=True)
            )
    return schedule.model_copy(update={"predictions": predictions})


def normal_equations(
    trial: Trial, schedule: Schedule, ways: Sequence[Direction], on_run: Callable[[], object] = lambda: None
) -> tuple[Array, Array]:
    """[n, n] and [n]: least squares of one trial's final error in the amounts.

    Scaled so that the trial counts by what a change of its error does to `trials.average_error`.
    """
    variants = [(way.start, moved(schedule, [way], [1.0])) for way in ways]
    output, others = trial.responses(schedule, variants, on_run)
    error, effects = output - trial.full, others - output
    size = float(np.linalg.norm(trial.full))
    relative = max(float(np.linalg.norm(error)) / size, NO_ERROR)
    scale = relative ** (AVERAGED_POWER - 2) / size**2
    return scale * effects @ effects.T, scale * effects @ error


def proposals(
    schedule: Schedule, ways: Sequence[Direction], equations: Sequence[tuple[Array, Array]]
) -> list[Schedule]:
    """The schedule with its best amounts, once for every ridge."""
    matrix = np.sum([matrix for matrix, _ in equations], axis=0)
    vector = np.sum([vector for _, vector in equations], axis=0)
    unit = np.trace(matrix) / len(ways) * np.eye(len(ways))
    return [moved(schedule, ways, -np.linalg.solve(matrix + ridge * unit, vector)) for ridge in RIDGES]
