"""dpcache: diffusion transformers several times faster, without training.

calibration = dpcache.calibrate(pipe, prompts, num_inference_steps=50)
schedule = calibration.plan(num_key_steps=13)
with dpcache.enabled(pipe, schedule):
    image = pipe(prompt, num_inference_steps=50).images[0]
"""

import importlib
from typing import TYPE_CHECKING, Any

from .noise import quietly

if TYPE_CHECKING:
    from .errors import (
        CacheStateError,
        CalibrationError,
        DPCacheError,
        ExportError,
        FileFormatError,
        GenerationError,
        GridError,
        HubError,
        InfeasibleBudgetError,
        MissingExtraError,
        PromptError,
        ScheduleMismatchError,
        UnknownModelError,
        UnsupportedPipelineError,
    )
    from .judge.comparison import Comparison, Sample, compare, compare_all
    from .measure.calibration import Calibration
    from .measure.measuring import calibrate
    from .measure.paper import paper_cost
    from .measure.plain import recording
    from .plan.planner import Plan, plan, plan_all
    from .plan.recipe import Recipe
    from .plan.schedule import Schedule
    from .run.layouts import register_denoiser
    from .run.pipelines import disable, enable, enabled, stats
    from .run.plain import following
    from .run.stats import Stats
    from .search.optimize import optimize
    from .zoo import load_pipeline

__version__ = "0.1.0"

# Imported when first asked for: torch and diffusers take seconds, planning and `--help` need neither.
_HOME = {
    "CacheStateError": "errors",
    "Calibration": "measure.calibration",
    "CalibrationError": "errors",
    "Comparison": "judge.comparison",
    "DPCacheError": "errors",
    "ExportError": "errors",
    "FileFormatError": "errors",
    "GenerationError": "errors",
    "GridError": "errors",
    "HubError": "errors",
    "InfeasibleBudgetError": "errors",
    "MissingExtraError": "errors",
    "PromptError": "errors",
    "Plan": "plan.planner",
    "Recipe": "plan.recipe",
    "Sample": "judge.comparison",
    "Schedule": "plan.schedule",
    "ScheduleMismatchError": "errors",
    "Stats": "run.stats",
    "UnknownModelError": "errors",
    "UnsupportedPipelineError": "errors",
    "calibrate": "measure.measuring",
    "compare": "judge.comparison",
    "compare_all": "judge.comparison",
    "disable": "run.pipelines",
    "enable": "run.pipelines",
    "enabled": "run.pipelines",
    "following": "run.plain",
    "load_pipeline": "zoo",
    "optimize": "search.optimize",
    "paper_cost": "measure.paper",
    "plan": "plan",
    "plan_all": "plan.planner",
    "recording": "measure.plain",
    "register_denoiser": "run.layouts",
    "stats": "run.pipelines",
}

__all__ = [  # noqa: RUF022 - in the order of use
    "load_pipeline",
    "optimize",
    "calibrate",
    "Calibration",
    "Recipe",
    "Schedule",
    "enable",
    "enabled",
    "disable",
    "stats",
    "following",
    "recording",
    "Stats",
    "compare",
    "compare_all",
    "Comparison",
    "Sample",
    "paper_cost",
    "plan",
    "plan_all",
    "Plan",
    "register_denoiser",
    "DPCacheError",
    "ExportError",
    "CacheStateError",
    "CalibrationError",
    "FileFormatError",
    "GenerationError",
    "GridError",
    "HubError",
    "InfeasibleBudgetError",
    "MissingExtraError",
    "PromptError",
    "ScheduleMismatchError",
    "UnknownModelError",
    "UnsupportedPipelineError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        instead = "; use dpcache.optimize(pipe, inputs, num_key_steps=13, budget=60)" if name == "select" else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{instead}")
    with quietly():
        home = importlib.import_module(f".{_HOME[name]}", __name__)
    value = getattr(home, name, home)  # `dpcache.plan` is a package that can be called
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
