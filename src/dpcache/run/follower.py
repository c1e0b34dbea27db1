"""Between a sampling loop and its `Generation`: which part of the schedule the loop follows, and what it came to."""

import os
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dpcache.errors import DPCacheError, ScheduleMismatchError
from dpcache.plan.matching import part_by_levels, part_by_number
from dpcache.plan.schedule import Schedule

from .adaptive import LEAST_INPUTS, Comparison, Guide, OnDrift
from .denoisers import identify
from .generation import Generation
from .loop import Call, Moved
from .plans import Calibrated, Plans
from .schedulers import noise_levels
from .scope import Told
from .stats import Stats

Source = Schedule | Calibrated | str | os.PathLike[str]
"""What a loop can follow: a schedule, a calibration that plans, or the path of a schedule's file."""


class Following:
    """What `enable` was told, and what came of it in all loops since.

    Arguments and errors as `dpcache.enable`.

    Attributes:
        schedule: the schedule; that for the calibration's own grid, if a calibration is given.
    """

    def __init__(
        self, source: Source, *, offload: bool, adaptive: bool, on_drift: OnDrift | None, planning: dict[str, Any]
    ) -> None:
        planning = {name: value for name, value in planning.items() if value is not None}
        if isinstance(source, str | os.PathLike):
            source = Schedule.load(Path(source))
        self._plans: Plans | None = None
        self._on_drift: OnDrift = "ignore"
        if isinstance(source, Schedule):
            asked = [*planning, *(["adaptive"] if adaptive else []), *(["on_drift"] if on_drift else [])]
            if asked:
                what = ", ".join(asked)
                raise TypeError(f"a schedule is planned already: {what} can be given with a calibration only.")
            self.schedule = source
        elif isinstance(source, Calibrated):
            self._on_drift = on_drift or ("warn" if len(source.value_gram) >= LEAST_INPUTS else "ignore")
            self._plans = Plans(source, planning, adaptive=adaptive, watched=self._on_drift != "ignore")
            self.schedule, _ = self._plans.own
        else:
            raise TypeError(
                f"give a schedule, a calibration or the path of a schedule's file, got {type(source).__name__}."
            )
        self.offload = offload
        self._lock = threading.Lock()
        self._total = Stats()
        self._live: list[Follower] = []
        self._latest: Follower | None = None

    def admit(self, denoisers: Sequence[nn.Module]) -> None:
        """Raises ScheduleMismatchError if the schedule was made for another model."""
        model, found = self.schedule.model, identify(denoisers)
        if model is not None and not model.admits(found):
            raise ScheduleMismatchError(
                f"the schedule was made for {model.denoiser} (configuration {model.config}), the pipeline has "
                f"{found.denoiser} (configuration {found.config}): calibrate this model with dpcache.calibrate(pipe, "
                "inputs) and plan anew."
            )

    def begin(self, pipeline: Any, tell: Told) -> "Follower":
        """A sampling loop of this pipeline begins; `tell` warns, each text once."""
        scheduler = pipeline.scheduler
        # Read now, while the device has nothing to do, what is compared after the first step.
        knows = self._plans is not None or self.schedule.sigmas is not None
        levels = noise_levels(scheduler) if knows and getattr(scheduler, "timesteps", None) is not None else None
        return self._begun(Follower(self, levels, tell, _steps_told(pipeline)))

    def begin_at(self, levels: Sequence[float] | None, tell: Told) -> "Follower":
        """A loop of one's own begins, with these noise levels if they are known."""
        follower = self._begun(Follower(self, levels, tell))
        size = len(levels) - 1 if levels is not None else self.schedule.num_inference_steps
        follower.located(None, size, 0)
        return follower

    def _begun(self, follower: "Follower") -> "Follower":
        """Counts a loop."""
        with self._lock:
            self._total.generations += 1
            self._live.append(follower)
            self._latest = follower
        return follower

    def ended(self, follower: "Follower") -> None:
        """Adds up what happened in a loop."""
        with self._lock:
            if follower in self._live:
                self._live.remove(follower)
                self._add(self._total, follower)

    def part(
        self, scheduler: Any, levels: Sequence[float] | None, size: int, start: int, tell: Told
    ) -> tuple[Schedule, Guide | None] | None:
        """What a loop follows from this step of a grid of this size on; None, and a word to the user, if nothing."""
        left = levels[start:] if levels is not None else None
        if self._plans is not None:
            try:
                return self._plans.on(scheduler, left, start)
            except DPCacheError as error:
                tell(f"every step is computed in full: {error}")
                return None
        schedule = self.schedule
        if schedule.sigmas is not None and left is not None:
            part = part_by_levels(schedule, left)
            if part is not None:
                return part, None
        part = part_by_number(schedule, size, start)
        expected = schedule.num_inference_steps
        if part is None:
            tell(
                f"the schedule covers {expected} steps but the pipeline was called for {size - start}: every step is "
                f"computed in full. Call the pipeline with num_inference_steps={expected}, or calibrate and plan for "
                f"{size - start} steps."
            )
            return None
        if schedule.sigmas is not None and left is not None:
            tell(
                f"the schedule was planned for noise levels {_shown(schedule.sigmas)}, this call has {_shown(left)} "
                "(another shift, size or kind of sigmas): its key steps are followed by their number, and may be badly "
                "placed. Give dpcache.enable a calibration, which plans for every call, or calibrate with these.",
                "levels",
            )
        return part, None

    def comparison(self, guide: Guide | None) -> Comparison | None:
        """What watches the key steps of a loop with this guide."""
        return Comparison(guide, self._on_drift) if guide is not None else None

    def stats(self) -> Stats:
        """What happened so far."""
        with self._lock:
            found = Stats(**vars(self._total))
            for follower in self._live:
                self._add(found, follower)
                found.cached_values += follower.generation.held_values
                found.cached_bytes += follower.generation.held_bytes
            if self._latest is not None:
                found.computed_steps = self._latest.generation.computed_steps
                found.predicted_steps = self._latest.generation.predicted_steps
                if (comparison := self._latest.comparison) is not None:
                    found.drift, found.decisions = comparison.drift, tuple(comparison.decisions)
        return found

    @staticmethod
    def _add(stats: Stats, follower: "Follower") -> None:
        generation = follower.generation
        stats.full_calls += generation.full_calls
        stats.predicted_calls += generation.predicted_calls
        stats.peak_cached_bytes = max(stats.peak_cached_bytes, generation.peak_bytes)


