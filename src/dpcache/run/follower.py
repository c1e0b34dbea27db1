"""Between a sampling loop and its `Generation`: which schedule the loop follows, and what it came to."""

import threading
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from dpcache.errors import ScheduleMismatchError
from dpcache.plan.levels import noise_levels

from .denoisers import identify
from .generation import Generation
from .loop import Call, Moved
from .plans import Plans
from .scope import Told
from .stats import Stats


class Following:
    """What loops are to follow, and what came of it in all loops so far.

    Args:
        plans: what they follow.
        offload: keep cached values in host memory.
    """

    def __init__(self, plans: Plans, *, offload: bool = False) -> None:
        self.plans, self.offload = plans, offload
        self._lock = threading.Lock()
        self._total = Stats()
        self._live: list[Follower] = []
        self._latest: Follower | None = None

    def admit(self, denoisers: Sequence[nn.Module]) -> None:
        """Raises ScheduleMismatchError if what is followed was made for another model."""
        model, found = self.plans.model, identify(denoisers)
        if model is not None and not model.admits(found):
            raise ScheduleMismatchError(
                f"the schedule was made for {model.denoiser} (configuration {model.config}), the pipeline has "
                f"{found.denoiser} (configuration {found.config}): calibrate this model with dpcache.calibrate(pipe, "
                "inputs) and plan anew, or do without: dpcache.enable(pipe, num_key_steps=13)."
            )

    def begin(self, pipeline: Any, tell: Told) -> "Follower":
        """A sampling loop of this pipeline begins; `tell` warns, each text once."""
        scheduler = pipeline.scheduler
        # Read now, while the device has nothing to do, what is compared after the first step.
        wanted = self.plans.needs_levels and getattr(scheduler, "timesteps", None) is not None
        levels = noise_levels(scheduler) if wanted else None
        return self._begun(Follower(self, levels, tell, _steps_told(pipeline)))

    def begin_at(self, levels: Sequence[float] | None, size: int, tell: Told) -> "Follower":
        """A loop of one's own begins, of so many steps, with these noise levels if they are known."""
        follower = self._begun(Follower(self, levels, tell))
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
        schedule = self._following.plans.part(scheduler, self._levels, size, start, self._tell)
        if schedule is None:
            self.generation.abandon()
        else:
            self.generation.follow(schedule)

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


def _steps_told(pipeline: Any) -> list[int]:
    told = [getattr(one, "__dict__", {}).get("_num_timesteps") for one in (pipeline, *vars(pipeline).values())]
    return [steps for steps in told if isinstance(steps, int)]
