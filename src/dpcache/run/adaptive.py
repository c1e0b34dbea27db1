"""What key steps tell about the sample at hand: where to compute next, and whether the calibration fits at all.

At a key step the value that was computed can be compared with the one that would have been predicted. The calibration
says how large that error is on its own inputs, for the same key steps; the ratio says how much harder this sample is.

A schedule that follows it: with cost-to-go V(i, j) = min over k of C[i, j, k] + price + V(j, k), the best next key step
for every last two is known beforehand for any price of a full call. The errors of a sample that is s times as hard
cost s^2 times as much, so it looks its next key step up at price / s^2. The price is set so that the calibration inputs
take K full calls on average.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch

from dpcache.errors import CalibrationError
from dpcache.plan.predictors import Predictor
from dpcache.plan.recipe import Recipe
from dpcache.plan.schedule import Schedule, Term

if TYPE_CHECKING:
    from .plans import Calibrated

Array = npt.NDArray[np.float64]
#: What to do where a sample's errors are beyond those of the calibration inputs.
OnDrift = Literal["warn", "full", "ignore"]

#: How much of what an error ratio says about the sample is believed of its next hops, as a power of the ratio.
_TRUST = 1.0
#: What an error ratio counts for at the next key step, against the one there.
_MEMORY = 0.6
#: As many key steps with a ratio of 1 are taken to have come before.
_PRIOR = 1.0
#: Prices of a full call are looked up at so many values between one and twice as much.
_PRICES = 4
#: Share of ordinary inputs that may be taken for drifted: the limit is set for less, since it is an estimate itself.
_FALSE_ALARMS = 0.002
#: With so few inputs there is no saying how far ordinary ones lie apart.
LEAST_INPUTS = 4
#: Key steps with an error that it takes to speak of drift.
_LEAST_KEYS = 3
#: By how much errors may exceed the recorded ones anyway: a cached run is off the path that was recorded in full.
_OFF_THE_PATH = 1.25


@dataclass(frozen=True)
class Decision:
    """What was found at a key step, and what followed.

    Attributes:
        step: the key step.
        ratio: error of predicting it, over what the calibration inputs err by there; None where it was not compared.
        next_key_step: the one that was decided on; T for none.
        planned: the one that comes next for a sample like the calibration inputs.
    """

    step: int
    ratio: float | None
    next_key_step: int
    planned: int

    def __str__(self) -> str:
        found = "nothing to compare yet" if self.ratio is None else f"error {self.ratio:.2f} times the usual"
        then = f"next {self.next_key_step}"
        if self.next_key_step < self.planned:
            then += f", earlier than {self.planned}"
        elif self.next_key_step > self.planned:
            then += f", later than {self.planned}"
        return f"step {self.step}: {found}, {then}"


class Usual:
    """How large errors at key steps are on the calibration inputs."""

    def __init__(self, gram: Array, predictor: Predictor) -> None:
        self.gram, self.predictor = gram, predictor
        #: Generations meet the same key steps again and again.
        self._found: dict[tuple[int, ...], Array] = {}

    def logarithms(self, known: Sequence[int], step: int) -> Array:
        """float64 [inputs]: logarithm of the relative RMS error of predicting the value at a step from known ones."""
        key = (*known, step)
        if key not in self._found:
            self._found[key] = self._logarithms(known, step)
        return self._found[key]

    def _logarithms(self, known: Sequence[int], step: int) -> Array:
        error = np.zeros(self.gram.shape[1])
        error[step] = 1.0
        coefficients = self.predictor.coefficients(known, [step])[0]
        error[list(known)[-len(coefficients) :]] -= coefficients
        square = np.maximum(np.einsum("a,nab,b->n", error, self.gram, error), 1e-30)
        found: Array = np.log(square / np.maximum(self.gram[:, step, step], 1e-30)) / 2
        return found


@dataclass
class Found:
    """Errors at the key steps of one generation, against the usual ones.

    Attributes:
        residuals: logarithm of the error over the usual one, for every key step that was compared.
        ordinary: likewise, float64 [inputs], of each calibration input against the others.
    """

    residuals: list[float] = field(default_factory=list)
    ordinary: list[Array] = field(default_factory=list)

    def add(self, usual: Array, logarithm: float) -> None:
        self.residuals.append(logarithm - float(usual.mean()))
        count = len(usual)
        self.ordinary.append((usual - usual.mean()) * (count / max(count - 1, 1)))

    def drift(self) -> tuple[float, float] | None:
        """By how many times errors are larger than usual on average, and the limit for it; None with too few."""
        if len(self.residuals) < _LEAST_KEYS:
            return None
        spread = np.mean(self.ordinary, axis=0)
        quantile = _student(1 - _FALSE_ALARMS, len(spread) - 1)
        limit = _OFF_THE_PATH * math.exp(quantile * float(np.sqrt(np.mean(spread**2))))
        return math.exp(float(np.mean(self.residuals))), limit

    def has_drifted(self) -> bool:
        """Whether errors are beyond the limit by now."""
        drift = self.drift()
        return drift is not None and not drift[0] <= drift[1]  # NaN is no ordinary error


def _student(probability: float, degrees: int) -> float:
    """Quantile of Student's t (Cornish-Fisher expansion in one over the degrees of freedom)."""
    z = NormalDist().inv_cdf(probability)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


