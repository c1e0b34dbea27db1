"""Every schedule of FLUX.1-dev with 9 of 50 key steps: what our costs say of those that real runs found best.

    python -m benchmarks.golden

writes docs/golden.md, in half a minute. Nothing is run: the runs are published (arXiv 2609.39343), and so is the cost
tensor (arXiv 2602.22654). The same files give the same page.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.subjects import ROOT, table
from dpcache.files.whole import write_whole
from dpcache.measure.anchor_limit import farthest_anchor
from dpcache.plan.curves import smooth_key_steps

REFERENCE = ROOT / "tests" / "reference"
STEPS, KEYS = 50, 9
EARLY = 10
"""Steps after which an error counts by a factor of e less, in the two costs that say so."""
METHODS = ("even", "dpcache", "budcache_search", "meancache")
NEAR = 2.5
"""So near the curve should be to what search found, in steps a key."""

Array = npt.NDArray[np.float64]
Schedules = npt.NDArray[np.int64]
INDICES = np.arange(STEPS + 1)


@cache
def published() -> dict[str, Any]:
    """What was run: see the file itself for its source."""
    found: dict[str, Any] = json.loads((REFERENCE / "flux1_dev_t50_real_runs.json").read_text(encoding="utf-8"))
    return found


def by_method(method: str, num_key_steps: int = KEYS) -> tuple[int, ...]:
    """The key steps that a published method chose."""
    return tuple(published()["by_method"][str(num_key_steps)][method])


def golden_path() -> tuple[int, ...]:
    """The best of all schedules with 9 key steps."""
    return tuple(published()["exhaustive"]["best"])


def best() -> Schedules:
    """[64, 9]: the best ones."""
    return _with_forced(np.array(published()["exhaustive"]["top64_free_key_steps"]))


def every() -> Schedules:
    """[1370754, 9]: every schedule that was run: 0, 1, 2 and 49 are forced, five key steps are free."""
    free = combinations(range(3, STEPS - 1), KEYS - len(published()["forced"]))
    return _with_forced(np.fromiter(free, dtype=np.dtype((np.int64, 5))))


def _with_forced(free: Schedules) -> Schedules:
    forced = np.broadcast_to(published()["forced"], (len(free), 4))
    return np.sort(np.concatenate([forced, free], axis=1), axis=1)


def steps_a_key(schedules: npt.ArrayLike, other: npt.ArrayLike) -> Array:
    """How far schedules are from another one: mean absolute difference of their key steps."""
    distance: Array = np.abs(np.asarray(schedules) - np.asarray(other)).mean(axis=-1)
    return distance


# ----------------------------------------------------------------------------------------------------------- the costs


@dataclass(frozen=True)
class Cost:
    """One way to price a schedule by the published errors.

    Attributes:
        name: for people.
        weights: [T + 1], of the error at every step; None for ones.
        counts_key: whether the error at the next key step counts, as in the paper, though it is computed.
        power: of a hop's summed error.
        largest: the largest hop instead of the sum.
        limited: whether hops that the published tensor has no history for are infinitely dear.
    """

    name: str
    weights: Array | None = None
    counts_key: bool = False
    power: float = 1.0
    largest: bool = False
    limited: bool = False

    def hops(self) -> Array:
        """[T, T + 1, T + 1], as a cost tensor."""
        errors, known = _errors(self.limited)
        if self.weights is not None:
            errors = errors * self.weights
        summed = errors.cumsum(axis=2)
        if not self.counts_key:
            summed -= errors
        return np.where(known, summed**self.power, np.inf)

    def of(self, schedules: Schedules) -> Array:
        """What the schedules cost."""
        hops = self.hops()
        stops = np.concatenate([schedules, np.full((len(schedules), 1), STEPS)], axis=1)
        total = np.zeros(len(schedules))
        for n in range(schedules.shape[1]):
            hop = hops[stops[:, max(n - 1, 0)], stops[:, n], stops[:, n + 1]]
            total = np.maximum(total, hop) if self.largest else total + hop
        return total


def _errors(limited: bool) -> tuple[Array, npt.NDArray[np.bool_]]:
    """[i, j, t], the error of predicting step t from key step j and the one before it, i; and which of them are known.

    The tensor holds their sums, for i at most 15 before j. Without that limit, what is farther counts like 15 before.
    """
    cost = np.load(REFERENCE / "flux1_dev_t50_cost.npz")["cost"].copy()
    farthest = farthest_anchor(STEPS)
    if not limited:
        for j in range(farthest + 1, STEPS):
            cost[: j - farthest, j] = cost[j - farthest, j]
    known = np.isfinite(cost)
    errors = np.diff(np.where(known, cost, 0.0), axis=2, prepend=0.0)
    # A few sums over 27 and more steps are less than those before them: errors too large for the numbers they came in.
    return np.maximum(errors, 0.0), known


def sigmas() -> Array:
    """FLUX's noise levels, T + 1, as they were sampled."""
    even = np.linspace(1.0, 1 / STEPS, STEPS)
    factor = np.exp(published()["mu"])
    return np.append(factor / (factor + 1 / even - 1), 0.0)


