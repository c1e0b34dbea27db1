"""Runs of one call with one schedule after another. What an earlier run has computed is not computed again.

Two schedules that do the same up to some step bring the sample to that step in the same state, bit for bit. So the
denoiser calls before it, and the call at it, are answered from memory. Run in the order of `turns`, schedules share
most, and the memory holds no more than the calls of one run.
"""

from collections.abc import Sequence
from typing import Any

import torch

from dpcache.errors import CalibrationError
from dpcache.plan.schedule import Schedule, Term
from dpcache.run.boundary import Forms
from dpcache.run.follower import Follower, Following
from dpcache.run.inputs import quiet, seeded
from dpcache.run.loop import Branch, Call, Moved
from dpcache.run.packing import take_apart
from dpcache.run.plans import OneSchedule
from dpcache.run.scope import Told

_Terms = tuple[tuple[int, float], ...]
Turns = tuple[tuple[bool, _Terms], ...]


def turns(schedule: Schedule) -> Turns:
    """What a schedule does at each step: whether it predicts, and the sum it predicts or corrects with."""
    keys = set(schedule.key_steps)
    corrections, predictions = schedule.corrections, schedule.predictions
    return tuple(
        (step not in keys, _plain(corrections.get(step, ()) if step in keys else predictions[step]))
        for step in range(schedule.num_inference_steps)
    )


def _plain(terms: Sequence[Term]) -> _Terms:
    return tuple((term.key_step, term.coefficient) for term in terms)


Spans = tuple[tuple[int, int], ...]
"""First and last step of every branch."""


def known_until(before: Schedule | None, after: Schedule, spans: Spans = ()) -> int:
    """So many first steps need no computing in a run that follows one with another schedule.

    Args:
        before: of the run before; None if there was none.
        after: of the run to come.
        spans: of the branches; from the first step to the last unless given. Where one begins late, predictions of it
            also depend on the schedule's order.
    """
    if before is None or before.num_inference_steps != after.num_inference_steps:
        return 0
    if begins_late(spans) and before.order != after.order:
        return 1
    for step, (one, other) in enumerate(zip(turns(before), turns(after), strict=True)):
        if one != other:
            # At a key step of both only what is handed on differs: what is computed there is the same.
            return step + (not one[0] and not other[0])
    return after.num_inference_steps


def steps_to_compute(before: Schedule | None, after: Schedule, spans: Spans = ()) -> int:
    """How many steps a run computes in full that follows one with another schedule. Arguments as `known_until`."""
    known = known_until(before, after, spans)
    computed = {
        start + key
        for start, end in spans or ((0, after.num_inference_steps - 1),)
        for key in after.from_step(start).key_steps
        if start + key <= end
    }
    return sum(step >= known for step in computed)


def begins_late(spans: Spans) -> bool:
    """Whether some branch begins after the first step."""
    return any(start > 0 for start, _ in spans)


class Sharing:
    """Watches a pipeline (see `entry.entered`) for one set of shared runs, or several in turn."""

    def __init__(self) -> None:
        self.current: SharedRuns | None = None

    def runs(self, pipeline: Any, arguments: dict[str, Any], spans: Spans = ()) -> "SharedRuns":
        """Those of one call. Arguments as `SharedRuns`."""
        return SharedRuns(self, pipeline, arguments, spans)

    def begin(self, pipeline: Any, tell: Told) -> "_Observer":
        """A sampling loop begins."""
        assert self.current is not None
        return self.current.begin(pipeline, tell)


