"""`dpcache generate`."""

import inspect
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import terminal
from .arguments import load, read_inputs, read_settings
from .following import Source, computed_steps, follow, num_steps, read_calibration, read_schedule
from .options import SCHEDULE_HELP, CalibrationName, Model, Output, PromptFile, Prompts, Seed, Settings
from .outputs import check_file

if TYPE_CHECKING:
    from dpcache.calibration import Calibration
    from dpcache.schedule import Schedule

#: What files can hold.
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
CLIPS = (".png", ".webp", ".gif")


def generate(
    model: Model,
    prompts: Prompts = None,
    schedule: Annotated[str | None, typer.Option("--schedule", "-s", help=f"{SCHEDULE_HELP}; none: in full.")] = None,
    calibration: CalibrationName = None,
    num_key_steps: Annotated[
        int | None, typer.Option("--key-steps", "-k", min=1, help="K, with --calibration: steps to compute in full.")
    ] = None,
    output: Output = Path("image.png"),
    prompt_file: PromptFile = None,
    steps: Annotated[
        int | None, typer.Option("--steps", "-t", min=1, help="T: that of the schedule or calibration, or 50.")
    ] = None,
    seed: Seed = 0,
    settings: Settings = None,
) -> None:
    """Draws prompts, in full, with a schedule, or with what a calibration plans for the number of steps at hand.

    Several pictures are numbered: image-0.png, image-1.png, ... Their suffix makes them PNG, JPEG, WebP or GIF.

    --json: model, schedule, calibration (the one given, or null), num_inference_steps, and pictures, a list of file,
    input, seed, seconds, and computed_steps (null where all were).
    """
    check_file(output, "picture", PICTURES)
    followed = _followed(model, schedule, calibration, num_key_steps, steps)
    inputs = read_inputs(model, prompts, prompt_file, held_out=True, count=1)
    arguments = read_settings(model, settings)
    pipeline, inputs = load(model, inputs, arguments)
    if output.suffix.lower() not in CLIPS and "num_frames" in inspect.signature(type(pipeline).__call__).parameters:
        raise typer.BadParameter(
            f"{type(pipeline).__name__} draws clips, which {output.suffix} cannot hold: call it "
            f"{output.with_suffix('.gif')} (or {', '.join(CLIPS)})."
        )
    if followed is not None:
        follow(pipeline, *followed)
    arguments["num_inference_steps"] = steps or (num_steps(followed[1]) if followed is not None else 50)
    pictures = _draw(pipeline, inputs, {"output_type": "np", **arguments}, output, seed)
    terminal.result(
        {
            "model": model,
            **(followed[0].document() if followed is not None else {"schedule": None, "calibration": None}),
            "num_inference_steps": arguments["num_inference_steps"],
            "pictures": pictures,
        },
        *(f"wrote {picture['file']} ({picture['seconds']:.2f} s)" for picture in pictures),
    )


def _followed(
    model: str, schedule: str | None, calibration: str | None, num_key_steps: int | None, steps: int | None
) -> "tuple[Source, Schedule | Calibration] | None":
    if schedule is not None and calibration is not None:
        raise typer.BadParameter("give --schedule or --calibration, not both.")
    if (calibration is None) != (num_key_steps is None):
        raise typer.BadParameter("--calibration and --key-steps go together: --calibration FILE -k 13.")
    if schedule is not None:
        return Source(schedule), read_schedule(schedule, steps, model=model)
    if calibration is not None:
        return Source(calibration, num_key_steps), read_calibration(calibration)
    return None


def _draw(pipeline: Any, inputs: list[Any], arguments: dict[str, Any], output: Path, seed: int) -> list[dict[str, Any]]:
    """Draws and writes every input; what JSON says of each picture."""
    from tqdm.auto import tqdm

    from dpcache.demo import save_picture
    from dpcache.inputs import call_arguments, label, seeded

    calls = call_arguments(inputs, arguments)
    pipeline.set_progress_bar_config(disable=not terminal.progress(), leave=len(calls) == 1)
    written: list[dict[str, Any]] = []
    bar = tqdm(calls, desc="generate", unit="call", disable=not terminal.progress() or len(calls) == 1)
    try:
        for number, call in enumerate(bar):
            start = time.perf_counter()
            pictures = pipeline(**seeded(pipeline, call, seed + number))[0]
            seconds = time.perf_counter() - start
            for picture in pictures:
                many = len(calls) * len(pictures) > 1
                path = output.with_stem(f"{output.stem}-{len(written)}") if many else output
                save_picture(path, picture)
                written.append(
                    {
                        "file": str(path),
                        "input": label(pipeline, call),
                        "seed": seed + number,
                        "seconds": seconds,
                        "computed_steps": computed_steps(pipeline),
                    }
                )
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"interrupted: {terminal.counted(len(written), 'picture')} written.") from interrupt
    return written
