"""ComfyUI: a MODEL that follows a schedule, and one that calibrates in its own sampling runs.

Both go through ComfyUI's wrappers, which compose with those of other nodes: `sampler_sample` around a sampler's run,
`predict_noise` around one evaluation by the sampler, guidance included, and `apply_model` around a call of the network
(`WrappersMP` in comfy/patcher_extension.py, `ModelPatcher.add_wrapper_with_key` in comfy/model_patcher.py, `CFGGuider`
in comfy/samplers.py; https://docs.comfy.org). What is remembered belongs to one sampling run: it is made when the run
begins, handed down in its `transformer_options`, and gone with it, whatever ended it.

What is cached is (x - denoised) / sigma, the derivative that samplers step along: the output of a model that predicts
flow or noise, and as good for every other. Which evaluation is which step is known before the first: see `rehearsal`.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dpcache.errors import CacheStateError, CalibrationError, DPCacheError, ScheduleMismatchError
from dpcache.measure.calibration import Calibration
from dpcache.plan.matching import part_by_levels
from dpcache.plan.schedule import ModelIdentity, Schedule
from dpcache.run.plans import Plans, plans_for

from .calibration_file import CalibrationFile
from .models import identity, prediction, predicts
from .rehearsal import Rehearsal, rehearse
from .runs import Following, Recording, Running
from .voice import Node, Voice

__all__ = ["Calibration", "Node", "Schedule", "apply", "calibrate", "identity", "plan_and_apply", "prediction"]

KEY = "dpcache"
"""Of the wrappers, and of the running state in `transformer_options`."""
#: The values of ComfyUI's `WrappersMP`.
_RUN, _EVALUATION, _NETWORK = "sampler_sample", "predict_noise", "apply_model"

#: What a run over these noise levels follows; None, and a word, if it has to be computed in full.
Plan = Callable[[Sequence[float], Callable[[str], None]], Schedule | None]


def apply(model: Any, schedule: Schedule, node: Node | None = None) -> Any:
    """A clone of the MODEL that computes the schedule's key steps and predicts the others.

    A run over a part of the planned noise levels follows that part of the schedule. A run on others, or with a sampler
    that does not evaluate each level once, is computed in full and says so before its first step.

    Args:
        model: ComfyUI's MODEL, a `ModelPatcher`; it stays as it is.
        schedule: made by `calibrate`, or of the boundary "output" and for any model.
        node: where the clone comes from.

    Raises:
        ScheduleMismatchError: the schedule is of another boundary, or was made for another model.
        CacheStateError: the MODEL goes through a node of dpcache already; or, in a run, through another cache.
    """
    if schedule.boundary != "output":
        raise ScheduleMismatchError(
            f'the schedule caches "{schedule.boundary}", but ComfyUI shows no more than the model\'s output: calibrate '
            "with the DPCache Calibrate node."
        )
    return _following(model, "schedule", schedule.model, partial(_of_schedule, schedule), node)


def plan_and_apply(
    model: Any, num_key_steps: int, calibration: Calibration | None = None, node: Node | None = None
) -> Any:
    """A clone of the MODEL that plans for the noise levels of each run, and follows the plan.

    Args:
        model: ComfyUI's MODEL; it stays as it is.
        num_key_steps: K, of every run; one with no more steps is computed in full.
        calibration: what to plan from, made by `calibrate`: for its number of steps and any other, other shifts, and
            runs that begin with less noise. Without one key steps lie on a smooth curve.
        node: where the clone comes from.

    Raises:
        ScheduleMismatchError: the calibration is of another boundary, or of another model.
        CacheStateError: as `apply`.
        ValueError: fewer than one key step.
    """
    if calibration is not None and calibration.facts.boundary != "output":
        raise ScheduleMismatchError(
            f'the calibration is of {calibration.facts.pipeline} at the boundary "{calibration.facts.boundary}": make '
            "one with the DPCache Calibrate node."
        )
    made_for = calibration.facts.model if calibration is not None else None
    plans = plans_for(calibration, num_key_steps=num_key_steps)
    return _following(model, "calibration", made_for, partial(_of_plans, plans), node)


def calibrate(
    model: Any,
    path: "str | os.PathLike[str]",
    *,
    key_steps: int = 0,
    schedule_path: "str | os.PathLike[str] | None" = None,
    order: int | None = None,
    append: bool = True,
    node: Node | None = None,
) -> Any:
    """A clone of the MODEL whose sampling runs, computed in full, are measured and added to a calibration file.

    What could go wrong is checked before a run's first step. A later run of the same prompt that does not fit the file,
    as a second pass over a larger picture, is left alone. Once a run has been made, its picture is never lost: a file
    that cannot be written is told.

    Errors are weighted by how far the sampler moves the sample in a step, the difference of its noise levels: exact for
    euler and ddim, and about right for other samplers of one evaluation a step.

    Args:
        model: ComfyUI's MODEL; it stays as it is.
        path: of the calibration, written anew after every run that came to its end.
        key_steps: if above 0, also plan for so many key steps after every run.
        schedule_path: where to write that schedule; beside the calibration unless given.
        order: of the Taylor prediction to plan for; by default whatever plans best.
        append: add to what the file holds already, instead of starting it over: once in a process, and what it held
            stays beside it under its name and `.old`.
        node: where the clone comes from.

    Raises:
        CacheStateError: the MODEL goes through a node of dpcache already; or, in a run, through another cache.
        CalibrationError: in a run, before its first step: the sampler does not evaluate each noise level once, or the
            run does not fit the file. In a step: the model's output has NaN values.
    """
    target = Path(path)
    plan = Path(schedule_path) if schedule_path else target.with_name(f"{target.stem}-{key_steps}.json")
    file = CalibrationFile(target, key_steps, plan, order, append, identity(model), prediction(model))
    return _wrapped(model, partial(_record, file, Voice(node)))


def sampler_name(sampler: Any) -> str:
    """The name of a SAMPLER, as ComfyUI lists it where it does."""
    return str(getattr(getattr(sampler, "sampler_function", sampler), "__name__", type(sampler).__name__)).removeprefix(
        "sample_"
    )


def part(schedule: Schedule, levels: Sequence[float]) -> Schedule | None:
    """What a run over these noise levels follows of a schedule; None if they are not among the planned ones.

    Args:
        schedule: what was planned.
        levels: as samplers have them, the last where the run ends.
    """
    if schedule.sigmas is None:
        return schedule if len(levels) - 1 == schedule.num_inference_steps else None
    return part_by_levels(schedule, levels)


def _following(model: Any, what: str, made_for: ModelIdentity | None, plan: Plan, node: Node | None) -> Any:
    known = identity(model)
    if made_for is not None and not made_for.admits(known):
        raise ScheduleMismatchError(
            f"the {what} was made for {made_for.denoiser} (configuration {made_for.config}), this MODEL is "
            f"{known.denoiser} (configuration {known.config}, prediction {predicts(model)}): calibrate it with the "
            "DPCache Calibrate node."
        )
    doubt = None
    if made_for is not None and not made_for.is_same(known):
        doubt = f"the {what} was made with other weights: key steps may be badly placed. Calibrate this model."
    return _wrapped(model, partial(_follow, plan, Voice(node), doubt))


def _wrapped(model: Any, make: "Callable[[_Sampling], Any]") -> Any:
    if model.get_wrappers(_RUN, KEY):
        raise CacheStateError("this MODEL goes through a DPCache node already: connect the one from before it.")
    clone = model.clone()
    clone.add_wrapper_with_key(_RUN, KEY, partial(_sample, make))
    clone.add_wrapper_with_key(_EVALUATION, KEY, _evaluate)
    clone.add_wrapper_with_key(_NETWORK, KEY, _call_network)
    return clone


# --------------------------------------------------------------------------------------------------- what runs follow


def _of_schedule(schedule: Schedule, levels: Sequence[float], tell: Callable[[str], None]) -> Schedule | None:
    left = part(schedule, levels)
    if left is None:
        tell(
            "every step is computed in full: the schedule was planned for "
            f"{schedule.num_inference_steps} steps{_span(schedule.sigmas)}, the run has {len(levels) - 1}"
            f"{_span(levels)}. Use the steps, scheduler and denoise of the calibration, or the DPCache Key Steps node, "
            "which plans from a calibration for others."
        )
    return left


def _of_plans(plans: Plans, levels: Sequence[float], tell: Callable[[str], None]) -> Schedule | None:
    return plans.part(None, levels, len(levels) - 1, 0, lambda text, kind="": tell(text))


def _span(sigmas: Sequence[float] | None) -> str:
    return f" with noise levels from {sigmas[0]:.4g} to {sigmas[-2]:.4g}" if sigmas else ""


# --------------------------------------------------------------------------------------------------------- the wrappers


@dataclass(frozen=True)
class _Sampling:
    """A sampler's run that is about to begin.

    Attributes:
        levels: the noise level of every step, and where the last one ends.
        obstacle: why its steps cannot be followed, and what to do; None where they can.
        sampler: its name.
        run: makes it, with what is remembered; None: as it is without dpcache.
    """

    levels: Sequence[float]
    obstacle: str | None
    sampler: str
    run: Callable[[Running | None], Any]


def _sample(
    make: Callable[[_Sampling], Any],
    executor: Any,
    guider: Any,
    sigmas: Any,
    extra_args: Any,
    callback: Any,
    noise: Any,
    latent_image: Any = None,
    *rest: Any,
    **more: Any,
) -> Any:
    def run(running: Running | None) -> Any:
        given = _handed_down(extra_args, running)
        return executor(guider, sigmas, given, callback, noise, latent_image, *rest, **more)

    _refuse_other_caches(extra_args)
    if len(sigmas) < 2:  # no step at all
        return run(None)
    sampler = executor.class_obj
    plays = rehearse(sampler, guider, sigmas, extra_args.get("seed"), noise, latent_image)
    return make(_Sampling(plays.levels, _obstacle(plays, extra_args), sampler_name(sampler), run))


def _follow(plan: Plan, voice: Voice, doubt: str | None, sampling: _Sampling) -> Any:
    voice.begin()
    if doubt:
        voice.warn(doubt)
    followed = None
    if sampling.obstacle:
        voice.warn(f"every step is computed in full: {sampling.obstacle}.")
    else:
        followed = plan(sampling.levels, voice.warn)
    if followed is None:
        return sampling.run(None)
    running = Following(followed, sampling.levels, voice.warn)
    output = sampling.run(running)
    steps = len(sampling.levels) - 1
    if unseen := steps - len(running.seen_steps):
        voice.warn(
            f"{unseen} of {steps} steps were not seen: the sampler or the guider calls the model otherwise "
            "than in the rehearsal, and what was not seen was computed in full."
        )
    voice.inform(f"{len(running.computed_steps) + unseen} of {steps} steps computed")
    return output


def _record(file: CalibrationFile, voice: Voice, sampling: _Sampling) -> Any:
    is_first = voice.begin()
    try:
        if sampling.obstacle:
            raise CalibrationError(f"{sampling.obstacle}, so no value is seen for every step.")
        file.check(sampling.levels, sampling.sampler)
    except DPCacheError as error:
        if is_first:
            raise
        voice.warn(f"a later run of this prompt is not measured: {error}")
        return sampling.run(None)
    running = Recording(sampling.levels)
    output = sampling.run(running)
    voice.inform(file.add(running.run, sampling.sampler))
    return output


def _handed_down(extra_args: dict[str, Any], running: Running | None) -> dict[str, Any]:
    """A sampler's arguments with what is remembered where every call of this run finds it, and no other."""
    if running is None:
        return extra_args
    options = extra_args.get("model_options", {})
    there = {**options.get("transformer_options", {}), KEY: running}
    return {**extra_args, "model_options": {**options, "transformer_options": there}}


