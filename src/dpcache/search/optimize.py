"""`optimize()`: the best schedule that a budget finds, among candidates of every kind that are run for real."""

import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args, overload

import torch
from tqdm.auto import tqdm

from dpcache.checks import one_of, whole
from dpcache.errors import CalibrationError
from dpcache.files.journal import Journal, digest
from dpcache.measure.arguments import checked_calls, checked_seed
from dpcache.measure.calibration import Calibration
from dpcache.measure.fingerprint import fingerprint
from dpcache.measure.sensitivity import probing_calls
from dpcache.measure.trials import average_error
from dpcache.plan.planner import checked_budget
from dpcache.plan.schedule import Boundary, Schedule
from dpcache.progress import say_how_long
from dpcache.run.denoisers import find_denoisers, identify
from dpcache.run.entry import entered
from dpcache.run.inputs import Input, seeded
from dpcache.run.pipelines import require_disabled

from .budget import Budget, parsed
from .candidates import Candidate, Candidates
from .contest import Contest
from .full_runs import Draw, FullRun, dealt, plain, probed, recorded, with_probes
from .hops import fitted, steps_to_fit
from .objectives import Metric, Objective, ObjectiveName
from .sharing import SharedRuns, Sharing, Spans, begins_late, steps_to_compute, turns

#: Of the budget, the share that goes to full runs; and how many they are.
FULL_SHARE = 0.3
FEWEST_FULL, MOST_FULL = 4, 32
#: With a tiny budget they take no more than this.
MOST_FULL_SHARE = 0.5
#: Of the budget, the share that may go to measuring what an error at a step does to the outcome: on so many inputs, at
#: so many steps.
PROBING_SHARE = 0.25
MOST_PROBED, PROBES = 2, 8
#: On so many inputs the sampler's own K steps are measured, at most.
FEWER_STEPS_INPUTS = 4
#: Coefficients are fitted on so many inputs, at most.
MOST_FITTED = 6
_GONE = ("num_trials", "tune", "polish")


@overload
def optimize(pipeline: Any, inputs: Sequence[Input], *, num_key_steps: int = 13, **arguments: Any) -> Schedule: ...


@overload
def optimize(
    pipeline: Any, inputs: Sequence[Input], *, num_key_steps: Sequence[int], **arguments: Any
) -> dict[int, Schedule]: ...