class Follower:
    """Has one sampling loop follow a schedule: the loop's observer.

    Args:
        following: what it was told.
        levels: the sampler's noise levels, where they are known.
        tell: warns, each text once.
        steps_told: how many steps the pipeline, or one it is made of, says it takes. Some leave out the last of the
            grid.
    """

    def __init__(
        self, following: Following, levels: Sequence[float] | None, tell: Told, steps_told: Collection[int] = ()
    ) -> None:
        self._following, self._levels, self._tell, self._steps_told = following, levels, tell, steps_told
        self.comparison: Comparison | None = None
        self.generation = Generation(None, offload=following.offload)

    def call(self, call: Call) -> Any:
        """The loop of the method, as seen from inside one denoiser call."""
        predicted = self.generation.predict(call.step, call.branch, call.shape)
        if predicted is not None:
            return call.predicted(predicted)
        output, value = call.full()
        handed_on = self.generation.computed(call.step, call.branch, value)
        return output if handed_on is value else call.predicted(handed_on)

    def located(self, scheduler: Any, size: int, start: int) -> None:
        """Where on the sampler's grid the loop runs is known."""
        if size - start not in self._steps_told and size - start - 1 in self._steps_told:
            size -= 1
        found = self._following.part(scheduler, self._levels, size, start, self._tell)
        if found is None:
            self.generation.abandon()
            return
        schedule, guide = found
        self.comparison = self._following.comparison(guide)
        self.generation.follow(schedule, self.comparison)

    def end_step(self, step: int, moved: Moved) -> None:
        """Drops what no later step needs."""
        self.generation.end_step(step)

    def restart(self) -> None:
        """What was computed so far predicts nothing of what comes."""
        self.generation.restart()

    def will_predict(self, step: int) -> bool:
        """Whether the step is skipped."""
        return self.generation.will_predict(step)

    def end(self) -> None:
        """The loop is over."""
        self.generation.close()
        self._following.ended(self)
        if self.comparison is not None and (warning := self.comparison.warning()) is not None:
            self._tell(warning, "drift")


def _steps_told(pipeline: Any) -> list[int]:
    told = [getattr(one, "__dict__", {}).get("_num_timesteps") for one in (pipeline, *vars(pipeline).values())]
    return [steps for steps in told if isinstance(steps, int)]


def _shown(levels: Sequence[float]) -> str:
    """The first few and the last of many noise levels."""
    first = ", ".join(f"{level:.4g}" for level in levels[:3])
    return f"{first}, ..., {levels[-2]:.4g}"
