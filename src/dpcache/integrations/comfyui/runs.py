"""What is remembered in one sampling run of ComfyUI: cached values, or everything for a calibration."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from dpcache.errors import CalibrationError
from dpcache.measure.recording import RecordedRun
from dpcache.plan.schedule import Schedule
from dpcache.run.generation import Generation
from dpcache.run.loop import Branch

from .rehearsal import step_of

Chunk = tuple[Any, int]
Full = Callable[[], Any]
#: What is said where one condition comes with several samples in one step, as in tiled diffusion.
_SEVERAL_SAMPLES = (
    "a condition is evaluated on several samples in one step (tiles, or context windows that are not ComfyUI's own), "
    "and nothing tells which follows which"
)


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

    def guided(self, x: torch.Tensor, sigma: torch.Tensor, denoised: torch.Tensor) -> None:
        """What the sampler is given in a step, guidance included."""


class Calls:
    """The calls of the network in one step.

    ComfyUI joins conditions to batches, and splits them, as memory allows. A condition may be evaluated again from the
    same sample, as some ways of guidance do; from another only in another context window.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self._seen: dict[Any, torch.Tensor] = {}
        self._count: Counter[Any] = Counter()

    def chunks(self, x: torch.Tensor, options: dict[str, Any]) -> list[tuple[Chunk, torch.Tensor]] | None:
        """Name and sample of every chunk of a batch; None if one condition comes with several samples."""
        kinds = options.get("cond_or_uncond") or [0]
        frames = tuple(getattr(options.get("context_window"), "index_list", ()))
        uuids = options.get("uuids") or [None] * len(kinds)
        conditions = [(kind, uuid, frames) for kind, uuid in zip(kinds, uuids, strict=True)]
        named = []
        for condition, sample in zip(conditions, x.chunk(len(conditions)), strict=True):
            before = self._seen.setdefault(condition, sample)
            if before is not sample and not torch.equal(before, sample):
                return None
            named.append(((condition, self._count[condition]), sample))
            self._count[condition] += 1
        return named


class Following:
    """One sampling run that follows a schedule: a `Generation` and what ComfyUI makes of its values.

    Args:
        schedule: for the run's steps.
        levels: the noise level of every step, and where the last one ends.
        tell: says why the run is computed in full from here on.

    Attributes:
        seen_steps: those in which the model was called.
        computed_steps: those in which its network ran.
    """

    def __init__(self, schedule: Schedule, levels: Sequence[float], tell: Callable[[str], None]) -> None:
        self._generation = Generation(schedule)
        self._levels = levels
        self._tell = tell
        self._calls = Calls(-1)
        self._covered = True
        self._dtype = torch.float32
        self.seen_steps: set[int] = set()
        self.computed_steps: set[int] = set()

    def call(self, full: Full, x: torch.Tensor, sigma: float, options: dict[str, Any]) -> Any:
        step = step_of(self._levels, sigma)
        if step is None:  # a call that is none of the sampler's
            return full()
        chunks = self._chunks(step, x, options) if self._covered else None
        self.seen_steps.add(step)
        if chunks is None:
            self.computed_steps.add(step)
            return full()
        predicted = [self._generation.predict(step, name, sample.shape) for name, sample in chunks]
        values = [value for value in predicted if value is not None]
        if len(values) == len(chunks):
            return (x - sigma * torch.cat(values)).to(self._dtype)
        self.computed_steps.add(step)
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

    def guided(self, x: torch.Tensor, sigma: torch.Tensor, denoised: torch.Tensor) -> None:
        """Nothing of it is needed."""

    def _chunks(self, step: int, x: torch.Tensor, options: dict[str, Any]) -> list[tuple[Chunk, torch.Tensor]] | None:
        if step != self._calls.step:
            if step < self._calls.step:
                self._give_up("the sampler goes back to an earlier noise level")
                return None
            self._calls = Calls(step)
        chunks = self._calls.chunks(x, options)
        if chunks is None:
            self._give_up(_SEVERAL_SAMPLES)
        return chunks

    def _give_up(self, reason: str) -> None:
        self._generation.abandon()
        self._covered = False
        self._tell(f"every step from step {self._calls.step} on is computed in full: {reason}.")


class Recording:
    """One sampling run that is computed in full and remembered, in host memory.

    Args:
        levels: the noise level of every step, and where the last one ends.
    """

    def __init__(self, levels: Sequence[float]) -> None:
        steps = len(levels) - 1
        influence = {step: levels[step + 1] - levels[step] for step in range(steps)}
        self.run = RecordedRun(num_steps=steps, sigmas=tuple(levels), influence=influence)
        self._levels = levels
        self._calls = Calls(-1)
        self._branches: dict[Any, int] = {}

    def call(self, full: Full, x: torch.Tensor, sigma: float, options: dict[str, Any]) -> Any:
        step = step_of(self._levels, sigma)
        if step is None:  # a call that is none of the sampler's
            return full()
        if step != self._calls.step:
            self._calls = Calls(step)
        chunks = self._calls.chunks(x, options)
        if chunks is None:
            raise CalibrationError(f"{_SEVERAL_SAMPLES}: calibrate without.")
        denoised = full()
        values = ((x - denoised) / sigma).float().cpu().chunk(len(chunks))
        for ((condition, number), _), value in zip(chunks, values, strict=True):
            context = str(self._branches.setdefault(condition, len(self._branches)))
            self.run.values.setdefault(Branch(context, number), {})[step] = value
        return denoised

    def guided(self, x: torch.Tensor, sigma: torch.Tensor, denoised: torch.Tensor) -> None:
        level = float(sigma.flatten()[0])
        step = step_of(self._levels, level)
        if step is None:
            return
        received = ((x - denoised) / level).float().flatten().cpu()
        if not bool(received.isfinite().all()):
            raise CalibrationError(
                f"the model's output at step {step} is NaN or infinite: check that the workflow works without DPCache "
                "Calibrate."
            )
        self.run.received[step] = received
