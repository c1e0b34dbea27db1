"""The peers: how each is switched on, and how its settings are searched until it takes so many full calls."""

import ast
import contextlib
import io
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
from diffusers import hooks

import dpcache
from benchmarks.bench import SEARCH_SEED, Bench
from dpcache.integrations.cache_dit import export
from dpcache.judge.ways import Way, diffusers_cache, fewer_steps, scheduled, taylorseers

TOLERANCE = 0.5
"""Of the full calls of a setting, from those asked for."""
ROUNDS = 7
"""Of bisection."""
CANDIDATES = 8
"""Settings of a grid that are run; the others, whose count is farther off, are not."""


class CannotRun(Exception):
    """A peer does not run on this model, and why."""


@dataclass(frozen=True)
class Method:
    """One row of the table at every budget.

    Attributes:
        name: in the table.
        search: the best setting found for so many full calls; what it raises is the reason why it cannot run.
        batch: inputs a call. One where the peer decides from the values of the whole batch.
    """

    name: str
    search: Callable[[Bench, int], Way]
    batch: int = 16


# ----------------------------------------------------------------------------------------------------------- searching


def best(bench: Bench, settings: Sequence[Way], k: int, batch: int) -> Way:
    """Of the settings that take k full calls, or come nearest to it, the one with the highest PSNR.

    On the inputs of the search, of course.
    """
    trials = [(setting, *bench.trial(setting, batch)) for setting in settings]
    off = max(TOLERANCE, min(abs(calls - k) for _, calls, _ in trials))
    return max((t for t in trials if abs(t[1] - k) <= off), key=lambda trial: trial[2])[0]


def bisected(bench: Bench, name: str, make: Callable[[float], Way], k: int, low: float, high: float, batch: int) -> Way:
    """The threshold between `low` and `high` that takes k full calls: the higher, the fewer."""
    nearest: tuple[float, Way | None] = (math.inf, None)
    for _ in range(ROUNDS):
        threshold = float(f"{math.sqrt(low * high):.3g}")
        setting = make(threshold)
        if (name, threshold) not in bench.tried:
            bench.tried[name, threshold] = bench.trial(setting, batch)[0]
        calls = bench.tried[name, threshold]
        if abs(calls - k) < nearest[0]:
            nearest = (abs(calls - k), setting)
        if abs(calls - k) <= TOLERANCE:
            break
        low, high = (threshold, high) if calls > k else (low, threshold)
    assert nearest[1] is not None
    return nearest[1]


# -------------------------------------------------------------------------------------------------------- this library


def selected(bench: Bench, k: int) -> Way:
    return scheduled(bench.selected(k))


def planned(bench: Bench, k: int) -> Way:
    """One plan, as it comes from the calibration: nothing is run to choose or tune it."""
    return scheduled(bench.calibration.plan(k))


def not_calibrated(bench: Bench, k: int) -> Way:
    """`enable(pipe, num_key_steps=k)`: nothing is measured, nothing is run."""
    return scheduled(bench.uncalibrated(k, bench.steps))


def papers_plan(bench: Bench, k: int) -> Way:
    return scheduled(bench.calibration.plan(k, recipe=dpcache.Recipe(method="paper")))


def uniform(bench: Bench, k: int) -> Way:
    return scheduled(dpcache.Schedule.uniform(k, bench.steps))


# ---------------------------------------------------------------------------------------------------------- fewer steps


def sampler_steps(bench: Bench, k: int) -> Way:
    return fewer_steps(k, type(bench.pipe.scheduler).__name__)


class _OwnGrid:
    """The solver's own grid of flow sigmas: pipelines hand over sigmas or a shift that it does not take."""

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, mu: float | None = None
    ) -> None:
        count = num_inference_steps if sigmas is None else len(sigmas)
        super().set_timesteps(count, device=device)  # type: ignore[misc]


class UniPC(_OwnGrid, diffusers.UniPCMultistepScheduler):
    pass


class DPMSolver(_OwnGrid, diffusers.DPMSolverMultistepScheduler):
    pass


@contextmanager
def solved_by(pipe: Any, scheduler: Any) -> Iterator[None]:
    before = pipe.scheduler
    pipe.scheduler = scheduler
    try:
        yield
    finally:
        pipe.scheduler = before


