"""Predictors: step indices in, coefficients of a linear combination of cached values out.

A predictor never sees a tensor. It answers one question: which multiples of the values at the key steps, added up,
predict the value at a step that is skipped. The answer depends on step indices alone, so a schedule can carry it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import factorial
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from dpcache.checks import number, whole

Coefficients = npt.NDArray[np.float64]
Steps = Sequence[int] | npt.NDArray[np.integer[Any]]

#: Ridges that `chosen_ridge` tries, and how far apart the key steps are that it predicts from.
_RIDGES = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
_REACH = 3


class Predictor(Protocol):
    """How skipped steps are predicted from key steps."""

    @property
    def name(self) -> str:
        """Goes into the schedule, for people."""

    @property
    def order(self) -> int:
        """A prediction uses at most order + 1 key steps, the latest."""

    def coefficients(self, keys: Sequence[int], steps: Steps) -> Coefficients:
        """float64 [steps, keys used]: what the values at the *last* min(order + 1, len(keys)) keys are multiplied by.

        Args:
            keys: key steps passed so far, strictly increasing, at least one.
            steps: steps after the last key, to be predicted.
        """


@dataclass(frozen=True)
class Taylor:
    """The paper's prediction: a Taylor series of backward differences (see `taylor_coefficients`)."""

    order: int = 2
    name: ClassVar[str] = "taylor"

    def __post_init__(self) -> None:
        whole("order", self.order, 0)

    def coefficients(self, keys: Sequence[int], steps: Steps) -> Coefficients:
        """As `Predictor.coefficients`."""
        differences = backward_differences(keys, self.order)
        ahead = np.asarray(steps) - keys[-1]
        coefficients: Coefficients = taylor_weights(ahead, len(differences) - 1) @ differences
        return coefficients


@dataclass(frozen=True)
class Trend:
    """A straight line that bends to a halt: safe where Taylor's would run away.

    With r how far beyond the last key step the predicted one lies, in units of the gap between the last two, the last
    difference counts (1 - exp(-rate r)) / rate times: as with Taylor of order 1 at first, never more than 1 / rate
    times (the damped trend of forecasting: Gardner and McKenzie, "Forecasting trends in time series", 1985). How the
    first step differs from a later one is no trend, because what a denoiser makes of pure noise changes abruptly: with
    these two alone the last value is reused.

    Attributes:
        rate: how soon it comes to a halt, above 0. Large values reuse the last value, small ones follow the line.
    """

    rate: float = 1.0
    order: ClassVar[int] = 1
    name: ClassVar[str] = "trend"

    def __post_init__(self) -> None:
        number("rate", self.rate, 0, above=True)

    def coefficients(self, keys: Sequence[int], steps: Steps) -> Coefficients:
        """As `Predictor.coefficients`."""
        differences = backward_differences(keys, 1)
        if len(differences) == 1 or keys[-2] == 0:
            return np.tile(differences[0], (len(steps), 1))
        gap = keys[-1] - keys[-2]
        share = -np.expm1(-self.rate * (np.asarray(steps) - keys[-1]) / gap) / self.rate
        coefficients: Coefficients = differences[0] + share[:, None] * gap * differences[1]
        return coefficients


@dataclass(frozen=True, eq=False)
class Fitted:
    """The linear prediction with the least mean square error over recorded runs.

    Attributes:
        gram: [T, T], mean products of the values at every two steps, over the runs to fit.
        order: one less than the number of key steps used.
        ridge: added to the diagonal of the normal equations, as a fraction of its mean: keys close to each other have
            nearly equal values, and without it their coefficients would be large and of opposite sign.
    """

    gram: Coefficients
    order: int = 1
    ridge: float = 1e-5
    name: ClassVar[str] = "fitted"

    def __post_init__(self) -> None:
        whole("order", self.order, 0)
        number("ridge", self.ridge, 0)
        if np.ndim(self.gram) != 2 or len(self.gram) != self.gram.shape[1]:
            raise ValueError(f"gram must be [T, T], got {list(np.shape(self.gram))}.")

    def coefficients(self, keys: Sequence[int], steps: Steps) -> Coefficients:
        """As `Predictor.coefficients`."""
        used = np.asarray(keys)[-(self.order + 1) :]
        among = self.gram[used[:, None], used]
        among = among + self.ridge * np.trace(among) / len(used) * np.eye(len(used))
        coefficients: Coefficients = np.linalg.solve(among, self.gram[used[:, None], np.asarray(steps)]).T
        return coefficients