class Guide:
    """What a calibration says about the generations on one grid.

    Args:
        calibration: on the grid.
        schedule: what an ordinary generation follows.
        recipe: how to plan.
        adaptive: whether generations may leave the schedule.

    Raises:
        CalibrationError: it is of too few inputs to know how they differ.
    """

    def __init__(self, calibration: "Calibrated", schedule: Schedule, recipe: Recipe, adaptive: bool) -> None:
        if len(calibration.value_gram) < LEAST_INPUTS:
            raise CalibrationError(
                f"{len(calibration.value_gram)} calibration inputs do not tell how much inputs differ: calibrate on "
                f'{LEAST_INPUTS} or more, or enable with adaptive=False and on_drift="ignore".'
            )
        self.calibration, self.recipe = calibration, recipe
        #: Where every step is computed there is nothing to decide.
        self.adaptive = adaptive and schedule.num_key_steps < schedule.num_inference_steps
        self.usual = Usual(calibration.value_gram, calibration.predictor(recipe.predictor, recipe.order))
        self._known: dict[tuple[int, ...], Schedule] = {schedule.key_steps: schedule}
        if self.adaptive:
            self._log_price = self._fitted_price(schedule.num_key_steps)
            schedule = self.schedule(self.path(0, [0], []))
        self.start = schedule

    @cached_property
    def _cost(self) -> Array:
        return self.calibration.cost(self.recipe)

    @cached_property
    def _tables(self) -> dict[int, npt.NDArray[np.intp]]:
        return {}

    def schedule(self, keys: Sequence[int]) -> Schedule:
        """The schedule with these key steps."""
        key = tuple(keys)
        if key not in self._known:
            self._known[key] = self.calibration.schedule(key, self.recipe)
        return self._known[key]

    def path(self, step: int, keys: Sequence[int], residuals: Sequence[float]) -> list[int]:
        """All key steps: those up to a step, and the best ones after it for a sample with these residuals."""
        table = self._table(self._log_price - 2 * _TRUST * _hardness(residuals))
        found = [key for key in keys if key <= step]
        while (after := table[found[-2] if len(found) > 1 else 0, found[-1]]) < len(table):
            found.append(int(after))
        return found

    def decision(self, step: int, keys: Sequence[int], residuals: Sequence[float] | None) -> Decision:
        """What was decided at a key step, for people; residuals up to it, None if it was not compared."""
        after, planned = (
            next((key for key in path if key > step), len(self._cost)) for path in (keys, self.path(step, keys, []))
        )
        return Decision(step, math.exp(residuals[-1]) if residuals else None, after, planned)

    def _table(self, log_price: float) -> npt.NDArray[np.intp]:
        """[T, T], indexed [i, j]: the best key step after j, the one before it i; T for none."""
        place = round(log_price / math.log(2) * _PRICES)
        if place not in self._tables:
            price, cost = 2.0 ** (place / _PRICES), self._cost
            steps = len(cost)
            ahead = np.zeros((steps, steps + 1))
            table = np.full((steps, steps), steps)
            for j in reversed(range(steps)):
                onward = np.append(price + ahead[j, j + 1 : steps], 0.0)
                total = cost[: max(j, 1), j, j + 1 :] + onward
                table[: max(j, 1), j] = j + 1 + total.argmin(axis=1)
                ahead[: max(j, 1), j] = total.min(axis=1)
            self._tables[place] = table
        return self._tables[place]

    def _fitted_price(self, num_key_steps: int) -> float:
        """Logarithm of the price with which the calibration inputs take so many full calls on average."""
        low, high = -80.0, 20.0
        while high - low > math.log(2) / _PRICES / 4:
            self._log_price = (low + high) / 2
            if self._mean_calls() > num_key_steps:
                low = self._log_price
            else:
                high = self._log_price
        return high

    def _mean_calls(self) -> float:
        counts = []
        for row in range(len(self.usual.gram)):
            keys, found = [0], Found()
            while len(path := self.path(keys[-1], keys, found.residuals)) > len(keys):
                keys.append(path[len(keys)])
                usual = self.usual.logarithms(keys[-self.usual.predictor.order - 2 : -1], keys[-1])
                found.add(np.delete(usual, row), float(usual[row]))
            counts.append(len(keys))
        return float(np.mean(counts))


