"""`dpcache plan`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dpcache.plan.recipe import Recipe

from . import terminal
from .following import read_calibration
from .options import CALIBRATION_HELP, Output
from .outputs import check_file

if TYPE_CHECKING:
    from dpcache.plan.schedule import Schedule


def plan(
    calibration: Annotated[str, typer.Argument(help=f"{CALIBRATION_HELP}.")],
    num_key_steps: Annotated[
        int | None, typer.Option("--key-steps", "-k", min=1, help="K: steps to compute in full.")
    ] = None,
    speedup: Annotated[float | None, typer.Option(help="T / K instead: as many key steps as it allows.")] = None,
    max_error: Annotated[
        float | None,
        typer.Option(help="As few key steps instead as keep the expected error below this, 0.01 for 1 %."),
    ] = None,
    output: Output = Path("schedule.json"),
    steps: Annotated[
        int | None,
        typer.Option("--steps", "-t", min=1, help="T of the schedule, if not that of the calibration: interpolates."),
    ] = None,
    method: Annotated[
        Literal["sampler", "paper"],
        typer.Option(help="How errors are judged: by what the sampler does with them, or as in the paper."),
    ] = "sampler",
    measured: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Weight of the measured sensitivity, 0 to 1 [0.5 where it was measured]."),
    ] = None,
    first: Annotated[
        int | None, typer.Option("--first", min=0, help="So many first steps are key steps [1; 3 with --method paper].")
    ] = None,
    last: Annotated[int, typer.Option("--last", min=0, help="So many last steps are key steps.")] = 0,
    max_gap: Annotated[int | None, typer.Option(min=1, help="Longest way from a key step to the next.")] = None,
) -> None:
    """Finds the best key steps for a budget and writes the schedule.

    --json: output, num_inference_steps, num_key_steps, key_steps, ideal_speedup (T / K), boundary, predictor, order,
    corrected_steps, cost, expected_error, error, source. Errors are shares of the full run's output, null where not
    known.
    """
    if sum(given is not None for given in (num_key_steps, speedup, max_error)) != 1:
        raise typer.BadParameter("give one of --key-steps, --speedup and --max-error.")
    check_file(output, "schedule", [".json"])
    recipe = Recipe(measured=measured, method=method, first_key_steps=first, last_key_steps=last, max_gap=max_gap)
    schedule = read_calibration(calibration).plan(
        num_key_steps,
        speedup=speedup,
        max_error=max_error,
        recipe=recipe,
        num_inference_steps=steps,
    )
    schedule.save(output)
    if max_error is not None and schedule.num_key_steps == schedule.num_inference_steps:
        terminal.note(
            f"no plan keeps within an error of {max_error:g}: this schedule computes every step, and saves nothing. "
            "Allow a larger --max-error, or calibrate on more inputs."
        )
    expected = "" if schedule.expected_error is None else f", expected error {schedule.expected_error:.2%}"
    terminal.result(
        document(schedule, output),
        f"wrote {output}: {schedule}, cost {schedule.cost:.4g}{expected}, up to {schedule.ideal_speedup:.2f}x faster",
    )


def document(schedule: "Schedule", output: Path) -> dict[str, Any]:
    """What JSON says of a schedule that was written."""
    return {"output": str(output), **facts(schedule)}


def facts(schedule: "Schedule") -> dict[str, Any]:
    """What JSON says of a schedule."""
    return {
        "num_inference_steps": schedule.num_inference_steps,
        "num_key_steps": schedule.num_key_steps,
        "key_steps": schedule.key_steps,
        "ideal_speedup": schedule.ideal_speedup,
        "boundary": schedule.boundary,
        "predictor": schedule.predictor,
        "order": schedule.order,
        "corrected_steps": sorted(schedule.corrections),
        "cost": schedule.cost,
        "expected_error": schedule.expected_error,
        "error": schedule.error,
        "source": schedule.source,
    }
