"""Recorded values -> cost tensor.

`cost[i, j, k]` is the accumulated error of predicting the steps after key step j up to k, when the key step before j
was i. Step T, one past the last, is a sentinel: the hop to it pays for everything after the last key step.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .predictors import Predictor, Taylor, taylor_coefficients
from .schedule import Schedule
from .taylor_errors import Errors

CostTensor = npt.NDArray[np.float64]

#: Of the T steps, how far apart a key step and the one before it may be in the paper's tensor.
ANCHOR_LIMIT = 0.3
#: Weight of the extrapolation (against the mean) in the value that stands in for the sentinel step T.
SENTINEL_ALPHA = 0.8


def paper_cost(
    features: "torch.Tensor | npt.NDArray[Any]",
    order: int = 2,
    *,
    sentinel_alpha: float = SENTINEL_ALPHA,
    anchor_limit: float = ANCHOR_LIMIT,
    device: "torch.device | str | None" = None,
) -> CostTensor:
    """Path-Aware Cost Tensor of one recorded run, as DPCache (arXiv 2602.22654) computes it.

    The error of one predicted step is mean |prediction - truth| / 2; `cost[i, j, k]` sums it over steps j+1 .. k, step
    k included. The history of a Taylor prediction of order n is taken to be the n consecutive steps up to i, then j.

    Args:
        features: [T, ...] values of one branch, real and finite, steps in sampling order; T >= order + 1.
        order: order n of the Taylor prediction, 0 or more.
        sentinel_alpha: the value at step T is alpha x (Taylor extrapolation from the last n + 1 steps)
            + (1 - alpha) x (their mean).
        anchor_limit: entries with j - i > anchor_limit x T are infinite.
        device: where to compute; by default where the features are. They are moved there some columns at a time, and
            the errors come back once, at the end.

    Returns:
        float64 array [T, T+1, T+1] indexed [i, j, k], infinite where no prediction exists. For j < order the only
        finite entries are `cost[i, j, j+1] = 0`: the first order + 1 steps are then all key steps.

    Raises:
        ValueError: fewer steps than the order needs, a negative order, or values that are not finite.
    """
    values = torch.as_tensor(features)
    values = values.reshape(values.shape[0], -1)
    steps = values.shape[0]
    if order < 0 or steps <= order:
        raise ValueError(f"an order-{order} cost needs order >= 0 and more than {order} steps, got {steps}.")

    anchors: dict[int, range] = {}
    for j in range(order, steps):
        # An order-0 prediction reads j alone, whatever came before it: every anchor has the same history.
        first = max(order - 1, j - int(anchor_limit * steps + 1e-9), 0)
        anchors[j] = range(first, max(j, first + 1))
    last = range(steps - order - 1, steps)
    sentinel = sentinel_alpha * taylor_coefficients(last, steps, order) + (1 - sentinel_alpha) / len(last)
    errors = Errors(anchors, steps, order, torch.device(device or values.device))
    errors.add(values, torch.as_tensor(sentinel, dtype=torch.promote_types(values.dtype, torch.float32)))
    finite = errors.finite.tolist()
    if not all(finite):
        raise ValueError(f"values are not finite at step {finite.index(False)}.")

    cost = np.full((steps, steps + 1, steps + 1), np.inf)
    for j in range(order):
        cost[: j + 1, j, j + 1] = 0.0
    for j, i in anchors.items():
        mean = errors.total[j].cpu().numpy() / values.shape[1]
        cost[i.start : i.stop, j, j + 1 :] = np.cumsum(mean, axis=1) / 2
    return cost


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
    """
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
    """What a schedule costs with its own coefficients, from the key steps that it really predicts from.

    Arguments and unit as in `sampler_cost`, which has to guess the key steps before the last two.
    """
    steps = len(weights)
    total = 0.0
    for key, after in pairwise([*schedule.key_steps, steps]):
        error = hop_error(weights, schedule, key, after)
        total += float((np.maximum(error @ gram @ error, 0) ** (power / 2)).mean())
    return total


def hop_error(weights: npt.NDArray[np.float64], schedule: Schedule, key: int, after: int) -> npt.NDArray[np.float64]:
    """float64 [T]: the error of the hop between two key steps, as multiples of what is received at every step."""
    error = np.zeros(len(weights))
    for step in range(key + 1, after):
        error[step] += weights[step]
        for term in schedule.predictions[step]:
            error[term.key_step] -= weights[step] * term.coefficient
    return error


def step_influence(received: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> float:
    """How far one step of a scheduler moves the sample per unit of the model output that it is given.

    `after` is fitted as a x before + b x received by least squares, and b returned, with its sign: exact wherever a
    step is linear in its sample and model output (Euler, flow Euler, DDIM: all but rounding), the best linear account
    otherwise.
    """
    x, o, y = (tensor.detach().double().flatten() for tensor in (before, received, after))
    products = torch.stack([x, o]) @ torch.stack([x, o, y]).T  # one transfer from the device
    (xx, xo, xy), (_, oo, oy) = products.tolist()
    determinant = xx * oo - xo * xo
    # Sample and output along one line: the share of each is unknown, and the output may have moved all of it.
    if determinant > 1e-12 * xx * oo:
        return float((xx * oy - xo * xy) / determinant)
    return float((oy - xo) / oo) if oo else 0.0
