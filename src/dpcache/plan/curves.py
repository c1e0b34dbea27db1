"""Key steps on a smooth curve: what suits diffusion transformers when nothing has been measured.

A sampler decides composition in its first steps, so these are computed one after the other; from there the gaps grow
steadily, and the last few steps, which hardly move the sample, are predicted. The best of 1,370,754 schedules of
FLUX.1-dev, all of them run, looks like this (arXiv 2609.39343), and so do the best ones of small models that leave much
to decide (docs/curves.md).

The curve is drawn over step numbers, not over noise levels: who chooses a model's shift for its resolution spaces its
levels so that the same share of steps comes before composition is decided.
"""

import numpy as np

from dpcache.checks import number, whole

FIRST_GAP = 0.25
"""The first gap that the curve would like, steps; where that is less than a step, the next step is taken."""
TAIL = 0.4
"""Where the run ends: so many key steps after the last one, if the curve went on."""


def smooth_key_steps(
    num_key_steps: int, num_inference_steps: int, *, first_gap: float = FIRST_GAP, tail: float = TAIL
) -> tuple[int, ...]:
    """Key steps t = T (m / (K - 1 + tail))^p for m = 0 .. K - 1, rounded, and moved on where two would be one.

    The exponent p follows from the first gap: 2.5 for 9 of 50, 2.1 for 13, 1.7 for 21. It is never less than 1.

    Args:
        num_key_steps: K, 1 to T.
        num_inference_steps: T.
        first_gap: where the curve has its second key step, above 0.
        tail: how much of a further hop lies between the last key step and T, above 0.

    Raises:
        TypeError, ValueError: a number of the wrong type or out of range.
    """
    steps = whole("num_inference_steps", num_inference_steps, 1)
    count = whole("num_key_steps", num_key_steps, 1, steps)
    number("first_gap", first_gap, 0, above=True)
    number("tail", tail, 0, above=True)
    hops = count - 1 + tail
    exponent = max(1.0, np.log(steps / first_gap) / np.log(hops)) if hops > 1 else 1.0
    wanted = np.rint(steps * (np.arange(count) / hops) ** exponent).astype(int).tolist()
    found = [0]
    for place, step in enumerate(wanted[1:], start=1):
        found.append(min(max(step, found[-1] + 1), steps - count + place))
    return tuple(found)
