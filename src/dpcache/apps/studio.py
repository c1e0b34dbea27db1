"""What the page in the browser draws with: one pipeline, in full and cached, and what it remembers of both."""

import inspect
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dpcache.errors import GridError
from dpcache.judge.metrics import Picture, psnr
from dpcache.plan.levels import noise_levels
from dpcache.plan.recipe import Recipe
from dpcache.plan.schedule import Schedule
from dpcache.run.inputs import Input, call_arguments, quiet, seeded
from dpcache.run.pipelines import enabled, stats
from dpcache.run.plans import plans_for

if TYPE_CHECKING:
    from dpcache.measure.calibration import Calibration

#: So many full runs and so many cached ones are remembered: another number of key steps needs no other full run.
_FULL, _CACHED = 8, 24
#: K / T of the curve: 5, 7, 9, 13, 18 and 25 of 50 steps.
_SHARES = (0.1, 0.14, 0.18, 0.26, 0.36, 0.5)


@dataclass(frozen=True)
class Asked:
    """What is to be drawn: an input, a seed, and a number of steps."""

    given: Any
    seed: int
    steps: int


@dataclass(frozen=True)
class Drawn:
    """One output and how it came about.

    Attributes:
        picture: float [H, W, C] in [0, 1], or [F, H, W, C] for a clip.
        seconds: time of the pipeline's call, text encoding and decoding included.
        key_steps: steps computed in full.
        schedule: what was followed; None in full.
    """

    picture: Picture
    seconds: float
    key_steps: tuple[int, ...]
    schedule: Schedule | None = None


class Studio:
    """Draws with one pipeline, planning for any number of key steps; remembers the latest runs.

    Args:
        pipeline: a diffusers pipeline.
        calibration: what to plan from; None where nothing was measured: key steps on a smooth curve.
        arguments: of every call of the pipeline, beside the input, seed and number of steps.
        steps: T to begin with, where there is no calibration to say it.
    """

    def __init__(
        self, pipeline: Any, calibration: "Calibration | None", arguments: Mapping[str, Any], steps: int = 50
    ) -> None:
        self.pipeline, self.calibration = pipeline, calibration
        self.arguments = {**arguments, "output_type": "np"}
        self.steps = steps if calibration is None else calibration.facts.num_inference_steps
        #: The paper's costs need nothing of what a scheduler hides, but are good for the recorded grid alone.
        recipe = Recipe(method="sampler" if calibration is None or len(calibration.gram) else "paper")
        self.planning: dict[str, Any] = {} if calibration is None else {"recipe": recipe}
        self.fixed_grid = calibration is not None and (calibration.grid is None or recipe.method == "paper")
        #: A run that nobody waits for any more goes on to its end: the next one begins after it.
        self._drawing = threading.Lock()
        self._full: OrderedDict[Asked, Drawn] = OrderedDict()
        self._cached: OrderedDict[tuple[Asked, int], Drawn] = OrderedDict()

    @property
    def takes_classes(self) -> bool:
        """Whether its inputs are class labels instead of prompts."""
        return "class_labels" in inspect.signature(type(self.pipeline).__call__).parameters

    @property
    def class_names(self) -> list[tuple[str, int]]:
        """Names and numbers of the classes, in the order of their numbers."""
        names = {number: name for name, number in getattr(self.pipeline, "labels", {}).items()}
        config = self.pipeline.transformer.config
        count = len(names) or int(config.get("num_embeds_ada_norm") or 1)
        return [(names.get(number, str(number)), number) for number in range(count)]

    def call(self, given: Any, steps: int) -> dict[str, Any]:
        """Arguments of the call for a prompt, a class or whole input."""
        if not isinstance(given, Mapping):
            given = {"class_labels": [int(given)]} if self.takes_classes else str(given)
        return call_arguments([given], {**self.arguments, "num_inference_steps": steps})[0]

    def remembered(self, asked: Asked, num_key_steps: int | None = None) -> Drawn | None:
        """The run of this in full, or with so many key steps, if it was drawn lately."""
        return self._full.get(asked) if num_key_steps is None else self._cached.get((asked, num_key_steps))

    def full(self, asked: Asked) -> Drawn:
        """It, drawn in full."""
        with self._drawing:
            if asked not in self._full:
                picture, seconds = self._timed(asked)
                self._full[asked] = Drawn(picture, seconds, tuple(range(asked.steps)))
                while len(self._full) > _FULL:
                    self._full.popitem(last=False)
            self._full.move_to_end(asked)
            return self._full[asked]

    def cached(self, asked: Asked, num_key_steps: int) -> Drawn:
        """It, drawn with this many key steps.

        Raises:
            DPCacheError: there is no plan with so many.
        """
        key = (asked, num_key_steps)
        with self._drawing:
            if key not in self._cached:
                planning = {**self.planning, "num_key_steps": num_key_steps}
                with enabled(self.pipeline, self.calibration, **planning):
                    picture, seconds = self._timed(asked)
                    computed = stats(self.pipeline).computed_steps
                self._cached[key] = Drawn(picture, seconds, computed, self._followed(planning))
                while len(self._cached) > _CACHED:
                    self._cached.popitem(last=False)
            self._cached.move_to_end(key)
            return self._cached[key]

    def curve(self, asked: Asked) -> dict[int, float]:
        """{K: PSNR in dB} of what is remembered of this."""
        full = self._full.get(asked)
        if full is None:
            return {}
        found = {k: drawn for (one, k), drawn in [*self._cached.items()] if one == asked}
        return {k: psnr(full.picture, found[k].picture) for k in sorted(found)}

    def ladder(self, steps: int) -> list[int]:
        """The numbers of key steps that make a curve."""
        return sorted({max(1, round(share * steps)) for share in _SHARES})

    def warm_up(self, given: Input) -> Picture:
        """A call of two steps: the first one pays for what is set up once. Returns what it drew."""
        with quiet(self.pipeline):
            return self._timed(Asked(given, 0, 2))[0]

    def _followed(self, planning: Mapping[str, Any]) -> Schedule | None:
        """The schedule that the call just made has followed; None where it was computed in full."""

        def refuse(text: str, kind: str = "") -> None:
            raise GridError(text)

        scheduler = self.pipeline.scheduler
        levels, size = noise_levels(scheduler), len(scheduler.timesteps)
        try:
            return plans_for(self.calibration, **planning).part(scheduler, levels, size, 0, refuse)
        except GridError:
            return None

    def _timed(self, asked: Asked) -> tuple[Picture, float]:
        arguments = seeded(self.pipeline, self.call(asked.given, asked.steps), asked.seed)
        start = time.perf_counter()
        output = self.pipeline(**arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return np.asarray(output[0][0]), seconds
