"""What the cached runs follow: schedules, or plans from a calibration; from files, the Hub, or this package."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dpcache.errors import CacheStateError, GridError, ScheduleMismatchError

if TYPE_CHECKING:
    from dpcache.measure.calibration import Calibration
    from dpcache.plan.schedule import Boundary, Schedule
    from dpcache.run.plans import Plans

    Followed = Schedule | Calibration | None
    """None where nothing was measured: a smooth curve."""


@dataclass(frozen=True)
class Source:
    """Where a schedule came from.

    Attributes:
        name: of a schedule, or of the calibration it was planned from, as it was typed (see `dpcache.apps.sources`);
            None where nothing was measured.
        num_key_steps: K, where it was planned from a calibration, or from nothing.
    """

    name: str | None
    num_key_steps: int | None = None

    def __str__(self) -> str:
        if self.name is None:
            return f"-k {self.num_key_steps}, no calibration"
        return self.name if self.num_key_steps is None else f"{self.name} -k {self.num_key_steps}"

    @property
    def short(self) -> "Source":
        """The same, without the folder."""
        return self if self.name is None else replace(self, name=Path(self.name).name)

    def document(self) -> dict[str, str | None]:
        """For JSON: the name of either, None for the other."""
        planned = self.num_key_steps is not None
        return {"schedule": None if planned else self.name, "calibration": self.name if planned else None}


def read_schedule(name: str, steps: int | None = None, *, model: str | None = None) -> "Schedule":
    """The schedule of this name: a file, a directory, a repository on the Hub, or one that ships with the package.

    Args:
        name: as it was typed.
        steps: T that was asked for, if any.
        model: what it is to be used with, if that is known: the hub id for "builtin:K".

    Raises:
        typer.BadParameter: it is a calibration, or the schedule is not for this number of steps.
        FileNotFoundError, FileFormatError, HubError, UnknownModelError, ValueError: as `sources.schedule_from`.
    """
    from dpcache.apps.sources import schedule_from

    if is_calibration(name):
        raise typer.BadParameter(
            f"{name} looks like a calibration, not a schedule: give it as --calibration {name} -k 13, or plan from it "
            f"with `dpcache plan {name} -k 13`."
        )
    schedule = schedule_from(name, model)
    if steps is not None and steps != schedule.num_inference_steps:
        raise typer.BadParameter(
            f"{name} is for {schedule.num_inference_steps} steps, not {steps}: leave out --steps, plan with `dpcache "
            f"plan CALIBRATION -k {schedule.num_key_steps} --steps {steps}`, or give --calibration instead."
        )
    return schedule


def read_calibration(name: str) -> "Calibration":
    """The calibration of this name: a file, a directory, or a repository on the Hub.

    Raises:
        typer.BadParameter: it is a schedule.
        FileNotFoundError, FileFormatError, HubError: as `sources.calibration_from`.
    """
    from dpcache.apps.sources import calibration_from

    if Path(name).suffix == ".json" or name.startswith("builtin:"):
        raise typer.BadParameter(
            f"{name} looks like a schedule, not a calibration: `dpcache show {name}` shows it, and `dpcache generate "
            f"MODEL -s {name}` follows it."
        )
    return calibration_from(name)


def is_calibration(name: str) -> bool:
    """Whether it is a calibration's name: a file or directory of one, or a file on the Hub."""
    if Path(name).is_dir():
        return (Path(name) / "calibration.safetensors").exists() and not (Path(name) / "schedule.json").exists()
    return Path(name).suffix == ".safetensors"


def check_budget(num_key_steps: int, steps: int) -> None:
    """Nothing, if so many of the steps can be computed.

    Raises:
        typer.BadParameter: there are not so many.
    """
    if num_key_steps > steps:
        raise typer.BadParameter(
            f"--key-steps {num_key_steps} is more than --steps {steps}, all that there are: give fewer."
        )


def num_steps(followed: "Followed") -> int:
    """T of the schedule, or of the grid that was calibrated on; 50 where nothing says."""
    if followed is None:
        return 50
    return followed.facts.num_inference_steps if hasattr(followed, "facts") else followed.num_inference_steps


def follow(pipeline: Any, source: Source, followed: "Followed") -> None:
    """`dpcache.enable`, with the source named in what it refuses."""
    from dpcache.run.pipelines import enable

    planning: dict[str, Any] = {} if source.num_key_steps is None else {"num_key_steps": source.num_key_steps}
    try:
        enable(pipeline, followed, **planning)
    except ScheduleMismatchError as error:
        raise ScheduleMismatchError(f"{source.name}: {error}") from error


def check(pipeline: Any, source: Source, followed: "Followed") -> None:
    """Nothing, if the pipeline can follow it; raises as `follow`."""
    from dpcache.run.pipelines import disable

    follow(pipeline, source, followed)
    disable(pipeline)


def computed_steps(pipeline: Any) -> tuple[int, ...] | None:
    """Which steps of the latest call ran in full; None where nothing is followed, and all do."""
    from dpcache.run.pipelines import stats

    try:
        return stats(pipeline).computed_steps
    except CacheStateError:
        return None


def planned(pipeline: Any, plans: "Sequence[Plans]", boundary: "Boundary", call: dict[str, Any]) -> "list[Schedule]":
    """The schedules that `dpcache.enable` would follow in such a call, one for each of the plans.

    It begins the call to find out, because the noise levels are known only after the first step.

    Raises:
        CalibrationError, GridError, InfeasibleBudgetError: as `dpcache.enable`.
    """
    from dpcache.measure.recording import record
    from dpcache.plan.levels import noise_levels

    class Begun(Exception):
        """The first step was taken."""

    def leave(step: int) -> None:
        raise Begun

    def refuse(text: str, kind: str = "") -> None:
        raise GridError(text)

    with contextlib.suppress(Begun):
        record(pipeline, call, boundary=boundary, on_step=leave)
    scheduler = pipeline.scheduler
    levels, size = noise_levels(scheduler), len(scheduler.timesteps)
    found = (plan.part(scheduler, levels, size, 0, refuse) for plan in plans)
    return [schedule for schedule in found if schedule is not None]