class SharedRuns:
    """Runs of one call of a pipeline that share what they have in common.

    Args:
        sharing: watches the pipeline.
        pipeline: a diffusers pipeline.
        arguments: of its call, the generator included.
        spans: as in `known_until`.

    Attributes:
        computed: steps of the latest run that were computed, not remembered.
    """

    def __init__(self, sharing: Sharing, pipeline: Any, arguments: dict[str, Any], spans: Spans = ()) -> None:
        self._sharing = sharing
        self._pipeline, self._arguments, self._spans = pipeline, arguments, spans
        self._before: Schedule | None = None
        self._known: _Known = {}
        self._forms: Forms | None = None
        self._steps: set[int] = set()
        self._loops = 0
        self._wanted: int | None = None
        self._found: dict[int, torch.Tensor] | None = None

    def run(self, schedule: Schedule) -> Any:
        """What the pipeline returns when it follows the schedule."""
        until = known_until(self._before, schedule, self._spans)
        self._known = {place: kept for place, kept in self._known.items() if place[0] < until}
        self._before = None  # in case the run fails
        self._following = Following(OneSchedule(schedule))
        self._steps, self._loops = set(), 0
        self._sharing.current = self
        with quiet(self._pipeline):
            returned = self._pipeline(**seeded(self._pipeline, self._arguments, 0))
        self._before = schedule
        return returned

    def sample_at(self, step: int, schedule: Schedule) -> torch.Tensor:
        """The sample that a step starts from (T: the final one), float32 [D] in host memory; nothing is run beyond.

        Raises:
            CalibrationError: the scheduler's samples could not be seen.
        """
        found: dict[int, torch.Tensor] = {}
        self._wanted, self._found = step, found
        try:
            self.run(schedule)
        except _FarEnough:
            self._before = schedule
        finally:
            self._wanted, self._found = None, None
        if step not in found:
            raise CalibrationError(f"the sample at step {step} could not be seen.")
        return found[step]

    def samples(self, schedule: Schedule) -> dict[int, torch.Tensor]:
        """Likewise at every step, 1 to T, as far as they can be seen."""
        found: dict[int, torch.Tensor] = {}
        self._found = found
        try:
            self.run(schedule)
        finally:
            self._found = None
        return found

    def reached(self, step: int, moved: Moved) -> None:
        """A step of the loop has ended."""
        is_far_enough = self._wanted == step + 1
        if self._found is not None and moved.tensors is not None and (is_far_enough or self._wanted is None):
            self._found[step + 1] = moved.tensors[2].detach().float().flatten().to("cpu", copy=True)
        if is_far_enough:
            raise _FarEnough

    @property
    def computed(self) -> int:
        return len(self._steps)

    def begin(self, pipeline: Any, tell: Told) -> "_Observer":
        """A sampling loop begins. Of several in one call the first alone is remembered."""
        self._loops += 1
        return _Observer(self._following.begin(pipeline, tell), self if self._loops == 1 else None)

    def remembering(self, call: Call) -> Call:
        """The call, answered from memory if it was made before; else remembered."""
        if self._forms is None:
            self._forms = call.forms
        call.forms = self._forms  # what the first run returned gives the form of predictions in all of them
        return _Remembering(call, self._known, self._steps)


class _Observer:
    """Has a loop follow the schedule of the moment, with calls that are remembered."""

    def __init__(self, follower: Follower, runs: SharedRuns | None) -> None:
        self._follower, self._runs = follower, runs

    def call(self, call: Call) -> Any:
        return self._follower.call(self._runs.remembering(call) if self._runs else call)

    def located(self, scheduler: Any, size: int, start: int) -> None:
        self._follower.located(scheduler, size, start)

    def end_step(self, step: int, moved: Moved) -> None:
        self._follower.end_step(step, moved)
        if self._runs:
            self._runs.reached(step, moved)

    def restart(self) -> None:
        self._follower.restart()

    def will_predict(self, step: int) -> bool:
        return False  # what runs beside the denoiser runs at every step

    def end(self) -> None:
        self._follower.end()


class _FarEnough(BaseException):
    """Ends a run whose rest does not matter: no error, so that nobody takes it for one."""


class _Kept:
    """What was computed, in host memory: every reading gives a copy, for a pipeline may change what it gets."""

    def __init__(self, value: Any) -> None:
        tensors, self._build = take_apart(value)
        self._devices = [tensor.device for tensor in tensors]
        self._tensors = [tensor.detach().to("cpu", copy=True) for tensor in tensors]

    def copy(self) -> Any:
        pairs = zip(self._tensors, self._devices, strict=True)
        return self._build(iter([tensor.to(device, copy=True) for tensor, device in pairs]))


_Known = dict[tuple[int, Branch], tuple[_Kept, _Kept]]
"""Output and value at the boundary of calls that were computed, by step and branch."""


class _Remembering(Call):
    """A call that is computed once."""

    def __init__(self, call: Call, known: _Known, steps: set[int]) -> None:
        super().__init__(**vars(call))
        self._known, self._computed = known, steps

    def full(self) -> tuple[Any, torch.Tensor]:
        place = self.step, self.branch
        if place in self._known:
            output, value = self._known[place]
            return output.copy(), value.copy()
        found = super().full()
        self._known[place] = _Kept(found[0]), _Kept(found[1])
        self._computed.add(self.step)
        return found