def costs() -> tuple[Cost, ...]:
    moved = np.append(-np.diff(sigmas()), 0.0)
    early = np.exp(-INDICES / EARLY)
    return (
        Cost("the paper's sum, anchor limit", counts_key=True, limited=True),
        Cost("the paper's sum, no limit", counts_key=True),
        Cost("the paper's sum, largest hop", counts_key=True, largest=True),
        Cost("skipped steps alone"),
        Cost("skipped steps alone, power 2", power=2.0),
        Cost("errors times step of sigma, power 1", moved),
        Cost("errors times step of sigma, power 2", moved, power=2.0),
        Cost("errors times step of sigma, power 4", moved, power=4.0),
        Cost("errors times step of sigma, largest hop", moved, largest=True),
        Cost("errors times exp(-t / 10)", early),
        Cost("errors times step of sigma and exp(-t / 10)", moved * early),
        Cost("errors times step of sigma and exp(-t / 10), power 2", moved * early, power=2.0),
    )


# ------------------------------------------------------------------------------------------------------------ the ranks


@dataclass(frozen=True)
class Ranks:
    """What a cost says of the schedules that were really run.

    Attributes:
        name: of the cost.
        median: of the 64 best, those of finite price: the share of all schedules of finite price that cost less.
        infinite: how many of the 64 have an infinite price.
        chosen: rank of the golden path and of what each published method chose; infinite where the price is.
        cheapest: the schedule of least cost, the first of them.
    """

    name: str
    median: float
    infinite: int
    chosen: dict[str, float]
    cheapest: tuple[int, ...]


def ranks() -> list[Ranks]:
    """By every cost, and by the distance to the library's curve."""
    all_of_them, curve = every(), smooth_key_steps(KEYS, STEPS)
    some = np.concatenate([best(), [golden_path(), *(by_method(method) for method in METHODS)]])
    found = [_ranks(cost.name, cost.of(all_of_them), cost.of(some), all_of_them) for cost in costs()]
    found.append(_ranks("distance to the curve", *(steps_a_key(s, curve) for s in (all_of_them, some)), all_of_them))
    return found


def _ranks(name: str, prices: Array, some: Array, schedules: Schedules) -> Ranks:
    ordered = np.sort(prices[np.isfinite(prices)])
    # Rounded sums of the same numbers in the same order are the same; schedules of one price share the middle rank.
    places = (np.searchsorted(ordered, some, "left") + np.searchsorted(ordered, some, "right")) / 2
    rank = np.where(np.isfinite(some), places / len(ordered), np.inf)
    top, chosen = rank[:-5], rank[-5:]
    return Ranks(
        name=name,
        median=float(np.median(top[np.isfinite(top)])),
        infinite=int(np.isinf(top).sum()),
        chosen=dict(zip(("golden path", *METHODS), chosen.tolist(), strict=True)),
        cheapest=tuple(schedules[prices.argmin()].tolist()),
    )


# ------------------------------------------------------------------------------------------------------------- the page

ABOUT = """# Costs and curves against every schedule of FLUX.1-dev

Made by `python -m benchmarks.golden` from published figures; nothing was run for it. "The Golden Path Hypothesis"
(arXiv 2609.39343) ran every schedule of FLUX.1-dev with 9 key steps of 50 that holds 0, 1, 2 and 49: {count:,} of
them, on four prompts, at 1024 x 1024, guidance 3.5. Skipped steps reuse the residual of the last key step. The best
one is {golden}: {four} dB on the four prompts, {others} dB on 7,151 other runs. This is the golden path. The 64 best
ones are like it.

**Step 49 was forced**, in these runs and in all published ones here, and so were 0, 1 and 2. Whether the last step is
a good key step was therefore never asked on FLUX. The library's curve ends earlier.

## What costs say

The costs come from the tensor published for FLUX.1-dev with DPCache: mean absolute errors of Taylor predictions of
order 2, after one key step and with another one before it. It holds no products, so the library's own cost, which
adds errors up with their signs, cannot be computed from it. What can: its weights (an Euler step moves the sample by
the difference of sigma, mu = {mu}), its powers of a hop's error (`Recipe.power`) and the largest hop
in place of the sum. "Skipped steps alone" leaves out the error at the next key step, which the paper counts though
that step is computed. The factor exp(-t / 10) is not in the library; it was chosen with these very runs in sight.

A rank is the share of all schedules with a finite price that are cheaper: 0 % is the cheapest, 50 % is what chance
gives. "Median" is the median rank of the 64 best ones of finite price; "infinite" counts those of them that cannot be
chosen at all. The tensor knows no key steps more than 15 apart (the paper's anchor limit, 0.3 T). Without the limit
such a hop costs what it would with the key step before it at 15 steps. Of hops of 24 steps and more the tensor
lacks some, and they stay infinitely dear. "Cheapest" is the schedule that this cost would choose of all, with its
distance from the golden path in steps a key.
"""

