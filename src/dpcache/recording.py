"""Records one pipeline call: the value at the boundary at every step, per branch. Changes nothing it watches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .cache import require_disabled
from .costs import step_influence
from .errors import CalibrationError
from .schedule import Boundary
from .schedulers import noise_levels
from .watch import Branch, Call, Grid, Moved, Watch


@dataclass
class RecordedRun:
    """What one call of a pipeline went through.

    Attributes:
        num_steps: T, the steps its sampling loop took.
        timesteps: float64 [T], the part of the scheduler's grid that the loop ran through.
        sigmas: float64 [T + 1], the noise level at every step and after the last (see `schedulers.noise_levels`); None
            where they are not known.
        values: per branch, the value at the boundary at every step it was called, step -> tensor in host memory.
        received: what the scheduler was given at every step, after guidance, step -> float32 [D] in host memory.
        influence: how far the scheduler moved the sample per unit of what it was given (see `costs.step_influence`).
        output: what the pipeline returned.
    """

    num_steps: int = 0
    timesteps: tuple[float, ...] = ()
    sigmas: tuple[float, ...] | None = None
    values: dict[Branch, dict[int, torch.Tensor]] = field(default_factory=dict)
    received: dict[int, torch.Tensor] = field(default_factory=dict)
    influence: dict[int, float] = field(default_factory=dict)
    output: Any = None

    def complete_branches(self) -> list[torch.Tensor]:
        """[T, ...] for every branch that was called at each of the T steps.

        Where a pipeline switches between denoisers, what each computed of a branch follows on what the last one did.
        """
        joined: dict[tuple[str, int], dict[int, torch.Tensor]] = {}
        for branch, steps in self.values.items():
            joined.setdefault((branch.context, branch.number), {}).update(steps)
        return [
            torch.stack([steps[t] for t in range(self.num_steps)])
            for steps in joined.values()
            if len(steps) == self.num_steps and len({value.shape for value in steps.values()}) == 1
        ]

    def gram(self) -> torch.Tensor | None:
        """float64 [T, T]: mean product of what the scheduler received at every two steps; None if that is not known."""
        if len(self.received) < self.num_steps:
            return None
        return _products(torch.stack([self.received[t] for t in range(self.num_steps)]))

    def value_gram(self) -> torch.Tensor:
        """float64 [T, T]: mean product of the values at the boundary at every two steps, mean over whole branches."""
        return torch.stack([_products(values) for values in self.complete_branches()]).mean(dim=0)


def _products(values: torch.Tensor) -> torch.Tensor:
    flat = values.flatten(start_dim=1).double()
    return flat @ flat.T / flat.shape[1]


def record(
    pipeline: Any,
    arguments: dict[str, Any],
    *,
    boundary: Boundary = "blocks",
    on_step: Callable[[int], object] = lambda step: None,
) -> RecordedRun:
    """Calls `pipeline(**arguments)` in full and records the value at the boundary at every step.

    Args:
        pipeline: a diffusers pipeline.
        arguments: of its call.
        boundary: where to read the value.
        on_step: called with the step's index when a step has ended.

    Raises:
        CalibrationError: a value is NaN or infinite (the message names the step), or the call ran no sampling loop.
        CacheStateError: dpcache is enabled on the pipeline.
        UnsupportedPipelineError: the pipeline cannot be followed, or not at this boundary.
    """
    require_disabled(pipeline)
    recorder = _Recorder(on_step)
    watch = Watch(pipeline, boundary, recorder)
    try:
        with quiet(pipeline):
            recorder.run.output = pipeline(**arguments)
    finally:
        watch.close()
    run = recorder.run
    if not run.num_steps:
        raise CalibrationError(
            f"{type(pipeline).__name__} was called but its scheduler never took a step, so there is nothing to record: "
            "is the scheduler of this pipeline somewhere else, or does it step copies of it?"
        )
    run.timesteps = tuple(float(t) for t in watch.scheduler.timesteps[recorder.start :][: run.num_steps])
    levels = noise_levels(watch.scheduler, recorder.start)
    run.sigmas = levels and levels[: run.num_steps + 1]
    return run


class _Recorder:
    def __init__(self, on_step: Callable[[int], object]) -> None:
        self.run = RecordedRun()
        self.start = 0
        self.on_step = on_step

    def begin(self) -> None:
        self.run.num_steps = 0
        for recorded in (self.run.values, self.run.received, self.run.influence):
            recorded.clear()

    def call(self, call: Call) -> Any:
        output, value = call.full()
        if not bool(torch.isfinite(value).all()):
            raise CalibrationError(
                f"the denoiser's value at step {call.step} is NaN or infinite: the model overflows before any caching. "
                "Load it in torch.bfloat16 or torch.float32, and check that the call works without dpcache."
            )
        # A copy even on the CPU: the pipeline may go on to change the tensor.
        host = value.detach().to("cpu", copy=True)
        self.run.values.setdefault(call.branch, {})[call.step] = host
        return output

    def located(self, grid: Grid) -> None:
        self.start = grid.start

    def end_step(self, step: int, moved: Moved) -> None:
        self.run.num_steps = step + 1
        given, before, after = moved.received, moved.before, moved.after
        seen = all(isinstance(tensor, torch.Tensor) for tensor in (given, before, after))
        if seen and given.shape == before.shape == after.shape:
            self.run.received[step] = given.detach().to("cpu", torch.float32, copy=True).flatten()
            self.run.influence[step] = step_influence(given, before, after)
        self.on_step(step)

    def end(self) -> None:
        pass


@contextmanager
def quiet(pipeline: Any) -> Iterator[None]:
    """Keeps the pipeline's own progress bar silent, and leaves its settings as they were."""
    missing = object()
    before = vars(pipeline).get("_progress_bar_config", missing)
    pipeline.set_progress_bar_config(**{**(before if isinstance(before, dict) else {}), "disable": True})
    try:
        yield
    finally:
        if before is missing:
            del pipeline._progress_bar_config
        else:
            pipeline._progress_bar_config = before
