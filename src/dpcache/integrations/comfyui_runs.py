"""What is remembered in one sampling run of ComfyUI: cached values, or everything for a calibration."""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from dpcache.errors import CalibrationError
from dpcache.measure.recording import RecordedRun
from dpcache.plan.matching import part_by_levels
from dpcache.plan.schedule import Schedule
from dpcache.run.generation import Generation
from dpcache.run.loop import Branch

Chunk = tuple[Any, int]
Full = Callable[[], Any]


class Running(Protocol):
    """One sampling run."""

    def call(self, full: Full, x: torch.Tensor, sigma: float, options: dict[str, Any]) -> Any:
        """What the network makes of a batch of chunks, one for each condition.

        Args:
            full: computes it.
            x: [chunks x batch, ...], the noisy samples.
            sigma: their noise level.
            options: ComfyUI's `transformer_options`, which name the chunks.
        """


def warn_of_full_run(reason: str) -> None:
    """One text for one reason: Python's default filter shows it once."""
    warnings.warn(
        f"{reason}: every step is computed in full. Use the steps, scheduler and sampler of the calibration, or "
        "calibrate with these.",
        stacklevel=2,
    )


def part(schedule: Schedule, levels: Sequence[float]) -> Schedule | None:
    """What a run over these noise levels follows of a schedule; None if they are not among the planned ones.

    Args:
        schedule: what was planned.
        levels: as samplers have them, the last where the run ends.
    """
    if schedule.sigmas is None:
        return schedule if len(levels) - 1 == schedule.num_inference_steps else None
    return part_by_levels(schedule, levels)


def _step(levels: Sequence[float], sigma: float) -> int | None:
    """The step whose noise level this is; None if it lies between."""
    nearest = min(range(len(levels) - 1), key=lambda step: abs(levels[step] - sigma))
    return nearest if sigma > 0 and abs(levels[nearest] - sigma) <= 1e-5 * levels[nearest] else None


@dataclass
class _Evaluations:
    """Which calls belong together: chunks of batches that ComfyUI joins and splits as memory allows.

    A condition may be evaluated again in a step from the same sample, as some ways of guidance do; never from another.
    """

    step: int = -1
    _seen: dict[Any, torch.Tensor] = field(default_factory=dict)
    _count: Counter[Any] = field(default_factory=Counter)

    def chunks(self, step: int, x: torch.Tensor, options: dict[str, Any]) -> list[tuple[Chunk, torch.Tensor]] | None:
        """Name and sample of every chunk of a batch; None if the sampler does not take one step after another."""
        if step != self.step:
            if step < self.step:
                return None
            self.step = step
            self._seen.clear()
            self._count.clear()
        kinds = options.get("cond_or_uncond") or [0]
        conditions = list(zip(kinds, options.get("uuids") or [None] * len(kinds), strict=True))
        named = []
        for condition, sample in zip(conditions, x.chunk(len(conditions)), strict=True):
            before = self._seen.setdefault(condition, sample)
            if before is not sample and not torch.equal(before, sample):
                return None
            named.append(((condition, self._count[condition]), sample))
            self._count[condition] += 1
        return named


class Following:
    """One sampling run that follows a schedule: a `Generation` and what ComfyUI makes of its values."""

    def __init__(self, schedule: Schedule, levels: Sequence[float]) -> None:
        self._generation = Generation(schedule)
        self._levels = levels
        self._evaluations = _Evaluations()
        self._covered = True
        self._dtype = torch.float32

    def call(self, full: Full, x: torch.Tensor, sigma: float, options: dict[str, Any]) -> Any:
        step = _step(self._levels, sigma) if self._covered else None
        chunks = self._evaluations.chunks(step, x, options) if step is not None else None
        if step is None or chunks is None:
            self._give_up("the sampler evaluates between its noise levels, or twice at one")
            return full()
        predicted = [self._generation.predict(step, name, sample.shape) for name, sample in chunks]
        values = [value for value in predicted if value is not None]
        if len(values) == len(chunks):
            return (x - sigma * torch.cat(values)).to(self._dtype)
        denoised = full()
        if not isinstance(denoised, torch.Tensor) or denoised.shape != x.shape:
            self._give_up("the model returns something else than what it was given")
            return denoised
        self._dtype = denoised.dtype
        computed = ((x - denoised) / sigma).contiguous().chunk(len(chunks))
        handed_on = [
            self._generation.computed(step, name, value) for (name, _), value in zip(chunks, computed, strict=True)
        ]
        if all(value is own for value, own in zip(handed_on, computed, strict=True)):
            return denoised
        return (x - sigma * torch.cat(handed_on)).to(self._dtype)

    def _give_up(self, reason: str) -> None:
        self._generation.abandon()
        if self._covered:
            self._covered = False
            warn_of_full_run(reason)


class Recording:
    """One sampling run that is computed in full and remembered, in host memory."""

    def __init__(self, levels: Sequence[float]) -> None:
        steps = len(levels) - 1
        influence = {step: levels[step + 1] - levels[step] for step in range(steps)}
        self.run = RecordedRun(num_steps=steps, sigmas=tuple(levels), influence=influence)
        self._levels = levels
        self._evaluations = _Evaluations()
        self._branches: dict[Any, int] = {}

    def call(self, full: Full, x: torch.Tensor, sigma: float, options: dict[str, Any]) -> Any:
        step = _step(self._levels, sigma)
        chunks = self._evaluations.chunks(step, x, options) if step is not None else None
        if step is None or chunks is None:
            raise CalibrationError(
                "the sampler evaluates between its noise levels, or twice at one, so there is no value for every step: "
                "calibrate with a sampler of one evaluation a step, for example euler."
            )
        denoised = full()
        values = ((x - denoised) / sigma).float().cpu().chunk(len(chunks))
        for ((condition, number), _), value in zip(chunks, values, strict=True):
            context = str(self._branches.setdefault(condition, len(self._branches)))
            self.run.values.setdefault(Branch(context, number), {})[step] = value
        return denoised

    def guided(self, x: torch.Tensor, sigma: torch.Tensor, denoised: torch.Tensor) -> None:
        level = float(sigma.flatten()[0])
        step = _step(self._levels, level)
        if step is not None:
            self.run.received[step] = ((x - denoised) / level).float().flatten().cpu()
