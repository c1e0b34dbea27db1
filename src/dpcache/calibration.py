"""Calibration: full runs on a few inputs become a cost tensor, a file, and schedules."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save_file
from tqdm.auto import tqdm

from .costs import CostTensor, paper_cost, sampler_cost
from .denoisers import find_denoisers, identify
from .errors import CalibrationError, FileFormatError
from .files import MAKERS, check_version, read_bytes, write_whole
from .inputs import Input, call_arguments, seeded
from .planner import Objective, Plan, plan, plan_all
from .predictors import Fitted, Predictor, Taylor
from .recording import RecordedRun, record
from .schedule import Boundary, ModelIdentity, Schedule
from .sensitivity import interpolated, measure, probing_calls

#: So many inputs are probed where the sensitivity is measured.
PROBED_INPUTS = 2

FORMAT = "dpcache.calibration"
VERSION = "2"

_TENSORS = ("paper_cost", "gram", "value_gram", "influence", "sensitivity")


class Facts(BaseModel):
    """What a calibration was measured on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_inference_steps: int = Field(ge=1, description="T: steps of the sampling loop.")
    boundary: Boundary = Field(description="Where values were read.")
    order: int = Field(ge=0, description="Order of the Taylor prediction whose errors the cost holds.")
    model: ModelIdentity = Field(description="The model measured.")
    pipeline: str = Field(description="Class name of the pipeline.")
    scheduler: str = Field(description="Class name of the scheduler.")
    timesteps: tuple[float, ...] = Field(description="The scheduler's grid, T values.")
    num_inputs: int = Field(ge=1, description="Inputs run.")
    num_branches: int = Field(ge=1, description="Denoiser calls per step.")
    calls: tuple[dict[str, Any], ...] | None = Field(
        description="Arguments of every call, the generator aside; None if there are some that JSON cannot hold."
    )


#: How a cost tensor judges an error: by what the sampler does with it, by what comes of it, or as the paper does.
Method = Literal["sampler", "measured", "paper"]
#: How to find what comes of an error: from the sampler alone, or by repeating runs with one.
Sensitivity = Literal["sampler", "measured"]
PredictorName = Literal["taylor", "fitted"]


