"""The runtime: computes the key steps, predicts the others from a few cached values."""

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Never

import torch

from dpcache.checks import no_more_arguments
from dpcache.errors import CacheStateError, ScheduleMismatchError
from dpcache.plan.recipe import RECIPE_FIELDS, Recipe
from dpcache.plan.schedule import Schedule, Term

from .adaptive import LEAST_INPUTS, Decision, Found, Guide
from .denoisers import find_denoisers, identify
from .plans import Calibrated, Plans
from .sums import keep, weighted_sum, with_correction
from .watch import Branch, Call, Grid, Moved, Watch

#: What to do where a sample's errors are beyond those of the calibration inputs.
OnDrift = Literal["warn", "full", "ignore"]


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
        cached_bytes: bytes they take, on the device or, offloaded, in host memory.
        peak_cached_bytes: the most bytes held at any time.
        drift: by how many times errors at the key steps of the latest generation were larger than those of the
            calibration inputs; None where they were not compared, or too few.
        decisions: what was found at each key step of the latest generation, and what followed; only with
            `enable(..., adaptive=True)`.
    """

    generations: int = 0
    computed_steps: tuple[int, ...] = ()
    predicted_steps: tuple[int, ...] = ()
    full_calls: int = 0
    predicted_calls: int = 0
    cached_values: int = 0
    cached_bytes: int = 0
    peak_cached_bytes: int = 0
    drift: float | None = None
    decisions: tuple[Decision, ...] = ()


def enable(
    pipeline: Any,
    schedule: Schedule | Calibrated,
    *,
    num_key_steps: int | None = None,
    speedup: float | None = None,
    max_error: float | None = None,
    recipe: Recipe | None = None,
    offload: bool = False,
    adaptive: bool = False,
    on_drift: OnDrift | None = None,
    **unknown: Never,
) -> None:
    """Makes every following call of the pipeline follow the schedule, until `disable`.

    Given a calibration instead, every call follows a schedule planned for its own noise levels, whatever its number of
    steps, shift or resolution: planned when such a call first comes, and remembered. How is said by one of
    `num_key_steps`, `speedup` and `max_error`, and by `recipe`.

    A loop that begins at a later step of the schedule's grid, like image-to-image with a strength, follows what is left
    of the schedule (see `Schedule.from_step`). So does, within a loop, a branch whose cached values fit no longer: it
    has another shape, or was not called for a while. A loop of any other number of steps is computed in full, with one
    warning.

    Args:
        pipeline: a diffusers pipeline.
        schedule: what to follow.
        num_key_steps: with a calibration, K; a call with no more steps is computed in full.
        speedup: with a calibration, T / K instead.
        max_error: with a calibration, the largest expected error instead (see `Calibration.plan`).
        recipe: with a calibration, how to plan.
        offload: keep the cached values in host memory (pinned, for a GPU) and bring them back a piece at a time. Takes
            next to nothing of the device's memory, and at every skipped step the time to copy up to order + 1 values:
            worth it for long videos, where a value takes hundreds of megabytes and a full step many seconds.
        adaptive: with a calibration, let every generation choose its key steps by what it meets: where predictions err
            more than they did on the calibration inputs the next key step comes earlier, where they err less, later.
            The number of full calls is then that of the plan on average over the calibration inputs. Reads one number
            from the device at every key step. A batch decides together, by the error over all of it. `Stats.decisions`
            tells what was decided and why.
        on_drift: with a calibration, what to do where errors at key steps are so much larger than those of the
            calibration inputs that the calibration does not fit: `"warn"`, once; compute the rest of the generation in
            `"full"`, and warn; or `"ignore"`. To warn nothing is read from the device before the last step; `"full"`
            reads a number at every key step. Unless given `"warn"`, with at least four calibration inputs.
        unknown: refused.

    Raises:
        CacheStateError: it is enabled already.
        ScheduleMismatchError: the schedule was made for another model.
        UnsupportedPipelineError: the pipeline cannot be followed, or not at the schedule's boundary.
        CalibrationError, InfeasibleBudgetError, ValueError: as `Calibration.plan`. A call whose noise levels are beyond
            those of the calibration raises GridError, after its first step.
        TypeError: what only a calibration can do was asked for with a schedule, or an argument that there is none of.
    """
    no_more_arguments(enable, unknown, RECIPE_FIELDS)
    asked = {"num_key_steps": num_key_steps, "speedup": speedup, "max_error": max_error, "recipe": recipe}
    planning: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    require_disabled(pipeline)
    plans = None
    if not isinstance(schedule, Schedule):
        on_drift = on_drift or ("warn" if len(schedule.value_gram) >= LEAST_INPUTS else "ignore")
        plans = Plans(schedule, planning, adaptive=adaptive, watched=on_drift != "ignore")
        schedule, _ = plans.own
    else:
        given = [*planning, *(["adaptive"] if adaptive else []), *(["on_drift"] if on_drift else [])]
        if given:
            raise TypeError(f"a schedule is planned already: {', '.join(given)} can be given with a calibration only.")
    cache = Cache(schedule, offload, plans, on_drift or "ignore")
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
def enabled(pipeline: Any, schedule: Schedule | Calibrated, **how: Any) -> Iterator[Any]:
    """`enable` on entering, with its arguments; `disable` on leaving, also after an exception. Yields the pipeline."""
    enable(pipeline, schedule, **how)
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
    """The cached values of one branch: key step -> value, no more of them than predictions still need.

    Steps count from `start`, the first call of this shape.
    """

    shape: tuple[Any, ...]
    start: int
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def keep(self, step: int, value: torch.Tensor, offload: bool) -> None:
        # A copy: the block may hand out a view of something larger, or memory that it uses again.
        self.values[step] = keep(value, offload=offload)
        self.device = value.device

    def predict(self, terms: tuple[Term, ...]) -> torch.Tensor:
        used = [self.values[term.key_step] for term in terms]
        return weighted_sum(used, [term.coefficient for term in terms], self.device)


@dataclass
class _Comparison:
    """What the key steps of one generation told; errors are read from the device when they are needed."""

    found: Found = field(default_factory=Found)
    decisions: list[Decision] = field(default_factory=list)
    step: int | None = None
    _pending: list[tuple[Any, torch.Tensor]] = field(default_factory=list)

    def add(self, usual: Any, error: torch.Tensor) -> None:
        self._pending.append((usual, error))

    def settle(self) -> None:
        if self._pending:
            logarithms = torch.stack([error for _, error in self._pending]).clamp(min=1e-15).log().tolist()
            for (usual, _), logarithm in zip(self._pending, logarithms, strict=True):
                self.found.add(usual, logarithm)
            self._pending.clear()


def _relative_error(predicted: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """RMS difference as a share of the value, on the device."""
    off, size = (torch.linalg.vector_norm(of, dtype=torch.float32) for of in (predicted - value, value))
    return torch.div(off, size.clamp(min=1e-30))


class Cache:
    """Follows a schedule on one pipeline: the observer behind `enable`."""

    def __init__(
        self, schedule: Schedule, offload: bool = False, plans: Plans | None = None, on_drift: OnDrift = "ignore"
    ) -> None:
        self.schedule, self.offload, self._plans, self._on_drift = schedule, offload, plans, on_drift
        self._guide: Guide | None = None
        self.watch: Watch | None = None
        self._rings: dict[Branch, _Ring] = {}
        #: From which step of the loop on -> what is left of the schedule; empty where it does not cover the loop.
        self._left: dict[int, Schedule] = {}
        self._stats = Stats()
        self._computed: set[int] = set()
        self._predicted: set[int] = set()
        self._comparison = _Comparison()
        self._warned = False

    def begin(self) -> None:
        self._guide, self._comparison = None, _Comparison()
        self._rings.clear()
        self._left = {}
        self._computed.clear()
        self._predicted.clear()
        self._stats.generations += 1

    def located(self, grid: Grid) -> None:
        if self._plans is not None:
            assert self.watch is not None
            self.schedule, self._guide = self._plans.on(self.watch.scheduler, grid.start)
        expected = self.schedule.num_inference_steps
        if grid.num_steps == expected:
            self._left[0] = self.schedule
        elif grid.size == expected:
            self._left[0] = self.schedule.from_step(grid.start)
        else:
            # One text for one schedule and step count: Python's default filter shows it once.
            warnings.warn(
                f"the schedule covers {expected} steps but the pipeline was called for {grid.num_steps}: every step is "
                f"computed in full. Call the pipeline with num_inference_steps={expected}, or calibrate and plan for "
                f"{grid.num_steps} steps.",
                stacklevel=2,
            )
            self._rings.clear()

    def call(self, call: Call) -> Any:
        terms = self._terms(call)
        if terms is not None:
            self._predicted.add(call.step)
            self._stats.predicted_calls += 1
            return call.predicted(self._rings[call.branch].predict(terms))
        output, value = call.full()
        self._computed.add(call.step)
        self._stats.full_calls += 1
        ring = self._rings[call.branch]
        step = call.step - ring.start
        if self._guide is not None and not ring.start and self._comparison.step != step:
            self._compare(self._guide, ring, step, value)
        terms = self._schedule_of(ring).corrections.get(step, ()) if self._left else ()
        if (corrected := with_correction(value, step, terms, ring.values)) is not None:
            output = call.predicted(corrected)
        if self._wanted(call):
            self._forget(ring, step, self._spared())
            ring.keep(step, value, self.offload)
            self._stats.peak_cached_bytes = max(self._stats.peak_cached_bytes, self._held_bytes())
        return output

    def _terms(self, call: Call) -> tuple[Term, ...] | None:
        """What to predict the call from; None if it is to be computed. Its branch has a ring that fits it then."""
        ring = self._rings.get(call.branch)
        if ring is not None and ring.shape == call.shape and self._left:
            terms = self._schedule_of(ring).predictions.get(call.step - ring.start)
            if terms is None or all(term.key_step in ring.values for term in terms):
                return terms
            ring = None
        if ring is None or ring.shape != call.shape:
            self._rings[call.branch] = _Ring(call.shape, call.step)
        return None

    def _wanted(self, call: Call) -> bool:
        """Whether a later step may be predicted from this one's value."""
        if not self._left:
            # Where on the grid the loop runs is known after its first step only.
            return call.step == 0
        ring = self._rings[call.branch]
        step = call.step - ring.start
        return bool(self._spared()) or self._schedule_of(ring).last_uses.get(step, step) > step

    def _schedule_of(self, ring: _Ring) -> Schedule:
        if ring.start not in self._left:
            self._left[ring.start] = self._left[0].from_step(ring.start)
        return self._left[ring.start]

    def end_step(self, step: int, moved: Moved) -> None:
        for ring in self._rings.values():
            self._forget(ring, step - ring.start, self._spared() and self._spared() + 1)

    def _forget(self, ring: _Ring, step: int, spared: int) -> None:
        """Drops values that no step after this one is made from, but for so many of the latest."""
        if ring.values:
            last_uses = self._schedule_of(ring).last_uses
            old = sorted(ring.values)[: len(ring.values) - spared]
            for key in [key for key in old if last_uses.get(key, key) <= step]:
                del ring.values[key]

    def _spared(self) -> int:
        """Of values beside the one at hand, how many are kept in case that the schedule changes."""
        return self.schedule.order if self._guide is not None and self._decides() else 0

    def _decides(self) -> bool:
        """Whether what is found at a key step matters before the end."""
        return self._on_drift == "full" or (self._guide is not None and self._guide.adaptive)

    def _compare(self, guide: Guide, ring: _Ring, step: int, value: torch.Tensor) -> None:
        """Holds the computed value against its prediction; the first branch of a step speaks for all."""
        comparison = self._comparison
        comparison.step = step
        known = sorted(ring.values)[-guide.usual.predictor.order - 1 :]
        if known:
            coefficients = guide.usual.predictor.coefficients(known, [step])[0]
            used = known[-len(coefficients) :]
            pairs = zip(used, coefficients.tolist(), strict=True)
            predicted = ring.predict(tuple(Term(key_step=key, coefficient=share) for key, share in pairs))
            comparison.add(guide.usual.logarithms(known, step), _relative_error(predicted, value))
        if not self._decides():
            return
        comparison.settle()
        if self._on_drift == "full" and comparison.found.has_drifted():
            keys = [
                *(key for key in self._left[0].key_steps if key <= step),
                *range(step + 1, guide.start.num_inference_steps),
            ]
            self._left = {0: guide.schedule(keys)}
            self._guide = None
        elif guide.adaptive:
            keys = guide.path(step, self._left[0].key_steps, comparison.found.residuals)
            comparison.decisions.append(guide.decision(step, keys, comparison.found.residuals if known else None))
            self._left = {0: guide.schedule(keys)}

    def _tell_drift(self) -> None:
        comparison = self._comparison
        comparison.settle()
        drift = comparison.found.drift()
        if drift is None or not comparison.found.has_drifted() or self._on_drift == "ignore" or self._warned:
            return
        self._warned = True
        ratio, limit = drift
        then = " The rest of it was computed in full." if self._on_drift == "full" else ""
        warnings.warn(
            f"the calibration does not fit this generation: predictions err {ratio:.2f} times as much as on the "
            f"calibration inputs, of which hardly any would exceed {limit:.2f}.{then} Calibrate with inputs like this "
            "one (its prompt, LoRA, size, guidance), or take more key steps. Told once; see dpcache.stats(pipe).drift.",
            stacklevel=2,
        )

    def end(self) -> None:
        self._tell_drift()
        self._rings.clear()

    def _held_bytes(self) -> int:
        return sum(value.nbytes for ring in self._rings.values() for value in ring.values.values())

    def stats(self) -> Stats:
        self._stats.cached_values = sum(len(ring.values) for ring in self._rings.values())
        self._stats.cached_bytes = self._held_bytes()
        self._comparison.settle()
        drift = self._comparison.found.drift()
        self._stats.drift = drift and drift[0]
        self._stats.decisions = tuple(self._comparison.decisions)
        self._stats.computed_steps = tuple(sorted(self._computed - self._predicted))
        self._stats.predicted_steps = tuple(sorted(self._predicted))
        return Stats(**vars(self._stats))


_enabled: "weakref.WeakKeyDictionary[Any, Cache]" = weakref.WeakKeyDictionary()
