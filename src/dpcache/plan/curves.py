"""Key steps on a smooth curve: what suits diffusion transformers when nothing has been measured.

A sampler decides composition in its first steps, so these are computed one after the other; from there the gaps grow
steadily, and the last few steps, which hardly move the sample, are predicted. The best of 1,370,754 schedules of
FLUX.1-dev, all of them run, looks like this (arXiv 2609.39343), and so do the best ones of small models that leave much
to decide (docs/defaults.md).

The curve is drawn over step numbers, not over noise levels: who chooses a model's shift for its resolution spaces its
levels so that the same share of steps comes before composition is decided.
"""

import math

import numpy as np

from dpcache.checks import number, whole

EXPONENT = 2.6
"""Of the curve: how much denser its beginning is. With many key steps it is flatter, see `FIRST_GAP`."""
FIRST_GAP = 0.12
"""The least first gap that the curve may have, steps: with many key steps it would crowd far too many at the start."""
TAIL = 3.6
"""The run ends TAIL / K key steps after the last one, if the curve went on. What comes last matters least: with few key
steps there is none near the end."""


def smooth_key_steps(
    num_key_steps: int, num_inference_steps: int, *, exponent: float | None = None, tail: float | None = None
) -> tuple[int, ...]:
    """Key steps t = T (m / (K - 1 + tail))^p for m = 0 .. K - 1, rounded, and moved on where two would be one.

    Unless it is given, p is 2.6 or, where that is less, such that the first gap is 0.12 steps: 2.4 for 13 of 50 key
    steps, 2.0 for 21; never less than 1, which spaces them evenly.

    Args:
        num_key_steps: K, 1 to T.
        num_inference_steps: T.
        exponent: p, 1 or more.
        tail: how much of a further hop lies between the last key step and T, above 0; 3.6 / K unless given.

    Raises:
        TypeError, ValueError: a number of the wrong type or out of range.
    """
    steps = whole("num_inference_steps", num_inference_steps, 1)
    count = whole("num_key_steps", num_key_steps, 1, steps)
    hops = count - 1 + (TAIL / count if tail is None else number("tail", tail, 0, above=True))
    if exponent is None:
        exponent = max(1.0, min(EXPONENT, float(np.log(steps / FIRST_GAP) / np.log(hops)))) if hops > 1 else EXPONENT
    wanted = np.rint(steps * (np.arange(count) / hops) ** number("exponent", exponent, 1)).astype(int).tolist()
    found = [0]
    for place, step in enumerate(wanted[1:], start=1):
        found.append(min(max(step, found[-1] + 1), steps - count + place))
    return tuple(found)


def key_steps_for(speedup: float, num_inference_steps: int) -> int:
    """The most key steps with which T / K is no less than a speedup, or one."""
    # A hair more, for 50 / 3.5714... is meant as 14.
    return max(1, math.floor(num_inference_steps / speedup + 1e-9))
