"""Calibration: what was measured of a model on one sampling grid; its file, its cost tensors, and plans from them."""

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from typing_extensions import Never, Self

from dpcache.checks import no_more_arguments, number
from dpcache.errors import CalibrationError, GridError
from dpcache.files.cards import Rows, fact_rows
from dpcache.files.hub import HubFile
from dpcache.plan.corrections import by_gram, corrected
from dpcache.plan.costs import CostTensor, sampler_cost, schedule_cost
from dpcache.plan.curves import key_steps_for
from dpcache.plan.grids import Frame, NoiseGrid, frame, left_out_error
from dpcache.plan.planner import Plan, checked_budget, plan, plan_all
from dpcache.plan.predictors import Fitted, Predictor, Taylor, Trend, chosen_ridge
from dpcache.plan.recipe import RECIPE_FIELDS, PredictorName, Recipe, require_recipe
from dpcache.plan.schedule import Schedule

from .anchor_limit import farthest_anchor, forbids_good_gaps
from .calibration_file import TENSORS, Facts, read, write
from .interpolation import asked_grid, interpolated, on_grid

Array = npt.NDArray[np.float64]
#: Share of the measured sensitivity in the weights where it was measured and nothing else is asked for.
MEASURED = 0.5
EASY = 0.007
"""Error of predictions, as a share of how far the run moves the sample. Where it is less, Taylor serves best whatever
the costs say; where it is more, what predicts is chosen by its cost."""
SAFE_TO_CORRECT = 0.1
"""Likewise: where predictions err more than this, corrections would do harm."""


