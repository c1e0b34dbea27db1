"""Predictors: step indices in, coefficients of a linear combination of cached values out.

A predictor never sees a tensor. It answers one question: which multiples of the values at the key steps, added up,
predict the value at a step that is skipped. The answer depends on step indices alone, so a schedule can carry it.
"""

from collections.abc import Sequence
from math import factorial

import numpy as np
import numpy.typing as npt

Coefficients = npt.NDArray[np.float64]


def taylor_coefficients(keys: Sequence[int], step: int, order: int = 2) -> Coefficients:
    """Coefficients of the Taylor prediction of `step` from backward differences at the key steps.

    The differences are D0_j = h_j and Dm_j = (D(m-1)_j - D(m-1)_i) / (j - i), where i is the key step before j, and
    the prediction is sum over m of Dm_j (step - j)^m / m! (TaylorSeer, arXiv 2503.06923; DPCache, arXiv 2602.22654).
    The order grows as key steps arrive: n + 1 key steps allow order n.

    Args:
        keys: key steps passed so far, strictly increasing, at least one.
        step: the step to predict; may be the last key itself.
        order: highest difference used, 0 or more.

    Returns:
        float64 array of length min(order + 1, len(keys)): one coefficient for each of the *last* keys, in order.

    Raises:
        ValueError: no keys, keys not strictly increasing, or a negative order.
    """
    if order < 0:
        raise ValueError(f"order must be 0 or more, got {order}.")
    if not keys or any(b <= a for a, b in zip(keys, keys[1:], strict=False)):
        raise ValueError(f"keys must be one or more strictly increasing steps, got {list(keys)}.")
    used = list(keys)[-(order + 1) :]
    # Row a holds the current difference at key a, as a combination of the values at the used keys.
    difference = np.eye(len(used))
    gap = np.diff(np.asarray(used, dtype=np.float64))
    coefficients = difference[-1].copy()
    for m in range(1, len(used)):
        difference = (difference[1:] - difference[:-1]) / gap[m - 1 :, None]
        coefficients += difference[-1] * (step - used[-1]) ** m / factorial(m)
    return coefficients
