"""Cost tensor -> best key steps, for every budget at once.

The cost of a hop from key step j to the next one k depends on the key step i before j, so the shortest path is found
over *pairs* of key steps (i, j). Keeping one predecessor per step, as the recurrence in the paper does, can miss it.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpcache.checks import whole
from dpcache.errors import InfeasibleBudgetError

Array = npt.NDArray[np.float64]
#: So many numbers are worked on at once: they stay in a processor's cache, and small problems take one call of numpy.
_AT_ONCE = 2**15


@dataclass(frozen=True)
class Plan:
    """The cheapest path for one budget.

    Attributes:
        key_steps: the steps to compute in full, increasing, the first is 0.
        cost: of the path, the final hop to step T included: sum of the cost tensor along it, in its unit.
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
) -> Plan:
    """Best plan with exactly `num_key_steps` key steps. Exact: no other choice of key steps costs less.

    Args:
        cost: [T, T+1, T+1] or [T+1, T+1, T+1], indexed [i, j, k] (see `dpcache.plan.costs`); infinite entries are
            forbidden hops. The first hop, from step 0 to k, costs `cost[0, 0, k]`.
        num_key_steps: K, 1 <= K <= T.
        first_key_steps: steps 0 .. first_key_steps - 1 are key steps.
        last_key_steps: steps T - last_key_steps .. T - 1 are key steps.
        max_gap: largest allowed k - j, the final hop to T included; None for no limit.

    Raises:
        InfeasibleBudgetError: no plan with K key steps satisfies the constraints; the message says which K does.
        ValueError: an argument out of range, or a cost tensor of the wrong shape or with NaN.
    """
    search = _Search(cost, first_key_steps, last_key_steps, max_gap)
    num_key_steps = checked_budget(num_key_steps, search.steps)
    search.run(num_key_steps)
    if found := search.best([num_key_steps]):
        return found[num_key_steps]
    raise InfeasibleBudgetError(_infeasible_message(num_key_steps, search))


def plan_all(
    cost: npt.ArrayLike,
    *,
    first_key_steps: int = 3,
    last_key_steps: int = 0,
    max_gap: int | None = None,
    max_key_steps: int | None = None,
) -> dict[int, Plan]:
    """Best plan for every feasible number of key steps, in one pass.

    Takes O(K T W^2) time and O(K T W) memory, W the longest gap allowed and K the most key steps.

    Args:
        cost: as in `plan`, like what follows it.
        first_key_steps: as in `plan`.
        last_key_steps: as in `plan`.
        max_gap: as in `plan`.
        max_key_steps: largest number of key steps to plan for; None for all up to T.

    Returns:
        {K: Plan} for every feasible K, increasing; empty where the constraints leave none.

    Raises:
        ValueError: an argument out of range, or a cost tensor of the wrong shape or with NaN.
    """
    search = _Search(cost, first_key_steps, last_key_steps, max_gap)
    most = search.steps if max_key_steps is None else min(whole("max_key_steps", max_key_steps, 1), search.steps)
    search.run(most)
    return search.best(range(1, most + 1))


def checked_budget(num_key_steps: int, num_steps: int) -> int:
    """K, if it is a whole number from 1 to T.

    Raises:
        TypeError, ValueError: it is not.
    """
    found = whole("num_key_steps", num_key_steps, -sys.maxsize)
    if not 1 <= found <= num_steps:
        raise ValueError(f"num_key_steps must be from 1 to the number of steps ({num_steps}), got {found}.")
    return found


