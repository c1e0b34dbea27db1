"""One call of a pipeline, run in full and with one schedule after another, and how far the outputs lie apart."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dpcache.plan.schedule import Schedule
from dpcache.run.inputs import as_numbers, quiet, seeded
from dpcache.run.pipelines import enabled

Array = npt.NDArray[np.floating[Any]]
#: Relative errors below this are none: it keeps logarithms finite.
NO_ERROR = 1e-12


def relative_error(output: Array, full: Array) -> float:
    """RMS difference of an output from that of the full run, as a share of the latter."""
    return max(float(np.linalg.norm(output - full) / np.linalg.norm(full)), NO_ERROR)


def average_error(errors: Sequence[float]) -> float:
    """What several relative errors amount to: their mean. That of logarithms overlooks a few bad ones among many."""
    return float(np.mean(errors))


class Trial:
    """One call of a pipeline that returns latents.

    Args:
        pipeline: a diffusers pipeline, dpcache not enabled on it.
        arguments: of its call, the generator included.
    """

    def __init__(self, pipeline: Any, arguments: dict[str, Any]) -> None:
        self.pipeline, self.arguments = pipeline, arguments

    def run_in_full(self) -> None:
        """Once, before errors are asked for."""
        self.full = self._run()

    def error(self, schedule: Schedule) -> float:
        """RMS difference between what the schedule and the full run return, as a share of the latter."""
        with enabled(self.pipeline, schedule):
            return relative_error(self._run(), self.full)

    def _run(self) -> Array:
        with quiet(self.pipeline):
            return as_numbers(self.pipeline(**seeded(self.pipeline, self.arguments, 0)))