def solver(bench: Bench, k: int, kind: Any) -> Way:
    """The best of its orders and spacings of steps."""
    config = bench.pipe.scheduler.config
    if isinstance(bench.pipe.scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": config.shift}
        options = [{**flow, "solver_order": order} for order in (2, 3)]
        make = partial(kind, num_train_timesteps=config.num_train_timesteps)
    else:
        spacings = ("leading", "linspace", "trailing")
        options = [
            {"solver_order": order, "timestep_spacing": spacing}
            for order, spacing in itertools.product((2, 3), spacings)
        ]
        make = partial(kind.from_config, config)

    def setting(option: dict[str, Any]) -> Way:
        return Way(lambda pipe: solved_by(pipe, make(**option)), option, steps=k)

    return best(bench, [setting(option) for option in options], k, batch=16)


# ------------------------------------------------------------------------------------------------------------ diffusers


def taylorseer(bench: Bench, k: int) -> Way:
    return best(bench, taylorseers(k, bench.steps, bench.pipe.dtype), k, batch=16)


def first_block(bench: Bench, k: int) -> Way:
    def setting(threshold: float) -> Way:
        config = diffusers.FirstBlockCacheConfig(threshold=threshold)
        apply = partial(diffusers_cache, config=config, apply=hooks.apply_first_block_cache)
        return Way(apply, {"threshold": threshold})

    return bisected(bench, "first block", setting, k, 0.005, 2.0, batch=1)


def magcache(bench: Bench, k: int) -> Way:
    """Calibrated as its documentation says; its threshold, longest run of skipped steps and first full steps."""
    if "magcache" not in bench.tried:
        bench.tried["magcache"] = _mag_ratios(bench)
    ratios = bench.tried["magcache"]
    shapes = [
        (_mag_threshold(ratios, k, longest, retention), longest, retention)
        for longest in (3, 5, 8)
        for retention in (0.06, 0.1, 0.2)
    ]
    off = {shape: abs(_mag_calls(ratios, *shape) - k) for shape in shapes}
    near = [shape for shape in sorted(shapes, key=off.__getitem__) if off[shape] <= max(1, min(off.values()))]

    def setting(threshold: float, longest: int, retention: float) -> Way:
        told = {"threshold": threshold, "max_skip_steps": longest, "retention_ratio": retention}
        config = diffusers.MagCacheConfig(**told, num_inference_steps=bench.steps, mag_ratios=ratios)
        return Way(partial(diffusers_cache, config=config, apply=hooks.apply_mag_cache), told)

    return best(bench, [setting(*shape) for shape in near[:CANDIDATES]], k, batch=16)


def _mag_ratios(bench: Bench) -> list[float]:
    """The ratios it prints after a full run; here of one call with every input of the search."""
    config = diffusers.MagCacheConfig(calibrate=True, num_inference_steps=bench.steps)
    calibrating = Way(partial(diffusers_cache, config=config, apply=hooks.apply_mag_cache), {})
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        bench.run(calibrating, bench.search_inputs, len(bench.search_inputs), SEARCH_SEED)
    (line,) = [line for line in printed.getvalue().splitlines() if line.startswith("[") and line.endswith("]")]
    return [float(ratio) for ratio in ast.literal_eval(line)]


def _mag_calls(ratios: Sequence[float], threshold: float, longest: int, retention: float) -> int:
    """How many full calls it takes: its decisions follow from the ratios alone."""
    first = int(retention * len(ratios) + 0.5)
    calls, product, error, skipped = first, 1.0, 0.0, 0
    for ratio in ratios[first:]:
        product *= ratio
        error += abs(1 - product)
        skipped += 1
        if error > threshold or skipped > longest:
            calls, product, error, skipped = calls + 1, 1.0, 0.0, 0
    return calls


def _mag_threshold(ratios: Sequence[float], k: int, longest: int, retention: float) -> float:
    thresholds = [float(f"{10 ** (n / 40 - 3):.3g}") for n in range(160)]  # 0.001 to 10
    return min(thresholds, key=lambda threshold: abs(_mag_calls(ratios, threshold, longest, retention) - k))


def seacache(bench: Bench, k: int) -> Way:
    config = diffusers.SeaCacheConfig(threshold=1.0)
    setting = Way(partial(diffusers_cache, config=config, apply=hooks.apply_sea_cache), {"threshold": 1.0})
    with _warnings_of("diffusers.hooks.sea_cache") as said:
        calls, _ = bench.trial(setting, batch=1)
    if calls == bench.steps:
        raise CannotRun(f"computes every step; it warns: {' '.join(said)}")
    return bisected(
        bench,
        "seacache",
        lambda threshold: Way(
            partial(
                diffusers_cache,
                config=diffusers.SeaCacheConfig(threshold=threshold, max_consecutive_cached=0),
                apply=hooks.apply_sea_cache,
            ),
            {"threshold": threshold, "max_consecutive_cached": 0},
        ),
        k,
        0.01,
        10.0,
        batch=1,
    )


@contextmanager
def _warnings_of(name: str) -> Iterator[list[str]]:
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener = Listener()
    logging.getLogger(name).addHandler(listener)
    try:
        yield said
    finally:
        logging.getLogger(name).removeHandler(listener)


# ------------------------------------------------------------------------------------------------------------ cache-dit


@contextmanager
def cache_dit_cache(pipe: Any, config: dict[str, Any], order: int) -> Iterator[None]:
    """DBCache, with its TaylorSeer where `order` is above 0."""
    import cache_dit

    taylor = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(**config), calibrator_config=taylor)
    try:
        yield
    finally:
        cache_dit.disable_cache(pipe)


