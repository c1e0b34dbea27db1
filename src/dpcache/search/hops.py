"""Coefficients fitted hop by hop, to where the full run is when the hop ends.

Let a schedule be followed on some inputs up to a key step. How the skipped steps after it are predicted decides where
the sample is at the next key step, and the full run says where it should be. Two or three numbers a hop, the same for
all inputs, are chosen by least squares: multiples of the last difference between cached values and of the one before,
and of what the key step makes up for. What earlier hops have got wrong is in what is left over, so a hop also makes up
for them. Hops are fitted in order, each where the fitted ones before it lead.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from dpcache.plan.predictors import backward_differences
from dpcache.plan.schedule import Schedule, Term

from .sharing import SharedRuns

Array = npt.NDArray[np.float64]

RIDGE = 0.3
"""How much a coefficient is held where it was, as a share of what the inputs say of it."""
#: Of a coefficient, the change by which it is found what it does.
_CHANGE = 0.25
_ORDER = 2


_Direction = dict[int, dict[int, float]]
"""What may be added to the prediction of each step, or to the correction of a key step: key step -> share, by step."""


@dataclass(frozen=True)
class _Hop:
    """What may be changed of a schedule between one key step and the next.

    Attributes:
        key: the key step at its beginning.
        end: the next key step, or T.
        directions: what the coefficients are multiples of.
    """

    key: int
    end: int
    directions: tuple[_Direction, ...]


def fitted(
    base: Schedule,
    runs: Sequence[SharedRuns],
    full: Sequence[Mapping[int, torch.Tensor]],
    correct: Callable[[Schedule], Schedule],
) -> Schedule:
    """The schedule with the coefficients of every hop fitted.

    Args:
        base: where coefficients start from, and are held to.
        runs: of some calls.
        full: of each, the full run's sample by the step that starts from it, 1 to T: float32 [D], in host memory.
        correct: has key steps make up for what predictions miss, as the base does; gives a schedule back as it is,
            where the base does not.

    Raises:
        CalibrationError: as `SharedRuns.sample_at`.
    """
    made = base.model_copy(update={"order": max(base.order, _ORDER), "predictor": f"{base.predictor}, fitted in runs"})
    for key, end in pairwise([*base.key_steps, base.num_inference_steps]):
        correction = correct(made).corrections.get(key, ())  # of the predictions as they are by now
        kept = {at: terms for at, terms in made.corrections.items() if at != key}
        made = made.model_copy(update={"corrections": {**kept, key: correction} if correction else kept})
        directions = _directions(made, key, end)
        if directions:
            hop = _Hop(key, end, directions)
            made = _with(made, hop, _least_squares(made, hop, runs, full))
    return made


def steps_to_fit(base: Schedule) -> int:
    """How many steps `fitted` computes for each call: those up to the last hop in which there is something to fit."""
    keys = base.key_steps
    hops = enumerate(pairwise([*keys, base.num_inference_steps]))
    last = [end for place, (key, end) in hops if (place and end > key + 1) or key in base.corrections]
    return sum(key < max(last, default=0) for key in keys)


def _directions(schedule: Schedule, key: int, end: int) -> tuple[_Direction, ...]:
    passed = [step for step in schedule.key_steps if step <= key]
    found: list[_Direction] = []
    if end > key + 1 and len(passed) > 1:
        differences = backward_differences(passed, _ORDER)
        gap = key - passed[-2]
        for order, difference in enumerate(differences[1:], start=1):
            shares = dict(zip(passed[-len(difference) :], difference.tolist(), strict=True))
            reach = {step: _reach(step - key, gap) ** order / order for step in range(key + 1, end)}
            found.append({step: {at: far * c for at, c in shares.items()} for step, far in reach.items()})
    if terms := schedule.corrections.get(key):
        found.append({key: {term.key_step: term.coefficient for term in terms}})
    return tuple(found)


def _reach(ahead: int, gap: int) -> float:
    """How far a trend goes that comes to a halt (see `predictors.Trend`), in steps."""
    return float(-np.expm1(-ahead / gap) * gap)


def _least_squares(
    schedule: Schedule, hop: _Hop, runs: Sequence[SharedRuns], full: Sequence[Mapping[int, torch.Tensor]]
) -> Array:
    """float64 [directions]: the multiples that bring samples nearest to those of the full runs."""
    count = len(hop.directions)
    products, wanted = np.zeros((count, count)), np.zeros(count)
    for run, samples in zip(runs, full, strict=True):
        now = run.sample_at(hop.end, schedule)
        missing = (samples[hop.end] - now).double()
        changes = []
        for place in range(count):
            changed = _with(schedule, hop, _CHANGE * np.eye(count)[place])
            changes.append((run.sample_at(hop.end, changed) - now).double() / _CHANGE)
        all_changes = torch.stack(changes)
        # An input counts for how much of its error goes: one that is far off does not outvote the others.
        weight = 1 / max(float(missing @ missing), 1e-30)
        products += weight * (all_changes @ all_changes.T).numpy()
        wanted += weight * (all_changes @ missing).numpy()
    held = products + RIDGE * np.diag(np.diag(products))
    held += 1e-12 * max(np.trace(products), 1e-30) * np.eye(count)
    return np.asarray(np.linalg.solve(held, wanted), dtype=np.float64)


def _with(schedule: Schedule, hop: _Hop, multiples: Array) -> Schedule:
    """The schedule with these multiples of the directions added."""
    predictions, corrections = dict(schedule.predictions), dict(schedule.corrections)
    for multiple, direction in zip(multiples, hop.directions, strict=True):
        for step, shares in direction.items():
            terms = corrections if step == hop.key else predictions
            sums = {term.key_step: term.coefficient for term in terms[step]}
            for at, share in shares.items():
                sums[at] = sums.get(at, 0.0) + float(multiple) * share
            terms[step] = tuple(Term(key_step=at, coefficient=sums[at]) for at in sorted(sums))
    return schedule.model_copy(update={"predictions": predictions, "corrections": corrections})
