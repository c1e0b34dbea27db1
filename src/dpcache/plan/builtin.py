"""Ready-made schedules that ship with the package: found or planned from what was published for a model."""

from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from dpcache.checks import whole
from dpcache.errors import UnknownModelError

from .predictors import Taylor
from .schedule import ModelIdentity, Schedule

FOLDER = Path(__file__).parent / "builtin_schedules"


class BuiltinPlan(BaseModel):
    """The plan for one number of key steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key_steps: tuple[int, ...] = Field(description="Steps at which the denoiser runs in full.")
    cost: float | None = Field(
        default=None, description="What the plan costs, in the unit of the published cost tensor, if it is from one."
    )
    source: str | None = Field(
        default=None, description="How this one came about, where the plans did not all come about in one way."
    )


class Builtin(BaseModel):
    """The schedules of one model: the file in `builtin_schedules`, made by `python -m benchmarks.builtin`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="What it is called here.")
    models: tuple[str, ...] = Field(description="Hub ids of the models it is for.")
    model: ModelIdentity = Field(description="Their denoiser.")
    num_inference_steps: int = Field(description="T.")
    boundary: Literal["blocks", "output"] = Field(description="What is cached and predicted.")
    order: int = Field(description="Of the Taylor prediction; 0 reuses the last computed value.")
    source: str = Field(description="Where the plans come from, all of them.")
    plans: dict[int, BuiltinPlan] = Field(description="By number of key steps.")


@cache
def builtins() -> dict[str, Builtin]:
    """What ships with the package, by name; of several for one model, the one to use comes first."""
    found = [Builtin.model_validate_json(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.json")]
    return {one.name: one for one in sorted(found, key=lambda one: one.name)}


def builtin_schedule(name: str, num_key_steps: int) -> Schedule:
    """The ready-made schedule of this name, with this many key steps.

    Raises:
        UnknownModelError: there are none of this name.
        ValueError: there is none with this many key steps.
    """
    if not isinstance(name, str) or name not in builtins():
        raise UnknownModelError(f"there are no built-in schedules named {name!r}: there are {_known()}.")
    one = builtins()[name]
    if whole("num_key_steps", num_key_steps, 1) not in one.plans:
        raise ValueError(
            f"the built-in schedules of {name} have {min(one.plans)} to {max(one.plans)} key steps, not "
            f"{num_key_steps}: choose one of these, or calibrate the model with dpcache.calibrate(pipe, inputs)."
        )
    plan = one.plans[num_key_steps]
    return Schedule.from_key_steps(
        plan.key_steps,
        one.num_inference_steps,
        predictor=Taylor(one.order),
        boundary=one.boundary,
        model=one.model,
        cost=plan.cost,
        source=f"{plan.source}; {one.source}" if plan.source else one.source,
    )


def builtin_of(model: str) -> str:
    """Name of the ready-made schedules for a model, given its hub id: the first of them, if there are several.

    Raises:
        UnknownModelError: there are none for it.
    """
    for one in builtins().values():
        if model in one.models:
            return one.name
    raise UnknownModelError(
        f"there are no built-in schedules for {model}: there are {_known()}. If it is one of these under another name, "
        "say builtin:NAME:K; else calibrate it."
    )


def _known() -> str:
    return "; ".join(f"{one.name}, for {' and '.join(one.models)}" for one in builtins().values())
