"""What a search makes least: how far outputs lie from those of the full runs, and what that amounts to over inputs."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from dpcache.checks import one_of
from dpcache.measure.trials import average_error, relative_error
from dpcache.run.inputs import as_numbers, as_pictures

Output = npt.NDArray[np.float32]
"""What is kept of a run: latents [D], or decoded pictures [N, H, W, C] in [0, 1] ([N, F, H, W, C] for clips)."""
Metric = Callable[[npt.NDArray[Any], npt.NDArray[Any]], float]
ObjectiveName = Literal["mean", "worst"]
#: Of the inputs, the share that `"worst"` looks at.
WORST_SHARE = 0.25


def worst_error(errors: Sequence[float]) -> float:
    """Mean of the worst quarter of them, of one at least."""
    count = math.ceil(WORST_SHARE * len(errors))
    return float(np.mean(sorted(errors)[-count:]))


class Objective:
    """The one or the other of what `optimize` takes as its objective.

    Attributes:
        name: what people call it.
        output_type: what the pipeline has to return.
        is_metric: whether outputs are pictures, which a metric compares.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a function.
    """

    def __init__(self, given: "ObjectiveName | Metric") -> None:
        self._metric = given if callable(given) else None
        if self._metric is None:
            one_of("objective", given, get_args(ObjectiveName))
        self.name = str(given if self._metric is None else getattr(given, "__qualname__", type(given).__name__))
        self.is_metric = self._metric is not None
        self.output_type = "np" if self.is_metric else "latent"

    def output(self, returned: Any) -> Output:
        """What is kept of what a pipeline returned."""
        found = as_pictures(returned) if self.is_metric else as_numbers(returned)
        return np.asarray(found, dtype=np.float32)

    def error(self, output: Output, full: Output) -> float:
        """How far an output lies from that of the full run: relative RMS difference, or what the metric says."""
        if self._metric is None:
            return relative_error(output, full)
        values = [float(self._metric(one, other)) for one, other in zip(output, full, strict=True)]
        found = float(np.mean(values))
        if not math.isfinite(found):
            raise ValueError(
                f"the objective {self.name} gave {found}: it must return a finite number, lower is better."
            )
        return found

    def average(self, errors: Sequence[float]) -> float:
        """What the errors of several inputs amount to."""
        is_worst = self.name == "worst" and not self.is_metric
        return worst_error(errors) if is_worst else average_error(errors)

    def shown(self, value: float) -> str:
        """A value for people."""
        return f"{value:.4g}" if self.is_metric else f"{value:.2%}"