def _hardness(residuals: Sequence[float]) -> float:
    """Logarithm of how much harder than usual a sample is, the latest key steps counting most."""
    counts = _MEMORY ** np.arange(len(residuals))[::-1]
    return float(counts @ np.asarray(residuals) / (counts.sum() + _PRIOR)) if len(residuals) else 0.0


class Comparison:
    """What the key steps of one generation told. Errors are read from the device when they are needed.

    Args:
        guide: what is usual on this grid.
        on_drift: what to do where errors are beyond it.
    """

    def __init__(self, guide: Guide, on_drift: OnDrift) -> None:
        self._guide: Guide | None = guide
        self._on_drift, self._order, self._adaptive = on_drift, guide.start.order, guide.adaptive
        self.decisions: list[Decision] = []
        self._found = Found()
        self._step: int | None = None
        self._pending: list[tuple[Array, torch.Tensor]] = []

    @property
    def spared(self) -> int:
        """How many values beside the newest to keep, in case the schedule changes."""
        return self._order if self._guide is not None and self._decides else 0

    def at_key_step(
        self,
        step: int,
        value: torch.Tensor,
        cached: Mapping[int, torch.Tensor],
        predicted: Callable[[tuple[Term, ...]], torch.Tensor],
        key_steps: Sequence[int],
    ) -> Schedule | None:
        """Holds the computed value against its prediction; the first branch of a step speaks for all.

        Args:
            step: the key step.
            value: what was computed.
            cached: key step -> value, of the key steps before.
            predicted: makes the weighted sum of cached values.
            key_steps: of the schedule that is followed.

        Returns:
            the schedule to follow from here on, if that changes.
        """
        guide = self._guide
        if guide is None or self._step == step:
            return None
        self._step = step
        known = sorted(cached)[-guide.usual.predictor.order - 1 :]
        if known:
            coefficients = guide.usual.predictor.coefficients(known, [step])[0]
            used = zip(known[-len(coefficients) :], coefficients.tolist(), strict=True)
            expected = predicted(tuple(Term(key_step=key, coefficient=share) for key, share in used))
            self._pending.append((guide.usual.logarithms(known, step), _relative_error(expected, value)))
        if not self._decides:
            return None
        self._settle()
        if self._on_drift == "full" and self._found.has_drifted():
            self._guide = None
            rest = range(step + 1, guide.start.num_inference_steps)
            return guide.schedule([*(key for key in key_steps if key <= step), *rest])
        if not guide.adaptive:
            return None
        keys = guide.path(step, key_steps, self._found.residuals)
        self.decisions.append(guide.decision(step, keys, self._found.residuals if known else None))
        return guide.schedule(keys)

    @property
    def drift(self) -> float | None:
        """By how many times errors are larger than usual; None where too few were compared."""
        self._settle()
        found = self._found.drift()
        return found and found[0]

    def warning(self) -> str | None:
        """What to tell the user at the end of the generation, if anything."""
        if self._on_drift == "ignore":
            return None
        self._settle()
        drift = self._found.drift()
        if drift is None or not self._found.has_drifted():
            return None
        then = " The rest of it was computed in full." if self._on_drift == "full" else ""
        return (
            f"the calibration does not fit this generation: predictions err {drift[0]:.2f} times as much as on the "
            f"calibration inputs, of which hardly any would exceed {drift[1]:.2f}.{then} Calibrate with inputs like "
            "this one (its prompt, LoRA, size, guidance), or take more key steps. Shown once; see "
            "dpcache.stats(pipe).drift."
        )

    @property
    def _decides(self) -> bool:
        """Whether what is found at a key step matters before the end."""
        return self._on_drift == "full" or (self._guide is not None and self._adaptive)

    def _settle(self) -> None:
        if self._pending:
            logarithms = torch.stack([error for _, error in self._pending]).clamp(min=1e-15).log().tolist()
            for (usual, _), logarithm in zip(self._pending, logarithms, strict=True):
                self._found.add(usual, logarithm)
            self._pending.clear()


def _relative_error(predicted: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """RMS difference as a share of the value, on the device."""
    off, size = (torch.linalg.vector_norm(of, dtype=torch.float32) for of in (predicted - value, value))
    return torch.div(off, size.clamp(min=1e-30))