def optimize(
    pipeline: Any,
    inputs: Sequence[Input],
    *,
    num_key_steps: "int | Sequence[int]" = 13,
    budget: "float | str" = 60,
    num_inference_steps: int = 50,
    boundary: Boundary = "blocks",
    objective: "ObjectiveName | Metric" = "mean",
    seed: int = 0,
    progress: bool = True,
    checkpoint: "str | os.PathLike[str] | None" = None,
    **arguments: Any,
) -> "Schedule | dict[int, Schedule]":
    """The best schedule that a budget finds for a pipeline: candidates are run for real, and the best one is kept.

    Three tenths of the budget go to full runs, 4 to 32 of them. Plans are made from all of them. Coefficients are
    fitted to a third, and candidates are held against the others. Where the budget allows it, it is also measured what
    errors at some steps do to the outcome, as `calibrate` does. Candidates are plans, smooth curves, even spacing and
    ready-made shapes, each with several ways to predict. Many are run on few inputs, and ever fewer on ever more. A few
    inputs show few bad cases, so what a candidate's cost says to expect counts beside its errors. Even spacing, the
    smooth curve and a single plan are run on every input, unless far behind, and the result is never worse than even
    spacing on the inputs that judge. A larger budget runs more candidates on more inputs.

    Args:
        pipeline: a diffusers pipeline.
        inputs: prompts, or dicts of arguments of the pipeline's call, as different as those to come: sixteen are good,
            more are used with budgets above 60. The first third serves for fitting, the others for judging; where
            there are too few they are repeated with other noise.
        num_key_steps: K, the steps to compute in full. With several of them, like (9, 13, 20), a schedule for each
            comes back. They share the full runs; what is left is split in proportion to K, so that as many candidates
            can be tried for each.
        budget: what all runs of the model together may cost. A number counts full runs: one of K computed steps counts
            K / T. A text is a time, like "15 min", "90 s" or "2 h".
        num_inference_steps: T of the pipeline's call.
        boundary: what to cache and predict (see `calibrate`).
        objective: what to make least. `"mean"`: the error of the outputs (RMS difference from the full run's,
            relative), mean over inputs. `"worst"`: the mean error of the worst quarter. Or a function
            metric(output, reference) -> float of two decoded pictures, float [H, W, C] in [0, 1] ([F, H, W, C] for
            clips), lower is better; its values are averaged.
        seed: of the noise.
        progress: show a progress bar.
        checkpoint: a file that keeps every result: called again with it, only what is missing is run. It may be used
            again with another K or a larger budget.
        arguments: further arguments of every call; an input's own win.

    Returns:
        the best schedule; with several K, {K: schedule}. `source` tells what was spent and what has won, `error` its
        measured error.

    Warns:
        UserWarning: K steps of the sampler itself are nearer to the full run than the schedule.

    Raises:
        CalibrationError: no inputs, or inputs of different numbers of steps; or a value was NaN or infinite.
        UnsupportedPipelineError, CacheStateError: as `calibrate`.
        InfeasibleBudgetError: no schedule has that many key steps.
        FileFormatError: the checkpoint is of another search.
        TypeError, ValueError: an argument of the wrong type or out of range, or one that the pipeline does not take.
    """
    _refuse_gone(arguments)
    steps = whole("num_inference_steps", num_inference_steps, 1)
    several = isinstance(num_key_steps, tuple | list | set | frozenset | range)
    given = list(num_key_steps) if isinstance(num_key_steps, Iterable) and several else [num_key_steps]
    wanted = sorted({checked_budget(one, steps) for one in given})  # type: ignore[arg-type]  # it says what is wrong
    if not wanted:
        raise ValueError("num_key_steps is empty: give one number, or several like (9, 13, 20).")
    amount, is_time = parsed(budget)
    if not is_time and amount < 1:
        raise ValueError(f"budget must be one full run or more, got {budget}.")
    goal = Objective(objective)
    one_of("boundary", boundary, get_args(Boundary))
    checked_seed(seed)
    defaults = {"num_inference_steps": steps, "output_type": goal.output_type, **arguments}
    if goal.is_metric:
        defaults["output_type"] = goal.output_type
    calls = checked_calls(pipeline, inputs, defaults)
    _check_same_steps(calls)
    require_disabled(pipeline)
    journal = _journal(checkpoint, pipeline, calls, boundary, goal, seed)
    search = _Search(pipeline, calls, Budget(budget, steps), boundary, goal, seed, journal, progress)
    name = f"result for {wanted} of {budget!r}"
    found = journal.get(name, lambda: {str(k): one for k, one in search.run(wanted).items()})
    schedules = {}
    for k in wanted:
        schedules[k] = Schedule.model_validate(found[str(k)]["schedule"])
        if (warning := found[str(k)]["warning"]) is not None:
            warnings.warn(warning, stacklevel=2)
    return schedules if several else schedules[wanted[0]]


def _refuse_gone(arguments: dict[str, Any]) -> None:
    gone = [name for name in _GONE if name in arguments]
    if gone:
        raise TypeError(
            f"optimize() has no argument {', '.join(gone)} any more: say what the search may cost instead, in full "
            'runs with budget=60, or in time with budget="15 min".'
        )


def _check_same_steps(calls: Sequence[dict[str, Any]]) -> None:
    for number, call in enumerate(calls):
        steps, first = call["num_inference_steps"], calls[0]["num_inference_steps"]
        if whole("num_inference_steps", steps, 1) != first:
            raise CalibrationError(
                f"input {number} takes {steps} steps and those before it {first}: give every input the same number of "
                "steps."
            )


