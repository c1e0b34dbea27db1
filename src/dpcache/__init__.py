"""dpcache: diffusion transformers several times faster, without training.

calibration = dpcache.calibrate(pipe, prompts, num_inference_steps=50)
schedule = calibration.plan(num_key_steps=13)
with dpcache.enabled(pipe, schedule):
    image = pipe(prompt, num_inference_steps=50).images[0]
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import Stats, disable, enable, enabled, stats
    from .calibration import Calibration
    from .comparison import Comparison, Sample, compare, compare_all
    from .costs import paper_cost
    from .denoisers import register_denoiser
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
    from .measuring import calibrate
    from .planner import Plan, plan, plan_all
    from .schedule import Schedule
    from .selection import Recipe, optimize, select
    from .zoo import load_pipeline

__version__ = "0.1.0"

# Imported when first asked for: torch and diffusers take seconds, planning and `--help` need neither.
_HOME = {
    "CacheStateError": "errors",
    "Calibration": "calibration",
    "CalibrationError": "errors",
    "Comparison": "comparison",
    "DPCacheError": "errors",
    "ExportError": "errors",
    "FileFormatError": "errors",
    "GenerationError": "errors",
    "GridError": "errors",
    "HubError": "errors",
    "InfeasibleBudgetError": "errors",
    "MissingExtraError": "errors",
    "PromptError": "errors",
    "Plan": "planner",
    "Recipe": "selection",
    "Sample": "comparison",
    "Schedule": "schedule",
    "ScheduleMismatchError": "errors",
    "Stats": "cache",
    "UnknownModelError": "errors",
    "UnsupportedPipelineError": "errors",
    "calibrate": "measuring",
    "compare": "comparison",
    "compare_all": "comparison",
    "disable": "cache",
    "enable": "cache",
    "enabled": "cache",
    "load_pipeline": "zoo",
    "optimize": "selection",
    "paper_cost": "costs",
    "plan": "planner",
    "plan_all": "planner",
    "register_denoiser": "denoisers",
    "select": "selection",
    "stats": "cache",
}

__all__ = [  # noqa: RUF022 - in the order of use
    "load_pipeline",
    "optimize",
    "calibrate",
    "Calibration",
    "select",
    "Recipe",
    "Schedule",
    "enable",
    "enabled",
    "disable",
    "stats",
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
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