def _obstacle(plays: Rehearsal, extra_args: dict[str, Any]) -> str | None:
    """Why the steps of a run cannot be followed, and what to do; None where they can."""
    if "multigpu_clones" in extra_args.get("model_options", {}):
        return "the conditions are split over several GPUs, which is not followed (sample on one)"
    return f"{plays.obstacle} (take one of one evaluation a step, for example euler)" if plays.obstacle else None


def _evaluate(
    executor: Any, x: Any, timestep: Any, model_options: Any = None, seed: Any = None, *rest: Any, **more: Any
) -> Any:
    denoised = executor(x, timestep, model_options or {}, seed, *rest, **more)
    running: Running | None = (model_options or {}).get("transformer_options", {}).get(KEY)
    if running is not None:
        running.guided(x, timestep, denoised)
    return denoised


def _call_network(
    executor: Any,
    x: Any,
    t: Any,
    c_concat: Any = None,
    c_crossattn: Any = None,
    control: Any = None,
    transformer_options: Any = None,
    *rest: Any,
    **more: Any,
) -> Any:
    options = transformer_options or {}
    full = partial(executor, x, t, c_concat, c_crossattn, control, options, *rest, **more)
    running: Running | None = options.get(KEY)
    if running is None:
        return full()
    # Samplers read noise levels in Python anyway, so this is not the first to wait for the device.
    return running.call(full, x, float(t.flatten()[0]), options)


def _refuse_other_caches(extra_args: dict[str, Any]) -> None:
    """Raises CacheStateError if another node skips calls, too: it would measure and reuse what is predicted."""
    options = extra_args.get("model_options", {}).get("transformer_options", {})
    names = {str(name) for of_kind in options.get("wrappers", {}).values() for name in of_kind}
    if others := sorted(name for name in names - {KEY} if name.lower().endswith("cache")):
        raise CacheStateError(
            f"{', '.join(others)} skips calls of this MODEL as well, and the two spoil each other: take one of the "
            "nodes out."
        )
