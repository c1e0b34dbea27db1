"""Records one pipeline call: the value at the boundary at every step, per branch. Changes nothing it watches."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from dpcache.errors import CalibrationError
from dpcache.plan.levels import noise_levels
from dpcache.plan.schedule import Boundary
from dpcache.run.entry import entered
from dpcache.run.inputs import quiet
from dpcache.run.loop import Branch, Call, Moved
from dpcache.run.pipelines import require_disabled
from dpcache.run.schedulers import step_influence
from dpcache.run.scope import Told
from dpcache.run.sums import keep

#: Columns of the values that are multiplied at a time.
_COLUMNS = 2**16


@dataclass
class RecordedRun:
    """What one call of a pipeline went through.

    Attributes:
        num_steps: T, the steps its sampling loop took.
        timesteps: float64 [T], the part of the scheduler's grid that the loop ran through.
        sigmas: float64 [T + 1], the noise level at every step and after the last (see `levels.noise_levels`); None
            where they are not known.
        values: per branch, the value at the boundary at every step it was called, step -> tensor in host memory.
        received: what the scheduler was given at every step, after guidance, step -> float32 [D] in host memory.
        influence: how far the scheduler moved the sample per unit of what it was given (see `costs.step_influence`).
        samples: where each step led, by the step that starts from it, 1 to T: float32 [D] in host memory; if asked for.
        output: what the pipeline returned.
    """

    num_steps: int = 0
    timesteps: tuple[float, ...] = ()
    sigmas: tuple[float, ...] | None = None
    values: dict[Branch, dict[int, torch.Tensor]] = field(default_factory=dict)
    received: dict[int, torch.Tensor] = field(default_factory=dict)
    influence: dict[int, float] = field(default_factory=dict)
    samples: dict[int, torch.Tensor] = field(default_factory=dict)
    output: Any = None
    _complete: list[torch.Tensor] | None = field(default=None, repr=False)

    def complete_branches(self) -> list[torch.Tensor]:
        """[T, ...] for every branch that was called at each of the T steps.

        Where a pipeline switches between denoisers, what each computed of a branch follows on what the last one did.
        """
        if self._complete is None:
            joined: dict[tuple[str, int], dict[int, tuple[Branch, torch.Tensor]]] = {}
            for branch, steps in self.values.items():
                of_branch = joined.setdefault((branch.context, branch.number), {})
                of_branch.update({step: (branch, value) for step, value in steps.items()})
            whole = [steps for steps in joined.values() if len(steps) == self.num_steps]
            self._complete = [
                self._stacked(steps) for steps in whole if len({value.shape for _, value in steps.values()}) == 1
            ]
        return self._complete

    def _stacked(self, steps: dict[int, tuple[Branch, torch.Tensor]]) -> torch.Tensor:
        """[T, ...]; the values become parts of it, so that they are held once."""
        stack = torch.stack([steps[t][1] for t in range(self.num_steps)])
        for t, (branch, _) in steps.items():
            self.values[branch][t] = stack[t]
        return stack

    def gram(self) -> torch.Tensor | None:
        """float64 [T, T]: mean product of what the scheduler received at every two steps; None if that is not known."""
        if len(self.received) < self.num_steps:
            return None
        return _products(torch.stack([self.received[t] for t in range(self.num_steps)]))

    def value_gram(self) -> torch.Tensor:
        """float64 [T, T]: mean product of the values at the boundary at every two steps, mean over whole branches."""
        return torch.stack([_products(values) for values in self.complete_branches()]).mean(dim=0)


def _products(values: torch.Tensor) -> torch.Tensor:
    flat = values.flatten(start_dim=1)
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for start in range(0, flat.shape[1], _COLUMNS):
        wide = flat[:, start : start + _COLUMNS].double()  # all of it would be large
        total.addmm_(wide, wide.T)
    return total / flat.shape[1]


def record(
    pipeline: Any,
    arguments: dict[str, Any],
    *,
    boundary: Boundary = "blocks",
    on_step: Callable[[int], object] = lambda step: None,
    samples: bool = False,
) -> RecordedRun:
    """Calls `pipeline(**arguments)` in full and records the value at the boundary at every step.

    Of several sampling loops in one call the longest is recorded, the first among equals.

    Args:
        pipeline: a diffusers pipeline.
        arguments: of its call.
        boundary: where to read the value.
        on_step: called with the step's index when a step has ended.
        samples: keep the samples too.

    Raises:
        CalibrationError: a value is NaN or infinite (the message names the step), or the call ran no sampling loop.
        CacheStateError: dpcache is enabled on the pipeline.
        UnsupportedPipelineError: the pipeline cannot be followed, or not at this boundary.
    """
    require_disabled(pipeline)
    recording = Recording(on_step, samples=samples)
    with entered(pipeline, boundary, recording), quiet(pipeline):
        output = pipeline(**arguments)
    run = recording.run()
    if run is None:
        raise CalibrationError(
            f"{type(pipeline).__name__} was called but its scheduler never took a step, so there is nothing to record: "
            "is the scheduler of this pipeline somewhere else, or does it step copies of it? For a loop of your own "
            "use `with dpcache.recording(denoiser):`."
        )
    run.output = output
    return run


class Recording:
    """Records the sampling loops of one call; keeps the longest."""

    def __init__(self, on_step: Callable[[int], object] = lambda step: None, *, samples: bool = False) -> None:
        self._on_step, self._samples = on_step, samples
        self._recorders: list[Recorder] = []

    def begin(self, pipeline: Any, tell: Told) -> "Recorder":
        """A sampling loop begins."""
        self._recorders = [*self._longest(), Recorder(self._on_step, samples=self._samples)]
        return self._recorders[-1]

    def run(self) -> RecordedRun | None:
        """What was recorded; None if no loop took a step.

        Raises:
            CalibrationError: a value is NaN or infinite.
        """
        found = self._longest()
        return found[0].finish() if found else None

    def _longest(self) -> "list[Recorder]":
        steps = max((recorder.run.num_steps for recorder in self._recorders), default=0)
        return [recorder for recorder in self._recorders if recorder.run.num_steps == steps > 0][:1]


class Recorder:
    """Records one loop: sends everything to host memory and looks at none of it, so that the loop waits for nothing."""

    def __init__(self, on_step: Callable[[int], object] = lambda step: None, *, samples: bool = False) -> None:
        self.run = RecordedRun()
        self._on_step, self._samples = on_step, samples
        self._grid: tuple[Any, int] | None = None
        self._finite: list[tuple[int, torch.Tensor]] = []
        self._post = _Post()

    def call(self, call: Call) -> Any:
        """Computes it, and keeps the value."""
        output, value = call.full()
        self._finite.append((call.step, torch.isfinite(value).all()))
        values = self.run.values.setdefault(call.branch, {})
        self._post.send(call.step, [value], lambda host: values.__setitem__(call.step, host))
        return output

    def located(self, scheduler: Any, size: int, start: int) -> None:
        """Remembers the grid as it is now: the pipeline may set another one before it returns."""
        self._grid = copy.copy(scheduler), start

    def end_step(self, step: int, moved: Moved) -> None:
        """Keeps what the scheduler did."""
        is_new, self.run.num_steps = step + 1 > self.run.num_steps, max(step + 1, self.run.num_steps)
        if moved.tensors is not None:
            self._post.send(step, moved.tensors, partial(self._stepped, step))
        self._post.deliver(before=step)
        if is_new:
            self._on_step(step)

    def _stepped(self, step: int, given: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> None:
        self.run.received[step] = given.float().flatten()
        self.run.influence[step] = step_influence(given, before, after)
        if self._samples:
            self.run.samples[step + 1] = after.float().flatten()

    def restart(self) -> None:
        """Of no account: nothing is predicted."""

    def will_predict(self, step: int) -> bool:
        return False

    def end(self) -> None:
        """Of no account."""

    def finish(self) -> RecordedRun:
        """Waits for what is under way; returns it all.

        Raises:
            CalibrationError: a value is NaN or infinite.
        """
        self._post.deliver()
        for step, finite in self._finite:
            if not bool(finite):
                raise CalibrationError(
                    f"the denoiser's value at step {step} is NaN or infinite: the model overflows before any caching. "
                    "Load it in torch.bfloat16 or torch.float32, and check that the call works without dpcache."
                )
        if self._grid is not None:
            scheduler, start = self._grid
            self.run.timesteps = tuple(scheduler.timesteps[start:][: self.run.num_steps].tolist())
            levels = noise_levels(scheduler, start)
            self.run.sigmas = levels and levels[: self.run.num_steps + 1]
        return self.run


class _Post:
    """Copies to host memory. Those from a GPU are waited for a step later, when they have long arrived."""

    def __init__(self) -> None:
        self._under_way: list[tuple[int, torch.cuda.Event, list[torch.Tensor], Callable[..., object]]] = []

    def send(self, step: int, tensors: Sequence[torch.Tensor], arrived: Callable[..., object]) -> None:
        """Calls `arrived` with copies of the tensors, sooner or later. Copies even on the CPU: tensors may change."""
        copies = [keep(tensor, offload=True) for tensor in tensors]
        if not any(tensor.is_cuda for tensor in tensors):
            arrived(*copies)
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(tensors[0].device))
        self._under_way.append((step, event, copies, arrived))

    def deliver(self, before: int | None = None) -> None:
        """Waits for what was sent in steps before this one; for everything, if not given."""
        while self._under_way and (before is None or self._under_way[0][0] < before):
            _, event, copies, arrived = self._under_way.pop(0)
            event.synchronize()
            # Out of the pinned memory, which the next copies use again.
            arrived(*(copy.clone() for copy in copies))