@dataclass(frozen=True, eq=False, repr=False)
class Calibration(HubFile):
    """What was measured of predicting instead of computing, for one model and one sampling grid.

    Attributes:
        facts: what it was measured on.
        paper_cost: float64 [T, T+1, T+1], the paper's cost tensor of the values at the boundary, mean over inputs and
            branches (see `costs.paper_cost`); of size 0 where it was interpolated, which this cost cannot be.
        gram: float64 [inputs, T, T], mean products of what the scheduler received at every two steps; no inputs where
            that could not be seen.
        value_gram: float64 [inputs, T, T], likewise of the values at the boundary, mean over branches.
        influence: float64 [inputs, T], how far the scheduler moves the sample per unit of what it receives (see
            `costs.step_influence`); no inputs where that could not be seen.
        probes: float64 [probed inputs, T], how much farther the final sample was measured to move (see
            `sensitivity.ratios`), NaN at steps that were not probed; no inputs where it was not measured.
        tried: float64 [trials, T], 1 at the key steps of Taylor schedules that were run for real, else 0.
        tried_error: float64 [trials], their measured errors: RMS difference of the final sample from the full run's, as
            a share of that; mean over inputs.
    """

    KIND: ClassVar[str] = "calibration"
    FILE_NAME: ClassVar[str] = "calibration.safetensors"

    facts: Facts
    paper_cost: CostTensor
    gram: Array
    value_gram: Array
    influence: Array
    probes: Array
    tried: Array
    tried_error: Array

    def __eq__(self, other: object) -> bool:
        """Whether facts and tensors are the same, bit for bit."""
        if not isinstance(other, Calibration):
            return NotImplemented
        pairs = ((getattr(self, name), getattr(other, name)) for name in TENSORS)
        return self.facts == other.facts and all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]  # arrays may change

    def __repr__(self) -> str:
        facts = self.facts
        inputs = "1 input" if facts.num_inputs == 1 else f"{facts.num_inputs} inputs"
        parts = [f"T={facts.num_inference_steps}", inputs, f"boundary={facts.boundary!r}"]
        if self.is_measured:
            parts.append("sensitivity measured")
        return f"Calibration({', '.join(parts)}, for {facts.model.denoiser})"

    @property
    def is_measured(self) -> bool:
        """Whether it knows what the model makes of an error, `calibrate(..., sensitivity="measured")`."""
        return len(self.probes) > 0

    def predictor(self, name: PredictorName | None = "taylor", order: int | None = None) -> Predictor:
        """What predicts: `"taylor"` (also for None), `"trend"`, or `"fitted"` to this calibration (see `Recipe`).

        Raises:
            ValueError: another name, a negative order, or one that the predictor does not have.
        """
        Recipe(predictor=name, order=order)  # says what is wrong with them
        if name == "trend":
            return Trend()
        order = self.facts.order if order is None else order
        if name in ("taylor", None):
            return Taylor(order)
        if order not in self._ridges:
            self._ridges[order] = chosen_ridge(self.value_gram, order)
        return Fitted(self.value_gram.mean(axis=0), order, self._ridges[order])

    def weights(self, measured: float | None = None) -> Array:
        """float64 [T]: how far the sample moves per unit of error in what the scheduler receives at a step.

        Args:
            measured: weight of the measured sensitivity, 0 to 1 (see `Recipe`).

        Raises:
            CalibrationError: the scheduler's steps could not be seen, or the sensitivity was not measured.
        """
        if not len(self.gram):
            raise CalibrationError(
                f"what {self.facts.scheduler} was given at every step could not be seen while calibrating "
                f'{self.facts.pipeline}: plan with Recipe(method="paper").'
            )
        measured = (MEASURED if self.is_measured else 0.0) if measured is None else number("measured", measured, 0, 1)
        if measured and not self.is_measured:
            raise CalibrationError(
                f"measured={measured} needs the sensitivity, which this calibration did not measure: calibrate with "
                'sensitivity="measured", or plan with Recipe(measured=0).'
            )
        influence: Array = self.influence.mean(axis=0)
        return influence * interpolated(self.probes) ** measured if measured else influence

    def cost(self, recipe: Recipe = Recipe()) -> CostTensor:
        """The cost tensor, float64 [T, T+1, T+1] indexed [i, j, k]; see `costs.sampler_cost` and `paper.paper_cost`.

        Of the recipe only predictor (None: Taylor), order, measured, method and power matter here.

        Raises:
            CalibrationError: as `weights`; or the paper's method is wanted with something else than was calibrated for.
            GridError: the paper's method is wanted of a calibration that was interpolated from another grid.
        """
        require_recipe(recipe)
        order = self.facts.order if recipe.order is None else recipe.order
        key = (recipe.predictor or "taylor", order, recipe.measured, recipe.power)
        if recipe.method == "paper":
            if (*key[:2], key[2] or 0.0, key[3]) != ("taylor", self.facts.order, 0.0, 2.0):
                raise CalibrationError(
                    f'method="paper" knows the errors of Taylor predictions of order {self.facts.order} alone, as '
                    f'calibrated: calibrate with order={order}, or plan with Recipe(method="sampler").'
                )
            if not self.paper_cost.size:
                raise GridError(
                    f'method="paper" cannot be interpolated from {self.facts.recorded_steps} steps to another grid: '
                    'calibrate on this one, or plan with Recipe(method="sampler").'
                )
            return self.paper_cost
        if key not in self._sampler_costs:
            predictor, weights = self.predictor(recipe.predictor, recipe.order), self.weights(recipe.measured)
            self._sampler_costs[key] = sampler_cost(self.gram, weights, predictor, power=recipe.power)
        return self._sampler_costs[key]

    @cached_property
    def _sampler_costs(self) -> dict[tuple[str, int, float | None, float], CostTensor]:
        return {}

    @cached_property
    def _ridges(self) -> dict[int, float]:
        return {}

    def plan(
        self,
        num_key_steps: int | None = None,
        *,
        speedup: float | None = None,
        max_error: float | None = None,
        recipe: Recipe = Recipe(),
        num_inference_steps: int | None = None,
        scheduler: Any = None,
        **unknown: Never,
    ) -> Schedule:
        """The best schedule with this many key steps, for this speedup, or within this error.

        Args:
            num_key_steps: K.
            speedup: T / K instead, what skipped steps that cost nothing would give: as many key steps as it allows.
            max_error: the fewest key steps instead with which `expected_error` is no larger.
            recipe: how to plan.
            num_inference_steps: T, if not that of the calibration (see `on_grid`).
            scheduler: whose grid to plan for, if not that of the calibration (see `on_grid`).
            unknown: refused.

        Raises:
            CalibrationError: as `cost`; or `max_error` is wanted of a calibration that has measured no errors.
            GridError: as `on_grid`.
            InfeasibleBudgetError: no plan with K key steps satisfies the constraints, or none keeps within the error.
            TypeError: an unknown argument, or one of the wrong type.
            ValueError: not exactly one of number, speedup and error; or one out of range.
        """
        no_more_arguments(self.plan, unknown, RECIPE_FIELDS)
        require_recipe(recipe)
        if sum(given is not None for given in (num_key_steps, speedup, max_error)) != 1:
            raise ValueError("give one of num_key_steps, speedup and max_error.")
        there = self
        if num_inference_steps is not None or scheduler is not None:
            there = self.on_grid(num_inference_steps, scheduler=scheduler)
        budget = there._budget(num_key_steps, speedup, max_error, recipe)
        found, chosen = there._cheapest(budget, recipe)
        if recipe.method == "paper":
            _warn_of_anchor_limit(budget, there.facts.num_inference_steps, recipe)
        schedule = there.schedule(found.key_steps, chosen)
        source = (
            f"planned by {recipe.method} cost from {self.facts.num_inputs} calibration inputs{there._interpolated()}"
        )
        expected = there.expected_error(schedule) if len(there.tried) else None
        return schedule.model_copy(update={"cost": found.cost, "expected_error": expected, "source": source})

    def _budget(self, num_key_steps: int | None, speedup: float | None, max_error: float | None, recipe: Recipe) -> int:
        """K, whichever way it was asked for."""
        steps = self.facts.num_inference_steps
        if num_key_steps is not None:
            return checked_budget(num_key_steps, steps)
        if speedup is not None:
            if not 1 <= number("speedup", speedup) <= steps:
                raise ValueError(f"speedup must be from 1 to the number of steps ({steps}), got {speedup}.")
            return key_steps_for(speedup, steps)
        if not (limit := number("max_error", max_error)) > 0:
            raise ValueError(f"max_error must be above 0, got {max_error}: it is a share of the full run's output.")
        for budget, found in self.plan_all(recipe).items():
            if self.expected_error(self.schedule(found.key_steps, recipe)) <= limit:
                return budget
        return steps

    @property
    def grid(self) -> NoiseGrid | None:
        """The noise levels it is of; None where they are not known, or not what the scheduler was given."""
        facts = self.facts
        if facts.sigmas is None or facts.prediction is None or not len(self.influence):
            return None
        timesteps = np.array(facts.timesteps) if facts.timesteps else None
        return NoiseGrid(np.array(facts.sigmas), facts.prediction, self.influence.mean(axis=0), timesteps)

    @property
    def interpolation_error(self) -> float | None:
        """How exact interpolation to other grids is: relative RMS error of outputs at steps that were left out.

        It leaves out every second step and interpolates it between the others. They are twice as far apart as the steps
        that `on_grid` interpolates between. None where noise levels are not known, or are fewer than nine.
        """
        grid = self.grid
        if grid is None or grid.num_steps < 9:
            return None
        return left_out_error(self.gram, grid.warped())

    def on_grid(
        self,
        num_inference_steps: int | None = None,
        *,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        scheduler: Any = None,
    ) -> "Calibration":
        """What this calibration would be, had it been made on another grid of noise levels: see `dpcache.plan.grids`.

        Args:
            num_inference_steps: T; the grid follows the rule of the recorded one.
            sigmas: T + 1 noise levels instead, as a scheduler has them in its `sigmas`, the last where the run ends.
            timesteps: T timesteps instead, of the recorded scheduler.
            scheduler: a scheduler of diffusers instead, on which `set_timesteps` has been called, of the same
                prediction type; or its `dpcache.plan.grids.NoiseGrid`.

        Returns:
            this calibration, if the noise levels are its own; else one that plans by `method="sampler"` alone.

        Raises:
            GridError: the grid is not within the recorded one; it or the scheduler is of a kind that cannot be
                interpolated; or this calibration was interpolated itself.
            ValueError: not exactly one of the arguments.
        """
        given = {"sigmas": sigmas, "timesteps": timesteps, "num_inference_steps": num_inference_steps}
        grid = asked_grid(self, {**given, "scheduler": scheduler})
        if grid is None:
            return self
        there = on_grid(self, grid)
        if not len(self.tried):
            return there
        # The errors that were found are kept as what they are: multiples of the computed ones.
        schedules = [there.schedule([int(t) for t in np.flatnonzero(row)]) for row in there.tried]
        errors = [math.exp(there._logarithm_of_cost(schedule) + self._error_factor) for schedule in schedules]
        return replace(there, tried_error=np.array(errors))

    def _interpolated(self) -> str:
        return f", interpolated from {self.facts.recorded_steps} steps" if self.facts.recorded_steps else ""

    def expected_error(self, schedule: Schedule) -> float:
        """The error to expect of a schedule that was not tuned: RMS difference of the final sample, relative.

        The root of its cost (see `costs.schedule_cost`), times the mean ratio of measured to computed errors of the
        schedules that were tried.

        Raises:
            CalibrationError: none were tried: that takes `calibrate(..., sensitivity="measured")`.
        """
        if not len(self.tried):
            raise CalibrationError(
                "this calibration has run no schedules, so it does not know what errors to expect: calibrate with "
                'sensitivity="measured".'
            )
        if not isinstance(schedule, Schedule):
            raise TypeError(f"expected_error is of a dpcache.Schedule, got {schedule!r}.")
        return math.exp(self._logarithm_of_cost(schedule) + self._error_factor)

    @cached_property
    def _error_factor(self) -> float:
        """Logarithm of measured over computed error, mean over the schedules that were tried."""
        schedules = [self.schedule([int(t) for t in np.flatnonzero(row)]) for row in self.tried]
        computed = [self._logarithm_of_cost(schedule) for schedule in schedules]
        return float(np.mean(np.log(self.tried_error) - computed))

    def _logarithm_of_cost(self, schedule: Schedule) -> float:
        return math.log(max(schedule_cost(self.gram, self.weights(), schedule), 1e-30)) / 2

    def schedule(self, key_steps: Sequence[int], recipe: Recipe = Recipe()) -> Schedule:
        """A schedule with key steps of your choice, for the model and boundary of this calibration.

        Args:
            key_steps: increasing, the first is 0.
            recipe: its predictor, order, measured and correct matter here. Where the scheduler's steps are of no known
                kind nothing is corrected.

        Raises:
            TypeError, ValueError: as `Schedule.from_key_steps`.
        """
        require_recipe(recipe)
        schedule = self._predicted(key_steps, recipe)
        if _is_open(recipe) and self._relative_error(schedule) > EASY:
            others = [schedule, *(self._predicted(key_steps, one) for one in _others(recipe))]
            weights = self.weights(recipe.measured)
            schedule = min(others, key=lambda one: schedule_cost(self.gram, weights, one, power=recipe.power))
        corrects = recipe.correct
        if corrects is None:
            corrects = recipe.method != "paper" and self._relative_error(schedule) <= SAFE_TO_CORRECT
        if not corrects or self._frame is None:
            return schedule
        return corrected(schedule, self._frame, by_gram(self.gram.mean(axis=0), self._frame.moves))

    def _predicted(self, key_steps: Sequence[int], recipe: Recipe) -> Schedule:
        """With the recipe's predictor, not corrected."""
        schedule = Schedule.from_key_steps(
            key_steps,
            self.facts.num_inference_steps,
            predictor=self.predictor(recipe.predictor, recipe.order),
            boundary=self.facts.boundary,
            model=self.facts.model,
        )
        return schedule.model_copy(update={"sigmas": self.facts.sigmas})

    def _cheapest(self, budget: int, recipe: Recipe) -> tuple[Plan, Recipe]:
        """The plan for so many key steps, and the recipe with the predictor that it was planned for."""

        def planned(one: Recipe) -> Plan:
            return plan(self.cost(one), budget, **_limits(one))

        found, chosen = planned(recipe), recipe
        if not _is_open(recipe):
            return found, chosen
        chosen = replace(recipe, predictor="taylor")
        if self._relative_error(self._predicted(found.key_steps, recipe)) <= EASY:
            return found, chosen
        others = [(found, chosen), *((planned(one), one) for one in _others(recipe))]
        return min(others, key=lambda pair: pair[0].cost)

    def _relative_error(self, schedule: Schedule) -> float:
        """How far predictions move the sample amiss, as a share of how far the whole run moves it; from its costs."""
        if not len(self.gram):
            return math.inf
        influence = self.influence.mean(axis=0)
        moved = influence @ self.gram.mean(axis=0) @ influence
        return float(math.sqrt(schedule_cost(self.gram, influence, schedule) / moved))

    @cached_property
    def _frame(self) -> Frame | None:
        return frame(self.grid) if self.grid is not None and len(self.gram) else None

    def plan_all(self, recipe: Recipe = Recipe()) -> dict[int, Plan]:
        """{K: Plan} for every feasible number of key steps: the whole trade-off, without the schedules.

        Raises:
            CalibrationError, GridError: as `cost`.
        """
        found = plan_all(self.cost(recipe), **_limits(recipe))
        if not _is_open(recipe):
            return found
        others = [plan_all(self.cost(one), **_limits(one)) for one in _others(recipe)]
        for budget, own in found.items():
            if self._relative_error(self._predicted(own.key_steps, recipe)) > EASY:
                all_plans = [own, *(plans[budget] for plans in others)]
                found[budget] = min(all_plans, key=lambda one: one.cost)
        return found

    @classmethod
    def merged(cls, parts: Sequence[Self]) -> Self:
        """One calibration from several of the same model and grid, each of its own inputs, in this order.

        Raises:
            CalibrationError: there are none, or they differ in more than their inputs.
        """
        if not parts:
            raise CalibrationError("there are no calibrations to merge.")
        if not all(isinstance(part, Calibration) for part in parts):
            raise TypeError(f"only calibrations can be merged, got {parts!r}.")
        first = parts[0].facts
        for place, part in enumerate(parts):
            same = {"num_inputs": first.num_inputs, "calls": first.calls}
            if part.facts.model_copy(update=same) != first:
                raise CalibrationError(
                    f"calibration {place} was made with another model, grid or way of guidance than the first: merge "
                    "only those that differ in their inputs."
                )
        inputs = [part.facts.num_inputs for part in parts]
        calls = [part.facts.calls for part in parts]
        known = None if None in calls else tuple(call for some in calls for call in some or ())
        facts = first.model_copy(update={"num_inputs": sum(inputs), "calls": known})
        tensors = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in TENSORS if name != "paper_cost"
        }
        if len(tensors["gram"]) < facts.num_inputs:  # what was not seen on every input is of no use
            tensors["gram"], tensors["influence"] = tensors["gram"][:0], tensors["influence"][:0]
        paper = sum(part.paper_cost * count for part, count in zip(parts, inputs, strict=True)) / sum(inputs)
        return cls(facts=facts, paper_cost=np.asarray(paper), **tensors)

    def save(self, path: "str | os.PathLike[str]") -> None:
        """Writes the calibration as safetensors, whole or not at all."""
        write(path, self.facts, {name: getattr(self, name) for name in TENSORS})

    @classmethod
    def load(cls, path: "str | os.PathLike[str]") -> Self:
        """Reads a calibration written by `save`.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: the file is truncated, edited, of another version, or no calibration.
        """
        facts, tensors = read(path)
        return cls(facts=facts, **tensors)

    def _card_rows(self) -> Rows:
        meaning = "Whether it was measured what an error at a step does to the outcome."
        return [*fact_rows(self.facts), ("sensitivity measured", "yes" if self.is_measured else "no", meaning)]

    def _card_texts(self, arguments: str) -> tuple[str, str]:
        usage = (
            "import dpcache\n"
            f"calibration = dpcache.Calibration.from_pretrained({arguments})\n"
            f"with dpcache.enabled(pipe, calibration, num_key_steps={max(1, self.facts.num_inference_steps // 4)}):\n"
            "    output = pipe(prompt)"
        )
        return "What was measured of predicting steps instead of computing them: plans come from it.", usage


def _is_open(recipe: Recipe) -> bool:
    """Whether it leaves the predictor open."""
    return recipe.predictor is None and recipe.order is None and recipe.method != "paper"


def _others(recipe: Recipe) -> list[Recipe]:
    """What may predict instead of Taylor, the likeliest first."""
    return [replace(recipe, predictor="trend"), *(replace(recipe, predictor="taylor", order=n) for n in (1, 0))]


def _limits(recipe: Recipe) -> dict[str, Any]:
    return {
        "first_key_steps": recipe.forced_first,
        "last_key_steps": recipe.last_key_steps,
        "max_gap": recipe.max_gap,
    }


def _warn_of_anchor_limit(num_key_steps: int, num_steps: int, recipe: Recipe) -> None:
    if num_key_steps > recipe.forced_first and forbids_good_gaps(num_key_steps, num_steps):
        warnings.warn(
            f'method="paper" keeps key steps within {farthest_anchor(num_steps)} steps of each other, which forbids '
            f"good schedules with {num_key_steps} of {num_steps}: plan with "
            'Recipe(method="sampler"), which has no such limit.',
            stacklevel=3,
        )
