"""Which plan is best in truth: candidates are run on inputs that they were not fitted to, tuned, and the best is kept.

No single way of planning wins on every model, but trying one is cheap: a run with K key steps costs K full calls.
"""

import hashlib
import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from dpcache.checks import whole
from dpcache.errors import CalibrationError, InfeasibleBudgetError
from dpcache.files.journal import Journal, digest
from dpcache.measure.arguments import checked_calls, checked_seed
from dpcache.measure.calibration import Calibration
from dpcache.measure.fingerprint import fingerprint
from dpcache.measure.measuring import TRIAL_SEED, calibrate
from dpcache.measure.trials import Trial, average_error
from dpcache.plan.planner import checked_budget
from dpcache.plan.recipe import PredictorName, Recipe
from dpcache.plan.schedule import Boundary, Schedule
from dpcache.run.inputs import Input, call_arguments, seeded
from dpcache.run.pipelines import require_disabled

from .tuning import RIDGES, Direction, directions, normal_equations, proposals

#: Of the inputs of `optimize`, the share that is calibrated and tuned on; the candidates are judged on the others.
FITTED_SHARE = 0.6
#: So many candidates are run in all trials and tuned, however badly one of them fares in the first.
FINALISTS = 3


_PREDICTORS: tuple[tuple[PredictorName, int], ...] = (("taylor", 1), ("taylor", 2), ("fitted", 2))
RECIPES = (
    *(Recipe(name, order, share) for share, (name, order) in itertools.product((0.25, 0.5, 0.75, 0.0), _PREDICTORS)),
    Recipe("taylor", 3, 0.5),
    Recipe("fitted", 1, 0.5),
    Recipe("taylor", 2, 0.5, objective="max"),
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
    tune: int = 2,
    seed: int = 0,
    progress: bool = True,
    checkpoint: "str | os.PathLike[str] | None" = None,
    **arguments: Any,
) -> Schedule:
    """Calibrates, plans, selects and tunes: the best schedule for a pipeline, in one call.

    Costs one full run for every input, some 25 to measure what comes of errors (see `calibrate`), and what `select`
    says.

    Args:
        pipeline: a diffusers pipeline.
        inputs: prompts, or dicts of arguments of the pipeline's call; five or more are better than one. The first 60 %
            are calibrated and tuned on, candidates are judged on the others; a single one serves for both, from
            different noise.
        num_inference_steps: T of the pipeline's call.
        num_key_steps: K, the steps to compute in full.
        boundary: what to cache and predict (see `calibrate`).
        num_trials: as in `select`.
        tune: as in `select`.
        seed: of the noise.
        progress: show progress bars.
        checkpoint: a directory that keeps what was measured: called again with it, the rest is done.
        arguments: further arguments of every call; an input's own win.

    Raises:
        CalibrationError, UnsupportedPipelineError, CacheStateError: as `calibrate`.
        InfeasibleBudgetError: no schedule has that many key steps.
        TypeError, ValueError: as `calibrate` and `select`.
    """
    call_arguments(inputs, {})  # says what is wrong with them, if anything is
    checked_budget(num_key_steps, whole("num_inference_steps", num_inference_steps, 1))
    _check(num_trials, tune, seed)
    fitted = math.ceil(FITTED_SHARE * len(inputs))
    calibration = calibrate(
        pipeline,
        inputs[:fitted],
        num_inference_steps=num_inference_steps,
        boundary=boundary,
        sensitivity="measured",
        seed=seed,
        progress=progress,
        checkpoint=checkpoint,
        **arguments,
    )
    return select(
        pipeline,
        calibration,
        num_key_steps,
        inputs=inputs[fitted:] or inputs,
        fitting_inputs=inputs[:fitted],
        num_trials=num_trials,
        tune=tune,
        seed=seed,
        progress=progress,
        checkpoint=Path(checkpoint) / f"select-{num_key_steps}.jsonl" if checkpoint is not None else None,
        **{"num_inference_steps": num_inference_steps, **arguments},
    )


