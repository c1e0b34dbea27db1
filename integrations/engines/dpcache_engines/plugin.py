"""How schedules get into cache-dit: every cache context that is made asks here what it shall do.

Three functions of cache-dit are wrapped, whichever engine calls them: what makes a calibrator, what makes a context,
and what says which contexts belong to which transformer. Nothing of an engine's own is touched.
"""

import copy
import functools
import logging
import os
import sys
from pathlib import Path
from typing import Any

from .schedules import EngineError, Schedule

VARIABLE = "DPCACHE_SCHEDULES"
"""Names schedule files, or folders of them, with the path separator of the system between; for the engines."""

logger = logging.getLogger("dpcache_engines")

#: Number of steps -> schedule.
_schedules: dict[int, Schedule] = {}
#: Names of contexts of the last list of blocks of a transformer: what they hand on is what the head reads.
_last: set[str] = set()
_originals: dict[str, Any] = {}
_told: set[str] = set()


def register(*files: "str | os.PathLike[str]") -> None:
    """Has cache-dit follow these schedules, each for calls of its number of steps.

    Args:
        files: schedule files, or folders of them; those that the environment names if none are given. With none at
            all nothing is changed.

    Raises:
        EngineError: a file that cannot be read, or two schedules for one number of steps.
    """
    named = files or tuple(part for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part)
    found: dict[int, Schedule] = {}
    for file in _files(named):
        schedule = Schedule.read(file)
        if (other := found.get(schedule.num_steps)) is not None:
            raise EngineError(
                f"{other.name} and {schedule.name} are both for {schedule.num_steps} steps, and requests do not say "
                "which they want: give one for each number of steps."
            )
        found[schedule.num_steps] = schedule
    if not found:
        return
    _schedules.clear()
    _schedules.update(found)
    _told.clear()
    _install()
    for steps, schedule in sorted(found.items()):
        logger.info("dpcache: %s for %d steps, %d of them computed", schedule.name, steps, len(schedule.key_steps))


def unregister() -> None:
    """Leaves cache-dit as it was."""
    _schedules.clear()
    _last.clear()
    if _originals:
        context, adapter = _modules()
        context.Calibrator = _originals.pop("calibrator")
        context.CachedContext.__post_init__ = _originals.pop("context")
        adapter.CachedAdapter.modify_context_params = _originals.pop("adapter")


def _files(named: "tuple[str | os.PathLike[str], ...]") -> list[Path]:
    found: list[Path] = []
    for path in map(Path, named):
        found += sorted(path.glob("*.json")) if path.is_dir() else [path]
    return found


def _modules() -> tuple[Any, Any]:
    from cache_dit.caching.cache_adapters import cache_adapter
    from cache_dit.caching.cache_contexts import cache_context

    return cache_context, cache_adapter


def _install() -> None:
    if _originals:
        return
    from .calibrator import TYPE, ScheduleCalibrator

    context, adapter = _modules()
    _originals["calibrator"] = make_calibrator = context.Calibrator
    _originals["context"] = set_up = context.CachedContext.__post_init__
    _originals["adapter"] = context_params = vars(adapter.CachedAdapter)["modify_context_params"]

    def calibrator(config: Any) -> Any:
        """Of this type, or one of cache-dit's own."""
        return ScheduleCalibrator(**config.to_kwargs()) if config.calibrator_type == TYPE else make_calibrator(config)

    @functools.wraps(set_up)
    def post_init(self: Any) -> None:
        if type(self) is context.CachedContext:  # pruning has contexts of its own
            _follow(self)
        set_up(self)

    def modify_context_params(cls: Any, block_adapter: Any, **kwargs: Any) -> Any:
        names = block_adapter.unique_blocks_name
        of_transformers = names if names and isinstance(names[0], list) else [names]
        if len(of_transformers) > 1:
            raise EngineError(
                f"{type(block_adapter.pipe).__name__} runs {len(of_transformers)} transformers one after another, and "
                "a cache context does not know at which step the second one begins (Wan 2.2's two experts): serve it "
                "without DPCACHE_SCHEDULES, or with dpcache.enable and diffusers."
            )
        transformers = block_adapter.transformer
        _require_the_model(transformers[0] if isinstance(transformers, list) else transformers)
        _last.update(some[-1] for some in of_transformers)
        return context_params.__func__(cls, block_adapter, **kwargs)

    context.Calibrator = calibrator
    context.CachedContext.__post_init__ = post_init
    adapter.CachedAdapter.modify_context_params = classmethod(modify_context_params)


def _require_the_model(transformer: Any) -> None:
    """Refuses schedules of other models; says it where only the configuration is another."""
    for schedule in _schedules.values():
        found = type(transformer).__name__
        if not schedule.is_for(transformer):
            raise EngineError(
                f"{schedule.name} was made for {schedule.model}, and what is served here is {found}: give only "
                "schedules of the model that is served."
            )
        if not schedule.knows(transformer):
            _tell(
                f"{schedule.name} was made for a {schedule.model} of another configuration than the {found} here: "
                "either another model, or the same one loaded by another version of diffusers."
            )


def _follow(context: Any) -> None:
    """Has a new cache context follow the schedule for its number of steps; computes everything where there is none."""
    from .calibrator import ScheduleCalibratorConfig

    config = copy.copy(context.cache_config)  # the original serves other requests
    steps = config.num_inference_steps
    if steps is None:  # an engine that says it with every request makes a new context then
        return
    if config.enable_separate_cfg and _guides_in_parallel():
        raise EngineError(
            "guidance runs in parallel here (cfg parallel), so each process sees one call a step, and cache-dit counts "
            "two: start the server without it, or without DPCACHE_SCHEDULES."
        )
    schedule = _schedules.get(steps)
    config.steps_computation_mask = schedule.mask if schedule is not None else [1] * steps
    config.steps_computation_policy = "static"
    config.Fn_compute_blocks, config.Bn_compute_blocks, config.max_warmup_steps = 1, 0, 1  # the fewest it works with
    context.cache_config = config
    if schedule is None:
        known = ", ".join(map(str, sorted(_schedules)))
        _tell(f"there is no schedule for requests of {steps} steps (only for {known}): every step is computed.")
        context.calibrator_config = None
        return
    corrects = context.name in _last
    context.calibrator_config = ScheduleCalibratorConfig(schedule=schedule, corrects=corrects)


def _guides_in_parallel() -> bool:
    """Whether SGLang splits guidance between processes."""
    state = sys.modules.get("sglang.multimodal_gen.runtime.distributed.parallel_state")
    return state is not None and state.get_classifier_free_guidance_world_size() > 1


def _tell(text: str) -> None:
    if text not in _told:
        _told.add(text)
        logger.warning("dpcache: %s", text)
