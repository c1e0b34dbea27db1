"""What users pass as inputs -> the arguments of each pipeline call, with a seed of its own; and what a call returns."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dpcache.errors import CalibrationError, UnsupportedPipelineError

#: One input of a pipeline: a prompt, or the arguments of its call.
Input = str | Mapping[str, Any]

#: What else pipelines of one's own call the number of steps.
_STEPS = ("steps", "num_steps", "n_steps", "sampling_steps", "inference_steps", "num_sampling_steps")
#: Where outputs keep what was drawn, the likeliest first.
_DRAWN = ("images", "frames", "videos", "audios", "audio", "sample", "samples", "latents", "image", "video")


def call_arguments(inputs: Sequence[Input], defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Arguments of one pipeline call per input; what an input says itself wins over the defaults.

    Raises:
        CalibrationError: no inputs, one string instead of a list, or an input that is neither prompt nor dict.
    """
    if isinstance(inputs, str | Mapping):
        raise CalibrationError(f"inputs must be a list, got one {type(inputs).__name__}: wrap it in [ ].")
    if not len(inputs):
        raise CalibrationError("there are no inputs: give one prompt or dict of call arguments at least, better five.")
    for number, item in enumerate(inputs):
        if not isinstance(item, str | Mapping):
            raise CalibrationError(
                f"input {number} is a {type(item).__name__}: give a prompt, or a dict of arguments of the pipeline's "
                "call."
            )
    return [{**defaults, **({"prompt": item} if isinstance(item, str) else item)} for item in inputs]


def seeded(pipeline: Any, arguments: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The arguments as this pipeline takes them, with a fresh generator: calling twice draws the same noise twice.

    A generator that the arguments bring along is copied in the state it is in. A pipeline of one's own may call the
    number of steps otherwise, or have no `output_type`.
    """
    arguments = as_taken(pipeline, arguments)
    generator = arguments.get("generator")
    if generator is None:
        return {**arguments, **noise_of(seed)} if accepts(pipeline, "generator") else arguments
    generator = [_copy(g) for g in generator] if isinstance(generator, list) else _copy(generator)
    return {**arguments, "generator": generator}


def noise_of(seed: int) -> dict[str, torch.Generator]:
    """The argument of a call that makes its noise: on the CPU, so that it is the same on every device."""
    return {"generator": torch.Generator("cpu").manual_seed(seed)}


def accepts(pipeline: Any, name: str) -> bool:
    """Whether a call of the pipeline takes an argument of this name."""
    blocks = getattr(pipeline, "blocks", None)
    if blocks is not None and hasattr(blocks, "input_names"):  # a modular pipeline
        return name in blocks.input_names
    parameters = inspect.signature(type(pipeline).__call__).parameters
    return name in parameters


def label(pipeline: Any, arguments: Mapping[str, Any]) -> str:
    """A short text that tells people which input this was; classes by name where the pipeline knows their names."""
    prompt, classes = arguments.get("prompt"), arguments.get("class_labels")
    if prompt is not None:
        return str(prompt)
    if classes is not None:
        names = {number: name for name, number in getattr(pipeline, "labels", {}).items()}
        numbers = classes if isinstance(classes, list | tuple) else [classes]
        return ", ".join(str(names.get(number, number)) for number in numbers)
    return ", ".join(f"{key}={value}" for key, value in arguments.items() if isinstance(value, str | int | float))


def drawn(returned: Any) -> Any:
    """What a call has drawn, out of whatever it returned: the first element, or the bare array or tensor itself.

    Raises:
        UnsupportedPipelineError: nothing of the kind is in it.
    """
    if isinstance(returned, torch.Tensor | np.ndarray):
        return returned
    if isinstance(returned, list | tuple):
        if not len(returned):
            raise UnsupportedPipelineError("the pipeline returned nothing.")
        return returned if hasattr(returned[0], "size") and not isinstance(returned[0], torch.Tensor) else returned[0]
    if isinstance(returned, Mapping) and len(returned):
        return next(iter(returned.values()))
    state = getattr(returned, "values", None)  # of a modular pipeline
    for name in _DRAWN:
        found = state.get(name) if isinstance(state, Mapping) else getattr(returned, name, None)
        if found is not None:
            return found
    raise UnsupportedPipelineError(
        f"the pipeline returned a {type(returned).__name__}, in which there is neither of {', '.join(_DRAWN)}: have it "
        "return what it has drawn, or a tuple that begins with it."
    )


def as_numbers(returned: Any) -> npt.NDArray[np.float64]:
    """What a call has drawn as float64 [D], whatever its form."""
    found = drawn(returned)
    if isinstance(found, list | tuple):
        found = np.stack([np.asarray(one) for one in found])
    return np.asarray(torch.as_tensor(found).to("cpu", torch.float64)).reshape(-1)


def as_pictures(returned: Any) -> np.ndarray:
    """What a call has drawn as float [N, H, W, C], or [N, F, H, W, C] for clips, with values in [0, 1].

    Raises:
        UnsupportedPipelineError: it is something else.
    """
    found = drawn(returned)
    if isinstance(found, torch.Tensor):
        found = found.detach().float().cpu().numpy()
        if found.ndim >= 4 and found.shape[-1] not in (1, 3, 4) and found.shape[-3] in (1, 3, 4):
            found = np.moveaxis(found, -3, -1)
    elif isinstance(found, list | tuple):
        found = np.stack([np.asarray(picture) for picture in found])
    pictures = np.asarray(found)
    if pictures.dtype == np.uint8:
        pictures = pictures.astype(np.float32) / 255
    if not np.issubdtype(pictures.dtype, np.floating) or pictures.ndim < 4:
        raise UnsupportedPipelineError(
            f"the pipeline returned {pictures.dtype} of shape {pictures.shape}: pictures are floats [N, H, W, C] in "
            '[0, 1]. With a pipeline of diffusers call it with output_type="np".'
        )
    return pictures


@contextmanager
def quiet(pipeline: Any) -> Iterator[None]:
    """Keeps the progress bars of a pipeline, and of pipelines that it is made of, silent; leaves them as they were."""
    bars = [one for one in (pipeline, *vars(pipeline).values()) if hasattr(one, "set_progress_bar_config")]
    before = [vars(one).get("_progress_bar_config") for one in bars]
    for bar, config in zip(bars, before, strict=True):
        bar.set_progress_bar_config(**{**(config or {}), "disable": True})
    try:
        yield
    finally:
        for bar, config in zip(bars, before, strict=True):
            vars(bar).pop("_progress_bar_config", None)
            if config is not None:
                bar._progress_bar_config = config


def as_taken(pipeline: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with the number of steps as this pipeline calls it, and without an `output_type` it has not."""
    taken = dict(arguments)
    for name, others in (("num_inference_steps", _STEPS), ("output_type", ())):
        if name in taken and not accepts(pipeline, name) and not _accepts_anything(pipeline):
            value = taken.pop(name)
            other = next((other for other in others if accepts(pipeline, other)), None)
            if other is not None:
                taken.setdefault(other, value)
    return taken


def _accepts_anything(pipeline: Any) -> bool:
    if hasattr(getattr(pipeline, "blocks", None), "input_names"):
        return False
    parameters = inspect.signature(type(pipeline).__call__).parameters.values()
    return any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _copy(generator: torch.Generator) -> torch.Generator:
    copy = torch.Generator(generator.device)
    copy.set_state(generator.get_state())
    return copy