def select(
    pipeline: Any,
    calibration: Calibration,
    num_key_steps: int,
    *,
    inputs: Sequence[Input] | None = None,
    fitting_inputs: Sequence[Input] | None = None,
    recipes: Sequence[Recipe] = RECIPES,
    num_trials: int = 8,
    tune: int = 2,
    seed: int = 0,
    progress: bool = True,
    checkpoint: "str | os.PathLike[str] | None" = None,
    **arguments: Any,
) -> Schedule:
    """The schedule that is best when really run, among plans by several recipes, with its coefficients tuned.

    Every candidate is run in the first two trials; the better half of them goes on to the next, down to three. These
    are tuned: what a change of each hop's prediction does to the final sample is measured in as many further trials,
    solved by least squares, and kept if it lowers the error in the first ones, which it was not fitted to (see
    `dpcache.search.tuning`). Deterministic.

    With n candidates and m trials that takes 2 m full runs, fewer than 3 n + 3 m runs with K full calls to select, and
    to tune at most m K / 2 + 4 m of them for each finalist and each further round.

    Args:
        pipeline: the pipeline that was calibrated.
        calibration: what to plan from.
        num_key_steps: K.
        inputs: what to judge on, best other inputs than were calibrated on; those of the calibration unless given.
            Their noise is other in any case.
        fitting_inputs: what to tune on; those of the calibration unless given. Their noise is other again.
        recipes: how the candidates are planned.
        num_trials: how many runs to judge by, and how many to tune on, at least; with fewer inputs they are repeated
            with other noise.
        tune: rounds of tuning; 0 leaves the coefficients as planned.
        seed: of the noise.
        progress: show a progress bar.
        checkpoint: a file that keeps every result: called again with it, only what is missing is run.
        arguments: of every call, beside inputs that are given; `num_inference_steps` is that of the calibration unless
            given.

    Returns:
        the best schedule, its measured error in `error`.

    Raises:
        CalibrationError: no inputs, or none that a file could keep; no recipes.
        FileFormatError: the checkpoint is of another search.
        InfeasibleBudgetError: no schedule has that many key steps.
        CacheStateError, UnsupportedPipelineError: as `calibrate`.
        TypeError, ValueError: an argument of the wrong type or out of range, or one that the pipeline does not take.
    """
    require_disabled(pipeline)
    _check(num_trials, tune, seed)
    if not isinstance(calibration, Calibration):
        raise TypeError(f"select plans from a dpcache.Calibration, got {type(calibration).__name__}.")
    if not all(isinstance(recipe, Recipe) for recipe in recipes):
        raise TypeError(f"recipes must be dpcache.Recipe, got {recipes!r}.")
    candidates = _candidates(calibration, num_key_steps, recipes)
    defaults = {
        "num_inference_steps": calibration.facts.num_inference_steps,
        "output_type": "latent",
        **arguments,
    }
    judging = checked_calls(pipeline, _known(inputs, calibration), defaults)
    fitting = checked_calls(pipeline, _known(fitting_inputs, calibration), defaults)
    journal = Journal(
        checkpoint, _about(pipeline, calibration, judging, fitting, seed) if checkpoint is not None else {}
    )
    most = _most_runs(len(candidates), len(judging), len(fitting), num_key_steps, num_trials, tune)
    with tqdm(desc="select", unit="run", total=most, disable=not progress) as bar:
        search = _Search(
            calibration,
            _trials(pipeline, judging, num_trials, TRIAL_SEED + seed, journal, "judging", bar.update),
            _trials(pipeline, fitting, num_trials, 2 * TRIAL_SEED + seed, journal, "fitting", bar.update),
        )
        finalists = search.halved(candidates)
        if tune:
            finalists = [search.tuned(finalist) for finalist in finalists]
        best = min(finalists, key=_Candidate.average)
        for _ in range(tune - 1):
            best = search.tuned(best)
        bar.total = bar.n  # most of what a journal knows, or nothing improves on, is not run
    source = f"best of {len(candidates)} plans in {len(search.judging)} trials{best.tuned}: {best.recipe}"
    return best.schedule.model_copy(update={"error": best.average(), "expected_error": None, "source": source})


def _check(num_trials: int, tune: int, seed: int) -> None:
    whole("num_trials", num_trials, 1)
    whole("tune", tune, 0)
    checked_seed(seed)


def _about(pipeline: Any, calibration: Calibration, judging: Any, fitting: Any, seed: int) -> dict[str, Any]:
    """What the results of a search depend on."""
    found = fingerprint(pipeline)
    return {
        "inputs": [judging, fitting],
        "seed": seed,
        "calibration": [calibration.facts.model_dump(), hashlib.sha256(calibration.gram.tobytes()).hexdigest()],
        "scheduler": found.scheduler,
        "model, adapter or weights": [found.pipeline, found.model, found.weights],
    }


@dataclass
class _Candidate:
    schedule: Schedule
    recipe: Recipe
    #: In every trial so far (see `Trial.error`).
    errors: list[float] = field(default_factory=list)
    tuned: str = ""

    def average(self) -> float:
        return average_error(self.errors)


