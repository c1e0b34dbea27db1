"""ComfyUI: a MODEL that follows a schedule, and one that calibrates in its own sampling runs.

Both go through ComfyUI's wrappers, which compose with those of other nodes: `outer_sample` around a sampling run,
`apply_model` around a call of the network, `predict_noise` around all calls of one evaluation, guidance included
(`WrappersMP` in comfy/patcher_extension.py, `ModelPatcher.add_wrapper_with_key` in comfy/model_patcher.py, `CFGGuider`
in comfy/samplers.py; https://docs.comfy.org). What is remembered belongs to one sampling run: it is made when the run
begins, handed down in its `transformer_options`, and gone with it, whatever ended it.

What is cached is (x - denoised) / sigma, the derivative that samplers step along: the output of a model that predicts
flow or noise, and as good for every other.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dpcache.errors import CacheStateError, CalibrationError, ScheduleMismatchError
from dpcache.integrations.comfyui_runs import Following, Recording, Running, part, warn_of_full_run
from dpcache.measure.calibration import Calibration
from dpcache.plan.grids import FLOW
from dpcache.plan.recipe import Recipe
from dpcache.plan.schedule import ModelIdentity, Schedule

KEY = "dpcache"
"""Of the wrappers, and of the running state in `transformer_options`."""
#: The values of ComfyUI's `WrappersMP`, and where their arguments are.
_RUN, _NETWORK, _EVALUATION = "outer_sample", "apply_model", "predict_noise"
_SAMPLER, _SIGMAS, _TRANSFORMER_OPTIONS, _MODEL_OPTIONS = 2, 3, 5, 2
#: Samplers of comfy/k_diffusion/sampling.py that evaluate every noise level but the first twice.
_TWICE = ("heun", "heunpp2", "exp_heun_2_x0", "exp_heun_2_x0_sde", "sa_solver_pece")
#: In a model's configuration, what says nothing of the network.
_NOT_OF_THE_NETWORK = ("dtype", "disable_unet_model_creation")


def apply(model: Any, schedule: Schedule) -> Any:
    """A clone of the MODEL that computes the schedule's key steps and predicts the others.

    A sampling run on other noise levels than planned for, or with a sampler that evaluates between them, is computed in
    full, with one warning. A run over a part of the planned levels follows that part of the schedule.

    Args:
        model: ComfyUI's MODEL, a `ModelPatcher`; it stays as it is.
        schedule: made by `calibrate`, or of the boundary "output" and for any model.

    Raises:
        ScheduleMismatchError: the schedule is of another boundary, or was made for another model.
        CacheStateError: the MODEL follows a schedule or calibrates already.
    """
    if schedule.boundary != "output":
        raise ScheduleMismatchError(
            f'the schedule caches "{schedule.boundary}", but ComfyUI shows no more than the model\'s output: calibrate '
            "with the DPCache Calibrate node."
        )
    known = identity(model)
    if schedule.model is not None and not schedule.model.admits(known):
        raise ScheduleMismatchError(
            f"the schedule was made for {schedule.model.denoiser} (configuration {schedule.model.config}), this MODEL "
            f"is {known.denoiser} (configuration {known.config}): calibrate it with the DPCache Calibrate node."
        )
    clone = _clone(model)
    clone.add_wrapper_with_key(_RUN, KEY, partial(_follow, schedule))
    clone.add_wrapper_with_key(_NETWORK, KEY, _call_network)
    return clone


def calibrate(
    model: Any,
    path: "str | os.PathLike[str]",
    *,
    key_steps: int = 0,
    schedule_path: "str | os.PathLike[str] | None" = None,
    order: int = 2,
    append: bool = True,
) -> Any:
    """A clone of the MODEL whose sampling runs, computed in full, are measured and added to a calibration file.

    Errors are weighted by how far the sampler moves the sample in a step, the difference of its noise levels: exact for
    euler and ddim, and about right for other samplers of one evaluation a step.

    Args:
        model: ComfyUI's MODEL; it stays as it is.
        path: of the calibration, written anew after every run that came to its end.
        key_steps: if above 0, also plan for so many key steps after every run.
        schedule_path: where to write that schedule; beside the calibration unless given.
        order: of the Taylor prediction to plan for.
        append: add to what the file holds already, instead of beginning anew.

    Raises:
        CacheStateError: the MODEL follows a schedule or calibrates already.
        CalibrationError: in a run, whose sampler evaluates between its noise levels, or twice at one; which had NaN
            values; or which is of another model or other noise levels than those before.
    """
    target = Path(path)
    plan = Path(schedule_path) if schedule_path else target.with_name(f"{target.stem}-{key_steps}.json")
    clone = _clone(model)
    file = _CalibrationFile(target, key_steps, plan, order, append, identity(clone), prediction(clone))
    clone.add_wrapper_with_key(_RUN, KEY, partial(_record, file))
    clone.add_wrapper_with_key(_NETWORK, KEY, _call_network)
    clone.add_wrapper_with_key(_EVALUATION, KEY, _evaluate)
    return clone


def identity(model: Any) -> ModelIdentity:
    """What tells one MODEL from another: ComfyUI's class for it, and a digest of its network's configuration."""
    inner = model.model
    config = getattr(getattr(inner, "model_config", None), "unet_config", None) or {}
    told = {name: value for name, value in config.items() if name not in _NOT_OF_THE_NETWORK}
    text = json.dumps(told, sort_keys=True, default=str)
    return ModelIdentity(denoiser=type(inner).__name__, config=hashlib.sha256(text.encode()).hexdigest()[:16])


def prediction(model: Any) -> str:
    """What the model's noise levels are: shares of noise (flow matching), or ratios of noise to signal."""
    kinds = {kind.__name__ for kind in type(model.model.model_sampling).__mro__}
    return FLOW if "CONST" in kinds else "epsilon"


