"""What a loop may follow: one schedule, plans from a calibration, or smooth curves where nothing was measured.

Each says, when a loop's place on its sampler's grid is known, which schedule the loop follows from there.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from dpcache.checks import number, whole
from dpcache.errors import DPCacheError, GridError
from dpcache.plan.corrections import corrected_by_levels
from dpcache.plan.curves import key_steps_for
from dpcache.plan.grids import NoiseGrid
from dpcache.plan.matching import part_by_levels, part_by_number
from dpcache.plan.recipe import Recipe
from dpcache.plan.schedule import Boundary, ModelIdentity, Schedule

from .schedulers import noise_grid, prediction_type

Key = TypeVar("Key")
#: So many schedules are remembered: a server may see a thousand resolutions.
_KEPT = 64

Array = npt.NDArray[np.float64]


class Tell(Protocol):
    """Warns, each text once; or once of a kind."""

    def __call__(self, text: str, kind: str = "") -> None: ...


class Facts(Protocol):
    """What is known of the grid that was calibrated on."""

    @property
    def num_inference_steps(self) -> int: ...
    @property
    def scheduler(self) -> str: ...


@runtime_checkable
class Calibrated(Protocol):
    """What plans are made from: a `dpcache.Calibration`, as far as it is needed here."""

    @property
    def facts(self) -> Facts: ...
    @property
    def grid(self) -> NoiseGrid | None: ...
    def on_grid(
        self,
        num_inference_steps: int | None = None,
        *,
        sigmas: Sequence[float] | None = None,
        scheduler: Any = None,
    ) -> "Calibrated": ...
    def plan(
        self,
        num_key_steps: int | None = ...,
        *,
        speedup: float | None = ...,
        max_error: float | None = ...,
        recipe: Recipe = ...,
    ) -> Schedule: ...


Source = Schedule | Calibrated | str | os.PathLike[str] | None
"""What a user can give to be followed: a schedule, a calibration, the path of a schedule's file, or nothing."""


class Plans(Protocol):
    """What a loop may follow.

    Attributes:
        boundary: where values are read.
        model: the model it was made for; None admits any.
        num_inference_steps: T of a loop whose length is not known otherwise; None where nothing says.
        needs_levels: whether the loop's noise levels matter.
    """

    @property
    def boundary(self) -> Boundary: ...
    @property
    def model(self) -> ModelIdentity | None: ...
    @property
    def num_inference_steps(self) -> int | None: ...
    @property
    def needs_levels(self) -> bool: ...
    def part(
        self, scheduler: Any, levels: Sequence[float] | None, size: int, start: int, tell: Tell
    ) -> Schedule | None:
        """The schedule of a loop; None, and a word to the user, if it has to be computed in full.

        Args:
            scheduler: steps the loop; None for a loop of one's own.
            levels: the noise levels of its grid, T of them and where the last step ends; None where not known.
            size: T of the grid.
            start: the step of the grid that the loop begins with.
            tell: warns, each text once.
        """


def plans_for(source: Source, **planning: Any) -> Plans:
    """What is followed, given what a user gave.

    Args:
        source: a schedule, a calibration, a path, or None.
        planning: num_key_steps, speedup, max_error, recipe; None where not given.

    Raises:
        TypeError: something else was given, or planning that does not go with it.
        ValueError, CalibrationError, InfeasibleBudgetError: planning that is out of range.
        FileNotFoundError, FileFormatError: as `Schedule.load`.
    """
    given = {name: value for name, value in planning.items() if value is not None}
    if isinstance(source, str | os.PathLike):
        source = Schedule.load(Path(source))
    if isinstance(source, Schedule):
        if given:
            what = ", ".join(given)
            raise TypeError(
                f"a schedule is planned already: {what} can be given with a calibration, or without either."
            )
        return OneSchedule(source)
    if isinstance(source, Calibrated):
        return CalibratedPlans(source, given)
    if source is not None:
        raise TypeError(
            f"give a schedule, a calibration, the path of a schedule's file, or only num_key_steps, got "
            f"{type(source).__name__}."
        )
    if only := [name for name in ("max_error", "recipe") if name in given]:
        raise TypeError(f"{', '.join(only)} can be given with a calibration only: make one with dpcache.calibrate.")
    return Curves(**given)


class OneSchedule:
    """One schedule for every loop that it fits."""

    needs_levels: bool

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self.boundary, self.model = schedule.boundary, schedule.model
        self.num_inference_steps: int | None = schedule.num_inference_steps
        self.needs_levels = schedule.sigmas is not None

    def part(
        self, scheduler: Any, levels: Sequence[float] | None, size: int, start: int, tell: Tell
    ) -> Schedule | None:
        """As `Plans.part`: by noise levels where both are known, else by their number."""
        schedule = self._schedule
        left = levels[start:] if levels is not None else None
        if schedule.sigmas is not None and left is not None:
            part = part_by_levels(schedule, left)
            if part is not None:
                return part
        part = part_by_number(schedule, size, start)
        expected = schedule.num_inference_steps
        if part is None:
            tell(
                f"the schedule covers {expected} steps but the pipeline was called for {size - start}: every step is "
                f"computed in full. Call the pipeline with num_inference_steps={expected}, or give dpcache.enable "
                f"num_key_steps instead of a schedule, or calibrate and plan for {size - start} steps."
            )
            return None
        if schedule.sigmas is not None and left is not None:
            tell(
                f"the schedule was planned for noise levels {_shown(schedule.sigmas)}, this call has {_shown(left)} "
                "(another shift, size or kind of sigmas): its key steps are followed by their number, and may be badly "
                "placed. Give dpcache.enable a calibration, which plans for every call, or calibrate with these.",
                "levels",
            )
        return part


