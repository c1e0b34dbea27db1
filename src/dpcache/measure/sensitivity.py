"""What an error at a step does to the final sample, measured: a recorded run is repeated with that one step predicted.

How far the scheduler moves on an error (`costs.step_influence`) is not all: the denoiser sees the moved sample at every
later step, and corrects the error or, early on, makes something else of it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dpcache.errors import CalibrationError
from dpcache.plan.predictors import Taylor
from dpcache.run.entry import entered
from dpcache.run.inputs import quiet
from dpcache.run.loop import Branch, Call, Moved
from dpcache.run.scope import Told

PROBES = 12
"""Steps at which to measure, at most; dense at the beginning, where most depends on the step."""
REACH = 3
"""The prediction put in at a step is from the values this many steps before it, and as many before that."""


def probe_steps(num_steps: int, probes: int = PROBES) -> list[int]:
    """The steps at which to measure, of T."""
    if num_steps < 2:
        return []
    return sorted({int(step) for step in np.geomspace(1, num_steps - 1, probes).round()})


def probing_calls(num_steps: int, probes: int = PROBES) -> int:
    """Steps computed in full to measure one input: one run, and from every probe to the end."""
    return num_steps + sum(num_steps - step - 1 for step in probe_steps(num_steps, probes))


def measure(
    pipeline: Any,
    arguments: Callable[[], dict[str, Any]],
    on_step: Callable[[], object] = lambda: None,
    *,
    probes: int = PROBES,
) -> dict[int, float]:
    """How far the final sample of one call moves, per unit of error in what the scheduler receives at a step.

    Args:
        pipeline: a diffusers pipeline.
        arguments: gives those of the call, the same at every time.
        on_step: called after every step computed in full.
        probes: steps at which to measure, at most.

    Returns:
        probed step -> RMS difference of the final sample / RMS error at the step; steps at which no error could be made
        are left out.

    Raises:
        CalibrationError: what the scheduler was given could not be seen.
    """
    prober = _Prober(on_step)
    found: dict[int, float] = {}
    with entered(pipeline, "output", prober), quiet(pipeline):
        pipeline(**arguments())
        if not prober.received:
            raise CalibrationError("what the scheduler was given at every step could not be seen.")
        truth = prober.sample
        for step in probe_steps(len(prober.received), probes):
            prober.probe, prober.error = step, 0.0
            pipeline(**arguments())
            if prober.error > 0:
                found[step] = float(torch.linalg.vector_norm(prober.sample - truth)) / prober.error
    return found


def ratios(measured: dict[int, float], influence: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """float64 [T]: how much farther the final sample moves than the step itself (see `costs.step_influence`) says.

    NaN at steps that were not probed.
    """
    found = np.full(len(influence), np.nan)
    for step, moved in measured.items():
        if influence[step]:
            found[step] = moved / abs(influence[step])
    return found


class _Prober:
    """Records one run; then repeats it up to the probed step, puts a prediction in there, and goes on in full."""

    def __init__(self, on_step: Callable[[], object]) -> None:
        self.on_step = on_step
        self.probe: int | None = None
        self.error = 0.0
        self.sample = torch.empty(0)
        self.received: dict[int, torch.Tensor] = {}
        self._values: dict[Branch, dict[int, torch.Tensor]] = {}

    def begin(self, pipeline: Any, tell: Told) -> "_Prober":
        return self

    def located(self, scheduler: Any, size: int, start: int) -> None:
        pass

    def call(self, call: Call) -> Any:
        values = self._values.setdefault(call.branch, {})
        if self.probe is None:
            output, value = call.full()
            # A copy: the pipeline may go on to change the tensor.
            values[call.step] = value.detach().clone()
            self._forms = call.forms
            return output
        # What the recorded run returned gives the form of predictions in all runs.
        call = replace(call, forms=self._forms)
        if call.step < self.probe and call.step in values:
            return call.predicted(values[call.step])
        earlier = [step for step in values if step < self.probe]
        if call.step == self.probe and earlier:
            keys = sorted({earlier[-min(reach, len(earlier))] for reach in (REACH, 2 * REACH)})
            weights = Taylor(1).coefficients(keys, [self.probe])[0]
            terms = [values[key] * float(weight) for key, weight in zip(keys, weights, strict=True)]
            return call.predicted(torch.stack(terms).sum(dim=0))
        return call.full()[0]

    def end_step(self, step: int, moved: Moved) -> None:
        if moved.tensors is None:
            return
        received, _, after = moved.tensors
        if self.probe is None:
            self.received[step] = received.detach().clone()
        elif step == self.probe:
            self.error = float(torch.linalg.vector_norm(received - self.received[step]))
        self.sample = after.detach().clone()
        if self.probe is None or step > self.probe:
            self.on_step()

    def restart(self) -> None:
        pass

    def will_predict(self, step: int) -> bool:
        return False

    def end(self) -> None:
        pass
