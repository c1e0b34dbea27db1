"""What users pass as inputs -> the arguments of each pipeline call, with a seed of its own."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dpcache.errors import CalibrationError

#: One input of a pipeline: a prompt, or the arguments of its call.
Input = str | Mapping[str, Any]


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
    """The arguments with a fresh generator, so that calling twice draws the same noise twice.

    A generator that the arguments bring along is copied in the state it is in.
    """
    generator = arguments.get("generator")
    if generator is None:
        if "generator" not in inspect.signature(type(pipeline).__call__).parameters:
            return dict(arguments)
        return {**arguments, **noise_of(seed)}
    generator = [_copy(g) for g in generator] if isinstance(generator, list) else _copy(generator)
    return {**arguments, "generator": generator}


def noise_of(seed: int) -> dict[str, torch.Generator]:
    """The argument of a call that makes its noise: on the CPU, so that it is the same on every device."""
    return {"generator": torch.Generator("cpu").manual_seed(seed)}


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


def _copy(generator: torch.Generator) -> torch.Generator:
    copy = torch.Generator(generator.device)
    copy.set_state(generator.get_state())
    return copy