class Curves:
    """Smooth curves of key steps, for a loop of any length (see `Schedule.smooth`).

    Args:
        num_key_steps: K; a loop with no more steps is computed in full.
        speedup: T / K instead.
        boundary: what to cache and predict. The denoiser's output is to be had of every model, and takes least memory.

    Raises:
        TypeError, ValueError: not exactly one of number and speedup, or one out of range.
    """

    model: ModelIdentity | None = None
    num_inference_steps: int | None = None
    needs_levels = True

    def __init__(
        self, num_key_steps: int | None = None, speedup: float | None = None, boundary: Boundary = "output"
    ) -> None:
        if (num_key_steps is None) == (speedup is None):
            raise TypeError(
                "say what to follow: num_key_steps=13 computes 13 steps of every call in full, speedup=3.5 one step of "
                "3.5; or give a schedule or a calibration."
            )
        self._num_key_steps = whole("num_key_steps", num_key_steps, 1) if num_key_steps is not None else None
        self._speedup = number("speedup", speedup, 1) if speedup is not None else None
        self.boundary: Boundary = boundary
        self._known = _Remembered[tuple[str, int, tuple[float, ...]]]()

    def part(self, scheduler: Any, levels: Sequence[float] | None, size: int, start: int, tell: Tell) -> Schedule:
        """As `Plans.part`: over the steps that the loop takes, however many."""
        steps = size - start
        left = tuple(levels[start:]) if levels is not None else ()
        return self._known.get((type(scheduler).__name__, steps, left), lambda: self.of(steps, scheduler, start))

    def of(self, steps: int, scheduler: Any = None, start: int = 0) -> Schedule:
        """The schedule for a loop of so many steps; with corrections, if the scheduler says how it moves the sample.

        Args:
            steps: that the loop takes.
            scheduler: steps it; None for a loop of one's own.
            start: the step of its grid that the loop begins with.
        """
        count = self._num_key_steps or key_steps_for(self._speedup or 1, steps)
        schedule = Schedule.smooth(min(count, steps), steps, boundary=self.boundary)
        try:
            grid = noise_grid(scheduler, start) if scheduler is not None else None
        except GridError:  # it does not say
            return schedule
        fits = grid is not None and grid.num_steps == steps
        return corrected_by_levels(schedule, grid) if grid is not None and fits else schedule


class CalibratedPlans:
    """Schedules from one calibration, each made when its grid is first met.

    Args:
        calibration: what to plan from.
        settings: num_key_steps, speedup or max_error, and recipe, as `Calibration.plan` has them. A loop with no more
            steps than `num_key_steps` is computed in full.

    Raises:
        CalibrationError, InfeasibleBudgetError, ValueError: as `Calibration.plan` on the calibration's own grid.
    """

    needs_levels = True

    def __init__(self, calibration: Calibrated, settings: dict[str, Any]) -> None:
        self.calibration, self.settings = calibration, settings
        #: For the grid that was recorded.
        self.own = self._planned(calibration)
        self.boundary, self.model = self.own.boundary, self.own.model
        self.num_inference_steps: int | None = self.own.num_inference_steps
        self._known = _Remembered[tuple[str, tuple[float, ...]]]()

    def part(
        self, scheduler: Any, levels: Sequence[float] | None, size: int, start: int, tell: Tell
    ) -> Schedule | None:
        """As `Plans.part`: planned for the loop's noise levels."""
        try:
            return self.on(scheduler, levels[start:] if levels is not None else None, start)
        except DPCacheError as error:
            tell(f"every step is computed in full: {error}")
            return None

    def on(self, scheduler: Any, levels: Sequence[float] | None, start: int) -> Schedule:
        """The schedule for a loop of this scheduler.

        Args:
            scheduler: steps the loop; None for a loop of one's own.
            levels: its noise levels from the loop's first step on.
            start: the step of its grid that the loop begins with.

        Raises:
            GridError: as `Calibration.on_grid`.
        """
        if scheduler is None and levels is None:
            return self.own
        if levels is None:
            raise GridError(
                f"the noise levels of {type(scheduler).__name__} are not known: give dpcache.enable a schedule, "
                "planned from a calibration with this scheduler and number of steps."
            )
        key = (type(scheduler).__name__, tuple(levels))
        return self._known.get(key, lambda: self._plan_for(scheduler, levels, start))

    def _plan_for(self, scheduler: Any, levels: Sequence[float], start: int) -> Schedule:
        recorded = self.calibration.grid
        if scheduler is None:
            return self._planned(self.calibration.on_grid(sigmas=levels))
        same = recorded is not None and recorded.is_same(NoiseGrid(np.array(levels), prediction_type(scheduler)))
        if same and type(scheduler).__name__ == self.calibration.facts.scheduler:
            return self.own
        return self._planned(self.calibration.on_grid(scheduler=noise_grid(scheduler, start)))

    def _planned(self, calibration: Calibrated) -> Schedule:
        steps, settings = calibration.facts.num_inference_steps, dict(self.settings)
        for name in ("num_key_steps", "speedup"):
            if settings.get(name) is not None:
                settings[name] = min(settings[name], steps)
        return calibration.plan(**settings)


class _Remembered(Generic[Key]):
    """The latest schedules, each made once."""

    def __init__(self) -> None:
        self._known: OrderedDict[Key, Schedule] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: Key, make: Callable[[], Schedule]) -> Schedule:
        with self._lock:
            if key not in self._known:
                self._known[key] = make()
                while len(self._known) > _KEPT:
                    self._known.popitem(last=False)
            self._known.move_to_end(key)
            return self._known[key]


def _shown(levels: Sequence[float]) -> str:
    """The first few and the last of many noise levels."""
    first = ", ".join(f"{level:.4g}" for level in levels[:3])
    return f"{first}, ..., {levels[-2]:.4g}"
