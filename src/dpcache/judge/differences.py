"""Where two pictures differ, so that it can be seen: amplified by a round number, from black to bright yellow."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .metrics import Picture

#: Places on the scale and their colours, ever lighter; between them it is even. Readers of any sight tell them apart.
_PLACES = (0.0, 0.13, 0.25, 0.38, 0.5, 0.63, 0.75, 0.88, 1.0)
_COLOURS = (
    (0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85),
    (227, 89, 51), (249, 140, 10), (249, 201, 50), (252, 255, 164),
)  # fmt: skip
#: uint8 [256, 3]: the colour of every level.
HEAT: npt.NDArray[np.uint8] = np.stack(
    [np.interp(np.linspace(0, 1, 256), _PLACES, channel).round() for channel in zip(*_COLOURS, strict=True)], axis=-1
).astype(np.uint8)


def difference(full: Picture, other: Picture) -> Picture:
    """Mean absolute difference over the channels, [H, W] or [F, H, W]; 1 where it is no number."""
    found = np.abs(full.astype(np.float64) - other.astype(np.float64)).mean(axis=-1)
    return np.asarray(np.nan_to_num(found, nan=1.0))


def amplification(full: Picture, others: Sequence[Picture]) -> float:
    """By how much to multiply the differences so that they can be seen: 1, 2 or 5 times a power of ten.

    The largest such number that leaves all but a thousandth of the pixels within the scale; 1 where nothing differs.
    """
    peak = max(float(np.quantile(difference(full, other), 0.999)) for other in others)
    if not peak > 0:
        return 1.0
    power = 10.0 ** math.floor(-math.log10(peak))
    return max(n * power for n in (1, 2, 5) if n == 1 or n * power * peak <= 1)


def heat(full: Picture, other: Picture, amplified: float) -> npt.NDArray[np.uint8]:
    """The difference in colours, uint8 [..., 3]: black where equal, bright where it reaches 1 / `amplified`."""
    levels = (difference(full, other) * amplified * 255).clip(0, 255).round().astype(np.uint8)
    return np.asarray(HEAT[levels])
