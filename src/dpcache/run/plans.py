"""Plans from one calibration for whatever grids a pipeline is called with, each made when the grid is first met."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from dpcache.errors import GridError
from dpcache.plan.grids import NoiseGrid
from dpcache.plan.predictors import Predictor
from dpcache.plan.recipe import PredictorName, Recipe
from dpcache.plan.schedule import Schedule

from .adaptive import Guide
from .schedulers import noise_grid, prediction_type

#: So many plans are remembered: a server may see a thousand resolutions.
_KEPT = 64

Array = npt.NDArray[np.float64]
#: What adaptive plans can differ in.
_JUDGED = ("predictor", "order", "measured", "power")


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
    def value_gram(self) -> Array: ...
    @property
    def grid(self) -> NoiseGrid | None: ...
    def on_grid(
        self,
        num_inference_steps: int | None = None,
        *,
        sigmas: Sequence[float] | None = None,
        scheduler: Any = None,
    ) -> "Calibrated": ...
    def predictor(self, name: PredictorName = ..., order: int | None = ...) -> Predictor: ...
    def cost(self, recipe: Recipe = ...) -> Array: ...
    def schedule(self, key_steps: Sequence[int], recipe: Recipe = ...) -> Schedule: ...
    def plan(
        self,
        num_key_steps: int | None = ...,
        *,
        speedup: float | None = ...,
        max_error: float | None = ...,
        recipe: Recipe = ...,
    ) -> Schedule: ...


class Plans:
    """Schedules from one calibration.

    Args:
        calibration: what to plan from.
        settings: num_key_steps, speedup or max_error, and recipe, as `Calibration.plan` has them. A loop with no more
            steps than `num_key_steps` is computed in full.
        adaptive: whether generations may leave the schedule (see `dpcache.run.adaptive`).
        watched: whether errors at key steps are compared with those of the calibration.

    Raises:
        CalibrationError, InfeasibleBudgetError, ValueError: as `Calibration.plan` on the calibration's own grid.
        TypeError: a field of the recipe that adaptive plans do not have.
    """

    def __init__(
        self, calibration: Calibrated, settings: dict[str, Any], *, adaptive: bool = False, watched: bool = False
    ) -> None:
        self.calibration, self.settings = calibration, settings
        self._adaptive, self._watched = adaptive, watched
        self._recipe: Recipe = settings.get("recipe", Recipe())
        plain = Recipe(**{name: getattr(self._recipe, name) for name in _JUDGED})
        fixed = [name for name, value in vars(self._recipe).items() if value != getattr(plain, name)]
        if adaptive and fixed:
            raise TypeError(f"adaptive plans have no {', '.join(sorted(fixed))}: leave it out, or adaptive=True.")
        #: For the grid that was recorded.
        self.own = self._planned(calibration)
        self._known: OrderedDict[tuple[str, tuple[float, ...]], tuple[Schedule, Guide | None]] = OrderedDict()
        self._lock = threading.Lock()

    def on(self, scheduler: Any, levels: Sequence[float] | None, start: int) -> tuple[Schedule, Guide | None]:
        """The schedule for a loop of this scheduler, and what watches over it.

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
        with self._lock:
            if key not in self._known:
                self._known[key] = self._plan_for(scheduler, levels, start)
                while len(self._known) > _KEPT:
                    self._known.popitem(last=False)
            self._known.move_to_end(key)
            return self._known[key]

    def _plan_for(self, scheduler: Any, levels: Sequence[float], start: int) -> tuple[Schedule, Guide | None]:
        recorded = self.calibration.grid
        if scheduler is None:
            return self._planned(self.calibration.on_grid(sigmas=levels))
        same = recorded is not None and recorded.is_same(NoiseGrid(np.array(levels), prediction_type(scheduler)))
        if same and type(scheduler).__name__ == self.calibration.facts.scheduler:
            return self.own
        return self._planned(self.calibration.on_grid(scheduler=noise_grid(scheduler, start)))

    def _planned(self, calibration: Calibrated) -> tuple[Schedule, Guide | None]:
        steps, settings = calibration.facts.num_inference_steps, dict(self.settings)
        for name in ("num_key_steps", "speedup"):
            if settings.get(name) is not None:
                settings[name] = min(settings[name], steps)
        schedule = calibration.plan(**settings)
        if not self._adaptive and not self._watched:
            return schedule, None
        guide = Guide(calibration, schedule, self._recipe, self._adaptive)
        return guide.start, guide
