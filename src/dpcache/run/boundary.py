"""The place whose value is cached and predicted: reads it in a full call, and puts a predicted one there."""

import threading
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from dpcache.plan.schedule import Boundary

from .denoisers import Block, find_blocks, find_feeders
from .hooks import Hook
from .packing import Assemble, pack, take_apart, unpack


class Forms:
    """What the full calls of one loop returned, without its tensors: how predicted calls return the same form.

    Attributes:
        values: branch -> shapes of the tensors at the boundary, and how to build an output around others.
        blanks: (what feeds the blocks, branch) -> makes what it returned, with nothing in it; None if it has to run.
    """

    def __init__(self) -> None:
        self.values: dict[Hashable, tuple[list[torch.Size], Assemble | None]] = {}
        self.blanks: dict[tuple[Hook, Hashable], Callable[[], Any] | None] = {}


class BoundaryTap:
    """Reads the value at the boundary of a full call, or runs only what follows it, on a predicted one.

    At the boundary "output" that is the denoiser's own output. Several tensors at the boundary are one value, end to
    end.

    Attributes:
        block_hooks: to be put on the denoiser's blocks; none at the boundary "output".
        feeder_hooks: to be put on what feeds the blocks and nothing else. They only save time.
        lock: to be held by whoever calls the denoiser: hooks on blocks learn from the attributes below what to do.
        reading: a full call is under way.
        skipping: a call is under way in which no block runs.
        branch: which of a step's calls that is.
        forms: of the loop it belongs to.
        streams: what the head reads: what the last block returned, or shall return.
    """

    def __init__(self, denoiser: nn.Module, boundary: Boundary) -> None:
        blocks, feeders = (find_blocks(denoiser), find_feeders(denoiser)) if boundary == "blocks" else ([], [])
        self.block_hooks = [(block.module, _BlockHook(self, block)) for block in blocks]
        self.feeder_hooks = [(module, _FeederHook(self)) for module in feeders]
        self.lock: AbstractContextManager[Any] = threading.RLock() if blocks else nullcontext()
        self.reading = self.skipping = False
        self.branch: Hashable = None
        self.forms = Forms()
        self.streams: list[torch.Tensor] = []

    def full(self, branch: Hashable, forward: Callable[[], Any], forms: Forms) -> tuple[Any, torch.Tensor]:
        """Runs the denoiser in full; returns its output and the value at the boundary."""
        for _, hook in self.feeder_hooks:
            forms.blanks.pop((hook, branch), None)
        self.reading, self.branch, self.forms = True, branch, forms
        try:
            output = forward()
            tensors, build = (self.streams, None) if self.block_hooks else take_apart(output)
        finally:
            self._rest()
        if not tensors:
            raise RuntimeError("the denoiser returned without running its last transformer block.")
        forms.values[branch] = [tensor.shape for tensor in tensors], build
        return output, pack(tensors)

    def predicted(self, branch: Hashable, forward: Callable[[], Any], value: torch.Tensor, forms: Forms) -> Any:
        """What the denoiser returns for this value; comes after a full call of the same branch."""
        shapes, build = forms.values[branch]
        tensors = unpack(value, shapes)
        if build is not None:
            return build(iter(tensors))
        self.skipping, self.branch, self.forms, self.streams = True, branch, forms, tensors
        try:
            return forward()
        finally:
            self._rest()

    def _rest(self) -> None:
        self.reading = self.skipping = False
        self.forms, self.streams = Forms(), []


class _BlockHook(Hook):
    def __init__(self, tap: BoundaryTap, block: Block) -> None:
        super().__init__()
        self.tap, self.block = tap, block

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.tap.skipping:
            return self.block.skipped(args, kwargs, self.tap.streams if self.block.head else [])
        output = self.beneath(*args, **kwargs)
        if self.tap.reading and self.block.head:
            self.tap.streams = self.block.streams(output)
        return output


class _FeederHook(Hook):
    """Does not run where no block does: returns tensors of the same shapes, with nothing in them."""

    def __init__(self, tap: BoundaryTap) -> None:
        super().__init__()
        self.tap = tap

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        known, place = self.tap.forms.blanks, (self, self.tap.branch)
        if self.tap.skipping and (blank := known.get(place)) is not None:
            return blank()
        output = self.beneath(*args, **kwargs)
        if self.tap.reading:
            # Called twice in one call, it may return two shapes: then it runs.
            known[place] = None if place in known else blank_like(output)
        return output


def blank_like(output: Any) -> Callable[[], Any]:
    """Makes something of the same form, with nothing in it."""
    tensors, build = take_apart(output)
    kinds = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]

    def blank() -> Any:
        # Zeros where they may be used as an index; else there is no need to write anything.
        makers = (torch.empty if dtype.is_floating_point else torch.zeros for _, dtype, _ in kinds)
        return build(make(shape, dtype=d, device=at) for make, (shape, d, at) in zip(makers, kinds, strict=True))

    return blank
