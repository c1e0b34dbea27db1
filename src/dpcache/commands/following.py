"""What the cached runs follow: schedule files, or plans from a calibration."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dpcache.errors import CacheStateError, ScheduleMismatchError

if TYPE_CHECKING:
    from dpcache.calibration import Calibration
    from dpcache.schedule import Boundary, Schedule
    from dpcache.schedulers import Plans


@dataclass(frozen=True)
class Source:
    """Where a schedule came from.

    Attributes:
        file: a schedule, or the calibration it was planned from.
        num_key_steps: K, where it was planned from a calibration.
    """

    file: Path
    num_key_steps: int | None = None

    def __str__(self) -> str:
        return str(self.file) if self.num_key_steps is None else f"{self.file} -k {self.num_key_steps}"

    def document(self) -> dict[str, str | None]:
        """For JSON: the name of either file, None for the other."""
        planned = self.num_key_steps is not None
        return {"schedule": None if planned else str(self.file), "calibration": str(self.file) if planned else None}


def read_schedule(path: Path, steps: int | None = None) -> "Schedule":
    """The schedule in a file.

    Raises:
        typer.BadParameter: the file is a calibration, or the schedule is not for this number of steps.
        FileNotFoundError, FileFormatError: as `Schedule.load`.
    """
    from dpcache.schedule import Schedule

    if path.suffix == ".safetensors":
        raise typer.BadParameter(
            f"{path} is no schedule but a calibration by its name: give it as --calibration {path} -k 13, or plan from "
            f"it with `dpcache plan {path} -k 13`."
        )
    schedule = Schedule.load(path)
    if steps is not None and steps != schedule.num_inference_steps:
        raise typer.BadParameter(
            f"{path} is for {schedule.num_inference_steps} steps, not {steps}: leave out --steps, plan with `dpcache "
            f"plan CALIBRATION -k {schedule.num_key_steps} --steps {steps}`, or give --calibration instead."
        )
    return schedule


def read_calibration(path: Path) -> "Calibration":
    """The calibration in a file.

    Raises:
        typer.BadParameter: the file is a schedule.
        FileNotFoundError, FileFormatError: as `Calibration.load`.
    """
    from dpcache.calibration import Calibration

    if path.suffix == ".json":
        raise typer.BadParameter(f"{path} is no calibration but a schedule by its name: give it with --schedule.")
    return Calibration.load(path)


def num_steps(followed: "Schedule | Calibration") -> int:
    """T of the schedule, or of the grid that was calibrated on."""
    return followed.facts.num_inference_steps if hasattr(followed, "facts") else followed.num_inference_steps


def follow(pipeline: Any, source: Source, followed: "Schedule | Calibration") -> None:
    """`dpcache.enable`, with the file named in what it refuses."""
    from dpcache.cache import enable

    planning: dict[str, Any] = {} if source.num_key_steps is None else {"num_key_steps": source.num_key_steps}
    try:
        enable(pipeline, followed, **planning)
    except ScheduleMismatchError as error:
        raise ScheduleMismatchError(f"{source.file}: {error}") from error


def check(pipeline: Any, source: Source, followed: "Schedule | Calibration") -> None:
    """Nothing, if the pipeline can follow it; raises as `follow`."""
    from dpcache.cache import disable

    follow(pipeline, source, followed)
    disable(pipeline)


def computed_steps(pipeline: Any) -> tuple[int, ...] | None:
    """Which steps of the latest call ran in full; None where nothing is followed, and all do."""
    from dpcache.cache import stats

    try:
        return stats(pipeline).computed_steps
    except CacheStateError:
        return None


def planned(pipeline: Any, plans: "Sequence[Plans]", boundary: "Boundary", call: dict[str, Any]) -> "list[Schedule]":
    """The schedules that `dpcache.enable` would follow in such a call, one for each of the plans.

    The call is begun to find out, for its noise levels are known after its first step.

    Raises:
        CalibrationError, GridError, InfeasibleBudgetError: as `dpcache.enable`.
    """
    from dpcache.recording import record

    class Begun(Exception):
        """The first step was taken."""

    def leave(step: int) -> None:
        raise Begun

    with contextlib.suppress(Begun):
        record(pipeline, call, boundary=boundary, on_step=leave)
    return [plan.schedule(pipeline.scheduler, 0) for plan in plans]
