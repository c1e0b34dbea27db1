"""Calibration: what was measured of a model on one sampling grid; its file, its cost tensors, and plans from them."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt

from dpcache.errors import CalibrationError, GridError
from dpcache.files.cards import Rows, fact_rows
from dpcache.files.hub import HubFile
from dpcache.plan.corrections import corrected
from dpcache.plan.costs import CostTensor, sampler_cost, schedule_cost
from dpcache.plan.grids import Frame, NoiseGrid, frame, left_out_error
from dpcache.plan.planner import Objective, Plan, plan, plan_all
from dpcache.plan.predictors import Fitted, Predictor, Taylor, chosen_ridge
from dpcache.plan.schedule import Schedule

from .calibration_file import TENSORS, Facts, read, write
from .interpolation import asked_grid, interpolated, on_grid

Array = npt.NDArray[np.float64]
#: How a cost tensor judges an error: by what the sampler and the model make of it, or as the paper does.
Method = Literal["sampler", "paper"]
PredictorName = Literal["taylor", "fitted"]
#: Share of the measured sensitivity in the weights where it was measured and nothing else is asked for.
MEASURED = 0.5


@dataclass(frozen=True)
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
        tried_error: float64 [trials], what they erred by: RMS difference of the final sample from the full run's, as a
            share of that; over inputs as in `trials.average_error`.
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

    @property
    def is_measured(self) -> bool:
        """Whether it knows what the model makes of an error, `calibrate(..., sensitivity="measured")`."""
        return len(self.probes) > 0

    def predictor(self, name: PredictorName = "taylor", order: int | None = None) -> Predictor:
        """The predictor of this name and order: `"taylor"`, or `"fitted"` to the values of this calibration."""
        order = self.facts.order if order is None else order
        if name == "taylor":
            return Taylor(order)
        if order not in self._ridges:
            self._ridges[order] = chosen_ridge(self.value_gram, order)
        return Fitted(self.value_gram.mean(axis=0), order, self._ridges[order])

    def weights(self, measured: float | None = None) -> Array:
        """float64 [T]: how far the sample moves per unit of error in what the scheduler receives at a step.

        Args:
            measured: what of the measured sensitivity to believe. At 0 an error counts as far as the scheduler moves on
                it in that step; at 1 as far as the final sample was measured to move; between, the weighted geometric
                mean. 0.5 where the sensitivity was measured, else 0, unless given.

        Raises:
            CalibrationError: the scheduler's steps could not be seen, or the sensitivity was not measured.
        """
        if not len(self.gram):
            raise CalibrationError(
                f"what {self.facts.scheduler} was given at every step could not be seen while calibrating "
                f'{self.facts.pipeline}: plan with method="paper".'
            )
        measured = (MEASURED if self.is_measured else 0.0) if measured is None else measured
        if measured and not self.is_measured:
            raise CalibrationError(
                f"measured={measured} needs the sensitivity, which this calibration did not measure: calibrate with "
                'sensitivity="measured", or plan with measured=0.'
            )
        influence: Array = self.influence.mean(axis=0)
        return influence * interpolated(self.probes) ** measured if measured else influence

    def cost(
        self,
        method: Method = "sampler",
        *,
        predictor: PredictorName = "taylor",
        order: int | None = None,
        measured: float | None = None,
        power: float = 2.0,
    ) -> CostTensor:
        """The cost tensor, float64 [T, T+1, T+1] indexed [i, j, k].

        Args:
            method: `"sampler"`, errors of what the scheduler receives, added up over a hop as it adds them up (see
                `costs.sampler_cost`); or `"paper"`, mean absolute errors of the values at the boundary.
            predictor: whose errors: `"taylor"`, or `"fitted"` by least squares to what was recorded.
            order: one less than the number of key steps it uses; that of the calibration unless given.
            measured: as in `weights`.
            power: as in `costs.sampler_cost`.

        Raises:
            CalibrationError: as `weights`; or the method is unknown, or the paper's method is wanted with something
                else than was calibrated for.
        """
        order = self.facts.order if order is None else order
        if method == "paper":
            if (predictor, order, measured or 0.0, power) != ("taylor", self.facts.order, 0.0, 2.0):
                raise CalibrationError(
                    f'method="paper" knows the errors of Taylor predictions of order {self.facts.order} alone, as '
                    f'calibrated: calibrate with order={order}, or use method="sampler".'
                )
            if not self.paper_cost.size:
                raise GridError(
                    f'method="paper" cannot be interpolated from {self.facts.recorded_steps} steps to another grid: '
                    'calibrate on this one, or use method="sampler".'
                )
            return self.paper_cost
        if method != "sampler":
            raise CalibrationError(f'method must be "sampler" or "paper", got {method!r}.')
        known, key = self._sampler_costs, (predictor, order, measured, power)
        if key not in known:
            known[key] = sampler_cost(self.gram, self.weights(measured), self.predictor(predictor, order), power=power)
        return known[key]

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
        num_inference_steps: int | None = None,
        scheduler: Any = None,
        method: Method = "sampler",
        predictor: PredictorName = "taylor",
        order: int | None = None,
        measured: float | None = None,
        power: float = 2.0,
        first_key_steps: int | None = None,
        last_key_steps: int = 0,
        max_gap: int | None = None,
        objective: Objective = "sum",
        correct: bool | None = None,
    ) -> Schedule:
        """The best schedule with this many key steps, for this speedup, or within this error.

        Args:
            num_key_steps: K.
            speedup: T / K instead, what skipped steps that cost nothing would give: as many key steps as it allows.
            max_error: the fewest key steps instead with which `expected_error` is no larger.
            num_inference_steps: T, if not that of the calibration (see `on_grid`).
            scheduler: whose grid to plan for, if not that of the calibration (see `on_grid`).
            method: as in `cost`.
            predictor: as in `cost`.
            order: as in `cost`.
            measured: as in `cost`.
            power: as in `cost`.
            first_key_steps: as in `dpcache.plan`; unless given 3 with the paper's method, as there, and 1 otherwise,
                where the cost itself says what the first steps are worth.
            last_key_steps: as in `dpcache.plan`.
            max_gap: as in `dpcache.plan`.
            objective: as in `dpcache.plan`.
            correct: as in `schedule`; unless given all but the paper's method do.

        Raises:
            CalibrationError: as `cost`; or `max_error` is wanted of a calibration that has measured no errors.
            GridError: as `on_grid`.
            InfeasibleBudgetError: no plan with K key steps satisfies the constraints, or none keeps within the error.
            ValueError: not exactly one of number, speedup and error; or one out of range.
        """
        judged: dict[str, Any] = {"predictor": predictor, "order": order, "measured": measured, "power": power}
        limits: dict[str, Any] = {
            "first_key_steps": _forced(method, first_key_steps),
            "last_key_steps": last_key_steps,
            "max_gap": max_gap,
            "objective": objective,
        }
        there = self
        if num_inference_steps is not None or scheduler is not None:
            there = self.on_grid(num_inference_steps, scheduler=scheduler)
        cost = there.cost(method, **judged)
        if sum(given is not None for given in (num_key_steps, speedup, max_error)) != 1:
            raise ValueError("give one of num_key_steps, speedup and max_error.")
        if max_error is not None:
            budget = there._budget_within(max_error, plan_all(cost, **limits), predictor, order)
        else:
            budget = _budget(there.facts.num_inference_steps, num_key_steps, speedup)
        found = plan(cost, budget, **limits)
        correct = method != "paper" if correct is None else correct
        schedule = there.schedule(found.key_steps, predictor, order, correct=correct)
        source = f"planned by {method} cost from {self.facts.num_inputs} calibration inputs{there._interpolated()}"
        expected = there.expected_error(schedule) if len(there.tried) else None
        return schedule.model_copy(update={"cost": found.cost, "expected_error": expected, "source": source})

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
        """How well other grids can be interpolated to: relative RMS error of outputs at steps that are left out.

        Every second step is left out and interpolated between the others, which are twice as far apart as those that
        `on_grid` goes by. None where noise levels are not known, or are fewer than nine.
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

    def _budget_within(
        self, max_error: float, plans: Mapping[int, Plan], predictor: PredictorName, order: int | None
    ) -> int:
        if not max_error > 0:
            raise ValueError(f"max_error must be above 0, got {max_error}: it is a share of the full run's output.")
        for budget, found in plans.items():
            if self.expected_error(self.schedule(found.key_steps, predictor, order)) <= max_error:
                return budget
        return self.facts.num_inference_steps

    def expected_error(self, schedule: Schedule) -> float:
        """The error to be expected of a schedule that was not tuned: RMS difference of the final sample, relative.

        The root of its cost (see `costs.schedule_cost`), times what the schedules that were tried erred by more.

        Raises:
            CalibrationError: none were tried: that takes `calibrate(..., sensitivity="measured")`.
        """
        if not len(self.tried):
            raise CalibrationError(
                "this calibration has run no schedules, so it does not know what errors to expect: calibrate with "
                'sensitivity="measured".'
            )
        return math.exp(self._logarithm_of_cost(schedule) + self._error_factor)

    @cached_property
    def _error_factor(self) -> float:
        """Logarithm of measured over computed error, mean over the schedules that were tried."""
        schedules = [self.schedule([int(t) for t in np.flatnonzero(row)]) for row in self.tried]
        computed = [self._logarithm_of_cost(schedule) for schedule in schedules]
        return float(np.mean(np.log(self.tried_error) - computed))

    def _logarithm_of_cost(self, schedule: Schedule) -> float:
        return math.log(max(schedule_cost(self.gram, self.weights(), schedule), 1e-30)) / 2

    def schedule(
        self,
        key_steps: Sequence[int],
        predictor: PredictorName = "taylor",
        order: int | None = None,
        *,
        correct: bool = True,
    ) -> Schedule:
        """A schedule with key steps of your choice, for the model and boundary of this calibration.

        Args:
            key_steps: increasing, the first is 0.
            predictor: as in `predictor`.
            order: as in `predictor`.
            correct: whether key steps make up for errors of the skipped steps before them (see
                `dpcache.plan.corrections`). They cannot where the scheduler's steps are of no known kind.
        """
        schedule = Schedule.from_key_steps(
            key_steps,
            self.facts.num_inference_steps,
            predictor=self.predictor(predictor, order),
            boundary=self.facts.boundary,
            model=self.facts.model,
        )
        schedule = schedule.model_copy(update={"sigmas": self.facts.sigmas})
        if not correct or self._frame is None:
            return schedule
        return corrected(schedule, self.gram.mean(axis=0), self._frame)

    @cached_property
    def _frame(self) -> Frame | None:
        return frame(self.grid) if self.grid is not None and len(self.gram) else None

    def plan_all(
        self,
        *,
        method: Method = "sampler",
        predictor: PredictorName = "taylor",
        order: int | None = None,
        measured: float | None = None,
        power: float = 2.0,
        first_key_steps: int | None = None,
        last_key_steps: int = 0,
        max_gap: int | None = None,
    ) -> dict[int, Plan]:
        """{K: Plan} for every feasible number of key steps: the whole trade-off, without the schedules."""
        return plan_all(
            self.cost(method, predictor=predictor, order=order, measured=measured, power=power),
            first_key_steps=_forced(method, first_key_steps),
            last_key_steps=last_key_steps,
            max_gap=max_gap,
        )

    @classmethod
    def merged(cls, parts: Sequence[Self]) -> Self:
        """One calibration from several of the same model and grid, each of its own inputs, in this order.

        Raises:
            CalibrationError: there are none, or they differ in more than their inputs.
        """
        if not parts:
            raise CalibrationError("there are no calibrations to merge.")
        first = parts[0].facts
        for number, part in enumerate(parts):
            same = {"num_inputs": first.num_inputs, "calls": first.calls}
            if part.facts.model_copy(update=same) != first:
                raise CalibrationError(
                    f"calibration {number} was made with another model, grid or way of guidance than the first: merge "
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


def _budget(num_steps: int, num_key_steps: int | None, speedup: float | None) -> int:
    if num_key_steps is not None:
        return num_key_steps
    assert speedup is not None
    if not 1 <= speedup <= num_steps:
        raise ValueError(f"speedup must be from 1 to the number of steps ({num_steps}), got {speedup}.")
    # A hair more, for 50 / 3.5714... is meant as 14.
    return math.floor(num_steps / speedup + 1e-9)


def _forced(method: Method, first_key_steps: int | None) -> int:
    return first_key_steps if first_key_steps is not None else 3 if method == "paper" else 1
