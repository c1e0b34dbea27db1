"""The cost tensor as the page carries it, for its reader to look into."""

import base64
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from dpcache.plan.costs import CostTensor

#: Hops of which the page carries the cost: 2 MB. All that there are up to T = 143; beyond that the shorter ones.
MOST_VALUES = 500_000


def explorer_data(
    cost: CostTensor, schedules: Mapping[str, Sequence[int]], most_values: int = MOST_VALUES
) -> dict[str, Any]:
    """What costs.js needs, fit for JSON.

    Args:
        cost: [T, T+1, T+1] or [T+1, T+1, T+1], infinite where there is no hop.
        schedules: {name: key steps}.
        most_values: more than this many costs are not carried: hops beyond a certain length are left out then.

    Returns:
        `steps`, T; `widest`, W, the longest hop that is carried, from i to j as from j to k; `schedules`; and `cost`,
        base64 of little-endian float32: for every j in order, for every i before it (0 for the first), the costs of all
        k after j, as far as W allows.
    """
    steps = cost.shape[1] - 1
    widest = next(w for w in range(steps, 0, -1) if w == 1 or _num_values(steps, w) <= most_values)
    parts = []
    for j in range(steps):
        i = slice(max(j - widest, 0), max(j, 1))
        parts.append(cost[i, j, j + 1 : j + widest + 1].astype("<f4").ravel())
    return {
        "steps": steps,
        "widest": widest,
        "schedules": {name: list(keys) for name, keys in schedules.items()},
        "cost": base64.b64encode(np.concatenate(parts).tobytes()).decode("ascii"),
    }


def path_cost(cost: CostTensor, key_steps: Sequence[int]) -> float:
    """Cost of these key steps in a cost tensor, the final hop to step T included."""
    stops = [key_steps[0], *key_steps, cost.shape[1] - 1]
    return float(sum(cost[i, j, k] for (i, j), (_, k) in pairwise(pairwise(stops))))


def _num_values(steps: int, widest: int) -> int:
    return sum(min(max(j, 1), widest) * min(steps - j, widest) for j in range(steps))
