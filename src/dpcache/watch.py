"""Follows one pipeline's sampling loop from outside: which generation, which step, which branch.

The scheduler says when a generation begins (`set_timesteps`) and when a step ends (`step`); the denoiser calls between
two steps are the branches of a step. Nothing here changes what is computed: an observer decides what a call does.
"""

import itertools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.hooks import ModelHook
from torch import nn

from .denoisers import Block, find_blocks, find_denoiser
from .hooks import attach, detach, listen
from .schedule import Boundary

#: A branch within a step: the name of the cache context it ran in (if any), and its number among the calls so named.
Branch = tuple[str, int]

_numbers = itertools.count()


@dataclass
class Call:
    """One denoiser call inside a generation.

    Attributes:
        step: index of the sampling step, 0 the noisiest.
        branch: which of the step's denoiser calls this is.
        shape: shape, dtype and device of the denoiser's input: a cached value only fits the same.
    """

    step: int
    branch: Branch
    shape: tuple[Any, ...]
    _tap: "_BoundaryTap"
    _forward: Callable[[], Any]

    def full(self) -> tuple[Any, torch.Tensor]:
        """Runs the denoiser in full; returns its output and the value at the boundary."""
        return self._tap.full(self._forward)

    def predicted(self, value: torch.Tensor) -> Any:
        """Runs only what follows the boundary, on the value given. Comes after a full call of the same branch."""
        return self._tap.predicted(self._forward, value)


class Observer(Protocol):
    """What watches: the runtime or the recorder."""

    def begin(self, num_steps: int) -> None:
        """A generation of `num_steps` steps begins; one before it may have been left half-way."""

    def call(self, call: Call) -> Any:
        """A denoiser call; returns what the denoiser should."""

    def end_step(self, step: int) -> None:
        """The scheduler has taken a step."""

    def end(self) -> None:
        """The last step has been taken."""