def _journal(
    checkpoint: "str | os.PathLike[str] | None",
    pipeline: Any,
    calls: Sequence[dict[str, Any]],
    boundary: Boundary,
    objective: Objective,
    seed: int,
) -> Journal:
    if checkpoint is None:
        return Journal(None, {})
    if Path(checkpoint).is_dir():
        raise ValueError(f"checkpoint must be a file, {checkpoint} is a directory: name one in it, like search.jsonl.")
    found = fingerprint(pipeline)
    return Journal(
        checkpoint,
        {
            "inputs": calls,
            "boundary": boundary,
            "objective": objective.name,
            "seed": seed,
            "scheduler": found.scheduler,
            "model, adapter or weights": [found.pipeline, found.model, found.weights],
        },
    )


@dataclass
class _Search:
    """One call of `optimize`."""

    pipeline: Any
    calls: Sequence[dict[str, Any]]
    budget: Budget
    boundary: Boundary
    objective: Objective
    seed: int
    journal: Journal
    progress: bool
    full: dict[str, FullRun] = field(default_factory=dict)

    def run(self, wanted: Sequence[int]) -> dict[int, dict[str, Any]]:
        """For each K the schedule, and what there is to be warned of."""
        total = round(self.budget.total) if self.budget.is_time else round(self.budget.total * self.budget.num_steps)
        unit = "s" if self.budget.is_time else "step"
        with tqdm(total=total, desc="optimize", unit=unit, disable=not self.progress) as self.bar:
            fitting, judging = self._full_runs()
            first = self.full[fitting[0].name]
            for k in wanted:  # the loop may take fewer steps than it was called for
                checked_budget(k, first.num_steps)
            found = {}
            for place, k in enumerate(wanted):
                others = sum(wanted[place + 1 :])
                reserve = self.budget.left() * others / (k + others)
                found[k] = self._best(k, fitting, judging, reserve)
            self.bar.total = self.bar.n
        return found

    def _full_runs(self) -> tuple[list[Draw], list[Draw]]:
        """Runs the first one, which tells how many there may be, and then the others."""
        draw = dealt(self.calls, 2, self.seed)[0][0]
        self._record(draw, samples=True)
        self.budget.settle(self.full[draw.name].num_steps)
        if self.progress:
            self._say_how_long()
        fitting, judging = dealt(self.calls, self._number_of_full_runs(), self.seed)
        for draw in [*fitting, *judging]:
            self._record(draw, samples=draw in fitting[:MOST_FITTED])
        self._probe(fitting)
        return fitting, judging

    def _probe(self, fitting: Sequence[Draw]) -> None:
        """Measures what an error at a step does to the outcome, on as many inputs as the budget allows."""
        steps = probing_calls(self.budget.num_steps, PROBES)
        number = min(int(PROBING_SHARE * self.budget.total / self.budget.cost(steps)), MOST_PROBED)
        for draw in fitting[:number]:
            run = self.full[draw.name]
            if run.calibration is None or not len(run.calibration.gram):
                break
            found = self.counted(f"sensitivity, {draw.name}", steps, partial(probed, self.pipeline, draw, PROBES))
            self.full[draw.name] = with_probes(run, found)

    def _number_of_full_runs(self) -> int:
        one = self.budget.cost(self.budget.num_steps)
        affordable = self.budget.total / one
        usual = min(max(int(FULL_SHARE * affordable), FEWEST_FULL), MOST_FULL)
        return max(1, min(usual, int(MOST_FULL_SHARE * affordable)))

    def _say_how_long(self) -> None:
        one = self.budget.cost(self.budget.num_steps) if self.budget.is_time else self.budget.seconds_per_full_run()
        long = self.budget.total if self.budget.is_time else one * self.budget.total
        say_how_long("optimize", "search", one, long)

    def _record(self, draw: Draw, *, samples: bool) -> None:
        if draw.name in self.full:
            return
        kept = None

        def measure() -> dict[str, Any]:
            nonlocal kept
            run = recorded(self.pipeline, draw, self.boundary, self.objective, samples=samples)
            kept = run.samples
            return run.to_json()

        found = self.counted(f"full run, {draw.name}", self.budget.num_steps, measure)
        self.full[draw.name] = replace(FullRun.from_json(found), samples=kept)

    def counted(self, name: str, steps: int, measure: Callable[[], Any]) -> Any:
        """The result of this name, which computes so many steps; what a checkpoint knows is counted all the same."""

        def timed() -> dict[str, Any]:
            start = time.perf_counter()
            result = measure()
            return {"result": result, "seconds": time.perf_counter() - start}

        is_known = self.journal.knows(name)
        found = self.journal.get(name, timed)
        self.budget.count(steps, found["seconds"], earlier=is_known)
        self.bar.update(round(self.budget.spent()) - self.bar.n if self.budget.is_time else steps)
        return found["result"]

    def _best(self, k: int, fitting: Sequence[Draw], judging: Sequence[Draw], reserve: float) -> dict[str, Any]:
        first = self.full[fitting[0].name]
        parts = [run.calibration for run in self.full.values() if run.calibration is not None]
        candidates = Candidates(
            k,
            first.num_steps,
            Calibration.merged(parts) if parts else None,
            boundary=self.boundary,
            model=identify(find_denoisers(self.pipeline)),
            sigmas=first.sigmas,
        )
        fewer = self._fewer_steps(k, judging, first.num_steps)
        sharing = Sharing()
        with entered(self.pipeline, self.boundary, sharing):
            trials = _Trials(self, sharing, fitting[:MOST_FITTED], judging, candidates, reserve, first.spans)
            contest = Contest(
                candidates, len(judging), trials, self.objective.average, expects=not self.objective.is_metric
            )
            best = contest.best()
        errors = list(best.errors.values())
        measured = self.objective.average(errors) if errors else None
        source = f"{best}: best of {len(contest.tried)} candidates, found with {self.budget}"
        if measured is not None:
            inputs = f"{len(errors)} input{'s' if len(errors) > 1 else ''}"
            source += f"; {self._what(measured)} on {inputs}"
        error = None if self.objective.is_metric or not errors else average_error(errors)
        schedule = best.schedule.model_copy(update={"error": error, "source": source})
        return {"schedule": schedule.model_dump(mode="json"), "warning": self._warning(k, fewer, best)}

    def _fewer_steps(self, k: int, judging: Sequence[Draw], num_steps: int) -> list[float]:
        """Errors of the sampler's own K steps on the first inputs; none where it cannot be asked for them."""
        errors: list[float] = []
        for draw in judging[:FEWER_STEPS_INPUTS]:
            call = draw.call
            given = call.get("sigmas") is not None or call.get("timesteps") is not None
            if given or num_steps != call["num_inference_steps"] or k == num_steps or not self._affords_more(k):
                break
            name = f"{k} steps of the sampler, {draw.name}"
            errors.append(self.counted(name, k, partial(self._error_of_fewer_steps, draw, k)))
        return errors

    def _affords_more(self, k: int) -> bool:
        """Whether the plain ways are affordable beside."""
        return self.budget.affords(10 * k)

    def _error_of_fewer_steps(self, draw: Draw, k: int) -> float:
        found = plain(self.pipeline, draw, self.objective, num_inference_steps=k)
        return self.objective.error(found.output, self.full[draw.name].output)

    def _what(self, value: float) -> str:
        shown = self.objective.shown(value)
        return f"{self.objective.name} {shown}" if self.objective.is_metric else f"{self.objective.name} error {shown}"

    def _warning(self, k: int, fewer: Sequence[float], best: Candidate) -> str | None:
        count = min(len(fewer), len(best.errors))
        if not count:
            return None
        theirs = self.objective.average(fewer[:count])
        ours = self.objective.average([best.errors[number] for number in range(count)])
        if theirs >= ours:
            return None
        return (
            f"{k} steps of the sampler itself are nearer to the full run ({self._what(theirs)}) than the best schedule "
            f"with {k} key steps ({self._what(ours)}): call the pipeline with num_inference_steps={k} and no schedule, "
            "or take more key steps."
        )