@dataclass(frozen=True)
class Calibration:
    """What was measured of predicting instead of computing, for one model and one sampling grid.

    Attributes:
        facts: what it was measured on.
        paper_cost: float64 [T, T+1, T+1], the paper's cost tensor of the values at the boundary, mean over inputs and
            branches (see `costs.paper_cost`).
        gram: float64 [inputs, T, T], mean products of what the scheduler received at every two steps; no inputs where
            that could not be seen.
        value_gram: float64 [inputs, T, T], likewise of the values at the boundary, mean over branches.
        influence: float64 [T], how far the scheduler moves the sample per unit of it (see `costs.step_influence`).
        sensitivity: float64 [T], how far the final sample moves per unit of it, as measured (see
            `dpcache.sensitivity`); [0] where it was not.
    """

    facts: Facts
    paper_cost: CostTensor
    gram: npt.NDArray[np.float64]
    value_gram: npt.NDArray[np.float64]
    influence: npt.NDArray[np.float64]
    sensitivity: npt.NDArray[np.float64]

    def predictor(self, name: PredictorName = "taylor", order: int | None = None) -> Predictor:
        """The predictor of this name and order: `"taylor"`, or `"fitted"` to the values of this calibration."""
        order = self.facts.order if order is None else order
        return Taylor(order) if name == "taylor" else Fitted(self.value_gram.mean(axis=0), order)

    def cost(
        self,
        method: Method = "sampler",
        *,
        predictor: PredictorName = "taylor",
        order: int | None = None,
        power: float = 1.0,
    ) -> CostTensor:
        """The cost tensor, float64 [T, T+1, T+1] indexed [i, j, k].

        Args:
            method: `"sampler"`, RMS errors of what the scheduler receives, weighted by how far it moves on them (see
                `costs.sampler_cost`); `"measured"`, weighted by how far the final sample was measured to move; or
                `"paper"`, mean absolute errors of the values at the boundary.
            predictor: whose errors: `"taylor"`, or `"fitted"` by least squares to what was recorded.
            order: one less than the number of key steps it uses; that of the calibration unless given.
            power: as in `costs.sampler_cost`.

        Raises:
            CalibrationError: the method is unknown, the scheduler's steps could not be seen while calibrating, its
                sensitivity was not measured, or the paper's method is wanted with another predictor than was calibrated
                for.
        """
        order = self.facts.order if order is None else order
        if method == "paper":
            if (predictor, order, power) != ("taylor", self.facts.order, 1.0):
                raise CalibrationError(
                    f'method="paper" knows the errors of Taylor predictions of order {self.facts.order} alone, as '
                    f'calibrated: calibrate with order={order}, or use method="sampler".'
                )
            return self.paper_cost
        if method not in ("sampler", "measured"):
            raise CalibrationError(f'method must be "sampler", "measured" or "paper", got {method!r}.')
        if not len(self.gram):
            raise CalibrationError(
                f"what {self.facts.scheduler} was given at every step could not be seen while calibrating "
                f'{self.facts.pipeline}: plan with method="paper".'
            )
        weights = self.influence if method == "sampler" else self.sensitivity
        if not len(weights):
            raise CalibrationError(
                'method="measured" needs the sensitivity, which this calibration did not measure: calibrate with '
                'sensitivity="measured", or plan with method="sampler".'
            )
        known = self._sampler_costs
        if (method, predictor, order, power) not in known:
            chosen = self.predictor(predictor, order)
            known[method, predictor, order, power] = sampler_cost(self.gram, weights, chosen, power=power)
        return known[method, predictor, order, power]

    @cached_property
    def _sampler_costs(self) -> dict[tuple[str, str, int, float], CostTensor]:
        return {}

    def plan(
        self,
        num_key_steps: int | None = None,
        *,
        speedup: float | None = None,
        method: Method = "sampler",
        predictor: PredictorName = "taylor",
        order: int | None = None,
        power: float = 1.0,
        first_key_steps: int | None = None,
        last_key_steps: int = 0,
        max_gap: int | None = None,
        objective: Objective = "sum",
    ) -> Schedule:
        """The best schedule with this many key steps, or for this speedup.

        `speedup` is T / K, what skipped steps that cost nothing would give: as many key steps as it allows. `method`,
        `predictor`, `order` and `power` are as in `cost`; the other arguments and the errors as in `dpcache.plan`, but
        that of the first steps 3 are forced with the paper's method, as there, and 1 with the others, whose cost says
        what they are worth.
        """
        found = plan(
            self.cost(method, predictor=predictor, order=order, power=power),
            _key_steps(self.facts.num_inference_steps, num_key_steps, speedup),
            first_key_steps=_forced(method, first_key_steps),
            last_key_steps=last_key_steps,
            max_gap=max_gap,
            objective=objective,
        )
        source = f"planned by {method} cost from {self.facts.num_inputs} calibration inputs"
        schedule = self.schedule(found.key_steps, predictor, order)
        return schedule.model_copy(update={"cost": found.cost, "source": source})

    def schedule(
        self, key_steps: Sequence[int], predictor: PredictorName = "taylor", order: int | None = None
    ) -> Schedule:
        """A schedule with key steps of your choice, for the model and boundary of this calibration."""
        return Schedule.from_key_steps(
            key_steps,
            self.facts.num_inference_steps,
            predictor=self.predictor(predictor, order),
            boundary=self.facts.boundary,
            model=self.facts.model,
        )

    def plan_all(
        self,
        *,
        method: Method = "sampler",
        predictor: PredictorName = "taylor",
        order: int | None = None,
        power: float = 1.0,
        first_key_steps: int | None = None,
        last_key_steps: int = 0,
        max_gap: int | None = None,
    ) -> dict[int, Plan]:
        """{K: Plan} for every feasible number of key steps: the whole trade-off, without the schedules."""
        return plan_all(
            self.cost(method, predictor=predictor, order=order, power=power),
            first_key_steps=_forced(method, first_key_steps),
            last_key_steps=last_key_steps,
            max_gap=max_gap,
        )

    def save(self, path: "str | os.PathLike[str]") -> None:
        """Writes the calibration as safetensors, whole or not at all."""
        facts = self.facts.model_dump_json()
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in _TENSORS}
        metadata = {"format": FORMAT, "version": VERSION, "facts": facts, "digest": _digest(facts, tensors)}
        write_whole(path, lambda part: save_file(tensors, part, metadata=metadata))

    @classmethod
    def load(cls, path: "str | os.PathLike[str]") -> Self:
        """Reads a calibration written by `save`.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: the file is truncated, edited, of another version, or no calibration.
        """
        remedy = f"Make it anew with {MAKERS['calibration']}."
        data = read_bytes(path, "calibration")
        try:
            tensors = load_tensors(data)
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise FileFormatError(f"{path} is not a whole safetensors file ({error}). {remedy}") from error
        if metadata.get("format") != FORMAT or set(tensors) != set(_TENSORS):
            raise FileFormatError(f"{path} is not a dpcache calibration. {remedy}")
        check_version(path, "calibration", metadata.get("version"), VERSION)
        if metadata.get("digest") != _digest(metadata.get("facts", ""), tensors):
            raise FileFormatError(f"{path} was edited after it was written: its digest does not match. {remedy}")
        try:
            facts = Facts.model_validate_json(metadata["facts"])
        except ValidationError as error:
            raise FileFormatError(f"{path} is not a valid calibration: {error.errors()[0]['msg']}. {remedy}") from error
        return cls(facts=facts, **tensors)