def chosen_ridge(grams: Coefficients, order: int, default: float = 1e-5) -> float:
    """The ridge of a fitted predictor that errs least on runs it was not fitted to.

    Every run is predicted by what is fitted to the others, each step from key steps 3 and more steps before it.

    Args:
        grams: [runs, T, T], mean products of the values at every two steps.
        order: of the predictor.
        default: for a single run, which cannot tell.
    """
    if np.ndim(grams) != 3 or grams.shape[1] != grams.shape[2]:
        raise ValueError(f"grams must be [runs, T, T], got {list(np.shape(grams))}.")
    whole("order", order, 0)
    runs, steps = grams.shape[:2]
    if runs < 2 or steps <= _REACH * (order + 1):
        return default
    errors = {}
    for ridge in _RIDGES:
        total = 0.0
        for run in range(runs):
            predictor = Fitted(np.delete(grams, run, axis=0).mean(axis=0), order, ridge)
            for step in range(_REACH * (order + 1), steps):
                keys = list(range(step - _REACH * (order + 1), step, _REACH))
                error = np.zeros(steps)
                error[step] = 1.0
                error[keys] -= predictor.coefficients(keys, [step])[0]
                total += float(error @ grams[run] @ error)
        errors[ridge] = total
    return min(errors, key=errors.__getitem__)


def backward_differences(keys: Sequence[int], order: int) -> Coefficients:
    """Backward differences at the last key step, as combinations of the values at the key steps.

    D0_j = h_j and Dm_j = (D(m-1)_j - D(m-1)_i) / (j - i), where i is the key step before j (TaylorSeer, arXiv
    2503.06923). The order grows as key steps arrive: n + 1 of them allow order n.

    Args:
        keys: key steps passed so far, strictly increasing, at least one.
        order: highest difference, 0 or more.

    Returns:
        float64 [m, a]: the difference of order m takes so much of the value at the a-th of the *last* min(order + 1,
        len(keys)) key steps.

    Raises:
        ValueError: no keys, keys not strictly increasing, or a negative order.
    """
    whole("order", order, 0)
    if not len(keys) or any(b <= a for a, b in pairwise(keys)):
        raise ValueError(f"keys must be one or more strictly increasing steps, got {list(keys)}.")
    used = list(keys)[-(order + 1) :]
    gaps = np.diff(np.asarray(used, dtype=np.float64))
    difference = np.eye(len(used))  # row a: the difference of the current order at key a
    rows = [difference[-1]]
    for m in range(1, len(used)):
        difference = (difference[1:] - difference[:-1]) / gaps[m - 1 :, None]
        rows.append(difference[-1])
    return np.stack(rows)


def taylor_coefficients(keys: Sequence[int], step: int, order: int = 2) -> Coefficients:
    """Coefficients of the Taylor prediction of `step`: sum over m of Dm_j (step - j)^m / m!, j the last key step.

    Arguments, `step` aside, and errors as `backward_differences` (DPCache, arXiv 2602.22654).

    Returns:
        float64 array of length min(order + 1, len(keys)): one coefficient for each of the *last* keys, in order.
    """
    differences = backward_differences(keys, order)
    coefficients: Coefficients = taylor_weights([step - keys[-1]], len(differences) - 1)[0] @ differences
    return coefficients


def taylor_weights(ahead: Steps, order: int) -> Coefficients:
    """float64 [steps ahead, m]: what the difference of order m is multiplied by, d^m / m! for d steps ahead."""
    distance = np.asarray(ahead, dtype=np.float64)[:, None]
    orders = np.arange(order + 1)
    weights: Coefficients = distance**orders / np.array([factorial(m) for m in orders])
    return weights