class Watch:
    """An observer's ears on one pipeline, from creation to `close`."""

    def __init__(self, pipeline: Any, boundary: Boundary, observer: Observer) -> None:
        self.denoiser = find_denoiser(pipeline)
        self.scheduler = pipeline.scheduler
        self.observer = observer
        self._pipeline = weakref.ref(pipeline)
        self._name = f"dpcache-{next(_numbers)}"
        self._step: int | None = None
        self._num_steps = 0
        self._calls: dict[str, int] = {}
        self._contexts: list[str] = []
        self._warned = False
        self._tap = _BoundaryTap(find_blocks(self.denoiser) if boundary == "blocks" else [])

        attach(self.denoiser, _DenoiserHook(self), self._name)
        for block, hook in self._tap.hooks():
            attach(block.module, hook, self._name)
        self._taps = [
            listen(self.scheduler, "set_timesteps", self._began),
            listen(self.scheduler, "step", self._stepped),
            listen(pipeline, "progress_bar", self._follow_bar),
        ]
        if hasattr(self.denoiser, "cache_context"):
            self._taps.append(listen(self.denoiser, "cache_context", self._in_context))

    def close(self) -> None:
        """Takes every hook and wrapper off again."""
        _running.remove(self)
        for leave in self._taps:
            leave()
        for block, _ in self._tap.hooks():
            detach(block.module, self._name)
        detach(self.denoiser, self._name)

    def on_call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A denoiser call, inside a generation of this pipeline or not."""
        if self._step is None or not _running.is_latest(self):
            self._check_scheduler()
            return forward(*args, **kwargs)
        name = self._contexts[-1] if self._contexts else ""
        number = self._calls.get(name, 0)
        self._calls[name] = number + 1
        call = Call(self._step, (name, number), _input_shape(args, kwargs), self._tap, lambda: forward(*args, **kwargs))
        return self.observer.call(call)

    def _began(self, result: Any, *_: Any, **__: Any) -> Any:
        self._step = None
        self._num_steps = len(self.scheduler.timesteps)
        self._calls.clear()
        self._contexts.clear()
        self.observer.begin(self._num_steps)
        self._step = 0
        _running.add(self)
        return result

    def _stepped(self, result: Any, *_: Any, **__: Any) -> Any:
        if self._step is not None and _running.is_latest(self):
            self.observer.end_step(self._step)
            self._step += 1
            self._calls.clear()
            if self._step == self._num_steps:
                self._ended()
        return result

    def _ended(self) -> None:
        """The loop is over: its last step taken, or left by an exception or an interrupt."""
        if self._step is not None:
            self._step = None
            _running.remove(self)
            self.observer.end()

    def _follow_bar(self, bar: Any, *_: Any, **__: Any) -> Any:
        """Pipelines run their loop under a progress bar, which is closed however the loop ends."""
        return _Bar(bar, self._ended)

    def _check_scheduler(self) -> None:
        pipeline = self._pipeline()
        if pipeline is not None and pipeline.scheduler is not self.scheduler and not self._warned:
            self._warned = True
            warnings.warn(
                "the pipeline's scheduler was replaced after dpcache was enabled, so nothing is cached: "
                "call dpcache.disable(pipe) and enable again.",
                stacklevel=4,
            )

    def _in_context(self, context: Any, name: str, *_: Any, **__: Any) -> Any:
        """Notes the name of a context that the pipeline opens around a denoiser call."""

        @contextmanager
        def noted() -> Iterator[Any]:
            with context as value:
                self._contexts.append(name)
                try:
                    yield value
                finally:
                    if self._contexts:
                        self._contexts.pop()

        return noted()


class _Running(threading.local):
    """Which watches are inside a generation in this thread, by denoiser, the latest last.

    Pipelines may share a denoiser, and one may run inside a callback of another: its calls belong to the latest.
    """

    def __init__(self) -> None:
        self._stacks: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[Watch]]] = weakref.WeakKeyDictionary()

    def add(self, watch: Watch) -> None:
        self.remove(watch)
        self._stacks.setdefault(watch.denoiser, []).append(weakref.ref(watch))

    def remove(self, watch: Watch) -> None:
        stack = self._stacks.get(watch.denoiser, [])
        stack[:] = [ref for ref in stack if ref() not in (watch, None)]

    def is_latest(self, watch: Watch) -> bool:
        stack = self._stacks.get(watch.denoiser, [])
        return bool(stack) and stack[-1]() is watch


_running = _Running()


class _Bar:
    """A progress bar that says when the loop under it has ended."""

    def __init__(self, bar: Any, ended: Callable[[], None]) -> None:
        self._bar, self._ended = bar, ended

    def __enter__(self) -> Any:
        return self._bar.__enter__()

    def __exit__(self, *error: Any) -> Any:
        self._ended()
        return self._bar.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._bar
        finally:
            self._ended()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)


class _DenoiserHook(ModelHook):  # type: ignore[misc]
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.watch.on_call(self.fn_ref.original_forward, args, kwargs)


class _BoundaryTap:
    """Reads the value at the boundary of a full call, or puts a predicted one there.

    Without blocks the boundary is the denoiser's own output.
    """

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        self.skipping = False
        self.replacement: torch.Tensor | None = None
        self.value: torch.Tensor | None = None
        self._wrap: Callable[[torch.Tensor], Any] = lambda value: value
        self._hooks = [(block, _BlockHook(self, block, block is blocks[-1])) for block in blocks]

    def hooks(self) -> list[tuple[Block, "_BlockHook"]]:
        return self._hooks

    def full(self, forward: Callable[[], Any]) -> tuple[Any, torch.Tensor]:
        self.value = None
        output = forward()
        if self.blocks:
            value, self.value = self.value, None
        else:
            value, self._wrap = _unwrap(output)
        if not isinstance(value, torch.Tensor):
            raise RuntimeError("the denoiser returned without running its last transformer block.")
        return output, value

    def predicted(self, forward: Callable[[], Any], value: torch.Tensor) -> Any:
        if not self.blocks:
            return self._wrap(value)
        self.skipping, self.replacement = True, value
        try:
            return forward()
        finally:
            self.skipping, self.replacement = False, None


class _BlockHook(ModelHook):  # type: ignore[misc]
    def __init__(self, tap: _BoundaryTap, block: Block, last: bool) -> None:
        super().__init__()
        self.tap, self.block, self.last = tap, block, last

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.tap.skipping:
            return self.block.skipped(args, kwargs, self.tap.replacement if self.last else None)
        output = self.fn_ref.original_forward(*args, **kwargs)
        if self.last:
            self.tap.value = self.block.hidden(output)
        return output


def _input_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    sample = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
    return () if sample is None else (tuple(sample.shape), sample.dtype, sample.device)


def _unwrap(output: Any) -> tuple[Any, Callable[[torch.Tensor], Any]]:
    """The tensor in what a denoiser returned, and how to return another one in the same manner.

    The manner is remembered without the tensor, so that it keeps no memory alive.
    """
    if isinstance(output, torch.Tensor):
        return output, lambda value: value
    if isinstance(output, tuple):
        rest = output[1:]
        return output[0], lambda value: (value, *rest)
    kind, (name, *_) = type(output), output.keys()
    return output[0], lambda value: kind(**{name: value})