READING = """
- The anchor limit alone makes {forbidden} of the 64 best ones infinitely dear. The golden path is one of them. With
  few key steps, good schedules have gaps of {gaps} steps. The limit belongs to `method="paper"` and to nothing else
  in the library, and planning with it warns where it is shorter than three mean gaps, at 10 key steps and fewer.
- Weighting errors by the sampler's steps, which is right for what an error does to the sample *at once*, ranks the
  best ones worse than the paper's plain sum: early errors do more on FLUX than their own step says. How much more has
  to be measured on the model.
- The distance to `smooth_key_steps(9, 50)`, which knows nothing of FLUX's errors, ranks the 64 best ones at
  {curve:.1%}. The best of the costs that the library has is at {cost:.1%}.
- The limits of the comparison: four prompts, reuse instead of a Taylor series in the real runs, and a curve whose two
  numbers were chosen by people who had seen the golden path.
"""


def page(found: Sequence[Ranks]) -> str:
    facts = published()["exhaustive"]
    golden = golden_path()
    head = ["cost", "median", "infinite", *found[0].chosen, "cheapest (steps a key from the golden path)"]
    rows = [
        [
            one.name,
            _share(one.median),
            one.infinite,
            *map(_share, one.chosen.values()),
            f"{_listed(one.cheapest)} ({steps_a_key(one.cheapest, golden):.1f})",
        ]
        for one in found
    ]
    gaps = np.diff(best(), axis=1).max(axis=1)
    ours = [one.median for one in found[1:-1] if "exp" not in one.name]
    parts = [
        ABOUT.format(
            count=facts["schedules_tried"],
            golden=_listed(golden),
            four=facts["best_psnr_mean_of_four"],
            others=facts["best_psnr_on_7151_held_out_runs"],
            mu=published()["mu"],
        ),
        table(head, rows),
        READING.format(
            forbidden=found[0].infinite, gaps=f"{gaps.min()} to {gaps.max()}", curve=found[-1].median, cost=min(ours)
        ),
        "## How near the curve is\n",
        "Mean absolute difference between `smooth_key_steps(K, 50)` and what was published, in steps a key. The golden "
        "path was found by running everything, `budcache_search` by simulated annealing on real runs, `meancache` by "
        f"its own rule. The target is {NEAR} for the golden path and for what search found. All of the published ones "
        "end with 49, which was forced; at that place alone the curve is up to five steps away.\n",
        table(["K", "the curve", "the other", "key steps of the other", "steps a key"], distances()),
        "## As ready-made schedules\n",
        "The golden path and the searched ones for 13 and 21 are the schedules that ship for FLUX.1-dev: see "
        "[without a calibration](choosing-k.md#without-a-calibration).\n",
    ]
    return "\n".join(parts)


def distances() -> list[list[str]]:
    others = [(KEYS, "golden path", golden_path())]
    others += [(k, method, by_method(method, k)) for k in (13, 21) for method in ("budcache_search", "meancache")]
    rows = []
    for k, name, other in others:
        curve = smooth_key_steps(k, STEPS)
        rows.append([str(k), _listed(curve), name, _listed(other), f"{steps_a_key(curve, other):.2f}"])
    return rows


def _listed(key_steps: Sequence[int]) -> str:
    return ", ".join(map(str, key_steps))


def _share(rank: float) -> str:
    return f"{rank:.2%}" if np.isfinite(rank) else "infinite"


def main() -> None:
    text = page(ranks())
    where = ROOT / "docs" / "golden.md"
    write_whole(where, lambda part: part.write_text(text, encoding="utf-8"))
    print(f"wrote {where}")


if __name__ == "__main__":
    main()