def calibrate(
    pipeline: Any,
    inputs: Sequence[Input],
    *,
    num_inference_steps: int = 50,
    boundary: Boundary = "blocks",
    order: int = 2,
    sensitivity: Sensitivity = "sampler",
    seed: int = 0,
    progress: bool = True,
    **arguments: Any,
) -> Calibration:
    """Runs the pipeline in full on a few inputs and measures what predicting each stretch of steps would cost.

    Five inputs are enough and one is nearly enough (DPCache, arXiv 2602.22654). The pipeline is left as it was.

    Args:
        pipeline: a diffusers pipeline.
        inputs: prompts, or dicts of arguments of the pipeline's call; each is one call.
        num_inference_steps: T; schedules planned from the calibration are for this many steps.
        boundary: what to cache and predict: `"blocks"`, the last transformer block's output, or `"output"`, the
            denoiser's.
        order: order of the Taylor prediction.
        sensitivity: `"measured"` repeats the runs of the first two inputs with a prediction at one step, for about a
            dozen steps, to find how much it matters there: some nine full runs each. Then `method="measured"` can be
            planned with, far better where errors in the first steps make other pictures.
        seed: input n gets a generator seeded with `seed + n`, unless it brings its own.
        progress: show a progress bar.
        arguments: further arguments of every call; an input's own win.

    Raises:
        CalibrationError: no inputs, or a value was NaN or infinite (the message names input and step).
        UnsupportedPipelineError: the pipeline cannot be followed, or not at this boundary.
        CacheStateError: dpcache is enabled on the pipeline.
    """
    defaults = {"num_inference_steps": num_inference_steps, "output_type": "latent", **arguments}
    calls = call_arguments(inputs, defaults)
    denoisers = find_denoisers(pipeline)
    paper: CostTensor | None = None
    branches = 0
    grams: list[npt.NDArray[np.float64]] = []
    value_grams: list[npt.NDArray[np.float64]] = []
    influences: list[npt.NDArray[np.float64]] = []
    probed = calls[:PROBED_INPUTS] if sensitivity == "measured" else []
    total = len(calls) * num_inference_steps + len(probed) * probing_calls(num_inference_steps)
    with tqdm(total=total, desc="calibrate", unit="step", disable=not progress) as bar:
        for number, call in enumerate(calls):
            try:
                run = record(
                    pipeline,
                    seeded(pipeline, call, seed + number),
                    boundary=boundary,
                    on_step=lambda _: bar.update(),
                )
                costs = _paper_costs(run, order)
            except CalibrationError as error:
                raise CalibrationError(f"input {number}: {error}") from error
            paper = np.zeros_like(costs[0]) if paper is None else paper
            if costs[0].shape != paper.shape:
                raise CalibrationError(
                    f"input {number} ran {run.num_steps} steps and those before it {len(paper)}: give every input "
                    "the same number of steps."
                )
            paper = sum(costs, start=paper)
            branches += len(costs)
            value_grams.append(run.value_gram().numpy())
            if (gram := run.gram()) is not None:
                grams.append(gram.numpy())
                influences.append(np.array([run.influence[t] for t in range(run.num_steps)]))
        measured = [
            measure(pipeline, partial(seeded, pipeline, call, seed + number), bar.update)
            for number, call in enumerate(probed)
        ]
    assert paper is not None  # there is at least one call
    facts = Facts(
        num_inference_steps=run.num_steps,
        boundary=boundary,
        order=order,
        model=identify(denoisers),
        pipeline=type(pipeline).__name__,
        scheduler=type(pipeline.scheduler).__name__,
        timesteps=run.timesteps,
        num_inputs=len(calls),
        num_branches=len(costs),
        calls=_as_json(calls),
    )
    seen = len(grams) == len(calls)
    influence = np.mean(influences, axis=0) if seen else np.zeros(run.num_steps)
    return Calibration(
        facts=facts,
        paper_cost=paper / branches,
        gram=np.stack(grams) if seen else np.empty((0, run.num_steps, run.num_steps)),
        value_gram=np.stack(value_grams),
        influence=influence,
        sensitivity=interpolated(measured, influence) if measured and seen else np.empty(0),
    )


