"""Which plan is best in truth: candidates are run on inputs that they were not fitted to, and the best is kept.

No single way of planning wins on every model, but trying one is cheap: a run with K key steps costs K full calls.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from .cache import enabled, require_disabled
from .calibration import Calibration, Method, PredictorName, calibrate
from .errors import CalibrationError, InfeasibleBudgetError
from .inputs import Input, call_arguments, seeded
from .recording import quiet
from .schedule import Boundary, Schedule

#: Of the inputs of `optimize`, the share that is calibrated on; the candidates are run on the others.
FITTED_SHARE = 0.6
#: Seeds of selection are so far from those of calibration that they never meet.
SEED_OFFSET = 1_000_000
#: So many candidates are run in all trials, however badly one of them fares in the first.
FINALISTS = 3


@dataclass(frozen=True)
class Recipe:
    """One way to plan.

    Attributes:
        method: how errors are judged (see `Calibration.cost`).
        predictor: what predicts (see `Calibration.predictor`).
        order: its order.
        power: of errors in the cost (see `costs.sampler_cost`).
        first_key_steps: steps forced at the beginning.
        last_key_steps: steps forced at the end.
    """

    predictor: PredictorName = "taylor"
    order: int = 2
    method: Method = "sampler"
    power: float = 1.0
    first_key_steps: int = 1
    last_key_steps: int = 0

    def __str__(self) -> str:
        forced = f"{self.first_key_steps} forced at the start"
        forced += f" and {self.last_key_steps} at the end" if self.last_key_steps else ""
        power = f" to the power {self.power:g}" if self.power != 1 else ""
        return f"{self.predictor} of order {self.order}, errors by the {self.method} weights{power}, {forced}"


_PREDICTORS: tuple[tuple[PredictorName, int], ...] = (
    ("taylor", 1),
    ("taylor", 2),
    ("taylor", 3),
    ("fitted", 1),
    ("fitted", 2),
)
_JUDGEMENTS: tuple[tuple[Method, int], ...] = (("measured", 1), ("sampler", 1), ("sampler", 3))
RECIPES = tuple(
    Recipe(predictor, order, method, first_key_steps=first)
    for (method, first), (predictor, order) in itertools.product(_JUDGEMENTS, _PREDICTORS)
)
"""What `select` and `optimize` try; what was not measured is left out."""


def optimize(
    pipeline: Any,
    inputs: Sequence[Input],
    *,
    num_inference_steps: int = 50,
    num_key_steps: int = 13,
    boundary: Boundary = "blocks",
    num_trials: int = 8,
    polish: int = 0,
    seed: int = 0,
    progress: bool = True,
    **arguments: Any,
) -> Schedule:
    """Calibrates, plans and selects: the best schedule for a pipeline, in one call.

    Costs one full run for every input, nine for each of two to measure the sensitivity (see `calibrate`), and the full
    calls that `select` says: about 50 full runs for five inputs.

    Args:
        pipeline: a diffusers pipeline.
        inputs: prompts, or dicts of arguments of the pipeline's call; five or more are better than one. The first 60 %
            are calibrated on, candidates are run on the others; a single one serves for both, from different noise.
        num_inference_steps: T of the pipeline's call.
        num_key_steps: K, the steps to compute in full.
        boundary: what to cache and predict (see `calibrate`).
        num_trials: as in `select`.
        polish: as in `select`.
        seed: of the noise.
        progress: show progress bars.
        arguments: further arguments of every call; an input's own win.

    Raises:
        CalibrationError, UnsupportedPipelineError, CacheStateError: as `calibrate`.
        InfeasibleBudgetError: no schedule has that many key steps.
    """
    call_arguments(inputs, {})  # says what is wrong with them, if anything is
    fitted = math.ceil(FITTED_SHARE * len(inputs))
    calibration = calibrate(
        pipeline,
        inputs[:fitted],
        num_inference_steps=num_inference_steps,
        boundary=boundary,
        sensitivity="measured",
        seed=seed,
        progress=progress,
        **arguments,
    )
    return select(
        pipeline,
        calibration,
        num_key_steps,
        inputs=inputs[fitted:] or inputs,
        num_trials=num_trials,
        polish=polish,
        seed=seed,
        progress=progress,
        **{"num_inference_steps": num_inference_steps, **arguments},
    )


def select(
    pipeline: Any,
    calibration: Calibration,
    num_key_steps: int,
    *,
    inputs: Sequence[Input] | None = None,
    recipes: Sequence[Recipe] = RECIPES,
    num_trials: int = 8,
    polish: int = 0,
    seed: int = 0,
    progress: bool = True,
    **arguments: Any,
) -> Schedule:
    """The plan that is best when really run, among those by several recipes.

    Every candidate is run in the first two trials; the better half of them goes on to the next, down to three. With n
    candidates and m trials that takes m full runs and fewer than 3 n + 3 m runs with K full calls. Deterministic.

    Args:
        pipeline: the pipeline that was calibrated.
        calibration: what to plan from.
        num_key_steps: K.
        inputs: what to run, best other inputs than were calibrated on; those of the calibration unless given. Their
            noise is other in any case.
        recipes: how the candidates are planned.
        num_trials: how many runs to judge by, at least; with fewer inputs they are repeated with other noise.
        polish: how many further runs with K full calls may be spent on moving single key steps of the best plan, each
            move kept if it lowers the error over all trials.
        seed: of the noise.
        progress: show a progress bar.
        arguments: of every call, beside inputs that are given; `num_inference_steps` is that of the calibration unless
            given.

    Returns:
        the best schedule, its measured error in `error`.

    Raises:
        CalibrationError: no inputs, or none that a file could keep; no recipes.
        InfeasibleBudgetError: no schedule has that many key steps.
        CacheStateError, UnsupportedPipelineError: as `calibrate`.
    """
    require_disabled(pipeline)
    candidates = _candidates(calibration, num_key_steps, recipes)
    steps = calibration.facts.num_inference_steps
    if inputs is None:
        if calibration.facts.calls is None:
            raise CalibrationError(
                "this calibration does not know its inputs, for there was more among them than text and numbers: pass "
                "some, select(pipe, calibration, num_key_steps, inputs=[...])."
            )
        inputs = calibration.facts.calls
    calls = call_arguments(inputs, {"num_inference_steps": steps, "output_type": "latent", **arguments})
    calls *= math.ceil(num_trials / len(calls))
    trials = [_Trial(pipeline, seeded(pipeline, call, SEED_OFFSET + seed + n)) for n, call in enumerate(calls)]
    kept = candidates
    with tqdm(desc="select", unit="run", disable=not progress) as bar:
        for number, trial in enumerate(trials):
            trial.run_in_full()
            bar.update()
            for candidate in kept:
                candidate.errors.append(trial.error(candidate.schedule))
                bar.update()
            kept = sorted(kept, key=_Candidate.mean_error)
            if number:
                kept = kept[: max(FINALISTS, math.ceil(len(kept) / 2))]
        best = kept[0]
        for candidate in _moves(best, calibration, polish // len(trials)):
            candidate.errors = [trial.error(candidate.schedule) for trial in trials]
            bar.update(len(trials))
            best = min(best, candidate, key=_Candidate.mean_error)
    source = f"best of {len(candidates)} plans in {len(trials)} trials: {best.recipe}"
    return best.schedule.model_copy(update={"error": 10 ** best.mean_error(), "source": source})


@dataclass
class _Candidate:
    schedule: Schedule
    recipe: Recipe
    #: log10 of the relative RMS error in every trial so far.
    errors: list[float] = field(default_factory=list)

    def mean_error(self) -> float:
        return float(np.mean(self.errors))


class _Trial:
    """One call of the pipeline, in full and with one schedule after another."""

    def __init__(self, pipeline: Any, arguments: dict[str, Any]) -> None:
        self.pipeline, self.arguments = pipeline, arguments

    def run_in_full(self) -> None:
        self.full = self._run()

    def error(self, schedule: Schedule) -> float:
        with enabled(self.pipeline, schedule):
            difference = self._run() - self.full
        # Where nothing differs at all, a difference far below any rounding keeps the logarithm finite.
        relative = float(np.linalg.norm(difference) / np.linalg.norm(self.full))
        return math.log10(max(relative, 1e-12))

    def _run(self) -> npt.NDArray[np.float64]:
        with quiet(self.pipeline):
            output = self.pipeline(**seeded(self.pipeline, self.arguments, 0))[0]
        return np.asarray(torch.as_tensor(output).to("cpu", torch.float64))


def _candidates(calibration: Calibration, num_key_steps: int, recipes: Sequence[Recipe]) -> list[_Candidate]:
    """Every different plan, with the recipe that gave it first."""
    found: dict[Any, _Candidate] = {}
    infeasible: Exception = CalibrationError(
        'there are no recipes to select from, or only such as need a calibration with sensitivity="measured".'
    )
    for recipe in recipes:
        if recipe.method == "measured" and not len(calibration.sensitivity):
            continue
        try:
            schedule = calibration.plan(num_key_steps, **vars(recipe))
        except InfeasibleBudgetError as error:
            infeasible = error
        else:
            key = (schedule.key_steps, schedule.predictor, schedule.order)
            found.setdefault(key, _Candidate(schedule, recipe))
    if not found:
        raise infeasible
    return list(found.values())


def _moves(best: _Candidate, calibration: Calibration, count: int) -> Iterator[_Candidate]:
    """At most `count` candidates, each with one key step moved by one or two from the best known by then.

    The one that receives them measures each before it asks for the next.
    """
    tried = {best.schedule.key_steps}
    while count:
        keys = best.schedule.key_steps
        moved = [
            tuple(sorted({*keys[:place], key + way, *keys[place + 1 :]}))
            for way in (1, -1, 2, -2)
            for place, key in enumerate(keys)
        ]
        last = best.schedule.num_inference_steps - 1
        fresh = [m for m in moved if len(m) == len(keys) and m[0] == 0 and m[-1] <= last and m not in tried]
        if not fresh:
            return
        for steps in fresh:
            tried.add(steps)
            candidate = _Candidate(calibration.schedule(steps, best.recipe.predictor, best.recipe.order), best.recipe)
            yield candidate
            count -= 1
            if not count:
                return
            if candidate.mean_error() < best.mean_error():
                best = candidate
                break
