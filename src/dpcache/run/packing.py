"""Several tensors as one: what a denoiser returned is taken apart into its tensors, and put together with others."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from dpcache.errors import UnsupportedPipelineError

#: Puts something of the same build together from tensors, taken in order.
Assemble = Callable[[Iterator[torch.Tensor]], Any]


def take_apart(value: Any) -> tuple[list[torch.Tensor], Assemble]:
    """The tensors in nested tuples, lists and named outputs, and how to build the same around other tensors.

    The build is remembered without the tensors, so that it keeps no memory alive.
    """
    if isinstance(value, torch.Tensor):
        return [value], next
    kind: Callable[..., Any] = type(value)
    if type(value) is dict and not all(isinstance(name, str) for name in value):
        return [], lambda pieces: value  # a cache of the network's own: handed on as it was
    if isinstance(value, Mapping):
        names = list(value)
        tensors, builders = _take_each_apart(value.values())
        return tensors, lambda pieces: kind(
            **{name: build(pieces) for name, build in zip(names, builders, strict=True)}
        )
    if isinstance(value, tuple | list):
        tensors, builders = _take_each_apart(value)
        if hasattr(value, "_fields"):
            return tensors, lambda pieces: kind(*(build(pieces) for build in builders))
        return tensors, lambda pieces: kind(build(pieces) for build in builders)
    return [], lambda pieces: value


def _take_each_apart(values: Any) -> tuple[list[torch.Tensor], list[Assemble]]:
    parts = [take_apart(value) for value in values]
    return [tensor for tensors, _ in parts for tensor in tensors], [build for _, build in parts]


def pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor with all the elements: a lone tensor as it is, several end to end.

    Raises:
        UnsupportedPipelineError: they have different dtypes or devices, or are not floating point.
    """
    first = tensors[0]
    if any(not t.is_floating_point() or (t.dtype, t.device) != (first.dtype, first.device) for t in tensors):
        kinds = ", ".join(sorted({f"{t.dtype} on {t.device}" for t in tensors}))
        raise UnsupportedPipelineError(
            f"the denoiser's tensors at the boundary are {kinds}: only floating-point ones of one dtype on one device "
            "can be predicted together. Try the other boundary."
        )
    return first if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])


def unpack(value: torch.Tensor, shapes: Sequence[torch.Size]) -> list[torch.Tensor]:
    """The tensors that `pack` made one of."""
    if len(shapes) == 1:
        return [value]
    pieces = torch.split(value, [shape.numel() for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