def _clone(model: Any) -> Any:
    if model.get_wrappers(_RUN, KEY):
        raise CacheStateError("this MODEL goes through a DPCache node already: connect the one from before it.")
    return model.clone()


# --------------------------------------------------------------------------------------------------------- the wrappers


def _follow(schedule: Schedule, executor: Any, *args: Any, **kwargs: Any) -> Any:
    sampler = sampler_name(_argument(args, kwargs, _SAMPLER, "sampler"))
    levels = _levels(args, kwargs)
    left = part(schedule, levels)
    if sampler in _TWICE:
        warn_of_full_run(f"the sampler {sampler} evaluates noise levels twice, which no schedule covers")
    elif left is None:
        warn_of_full_run(
            f"the schedule was planned for {schedule.num_inference_steps} steps{_span(schedule.sigmas)}, the run has "
            f"{len(levels) - 1}{_span(levels)}"
        )
    else:
        with _handed_down(executor.class_obj, Following(left, levels)):
            return executor(*args, **kwargs)
    return executor(*args, **kwargs)


def _record(file: "_CalibrationFile", executor: Any, *args: Any, **kwargs: Any) -> Any:
    recording = Recording(_levels(args, kwargs))
    with _handed_down(executor.class_obj, recording):
        output = executor(*args, **kwargs)
    file.add(recording, sampler_name(_argument(args, kwargs, _SAMPLER, "sampler")))
    return output


def _call_network(executor: Any, *args: Any, **kwargs: Any) -> Any:
    options = _argument(args, kwargs, _TRANSFORMER_OPTIONS, "transformer_options") or {}
    running: Running | None = options.get(KEY)
    if running is None:
        return executor(*args, **kwargs)
    # Samplers read noise levels in Python anyway, so this is not the first to wait for the device.
    sigma = float(_argument(args, kwargs, 1, "t").flatten()[0])
    return running.call(partial(executor, *args, **kwargs), _argument(args, kwargs, 0, "x"), sigma, options)


def _evaluate(executor: Any, *args: Any, **kwargs: Any) -> Any:
    denoised = executor(*args, **kwargs)
    options = _argument(args, kwargs, _MODEL_OPTIONS, "model_options") or {}
    recording = options.get("transformer_options", {}).get(KEY)
    if isinstance(recording, Recording):
        recording.guided(_argument(args, kwargs, 0, "x"), _argument(args, kwargs, 1, "timestep"), denoised)
    return denoised


@contextmanager
def _handed_down(guider: Any, running: Running) -> Iterator[None]:
    """Puts what is remembered where every call of this run finds it, and no other."""
    before = guider.model_options
    guider.model_options = {
        **before,
        "transformer_options": {**before.get("transformer_options", {}), KEY: running},
    }
    try:
        yield
    finally:
        guider.model_options = before


def sampler_name(sampler: Any) -> str:
    """The name of a SAMPLER, as ComfyUI lists it where it does."""
    return str(getattr(getattr(sampler, "sampler_function", sampler), "__name__", type(sampler).__name__)).removeprefix(
        "sample_"
    )


def _argument(args: Sequence[Any], kwargs: dict[str, Any], position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(name)


def _levels(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[float, ...]:
    return tuple(_argument(args, kwargs, _SIGMAS, "sigmas").tolist())


def _span(sigmas: Sequence[float] | None) -> str:
    return f" with noise levels from {sigmas[0]:.4g} to {sigmas[-2]:.4g}" if sigmas else ""


@dataclass
class _CalibrationFile:
    """The file that recorded runs are added to."""

    path: Path
    key_steps: int
    schedule_path: Path
    order: int
    append: bool
    model: ModelIdentity
    prediction: str
    _found: Calibration | None = None

    def add(self, recording: Recording, sampler: str) -> None:
        from dpcache.measure.measuring import from_run

        run = recording.run
        if len(run.received) < run.num_steps:
            raise CalibrationError(
                "what the sampler was given was not seen at every step: update ComfyUI, and sample with a guider of "
                "its own."
            )
        for step in range(run.num_steps):
            if not bool(run.received[step].isfinite().all()):
                raise CalibrationError(
                    f"the model's output at step {step} is NaN or infinite: check that the workflow works without "
                    "DPCache Calibrate."
                )
        added = from_run(
            run,
            boundary="output",
            order=self.order,
            model=self.model,
            pipeline="ComfyUI",
            scheduler=sampler,
            prediction=self.prediction,
        )
        if self._found is None and self.append and self.path.exists():
            self._found = Calibration.load(self.path)
        try:
            self._found = Calibration.merged([self._found, added]) if self._found else added
        except CalibrationError as error:
            raise CalibrationError(f"{self.path.name}: {error} Give another name, or start over.") from error
        self._found.save(self.path)
        if self.key_steps:
            self._found.plan(self.key_steps, recipe=Recipe(order=self.order)).save(self.schedule_path)
