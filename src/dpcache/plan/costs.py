"""Recorded values -> cost tensor.

`cost[i, j, k]` is the accumulated error of predicting the steps after key step j up to k, when the key step before j
was i. Step T, one past the last, is a sentinel: the hop to it pays for everything after the last key step.
"""

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from dpcache.checks import number

from .predictors import Predictor, Taylor
from .schedule import Schedule

CostTensor = npt.NDArray[np.float64]


def sampler_cost(
    gram: npt.NDArray[np.float64],
    weights: npt.NDArray[np.float64],
    predictor: Predictor | None = None,
    *,
    power: float = 2.0,
) -> CostTensor:
    """Cost tensor that knows the sampler: what errors of prediction do to the sample.

    At a skipped step the scheduler moves the sample by a multiple of what it receives, so the errors of a hop add up
    before the denoiser sees any of them: `cost[i, j, k]` is the RMS of their weighted sum over the skipped steps
    j+1 .. k-1, to some power, mean over runs. Errors of opposite sign cancel, as they do in the sample.

    All follows in closed form from products of what was received at every two steps. The history of a prediction is
    that of the paper, the consecutive steps up to i, then j, and shorter where the run has just begun.

    Args:
        gram: [runs, T, T], mean products (see `RecordedRun.gram`).
        weights: [T], how far the sample moves per unit of what the scheduler receives (see `step_influence`).
        predictor: what predicts; by default Taylor of order 2.
        power: 2 adds hops up as errors that know nothing of each other; with more, single large ones weigh heavier.

    Returns:
        float64 array [T, T+1, T+1] indexed [i, j, k], infinite for i >= j > 0 and k <= j.

    Raises:
        TypeError, ValueError: shapes that do not fit, or a power that is not above 0.
    """
    _check(gram, weights, power)
    predictor = predictor or Taylor()
    order = predictor.order
    steps = len(weights)
    cost = np.full((steps, steps + 1, steps + 1), np.inf)
    for j in range(steps):
        targets = np.arange(j + 1, steps)
        weighted = weights[targets, None] * gram[:, targets]  # [runs, targets, T]
        summed = weighted.cumsum(axis=1)  # products of the hop's true sum with every step
        inner = (weighted[:, :, targets] * weights[targets]).cumsum(axis=1).cumsum(axis=2)
        square_of_truth = np.diagonal(inner, axis1=1, axis2=2)  # [runs, targets]
        for i in range(max(j, 1)):
            keys = [*range(max(i - order + 1, 0), i + 1), j] if i < j and order else [j]
            c = (weights[targets, None] * predictor.coefficients(keys, targets)).cumsum(axis=0)  # [targets, keys]
            among = gram[:, np.array(keys)[:, None], keys]
            square = square_of_truth - 2 * (summed[:, :, keys] * c).sum(axis=2) + ((c @ among) * c).sum(axis=2)
            cost[i, j, j + 1] = 0.0
            cost[i, j, j + 2 :] = (np.maximum(square, 0) ** (power / 2)).mean(axis=0)
    return cost


def schedule_cost(
    gram: npt.NDArray[np.float64], weights: npt.NDArray[np.float64], schedule: Schedule, *, power: float = 2.0
) -> float:
    """What a schedule costs with its own coefficients, from the key steps that it really predicts from: mean over runs.

    Arguments and unit as in `sampler_cost`, which has to guess the key steps before the last two.

    Raises:
        TypeError, ValueError: as `sampler_cost`, or a schedule for another number of steps.
    """
    return float(schedule_costs(gram, weights, schedule, power=power).mean())


def schedule_costs(
    gram: npt.NDArray[np.float64], weights: npt.NDArray[np.float64], schedule: Schedule, *, power: float = 2.0
) -> npt.NDArray[np.float64]:
    """float64 [runs]: as `schedule_cost`, for each run."""
    _check(gram, weights, power)
    steps = len(weights)
    if schedule.num_inference_steps != steps:
        raise ValueError(
            f"the schedule is for {schedule.num_inference_steps} steps, what was measured for {steps}: give one for "
            f"{steps} steps."
        )
    total = np.zeros(len(gram))
    for key, after in pairwise([*schedule.key_steps, steps]):
        error = hop_error(weights, schedule, key, after)
        total += np.maximum(gram @ error @ error, 0) ** (power / 2)
    return total


def _check(gram: npt.NDArray[np.float64], weights: npt.NDArray[np.float64], power: float) -> None:
    steps = len(weights)
    if np.shape(weights) != (steps,) or np.ndim(gram) != 3 or gram.shape[1:] != (steps, steps):
        raise ValueError(
            f"gram must be [runs, T, T] and weights [T], got {list(np.shape(gram))} and {list(np.shape(weights))}."
        )
    number("power", power, 0, above=True)


def hop_error(weights: npt.NDArray[np.float64], schedule: Schedule, key: int, after: int) -> npt.NDArray[np.float64]:
    """float64 [T]: the error of the hop between two key steps, as multiples of what is received at every step."""
    error = np.zeros(len(weights))
    for step in range(key + 1, after):
        error[step] += weights[step]
        for term in schedule.predictions[step]:
            error[term.key_step] -= weights[step] * term.coefficient
    return error
