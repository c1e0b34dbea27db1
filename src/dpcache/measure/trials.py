"""One call of a pipeline, run in full and with one schedule after another, and how far the outputs lie apart."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dpcache.plan.schedule import Schedule
from dpcache.run.boundary import Forms
from dpcache.run.entry import entered
from dpcache.run.follower import Follower, Following
from dpcache.run.inputs import as_numbers, quiet, seeded
from dpcache.run.loop import Branch, Call, Moved
from dpcache.run.packing import take_apart
from dpcache.run.pipelines import enabled
from dpcache.run.plans import OneSchedule
from dpcache.run.scope import Told

Array = npt.NDArray[np.float64]
#: Relative errors below this are none: it keeps logarithms finite.
NO_ERROR = 1e-12
#: The power in which errors of several outputs are averaged. The logarithm (power 0) overlooks a few bad outputs among
#: many good ones, the square sees nothing else.
AVERAGED_POWER = 0.5


def average_error(errors: Sequence[float]) -> float:
    """What several relative errors amount to: their mean in the power `AVERAGED_POWER`."""
    return float(np.mean(np.asarray(errors) ** AVERAGED_POWER) ** (1 / AVERAGED_POWER))


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
            difference = self._run() - self.full
        return max(float(np.linalg.norm(difference) / np.linalg.norm(self.full)), NO_ERROR)

    def responses(
        self, schedule: Schedule, variants: Sequence[tuple[int, Schedule]], on_run: Callable[[], object] = lambda: None
    ) -> tuple[Array, Array]:
        """What the schedule returns, and what variants of it do.

        Args:
            schedule: a schedule.
            variants: each a schedule with the same key steps, and the first step that it predicts differently. Before
                that step nothing is computed: the denoiser's outputs are remembered.
            on_run: called after every run.

        Returns:
            float64 [D], and [variants, D].
        """
        rerun = _Rerun(schedule)
        with entered(self.pipeline, schedule.boundary, rerun):
            output = self._run()
            on_run()
            others = []
            for start, variant in variants:
                rerun.follow(variant, start)
                others.append(self._run())
                on_run()
        return output, np.stack(others) if others else np.empty((0, output.size))

    def _run(self) -> Array:
        with quiet(self.pipeline):
            return as_numbers(self.pipeline(**seeded(self.pipeline, self.arguments, 0)))


class _Rerun:
    """Follows a schedule and remembers every call; then follows others that begin in the same way."""

    def __init__(self, schedule: Schedule) -> None:
        #: Calls before this step are answered from memory; None while remembering.
        self._start: int | None = None
        self._outputs: dict[tuple[int, Branch], _Kept] = {}
        self._values: dict[tuple[int, Branch], _Kept] = {}
        self._forms: Forms | None = None
        self.follow(schedule, None)

    def follow(self, schedule: Schedule, start: int | None) -> None:
        """The next runs follow this schedule; before the step, as remembered."""
        self._following = Following(OneSchedule(schedule))
        self._start = start

    def begin(self, pipeline: Any, tell: Told) -> "_Rerun":
        self._follower: Follower = self._following.begin(pipeline, tell)
        return self

    def located(self, scheduler: Any, size: int, start: int) -> None:
        self._follower.located(scheduler, size, start)

    def end_step(self, step: int, moved: Moved) -> None:
        self._follower.end_step(step, moved)

    def restart(self) -> None:
        self._follower.restart()

    def will_predict(self, step: int) -> bool:
        return False

    def end(self) -> None:
        self._follower.end()

    def call(self, call: Call) -> Any:
        key = call.step, call.branch
        if self._forms is None:
            self._forms = call.forms
        call.forms = self._forms  # what the first run returned gives the form of predictions in all of them
        if self._start is None:
            output = self._follower.call(_Remembering(call, self._values))
            self._outputs[key] = _Kept(output)
            return output
        if call.step < self._start:
            # The follower still sees the value at the boundary: it predicts later steps from it.
            return self._follower.call(_Remembered(call, self._outputs[key], self._values.get(key)))
        return self._follower.call(call)


class _Kept:
    """What was computed, in host memory: every reading gives a copy, for a pipeline may change what it gets."""

    def __init__(self, value: Any) -> None:
        tensors, self._build = take_apart(value)
        self._devices = [tensor.device for tensor in tensors]
        self._tensors = [tensor.detach().to("cpu", copy=True) for tensor in tensors]

    def copy(self) -> Any:
        pairs = zip(self._tensors, self._devices, strict=True)
        return self._build(iter([tensor.to(device, copy=True) for tensor, device in pairs]))


class _Remembering(Call):
    """A call whose value at the boundary is kept, where it is computed."""

    def __init__(self, call: Call, values: dict[tuple[int, Branch], _Kept]) -> None:
        super().__init__(**vars(call))
        self._known = values

    def full(self) -> tuple[Any, torch.Tensor]:
        output, value = super().full()
        self._known[self.step, self.branch] = _Kept(value)
        return output, value


class _Remembered(Call):
    """A call that was made before: nothing runs."""

    def __init__(self, call: Call, output: _Kept, value: _Kept | None) -> None:
        super().__init__(**vars(call))
        self._output, self._value = output, value

    def full(self) -> tuple[Any, torch.Tensor]:
        assert self._value is not None  # the same steps are key steps in every variant
        return self._output.copy(), self._value.copy()

    def predicted(self, value: torch.Tensor) -> Any:
        return self._output.copy()