class _Search:
    """Shortest paths by number of key steps, over states (key step j, gap g = j - i to the one before it).

    Gaps rather than predecessors index the state, so that a gap limit W shrinks the tables: T x W states, T x W x W
    hops. `hop[j, g, h]` is the cost of going on from state (j, g) to key step j + h, and `value[j, g, m-1]` the least
    cost of m key steps that end in state (j, g). Gap 0 belongs to the first key step alone.
    """

    def __init__(self, cost: npt.ArrayLike, first: int, last: int, max_gap: int | None) -> None:
        table = _validated(cost)
        self.steps = table.shape[1] - 1
        for name, value in (("first_key_steps", first), ("last_key_steps", last)):
            if not 0 <= whole(name, value, -sys.maxsize) <= self.steps:
                raise ValueError(f"{name} must be from 0 to the number of steps ({self.steps}), got {value}.")
        self.first, self.last = int(first), int(last)
        self.max_gap = None if max_gap is None else whole("max_gap", max_gap, 1)
        self.hop = self._hops(table)

    def _hops(self, table: Array) -> Array:
        """[T, W+1, W+1] hop costs, W the longest hop that is allowed anywhere."""
        j, k = np.arange(self.steps)[:, None], np.arange(self.steps + 1)
        # A hop may not jump over a step that is forced to be a key step.
        allowed = (k == j + 1) | ((j >= self.first - 1) & (k > j) & (k <= self.steps - self.last))
        allowed &= np.isfinite(table[: self.steps, : self.steps]).any(axis=0)
        widest = int((k - j)[allowed].max(initial=1))
        width = min(widest, self.max_gap or widest)
        j, gap, ahead = np.ogrid[: self.steps, : width + 1, : width + 1]
        i, k = j - gap, j + ahead
        hop: Array = table[np.maximum(i, 0), j, np.minimum(k, self.steps)]
        # Gap 0 is of the first key step alone.
        exists = (gap <= j) & ((gap > 0) | (j == 0)) & (ahead > 0) & (k <= self.steps)
        hop[~(exists & allowed[j, np.minimum(k, self.steps)])] = np.inf
        return hop

    def run(self, max_keys: int) -> None:
        """Fills `value`: the states of one step after another, for all numbers of key steps at once."""
        width = self.hop.shape[2] - 1
        self.value = np.full((self.steps, width + 1, max_keys), np.inf)
        self.value[0, 0, 0] = 0.0
        for j in range(self.steps - 1):
            # At j lie paths of at most j + 1 key steps; those of max_keys go nowhere but to the end.
            keys = min(j + 1, max_keys - 1)
            gaps, ahead = min(j, width) + 1, np.arange(1, min(width, self.steps - 1 - j) + 1)
            onward = self._least(self.value[j, :gaps, :keys], self.hop[j, :gaps, 1 : len(ahead) + 1])
            self.value[j + ahead, ahead, 1 : keys + 1] = onward

    def _least(self, value: Array, hop: Array) -> Array:
        """[hops, keys]: the least over gaps of value[gaps, keys] and hop[gaps, hops] together."""
        gaps, keys = value.shape
        hops = hop.shape[1]
        least = np.full((hops, keys), np.inf)
        if gaps * hops * keys <= _AT_ONCE:
            np.min(value[:, None, :] + hop[:, :, None], axis=0, initial=np.inf, out=least)
            return least
        together = np.empty_like(least)
        for so_far, on in zip(value, hop, strict=True):
            np.add(so_far, on[:, None], out=together)
            np.minimum(least, together, out=least)
        return least

    def best(self, budgets: Sequence[int]) -> dict[int, Plan]:
        """The best path of every feasible budget, read backwards through the table, all budgets together."""
        width = self.hop.shape[2] - 1
        from_j = np.arange(max(self.steps - width, 0), self.steps)
        final = self.hop[from_j, :, self.steps - from_j]  # [j, g]
        keys = np.asarray(budgets)
        total = (self.value[from_j][:, :, keys - 1] + final[:, :, None]).reshape(-1, len(keys))
        arrival = total.argmin(axis=0)
        costs = total[arrival, np.arange(len(keys))]
        feasible = np.isfinite(costs)
        keys, costs, arrival = keys[feasible], costs[feasible], arrival[feasible]
        step, gap = from_j[arrival // (width + 1)], arrival % (width + 1)
        paths = np.empty((len(keys), keys.max(initial=0)), dtype=np.int64)
        for passed in range(paths.shape[1]):
            on = np.flatnonzero(keys > passed)  # paths that have not come to their first key step yet
            paths[on, keys[on] - 1 - passed] = step[on]
            on = np.flatnonzero(keys > passed + 1)
            step[on], hop = step[on] - gap[on], gap[on]
            earlier = self.value[step[on], :, keys[on] - 2 - passed]
            gap[on] = (earlier + self.hop[step[on], :, hop]).argmin(axis=1)
        return {
            int(k): Plan(tuple(path[:k].tolist()), float(cost))
            for k, path, cost in zip(keys, paths, costs, strict=True)
        }

    def feasible(self) -> list[int]:
        """Every feasible number of key steps. Bit m of `reached[j][g]`: m key steps can end in state (j, g)."""
        width = self.hop.shape[2] - 1
        open_hops = np.isfinite(self.hop)
        reached = [[0] * (width + 1) for _ in range(self.steps)]
        reached[0][0] = 0b10
        ended = 0
        for j, states in enumerate(reached):
            for g in filter(states.__getitem__, range(width + 1)):
                for h in np.flatnonzero(open_hops[j, g]).tolist():
                    if j + h == self.steps:
                        ended |= states[g]
                    else:
                        reached[j + h][h] |= states[g] << 1
        return [m for m in range(1, self.steps + 1) if ended >> m & 1]


def _validated(cost: npt.ArrayLike) -> Array:
    try:
        table = np.asarray(cost, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"cost must be an array of numbers, [T, T+1, T+1] ({error}).") from error
    size = table.shape[-1] if table.ndim else 0
    if table.shape not in ((size - 1, size, size), (size, size, size)):
        raise ValueError(f"cost must have shape [T, T+1, T+1] or [T+1, T+1, T+1], got {list(table.shape)}.")
    if size < 2:
        raise ValueError("cost must cover at least one step.")
    # The least of them is NaN where any is: one pass, and no copy of what may be large.
    if not table.min() > -np.inf:
        raise ValueError("cost must hold no NaN and no negative infinity; forbidden hops are +infinity.")
    return table


def _infeasible_message(num_key_steps: int, search: _Search) -> str:
    feasible = search.feasible()
    gap = "" if search.max_gap is None else f", max_gap={search.max_gap}"
    constraints = f"first_key_steps={search.first}, last_key_steps={search.last}{gap} over {search.steps} steps"
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
