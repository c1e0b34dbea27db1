"""Follows one pipeline's sampling loop from outside: which generation, which step, which branch.

The scheduler says when a generation begins (`set_timesteps`) and when a step ends (`step`); the denoiser calls between
two steps are the branches of a step. Nothing here changes what is computed: an observer decides what a call does.
"""

import itertools
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from dpcache.plan.schedule import Boundary

from .boundary import BoundaryTap
from .denoisers import as_called, find_denoisers
from .hooks import Hook, attach, detach, entrance, listen

_numbers = itertools.count()


class Branch(NamedTuple):
    """Which of a step's denoiser calls.

    Attributes:
        context: name of the cache context it ran in, if any.
        number: its number among the step's calls of this denoiser in contexts so named.
        denoiser: which of the pipeline's denoisers was called; not 0 only where a pipeline switches between several.
            What one denoiser computed predicts nothing of another, so their calls are branches of their own.
    """

    context: str
    number: int
    denoiser: int = 0


@dataclass
class Call:
    """One denoiser call inside a generation.

    Attributes:
        step: index of the sampling step, 0 the first that the loop takes.
        branch: which of the step's denoiser calls this is.
        shape: of the denoiser's inputs, with dtype and device: a cached value only fits the same.
    """

    step: int
    branch: Branch
    shape: tuple[Any, ...]
    _tap: "BoundaryTap"
    _forward: Callable[[], Any]

    def full(self) -> tuple[Any, torch.Tensor]:
        """Runs the denoiser in full; returns its output and the value at the boundary."""
        return self._tap.full(self.branch, self._forward)

    def predicted(self, value: torch.Tensor) -> Any:
        """Runs only what follows the boundary, on the value given. Comes after a full call of the same branch."""
        return self._tap.predicted(self.branch, self._forward, value)


@dataclass(frozen=True)
class Moved:
    """One step of the scheduler, as it was called.

    Attributes:
        received: the model output it was given, after guidance: a tensor, or what a scheduler of its own kind takes.
        before: likewise, the sample it started from.
        after: likewise, the sample it returned.
    """

    received: Any
    before: Any
    after: Any


class Grid(NamedTuple):
    """The scheduler's steps, and where among them a loop begins.

    Attributes:
        size: number of steps of the scheduler's grid.
        start: which of them is the loop's first; not 0 where a pipeline begins with a picture that is given.
    """

    size: int
    start: int

    @property
    def num_steps(self) -> int:
        """Steps of the loop, from its first to the end of the grid."""
        return self.size - self.start


class Observer(Protocol):
    """What watches: the runtime or the recorder."""

    def begin(self) -> None:
        """A generation begins; one before it may have been left half-way."""

    def call(self, call: Call) -> Any:
        """A denoiser call; returns what the denoiser should."""

    def located(self, grid: "Grid") -> None:
        """The scheduler's first step has told where on its grid the loop runs; comes once, before `end_step`."""

    def end_step(self, step: int, moved: "Moved") -> None:
        """The scheduler has taken a step."""

    def end(self) -> None:
        """The last step has been taken."""


