"""Cost tensor -> best key steps, for every budget at once.

The cost of a hop from key step j to the next one k depends on the key step i before j, so the shortest path is found
over *pairs* of key steps (i, j). Keeping one predecessor per step, as the recurrence in the paper does, can miss it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from .errors import InfeasibleBudgetError

Array = npt.NDArray[np.float64]
#: What a path costs: the sum of its hops, or the largest of them.
Objective = Literal["sum", "max"]
_TOGETHER: dict[Objective, np.ufunc] = {"sum": np.add, "max": np.maximum}


@dataclass(frozen=True)
class Plan:
    """The cheapest path for one budget.

    Attributes:
        key_steps: the steps to compute in full, increasing, the first is 0.
        cost: of the path, the final hop to step T included: sum (or largest) of the cost tensor along it, in its unit.
    """

    key_steps: tuple[int, ...]
    cost: float


def plan(
    cost: npt.ArrayLike,
    num_key_steps: int,
    *,
    first_key_steps: int = 3,
    last_key_steps: int = 0,
    max_gap: int | None = None,
    objective: Objective = "sum",
) -> Plan:
    """Best plan with exactly `num_key_steps` key steps. Exact: no other choice of key steps costs less.

    Args:
        cost: [T, T+1, T+1] or [T+1, T+1, T+1], indexed [i, j, k] (see `dpcache.costs`); infinite entries are forbidden
            hops. The first hop, from step 0 to k, costs `cost[0, 0, k]`.
        num_key_steps: K, 1 <= K <= T.
        first_key_steps: steps 0 .. first_key_steps - 1 are key steps.
        last_key_steps: steps T - last_key_steps .. T - 1 are key steps.
        max_gap: largest allowed k - j, the final hop to T included; None for no limit.
        objective: what to make least, the `"sum"` of the costs of all hops or the largest of them, `"max"`.

    Raises:
        InfeasibleBudgetError: no plan with K key steps satisfies the constraints; the message says which K does.
        ValueError: an argument out of range, or a cost tensor of the wrong shape or with NaN.
    """
    search = _Search(cost, first_key_steps, last_key_steps, max_gap, objective)
    if not 1 <= num_key_steps <= search.steps:
        raise ValueError(f"num_key_steps must be from 1 to the number of steps ({search.steps}), got {num_key_steps}.")
    for budget in search.run(num_key_steps):
        if budget == num_key_steps and (found := search.best(budget)) is not None:
            return found
    feasible = [budget for budget in search.run(search.steps) if search.best(budget) is not None]
    raise InfeasibleBudgetError(_infeasible_message(num_key_steps, feasible, search))


def plan_all(
    cost: npt.ArrayLike,
    *,
    first_key_steps: int = 3,
    last_key_steps: int = 0,
    max_gap: int | None = None,
    objective: Objective = "sum",
) -> dict[int, Plan]:
    """Best plan for every feasible number of key steps, in one pass; arguments as in `plan`.

    Returns:
        {K: Plan} for every feasible K, increasing; empty where the constraints leave none.
    """
    search = _Search(cost, first_key_steps, last_key_steps, max_gap, objective)
    plans = ((budget, search.best(budget)) for budget in search.run(search.steps))
    return {budget: found for budget, found in plans if found is not None}


class _Search:
    """Shortest paths by number of key steps, over states (key step j, gap g = j - i to the one before it).

    Gaps rather than predecessors index the state, so that a gap limit W shrinks the tables: T x W states, T x W x W
    hops. `hop[j, g, h]` is the cost of going on from state (j, g) to key step j + h, and `value[m-1][j, g]` the least
    cost of m key steps that end in state (j, g). Gap 0 belongs to the first key step alone.
    """

    def __init__(self, cost: npt.ArrayLike, first: int, last: int, max_gap: int | None, objective: Objective) -> None:
        if objective not in _TOGETHER:
            raise ValueError(f'objective must be "sum" or "max", got {objective!r}.')
        self.together = _TOGETHER[objective]
        table = _validated(cost)
        self.steps = table.shape[1] - 1
        self.first, self.last, self.max_gap = first, last, max_gap
        for name, value in (("first_key_steps", first), ("last_key_steps", last)):
            if not 0 <= value <= self.steps:
                raise ValueError(f"{name} must be from 0 to the number of steps ({self.steps}), got {value}.")
        if max_gap is not None and max_gap < 1:
            raise ValueError(f"max_gap must be 1 or more, or None for no limit, got {max_gap}.")
        self.hop = self._hops(table)
        self.value: list[Array] = []

    def _hops(self, table: Array) -> Array:
        """[T, W+1, W+1] hop costs, W the longest hop that is allowed anywhere."""
        possible = np.isfinite(table[: self.steps, : self.steps]).any(axis=0)
        j, k = np.nonzero(np.triu(possible, k=1))
        if self.max_gap is not None:
            ahead = k - j <= self.max_gap
            j, k = j[ahead], k[ahead]
        # A hop may not jump over a step that is forced to be a key step.
        ahead = ((k == j + 1) | (j >= self.first - 1)) & ((k == j + 1) | (k <= self.steps - self.last))
        j, k = j[ahead], k[ahead]
        width = int((k - j).max(initial=1))
        hop = np.full((self.steps, width + 1, width + 1), np.inf)
        gap = np.arange(width + 1)[:, None]
        i = j - gap
        known = (i >= 0) & ((gap > 0) | (j == 0))
        hop[j, gap, k - j] = np.where(known, table[np.maximum(i, 0), j, k], np.inf)
        return hop

    def run(self, max_keys: int) -> Iterator[int]:
        """Fills `value` one budget at a time, yielding each."""
        start = np.full(self.hop.shape[:2], np.inf)
        start[0, 0] = 0.0
        self.value = [start]
        yield 1
        width = self.hop.shape[2] - 1
        for budget in range(2, max_keys + 1):
            # Cheapest way from any state at j on to j + h, for every h, put where it arrives.
            onward = self.together(self.value[-1][:, :, None], self.hop).min(axis=1)  # [j, h]
            arrived = np.full_like(start, np.inf)
            for h in range(1, min(width, self.steps - 1) + 1):
                arrived[h:, h] = onward[: self.steps - h, h]
            self.value.append(arrived)
            yield budget

    def best(self, budget: int) -> Plan | None:
        """The best path of `budget` key steps, read backwards through the tables; None where there is none."""
        value = self.value[budget - 1]
        j, g = np.indices(value.shape)
        final = self.steps - j
        reach = final < self.hop.shape[2]
        total = np.where(reach, self.together(value, self.hop[j, g, np.where(reach, final, 0)]), np.inf)
        step, gap = (int(n) for n in np.unravel_index(np.argmin(total), total.shape))
        cost = float(total[step, gap])
        if not np.isfinite(cost):
            return None
        path = [step]
        for earlier in reversed(self.value[: budget - 1]):
            step, hop = step - gap, gap
            path.append(step)
            gap = int(np.argmin(self.together(earlier[step], self.hop[step, :, hop])))
        return Plan(tuple(reversed(path)), cost)


def _validated(cost: npt.ArrayLike) -> Array:
    table = np.asarray(cost, dtype=np.float64)
    size = table.shape[-1] if table.ndim else 0
    if table.shape not in ((size - 1, size, size), (size, size, size)):
        raise ValueError(f"cost must have shape [T, T+1, T+1] or [T+1, T+1, T+1], got {list(table.shape)}.")
    if size < 2:
        raise ValueError("cost must cover at least one step.")
    if np.isnan(table).any() or np.isneginf(table).any():
        raise ValueError("cost must hold no NaN and no negative infinity; forbidden hops are +infinity.")
    return table


def _infeasible_message(num_key_steps: int, feasible: list[int], search: _Search) -> str:
    constraints = (
        f"first_key_steps={search.first}, last_key_steps={search.last}, max_gap={search.max_gap} "
        f"over {search.steps} steps"
    )
    if not feasible:
        return (
            f"no number of key steps is feasible with {constraints}: raise max_gap, or raise first_key_steps where the "
            "cost tensor only allows consecutive key steps at the start."
        )
    return (
        f"{num_key_steps} key steps are infeasible with {constraints}: the smallest feasible number is {feasible[0]}"
        + (f" and the largest {feasible[-1]}." if num_key_steps > feasible[0] else ".")
        + " Change num_key_steps or relax the constraints."
    )