def _as_json(calls: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...] | None:
    plain = [{name: value for name, value in call.items() if name != "generator"} for call in calls]
    try:
        return tuple(json.loads(json.dumps(plain)))
    except TypeError:
        return None


def _key_steps(num_steps: int, num_key_steps: int | None, speedup: float | None) -> int:
    if (num_key_steps is None) == (speedup is None):
        raise ValueError("give either num_key_steps or speedup.")
    if num_key_steps is not None:
        return num_key_steps
    assert speedup is not None
    if not 1 <= speedup <= num_steps:
        raise ValueError(f"speedup must be from 1 to the number of steps ({num_steps}), got {speedup}.")
    # A hair more, for 50 / 3.5714... is meant as 14.
    return math.floor(num_steps / speedup + 1e-9)


def _forced(method: Method, first_key_steps: int | None) -> int:
    return first_key_steps if first_key_steps is not None else 3 if method == "paper" else 1


def _paper_costs(run: RecordedRun, order: int) -> list[CostTensor]:
    """The paper's cost tensor of every branch."""
    costs = [paper_cost(values, order) for values in run.complete_branches()]
    if not costs:
        raise CalibrationError(
            f"no denoiser call was made at every one of the {run.num_steps} steps, so there is no whole trajectory to "
            "measure. Calibrate with guidance on throughout and from the first step."
        )
    return costs


def _digest(facts: str, tensors: Mapping[str, npt.NDArray[np.float64]]) -> str:
    data = facts.encode() + b"".join(tensors[name].tobytes() for name in _TENSORS)
    return hashlib.sha256(data).hexdigest()