class _Remembered:
    """A trial whose results are kept in a journal."""

    def __init__(self, trial: Trial, journal: Journal, name: str, on_run: Callable[[], object]) -> None:
        self._trial, self._journal, self._name, self._on_run = trial, journal, name, on_run

    def error(self, schedule: Schedule) -> float:
        def measure() -> float:
            found = self._full().error(schedule)
            self._on_run()
            return found

        return float(self._journal.get(f"{self._name}: error of {_name(schedule)}", measure))

    def equations(self, schedule: Schedule, ways: Sequence[Direction]) -> tuple[Any, Any]:
        def measure() -> list[Any]:
            found = normal_equations(self._full(), schedule, ways, self._on_run)
            return [part.tolist() for part in found]

        matrix, vector = self._journal.get(f"{self._name}: equations of {_name(schedule)}", measure)
        return np.array(matrix), np.array(vector)

    def _full(self) -> Trial:
        if not hasattr(self._trial, "full"):
            self._trial.run_in_full()
            self._on_run()
        return self._trial


@dataclass
class _Search:
    calibration: Calibration
    judging: list[_Remembered]
    fitting: list[_Remembered]

    def halved(self, candidates: list[_Candidate]) -> list[_Candidate]:
        """The few that are best in all trials, the best first; the others were run in fewer."""
        kept = candidates
        for number, trial in enumerate(self.judging):
            for candidate in kept:
                candidate.errors.append(trial.error(candidate.schedule))
            kept = sorted(kept, key=_Candidate.average)
            if number:
                kept = kept[: max(FINALISTS, math.ceil(len(kept) / 2))]
        return kept[:FINALISTS]

    def judged(self, candidate: _Candidate) -> _Candidate:
        candidate.errors = [trial.error(candidate.schedule) for trial in self.judging]
        return candidate

    def tuned(self, best: _Candidate) -> _Candidate:
        """The candidate, or one with tuned coefficients, if that is better in the trials it was not fitted to."""
        ways = directions(best.schedule, self.calibration)
        if not ways:
            return best
        equations = [trial.equations(best.schedule, ways) for trial in self.fitting]
        for schedule in proposals(best.schedule, ways, equations):
            tuned = self.judged(_Candidate(schedule, best.recipe, tuned=f", tuned in {len(self.fitting)} more"))
            best = min(best, tuned, key=_Candidate.average)
        return best


def _known(inputs: Sequence[Input] | None, calibration: Calibration) -> Sequence[Input]:
    if inputs is not None:
        return inputs
    if calibration.facts.calls is None:
        raise CalibrationError(
            "this calibration does not know its inputs, because they hold more than text and numbers: pass "
            "some, select(pipe, calibration, num_key_steps, inputs=[...], fitting_inputs=[...])."
        )
    return calibration.facts.calls


def _trials(
    pipeline: Any,
    calls: Sequence[dict[str, Any]],
    least: int,
    seed: int,
    journal: Journal,
    kind: str,
    on_run: Callable[[], object],
) -> list[_Remembered]:
    repeated = list(calls) * math.ceil(least / len(calls))
    return [
        _Remembered(Trial(pipeline, seeded(pipeline, call, seed + number)), journal, f"{kind} {number}", on_run)
        for number, call in enumerate(repeated)
    ]


def _most_runs(candidates: int, judging: int, fitting: int, num_key_steps: int, num_trials: int, tune: int) -> int:
    """About how many runs `select` makes at most, in full, cached or in part, so that its bar has an end."""
    judged, fitted = (inputs * math.ceil(num_trials / inputs) for inputs in (judging, fitting))
    kept, tried = candidates, 0
    for number in range(judged):
        tried += kept
        kept = max(min(kept, FINALISTS), math.ceil(kept / 2)) if number else kept
    rounds = min(candidates, FINALISTS) + tune - 1 if tune else 0
    per_round = fitted * (1 + num_key_steps) + len(RIDGES) * judged
    return judged + tried + (fitted + rounds * per_round if tune else 0)


def _name(schedule: Schedule) -> str:
    return digest(schedule.model_dump(mode="json", include={"key_steps", "predictions", "corrections", "boundary"}))


def _candidates(calibration: Calibration, num_key_steps: int, recipes: Sequence[Recipe]) -> list[_Candidate]:
    """Every different plan, with the recipe that gave it first."""
    found: dict[Any, _Candidate] = {}
    infeasible: Exception = CalibrationError(
        'there are no recipes to select from, or only such as need a calibration with sensitivity="measured".'
    )
    for recipe in recipes:
        if recipe.measured and not calibration.is_measured:
            continue
        try:
            schedule = calibration.plan(num_key_steps, recipe=recipe)
        except InfeasibleBudgetError as error:
            infeasible = error
        else:
            key = (schedule.key_steps, schedule.predictor, schedule.order)
            found.setdefault(key, _Candidate(schedule, recipe))
    if not found:
        raise infeasible
    return list(found.values())
