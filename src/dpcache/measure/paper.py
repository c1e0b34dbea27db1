"""The cost tensor as the paper computes it, from the values recorded in one run."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dpcache.checks import number, whole
from dpcache.plan.costs import CostTensor
from dpcache.plan.predictors import taylor_coefficients

from .anchor_limit import ANCHOR_LIMIT, farthest_anchor
from .taylor_errors import Errors

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
        anchor_limit: entries with j - i > anchor_limit x T are infinite. With few key steps that forbids good schedules
            (see `anchor_limit.forbids_good_gaps`); 1 is no limit.
        device: where to compute; by default where the features are. They are moved there some columns at a time, and
            the errors come back once, at the end.

    Returns:
        float64 array [T, T+1, T+1] indexed [i, j, k], infinite where no prediction exists. For j < order the only
        finite entries are `cost[i, j, j+1] = 0`: the first order + 1 steps are then all key steps.

    Raises:
        ValueError: fewer steps than the order needs, a negative order, or values that are not finite.
    """
    order = whole("order", order, 0)
    number("sentinel_alpha", sentinel_alpha)
    number("anchor_limit", anchor_limit, 0)
    values = torch.as_tensor(features)
    if values.ndim < 2:
        raise ValueError(f"features must be [T, ...], steps first, got {list(values.shape)}.")
    values = values.reshape(values.shape[0], -1)
    steps = values.shape[0]
    if steps <= order or not values.shape[1]:
        raise ValueError(f"an order-{order} cost needs more than {order} steps of values, got {list(values.shape)}.")

    anchors: dict[int, range] = {}
    for j in range(order, steps):
        # An order-0 prediction reads j alone, whatever came before it: every anchor has the same history.
        first = max(order - 1, j - farthest_anchor(steps, anchor_limit), 0)
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