class Watch:
    """An observer's ears on one pipeline, from creation to `close`."""

    def __init__(self, pipeline: Any, boundary: Boundary, observer: Observer) -> None:
        self.denoisers = find_denoisers(pipeline)
        self.scheduler = pipeline.scheduler
        self.observer = observer
        self._pipeline = weakref.ref(pipeline)
        self._name = f"dpcache-{next(_numbers)}"
        self._step: int | None = None
        self._grid: Grid | None = None
        self._lock = threading.RLock()
        self._calls: Counter[tuple[str, int]] = Counter()
        self._contexts: list[str] = []
        self._warned = False
        self._boundaries = [BoundaryTap(denoiser, boundary) for denoiser in self.denoisers]
        self._hooks = [_DenoiserHook(self, number) for number in range(len(self.denoisers))]
        self._placed: list[tuple[Any, Hook]] = []

        self._place_hooks(pipeline)
        self._taps = [
            listen(self.scheduler, "set_timesteps", self._began),
            listen(self.scheduler, "step", self._stepped),
            listen(pipeline, "progress_bar", self._follow_bar),
            *(listen(d, "cache_context", self._in_context) for d in self.denoisers if hasattr(d, "cache_context")),
        ]

    def close(self) -> None:
        """Takes every hook and wrapper off again."""
        _running.remove(self)
        for leave in self._taps:
            leave()
        self._remove_hooks()

    def on_call(self, denoiser: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of one of the denoisers, inside a generation of this pipeline or not."""
        if self._step is None or not _running.is_latest(self, denoiser):
            self._check_scheduler()
            with self._lock:
                return forward(*args, **kwargs)
        name = self._contexts[-1] if self._contexts else ""
        branch = Branch(name, self._calls[name, denoiser], denoiser)
        self._calls[name, denoiser] += 1
        signature = _signature((*args, *kwargs.values()))
        call = Call(self._step, branch, signature, self._boundaries[denoiser], lambda: forward(*args, **kwargs))
        with self._lock:
            return self.observer.call(call)

    def _place_hooks(self, pipeline: Any) -> None:
        """Puts the hooks where the calls come in: elsewhere, once a denoiser or its blocks have been compiled."""
        places: list[tuple[Any, Hook]] = []
        for denoiser, hook, tap in zip(self.denoisers, self._hooks, self._boundaries, strict=True):
            outside = entrance(as_called(pipeline, denoiser))
            # Compiled as a whole, the denoiser's blocks are called inside one graph, past their own compiled code.
            inside = outside is not denoiser
            places.append((outside, hook))
            places += [(module if inside else entrance(module), h) for module, h in tap.block_hooks]
            # What nothing reads is not in the graph of a skipped step anyway.
            places += [] if inside else [(entrance(module), h) for module, h in tap.feeder_hooks]
        if places != self._placed:
            self._remove_hooks()
            for place, hook in places:
                attach(place, hook, self._name)
            self._placed = places

    def _remove_hooks(self) -> None:
        for place, _ in self._placed:
            detach(place, self._name)
        self._placed = []

    def mend_hooks(self, denoiser: int) -> None:
        """Offloading takes hooks of its own off in the middle of a generation, from beneath these."""
        tap = self._boundaries[denoiser]
        own = {self._hooks[denoiser], *(hook for _, hook in (*tap.block_hooks, *tap.feeder_hooks))}
        for _, hook in self._placed:
            if hook in own:
                hook.mend()

    def _began(self, result: Any, *_: Any, **__: Any) -> Any:
        self._place_hooks(self._pipeline())
        self._step = None
        self._grid = None
        self._calls.clear()
        self._contexts.clear()
        self.observer.begin()
        self._step = 0
        _running.add(self)
        return result

    def _stepped(self, result: Any, *args: Any, **kwargs: Any) -> Any:
        if self._step is not None and _running.is_latest(self):
            # What every scheduler of diffusers calls its arguments: step(model_output, timestep, sample, ...).
            given = dict(zip(("model_output", "timestep", "sample"), args, strict=False)) | kwargs
            if self._grid is None:
                self._grid = self._locate(given["timestep"])
                self.observer.located(self._grid)
            self.observer.end_step(self._step, Moved(given.get("model_output"), given.get("sample"), result[0]))
            self._step += 1
            self._calls.clear()
            if self._step == self._grid.num_steps:
                self._ended()
        return result

    def _locate(self, timestep: Any) -> Grid:
        """Where the loop runs, now that its first step is taken; without waiting for a device, if that can be."""
        grid = self.scheduler.timesteps
        # Schedulers that count their steps say so; else a loop over the grid takes its elements, seldom copies of them.
        counted = getattr(self.scheduler, "step_index", None)
        start = counted - 1 if counted else _position(timestep, grid)
        return Grid(len(grid), int((grid == timestep).nonzero()[0]) if start is None else start)

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
                # In another thread, or for another pipeline of the same denoiser, it is none of this one's business.
                if not _running.is_latest(self):
                    yield value
                    return
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
        for denoiser in watch.denoisers:
            self._stacks.setdefault(denoiser, []).append(weakref.ref(watch))

    def remove(self, watch: Watch) -> None:
        for denoiser in watch.denoisers:
            stack = self._stacks.get(denoiser, [])
            stack[:] = [ref for ref in stack if ref() not in (watch, None)]

    def is_latest(self, watch: Watch, denoiser: int = 0) -> bool:
        stack = self._stacks.get(watch.denoisers[denoiser], [])
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


class _DenoiserHook(Hook):
    def __init__(self, watch: Watch, denoiser: int) -> None:
        super().__init__()
        self.watch, self.denoiser = watch, denoiser

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.watch.mend_hooks(self.denoiser)
        return args, kwargs

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.watch.on_call(self.denoiser, self.beneath, args, kwargs)


def _position(timestep: Any, grid: Any) -> int | None:
    """Where in the grid a timestep is that shares its memory; None if it does not."""
    if not isinstance(timestep, torch.Tensor) or not isinstance(grid, torch.Tensor) or not grid.stride(0):
        return None
    if timestep.untyped_storage().data_ptr() != grid.untyped_storage().data_ptr() or timestep.dtype != grid.dtype:
        return None
    position = (timestep.storage_offset() - grid.storage_offset()) // grid.stride(0)
    return position if timestep.ndim == 0 and 0 <= position < len(grid) else None


def _signature(values: Iterable[Any]) -> tuple[Any, ...]:
    """What a denoiser's inputs have in common with those that a cached value fits.

    Shapes of all, for a value may have the length of the text in it; the dtype of the first alone, which is what is
    denoised: that of a timestep changes in HunyuanVideo from step 0 to 1, without any effect.
    """
    found = list(_tensors(values))
    return (*(tuple(tensor.shape) for tensor in found), *((found[0].dtype, found[0].device) if found else ()))


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Those among the values and in lists of them.

    Not in dicts: pipelines keep things there that come and go without any effect on what is computed.
    """
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