def _cache_dit_setting(bench: Bench, told: dict[str, Any], order: int) -> Way:
    config = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "num_inference_steps": bench.steps, **told}
    taylor = {"taylorseer_order": order} if order else {}
    return Way(partial(cache_dit_cache, config=config, order=order), {"Fn_compute_blocks": 1, **told, **taylor})


def dbcache(bench: Bench, k: int, orders: Sequence[int]) -> Way:
    """Its threshold, for the best of some orders; as many full steps at the start as leave room for others."""
    warmup = 4 if k > 8 else 1
    found = [
        bisected(
            bench,
            f"dbcache {order} {warmup}",
            lambda threshold, order=order: _cache_dit_setting(  # type: ignore[misc]
                bench, {"max_warmup_steps": warmup, "residual_diff_threshold": threshold}, order
            ),
            k,
            0.005,
            2.0,
            batch=1,
        )
        for order in orders
    ]
    return found[0] if len(found) == 1 else best(bench, found, k, batch=1)


def own_mask(bench: Bench, k: int) -> Way:
    """The one of its four masks that comes nearest, with the better order of its TaylorSeer."""
    import cache_dit

    masks = {
        policy: cache_dit.steps_mask(total_steps=bench.steps, mask_policy=policy)
        for policy in ("slow", "medium", "fast", "ultra")
    }
    policy = min(masks, key=lambda policy: abs(sum(masks[policy]) - k))
    setting = masked(bench, masks[policy], k)
    del setting.told["steps_computation_mask"]
    setting.told["mask_policy"] = policy
    return setting


def our_mask(bench: Bench, k: int) -> Way:
    """The key steps that this library selected."""
    schedule = bench.selected(k)
    setting = masked(bench, list(export(schedule).mask), k)
    del setting.told["steps_computation_mask"]
    setting.told["key_steps"] = list(schedule.key_steps)
    return setting


def masked(bench: Bench, mask: list[int], k: int) -> Way:
    told = {"steps_computation_mask": mask, "steps_computation_policy": "static"}
    return best(bench, [_cache_dit_setting(bench, dict(told), order) for order in (1, 2)], k, batch=16)


SELECTED = "dpcache, default"
FULL_NAME = "full"
METHODS = (
    Method(SELECTED, selected),
    Method("dpcache, one plan", planned),
    Method("dpcache, no calibration", not_calibrated),
    Method("dpcache, the paper's plan", papers_plan),
    Method("uniform interval, Taylor 2", uniform),
    Method("fewer steps", sampler_steps),
    Method("fewer steps, UniPC", partial(solver, kind=UniPC)),
    Method("fewer steps, DPM-Solver++", partial(solver, kind=DPMSolver)),
    Method("diffusers TaylorSeer", taylorseer),
    Method("diffusers MagCache", magcache),
    Method("diffusers SeaCache", seacache, batch=1),
    Method("cache-dit, its own mask, TaylorSeer", own_mask),
    Method("cache-dit, dpcache's key steps as mask, TaylorSeer", our_mask),
    Method("diffusers FirstBlockCache", first_block, batch=1),
    Method("cache-dit DBCache", partial(dbcache, orders=(0,)), batch=1),
    Method("cache-dit DBCache, TaylorSeer", partial(dbcache, orders=(1,)), batch=1),
)
