"""The runtime: computes the key steps, predicts the others from a few cached values."""

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .denoisers import find_denoisers, identify
from .errors import CacheStateError, ScheduleMismatchError
from .schedule import Schedule, Term
from .watch import Branch, Call, Moved, Watch


@dataclass
class Stats:
    """What happened since `enable`.

    Attributes:
        generations: sampling loops begun.
        computed_steps: steps of the latest generation whose denoiser calls all ran in full.
        predicted_steps: steps of the latest generation with at least one predicted call.
        full_calls: denoiser calls run in full, over all generations.
        predicted_calls: denoiser calls predicted, over all generations.
        cached_values: values held now.
        cached_bytes: bytes they take.
        peak_cached_bytes: the most bytes held at any time.
    """

    generations: int = 0
    computed_steps: tuple[int, ...] = ()
    predicted_steps: tuple[int, ...] = ()
    full_calls: int = 0
    predicted_calls: int = 0
    cached_values: int = 0
    cached_bytes: int = 0
    peak_cached_bytes: int = 0


def enable(pipeline: Any, schedule: Schedule) -> None:
    """Makes every following call of the pipeline follow the schedule, until `disable`.

    A call with another number of steps than the schedule's is computed in full, with one warning. The same holds
    within a call wherever the cached values do not fit: another shape, or too few key steps passed.

    Raises:
        CacheStateError: it is enabled already.
        ScheduleMismatchError: the schedule was made for another model.
        UnsupportedPipelineError: the pipeline cannot be followed, or not at the schedule's boundary.
    """
    require_disabled(pipeline)
    cache = _Cache(schedule)
    identity = identify(find_denoisers(pipeline))
    if schedule.model is not None and not schedule.model.admits(identity):
        raise ScheduleMismatchError(
            f"the schedule was made for {schedule.model.denoiser} (configuration {schedule.model.config}), the "
            f"pipeline has {identity.denoiser} (configuration {identity.config}): calibrate this model with "
            "dpcache.calibrate(pipe, inputs) and plan anew."
        )
    cache.watch = Watch(pipeline, schedule.boundary, cache)
    _enabled[pipeline] = cache


def disable(pipeline: Any) -> None:
    """Takes everything off the pipeline again and frees the cached values.

    Raises:
        CacheStateError: it is not enabled.
    """
    cache = _enabled.pop(pipeline, None)
    if cache is None:
        raise CacheStateError("dpcache is not enabled on this pipeline: call dpcache.enable(pipe, schedule) first.")
    assert cache.watch is not None
    cache.watch.close()


@contextmanager
def enabled(pipeline: Any, schedule: Schedule) -> Iterator[Any]:
    """`enable` on entering, `disable` on leaving, also after an exception. Yields the pipeline."""
    enable(pipeline, schedule)
    try:
        yield pipeline
    finally:
        disable(pipeline)


def require_disabled(pipeline: Any) -> None:
    """Raises CacheStateError where a full run is wanted but dpcache is enabled."""
    if pipeline in _enabled:
        raise CacheStateError(
            "dpcache is enabled on this pipeline already: call dpcache.disable(pipe) first, or use "
            "`with dpcache.enabled(pipe, schedule):`."
        )


def stats(pipeline: Any) -> Stats:
    """What happened on this pipeline since `enable`.

    Raises:
        CacheStateError: it is not enabled.
    """
    cache = _enabled.get(pipeline)
    if cache is None:
        raise CacheStateError(
            "dpcache is not enabled on this pipeline, so there are no statistics: call dpcache.stats(pipe) between "
            "dpcache.enable(pipe, schedule) and dpcache.disable(pipe)."
        )
    return cache.stats()


@dataclass
class _Ring:
    """The cached values of one branch: key step -> value, no more of them than predictions still need."""

    shape: tuple[Any, ...] = ()
    values: dict[int, torch.Tensor] = field(default_factory=dict)

    def predict(self, terms: tuple[Term, ...]) -> torch.Tensor:
        """The weighted sum of cached values: summed in float32 (float64 for float64 values), rounded once."""
        first, *others = terms
        value = self.values[first.key_step]
        wide = torch.promote_types(value.dtype, torch.float32)
        total = value.to(wide) * first.coefficient
        for term in others:
            total.add_(self.values[term.key_step], alpha=term.coefficient)
        return total.to(value.dtype)


class _Cache:
    """Follows a schedule on one pipeline: the observer behind `enable`."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.watch: Watch | None = None
        self._rings: dict[Branch, _Ring] = {}
        self._covered = False
        self._stats = Stats()
        self._computed: set[int] = set()
        self._predicted: set[int] = set()
        # After which step no prediction uses a key step's value any more.
        self._last_use = {key: key for key in schedule.key_steps}
        for step, terms in sorted(schedule.predictions.items()):
            self._last_use.update({term.key_step: step for term in terms})

    def begin(self, num_steps: int) -> None:
        self._rings.clear()
        self._computed.clear()
        self._predicted.clear()
        self._stats.generations += 1
        expected = self.schedule.num_inference_steps
        if num_steps != expected:
            # One text for one schedule and step count: Python's default filter shows it once.
            warnings.warn(
                f"the schedule covers {expected} steps but the pipeline was called for {num_steps}: every step is "
                f"computed in full. Call the pipeline with num_inference_steps={expected}, or calibrate and plan for "
                f"{num_steps} steps.",
                stacklevel=2,
            )
        self._covered = num_steps == expected

    def call(self, call: Call) -> Any:
        ring = self._rings.setdefault(call.branch, _Ring())
        if ring.shape != call.shape:
            ring.shape = call.shape
            ring.values.clear()
        terms = self.schedule.predictions.get(call.step) if self._covered else None
        if terms is not None and all(term.key_step in ring.values for term in terms):
            self._predicted.add(call.step)
            self._stats.predicted_calls += 1
            return call.predicted(ring.predict(terms))
        output, value = call.full()
        self._computed.add(call.step)
        self._stats.full_calls += 1
        if self._covered and self._last_use.get(call.step, -1) > call.step:
            # A copy: the block may hand out a view of something larger, or memory that it uses again.
            ring.values[call.step] = value.detach().clone(memory_format=torch.contiguous_format)
            self._stats.peak_cached_bytes = max(self._stats.peak_cached_bytes, self.stats().cached_bytes)
        return output

    def end_step(self, step: int, moved: Moved) -> None:
        for ring in self._rings.values():
            for key in [key for key in ring.values if self._last_use[key] <= step]:
                del ring.values[key]

    def end(self) -> None:
        self._rings.clear()

    def stats(self) -> Stats:
        held = [value for ring in self._rings.values() for value in ring.values.values()]
        self._stats.cached_values = len(held)
        self._stats.cached_bytes = sum(value.numel() * value.element_size() for value in held)
        self._stats.computed_steps = tuple(sorted(self._computed - self._predicted))
        self._stats.predicted_steps = tuple(sorted(self._predicted))
        return Stats(**vars(self._stats))


_enabled: "weakref.WeakKeyDictionary[Any, _Cache]" = weakref.WeakKeyDictionary()
