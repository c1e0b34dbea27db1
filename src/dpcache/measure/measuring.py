"""`calibrate()`: full runs on a few inputs, and what was measured in them."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from tqdm.auto import tqdm

from dpcache.checks import one_of, whole
from dpcache.errors import CalibrationError
from dpcache.files.journal import Journal, digest
from dpcache.plan.costs import CostTensor
from dpcache.plan.schedule import Boundary, ModelIdentity
from dpcache.progress import say_how_long
from dpcache.run.denoisers import find_denoisers, identify
from dpcache.run.inputs import Input, seeded
from dpcache.run.schedulers import prediction_type

from .arguments import checked_calls, checked_seed
from .calibration import Calibration
from .calibration_file import Facts
from .fingerprint import require_same
from .paper import paper_cost
from .recording import RecordedRun, record
from .sensitivity import measure, probing_calls, ratios
from .trials import Trial, average_error

#: How to find what comes of an error: from the sampler alone, or by repeating runs with one.
Sensitivity = Literal["sampler", "measured"]
#: So many inputs are probed where the sensitivity is measured.
PROBED_INPUTS = 2
#: So many inputs are run with three plans, of these T / K, to know what errors to expect.
TRIED_INPUTS = 4
TRIED_SPEEDUPS = (8, 5, 3)
#: Seeds of trials are so far from those of calibration that they never meet.
TRIAL_SEED = 1_000_000


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
    checkpoint: "str | os.PathLike[str] | None" = None,
    **arguments: Any,
) -> Calibration:
    """Runs the pipeline in full on a few inputs and measures what predicting each stretch of steps would cost.

    Five inputs do, and one nearly does (DPCache, arXiv 2602.22654); `optimize` makes use of sixteen. The
    pipeline is left as it was.

    Args:
        pipeline: a diffusers pipeline.
        inputs: prompts, or dicts of arguments of the pipeline's call; each is one call.
        num_inference_steps: T; schedules planned from the calibration are for this many steps.
        boundary: what to cache and predict: `"blocks"`, the last transformer block's output, or `"output"`, the
            denoiser's.
        order: order of the Taylor prediction.
        sensitivity: `"measured"` repeats the runs of the first two inputs with a prediction at one step, for about a
            dozen steps, to find how much it matters there: some nine full runs each. Then it runs three plans on four
            inputs, to find what errors to expect: some seven full runs in all. Plans are far better for it where errors
            in the first steps make other pictures, and `plan(max_error=...)` needs it.
        seed: input n gets a generator seeded with `seed + n`, unless it brings its own.
        progress: show a progress bar.
        checkpoint: a directory that keeps what was measured of each input: called again with it, only the others are
            run. It also keeps which pipeline, scheduler, model, adapters and weights they were measured with.
        arguments: further arguments of every call; an input's own win.

    Raises:
        CalibrationError: no inputs, or a value was NaN or infinite (the message names input and step); or the
            checkpoint was measured on other inputs, in another way, or with another model, adapter or scheduler.
        UnsupportedPipelineError: the pipeline cannot be followed, or not at this boundary.
        CacheStateError: dpcache is enabled on the pipeline.
        TypeError, ValueError: an unknown name, or a number out of range.
    """
    defaults = {"num_inference_steps": num_inference_steps, "output_type": "latent", **arguments}
    _check(boundary, order, sensitivity, seed)
    calls = checked_calls(pipeline, inputs, defaults)
    _check_steps(calls, order)
    folder = None if checkpoint is None else Path(checkpoint)
    if folder is not None:
        require_same(folder, pipeline)
    probed = PROBED_INPUTS if sensitivity == "measured" else 0
    tried = calls[:TRIED_INPUTS] if sensitivity == "measured" else []
    steps = num_inference_steps
    per_trial = steps + sum(_tried_budgets(steps))
    total = len(calls) * steps + min(probed, len(calls)) * probing_calls(steps) + len(tried) * per_trial
    with tqdm(total=total, desc="calibrate", unit="step", disable=not progress) as bar:
        parts = []
        told = _told_once(bar, steps) if progress else None
        for number, call in enumerate(calls):
            one = _One(pipeline, call, number, seed + number, boundary, order, number < probed, told)
            parts.append(one.measured(folder, bar.update, steps))
        found = _merged(parts)
        if tried and len(found.gram):
            about = {"inputs": calls, "seed": seed, "boundary": boundary, "order": order}
            journal = Journal(None if folder is None else folder / "tried.jsonl", about)
            found = _tried_out(pipeline, found, tried, TRIAL_SEED + seed, journal, partial(bar.update, per_trial))
    return found


def _told_once(bar: Any, steps: int) -> Callable[[float], None]:
    """Says how long the rest will take, given the seconds of a full run; once."""
    said = False

    def tell(seconds: float) -> None:
        nonlocal said
        if not said:
            # The run itself is on the bar already.
            left = bar.total - bar.n + steps
            say_how_long("calibrate", "whole" if left == bar.total else "rest", seconds, seconds * left / steps)
        said = True

    return tell


def _check(boundary: str, order: int, sensitivity: str, seed: int) -> None:
    one_of("boundary", boundary, get_args(Boundary))
    one_of("sensitivity", sensitivity, get_args(Sensitivity))
    whole("order", order, 0)
    checked_seed(seed)


def _check_steps(calls: Sequence[dict[str, Any]], order: int) -> None:
    for number, call in enumerate(calls):
        if whole("num_inference_steps", call["num_inference_steps"], 1) <= order:
            raise ValueError(
                f"order={order} needs more than {order} steps, input {number} has {call['num_inference_steps']}: "
                "give more steps, or a lower order."
            )


def _merged(parts: Sequence[Calibration]) -> Calibration:
    """One calibration of all inputs, in their order."""
    first = parts[0].facts.num_inference_steps
    for number, part in enumerate(parts):
        if part.facts.num_inference_steps != first:
            raise CalibrationError(
                f"input {number} ran {part.facts.num_inference_steps} steps and those before it {first}: give every "
                "input the same number of steps."
            )
    return Calibration.merged(parts)


@dataclass(frozen=True)
class _One:
    """One input, and how to measure it."""

    pipeline: Any
    call: dict[str, Any]
    number: int
    seed: int
    boundary: Boundary
    order: int
    probe: bool
    told: "Callable[[float], object] | None"
    """Is given the seconds of the full run."""

    def measured(self, folder: Path | None, on_steps: Callable[..., object], steps: int) -> Calibration:
        """Its calibration: from the checkpoint, or by running it, and then put there."""
        kept = None if folder is None else folder / f"input-{self.number}-seed-{self.seed}.safetensors"
        if kept is not None and kept.exists():
            on_steps(steps + self.probe * probing_calls(steps))
            return self._resumed(kept)
        try:
            part = self._run(on_steps)
        except CalibrationError as error:
            raise CalibrationError(f"input {self.number}: {error}") from error
        if kept is not None:
            part.save(kept)
        return part

    def _run(self, on_step: Callable[[], object]) -> Calibration:
        pipeline, begun = self.pipeline, time.perf_counter()
        run = record(
            pipeline, seeded(pipeline, self.call, self.seed), boundary=self.boundary, on_step=lambda _: on_step()
        )
        if self.told is not None:
            self.told(time.perf_counter() - begun)
        part = from_run(
            run,
            boundary=self.boundary,
            order=self.order,
            model=identify(find_denoisers(pipeline)),
            pipeline=type(pipeline).__name__,
            scheduler=type(pipeline.scheduler).__name__,
            prediction=prediction_type(pipeline.scheduler),
            calls=_as_json([self.call]),
            device=device_of(pipeline),
        )
        if not self.probe or not len(part.gram):
            return part
        moved = measure(pipeline, partial(seeded, pipeline, self.call, self.seed), on_step)
        return replace(part, probes=ratios(moved, part.influence[0])[None])

    def _resumed(self, path: Path) -> Calibration:
        """What a checkpoint keeps of the input, if it is of this one."""
        part = Calibration.load(path)
        facts = part.facts
        # Where the scheduler's steps could not be seen there was nothing to probe.
        probed = self.probe and len(part.gram) > 0
        same = (facts.calls, facts.boundary, facts.order) == (_as_json([self.call]), self.boundary, self.order)
        if not same or part.is_measured != probed:
            raise CalibrationError(
                f"{path} was measured on another input {self.number}, or in another way: go on with the same "
                "arguments, or give another checkpoint."
            )
        return part


def from_run(
    run: RecordedRun,
    *,
    boundary: Boundary,
    order: int,
    model: ModelIdentity,
    pipeline: str,
    scheduler: str,
    prediction: str | None,
    calls: tuple[dict[str, Any], ...] | None = None,
    device: Any = None,
) -> Calibration:
    """The calibration of one recorded run.

    Args:
        run: what was recorded.
        boundary: where its values were read.
        order: of the Taylor prediction whose errors the paper's cost holds.
        model: the model that ran.
        pipeline: class name of what called it.
        scheduler: class name of what stepped.
        prediction: as in `Facts`.
        calls: as in `Facts`.
        device: where to compute the paper's cost; by default where the values are.

    Raises:
        CalibrationError: no branch was called at every step.
        ValueError: the run has too few steps for the order.
    """
    steps = run.num_steps
    if steps <= order:
        raise CalibrationError(
            f"the loop took {steps} step{'s' if steps > 1 else ''}, but predictions of order {order} are made from "
            f"{order + 1} steps and more: take more steps (or, where it begins with a picture, a larger "
            "strength), or calibrate with a lower order."
        )
    costs = _paper_costs(run, order, device)
    gram = run.gram()
    empty = np.empty((0, steps))
    return Calibration(
        facts=Facts(
            num_inference_steps=steps,
            boundary=boundary,
            order=order,
            model=model,
            pipeline=pipeline,
            scheduler=scheduler,
            timesteps=run.timesteps,
            sigmas=run.sigmas,
            prediction=prediction,
            num_inputs=1,
            num_branches=len(costs),
            calls=calls,
        ),
        paper_cost=np.asarray(sum(costs) / len(costs)),
        gram=gram.numpy()[None] if gram is not None else np.empty((0, steps, steps)),
        value_gram=run.value_gram().numpy()[None],
        influence=np.array([[run.influence[t] for t in range(steps)]]) if gram is not None else empty,
        probes=empty,
        tried=empty,
        tried_error=np.empty(0),
    )


def _tried_out(
    pipeline: Any,
    found: Calibration,
    calls: Sequence[dict[str, Any]],
    seed: int,
    journal: Journal,
    on_trial: Callable[[], object],
) -> Calibration:
    """The calibration, with the errors of its own plans, run from other noise."""
    plans = [found.plan(budget) for budget in _tried_budgets(found.facts.num_inference_steps)]

    def errors(number: int, call: dict[str, Any]) -> list[float]:
        trial = Trial(pipeline, seeded(pipeline, call, seed + number))
        trial.run_in_full()
        return [trial.error(plan) for plan in plans]

    rows = []
    for number, call in enumerate(calls):
        rows.append(journal.get(f"trial {number}", partial(errors, number, call)))
        on_trial()
    tried = np.zeros((len(plans), found.facts.num_inference_steps))
    for row, plan in zip(tried, plans, strict=True):
        row[list(plan.key_steps)] = 1.0
    return replace(
        found, tried=tried, tried_error=np.array([average_error(errors) for errors in zip(*rows, strict=True)])
    )


def _tried_budgets(num_steps: int) -> list[int]:
    return sorted({max(2, num_steps // speedup) for speedup in TRIED_SPEEDUPS} & set(range(2, num_steps)))


def _as_json(calls: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The calls without their generators; of a picture or a tensor what tells it from others."""
    plain = [{name: value for name, value in call.items() if name != "generator"} for call in calls]
    return tuple(json.loads(json.dumps(plain, default=lambda value: f"{type(value).__name__} {digest(value)}")))


def device_of(pipeline: Any) -> Any:
    """Where the pipeline computes: its weights may be elsewhere, with offloading."""
    found = getattr(pipeline, "_execution_device", None)
    return found if found is not None else next(find_denoisers(pipeline)[0].parameters()).device


def _paper_costs(run: RecordedRun, order: int, device: Any) -> list[CostTensor]:
    """The paper's cost tensor of every branch, computed where the pipeline runs."""
    costs = [paper_cost(values, order, device=device) for values in run.complete_branches()]
    if not costs:
        raise CalibrationError(
            f"no denoiser call was made at every one of the {run.num_steps} steps, so there is no whole trajectory to "
            "measure. Calibrate with guidance on throughout and from the first step."
        )
    return costs