class _Trials:
    """Runs candidates for `Contest`.

    Args:
        search: the search.
        sharing: watches its pipeline.
        fitting: the inputs that coefficients are fitted on.
        judging: the inputs.
        candidates: what is run.
        reserve: what other numbers of key steps need of the budget.
        spans: as in `sharing.known_until`.
    """

    def __init__(
        self,
        search: _Search,
        sharing: Sharing,
        fitting: Sequence[Draw],
        judging: Sequence[Draw],
        candidates: Candidates,
        reserve: float,
        spans: Spans,
    ) -> None:
        self._search, self._sharing = search, sharing
        self._fitting, self._judging, self._candidates = fitting, judging, candidates
        self._num_key_steps, self._reserve, self._spans = candidates.num_key_steps, reserve, spans
        self._runs = self._steps = 0

    def run(self, candidates: Sequence[Candidate], number: int, beside: int = 0) -> bool:
        """As `contest.Trials`: the ones that share most after each other."""
        search, draw = self._search, self._judging[number]
        arguments = seeded(search.pipeline, draw.call, draw.seed)
        runs = self._sharing.runs(search.pipeline, arguments, self._spans)
        reserve = self._reserve + beside * search.budget.cost(self._num_key_steps)
        before: Schedule | None = None
        for one in sorted((one for one in candidates if number not in one.errors), key=self._place):
            steps = steps_to_compute(before, one.schedule, self._spans)
            if not search.budget.affords(steps, reserve):
                return False

            def measure(schedule: Schedule = one.schedule) -> float:
                return search.objective.error(
                    search.objective.output(runs.run(schedule)), search.full[draw.name].output
                )

            one.errors[number] = search.counted(f"{_name(one.schedule)}, {draw.name}", steps, measure)
            self._runs, self._steps = self._runs + 1, self._steps + steps
            before = one.schedule
        return True

    def fit(self, candidate: Candidate, beside: int = 0) -> Schedule | None:
        """As `contest.Trials`: the runs of all inputs go along together, hop by hop, so each computes a step once."""
        search, steps = self._search, self.runs_to_fit * steps_to_fit(candidate.schedule)
        if not steps or not search.budget.affords(
            steps, self._reserve + beside * search.budget.cost(self._num_key_steps)
        ):
            return None
        name = f"fitted, {_name(candidate.schedule)}, on {', '.join(draw.name for draw in self._fitting)}"
        found = search.counted(name, steps, lambda: self._fit(candidate))
        return None if found is None else Schedule.model_validate(found)

    def _fit(self, candidate: Candidate) -> dict[str, Any] | None:
        search = self._search
        calls = [seeded(search.pipeline, draw.call, draw.seed) for draw in self._fitting]
        runs = [self._sharing.runs(search.pipeline, call, self._spans) for call in calls]
        full = [self._samples(draw, run) for draw, run in zip(self._fitting, runs, strict=True)]
        if not all(full):
            return None
        try:
            made = fitted(candidate.schedule, runs, full, partial(self._candidates.correct, candidate))
        except CalibrationError:  # samples of a kind that is not seen
            return None
        return made.model_dump(mode="json")

    def _samples(self, draw: Draw, run: SharedRuns) -> Mapping[int, torch.Tensor]:
        """Those of a full run, all or none; what a checkpoint knows is run again for them, once."""
        known = self._search.full[draw.name]
        if known.samples is None:
            found = run.samples(Schedule.uniform(known.num_steps, known.num_steps, boundary=self._search.boundary))
            known = replace(known, samples=found if len(found) == known.num_steps else {})
            self._search.full[draw.name] = known
        return known.samples or {}

    @property
    def runs_to_fit(self) -> int:
        """As `contest.Trials`."""
        return 0 if begins_late(self._spans) else len(self._fitting)

    def affordable(self, beside: int = 0, *, shared: bool = True) -> float:
        """As `contest.Trials`."""
        budget, alone = self._search.budget, self._num_key_steps
        steps = self._steps / self._runs if shared and self._runs else alone
        left = budget.left() - self._reserve - beside * budget.cost(alone)
        return max(0.0, left) / max(budget.cost(steps), 1e-9)

    def _place(self, candidate: Candidate) -> Any:
        return (candidate.schedule.order if begins_late(self._spans) else 0), turns(candidate.schedule)


def _name(schedule: Schedule) -> str:
    return digest(schedule.model_dump(mode="json", include={"key_steps", "predictions", "corrections"}))
