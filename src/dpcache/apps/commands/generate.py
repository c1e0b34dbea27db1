"""`dpcache generate`."""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpcache.files.journal import digest
from dpcache.files.prompts import JSON_LINES

from . import terminal
from .arguments import check_name, load, read_inputs, read_settings
from .drawing import draw
from .following import Source, check_budget, follow, num_steps, read_calibration, read_schedule
from .generate_ray import generate_on_ray
from .loading import Loading, loads
from .options import SCHEDULE_HELP, CalibrationName, Model, Output, PromptFile, Prompts, Seed, Settings
from .outputs import check_file, check_folder

if TYPE_CHECKING:
    from .following import Followed

#: What files can hold.
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
CLIPS = (".png", ".webp", ".gif")


@loads
def generate(
    model: Model,
    prompts: Prompts = None,
    schedule: Annotated[str | None, typer.Option("--schedule", "-s", help=f"{SCHEDULE_HELP}; none: in full.")] = None,
    calibration: CalibrationName = None,
    num_key_steps: Annotated[
        int | None,
        typer.Option("--key-steps", "-k", min=1, help="K: steps to compute in full. Alone, no calibration is needed."),
    ] = None,
    output: Output = Path("image.png"),
    prompt_file: PromptFile = None,
    steps: Annotated[
        int | None, typer.Option("--steps", "-t", min=1, help="T: that of the schedule or calibration, or 50.")
    ] = None,
    seed: Seed = 0,
    settings: Settings = None,
    loading: Loading = Loading(),
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Draw on a Ray cluster into the folder OUTPUT, and go on where that was interrupted: auto joins the "
            "cluster that runs here, local starts one on this machine.",
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="With --ray: pipelines [what the GPUs allow].")] = None,
    gpus_per_worker: Annotated[
        float | None, typer.Option(min=0, help="With --ray: GPUs of each pipeline [1 where there are some].")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="With --ray: prompts in one call [1].")] = None,
) -> None:
    """Draws prompts: in full, with -k alone, with a schedule, or with what a calibration plans for the steps at hand.

    With -k 13, 13 steps are computed in full, on a smooth curve, and the others predicted; nothing has to be measured.

    Several pictures are numbered: image-0.png, image-1.png, ... Their suffix makes them PNG, JPEG, WebP or GIF. A PNG
    file is kept that was drawn before by the same model, with the same prompt, seed, settings and schedule.

    --json: model, schedule and calibration (the one given, or null), num_key_steps (null with a schedule or in full),
    num_inference_steps, and pictures, a list of file, input, seed, seconds, computed_steps (null where all were), and
    kept (whether it was there already). With --ray: model, schedule, output, index (the file that tells what became of
    each prompt), num_prompts and num_pictures.
    """
    if ray is not None:
        if calibration is not None or num_key_steps is not None:
            raise typer.BadParameter("--ray takes a --schedule: plan one with `dpcache plan CALIBRATION -k 13`.")
        if loading != Loading():
            raise typer.BadParameter(
                "--ray loads the model as it comes: leave out "
                f"{', '.join(f'--{name}' for name, value in vars(loading).items() if value is not None)}, or call "
                "dpcache.integrations.ray.generate with a function that loads it."
            )
        call = {**read_settings(model, settings, loading), **({"num_inference_steps": steps} if steps else {})}
        generate_on_ray(
            model,
            _for_ray(model, prompts, prompt_file, output),
            output,
            schedule,
            schedule=None if schedule is None else read_schedule(schedule, steps, model=model),
            num_workers=workers,
            gpus_per_worker=gpus_per_worker,
            batch_size=batch or 1,
            seed=seed,
            address=ray,
            **call,
        )
        return
    if workers or gpus_per_worker is not None or batch:
        raise typer.BadParameter("--workers, --gpus-per-worker and --batch are for --ray.")
    check_file(output, "picture", PICTURES)
    followed = _followed(model, schedule, calibration, num_key_steps, steps)
    length = steps or num_steps(None if followed is None else followed[1])
    check_budget(num_key_steps or 1, length)
    inputs = read_inputs(model, prompts, prompt_file, held_out=True, count=1, seed=seed)
    arguments = read_settings(model, settings, loading)
    pipeline, inputs = load(model, inputs, arguments, loading)
    if output.suffix.lower() not in CLIPS and "num_frames" in inspect.signature(type(pipeline).__call__).parameters:
        raise typer.BadParameter(
            f"{type(pipeline).__name__} draws clips, which {output.suffix} cannot hold: call it "
            f"{output.with_suffix('.gif')} (or {', '.join(CLIPS)})."
        )
    if followed is not None:
        follow(pipeline, *followed)
    arguments["num_inference_steps"] = length
    told = _told_apart(followed)
    name = " ".join([model, *([digest(facts)] if (facts := loading.facts()) else [])])
    pictures = draw(pipeline, inputs, {"output_type": "np", **arguments}, output, seed=seed, model=name, followed=told)
    terminal.result(
        {
            "model": model,
            **(followed[0].document() if followed is not None else {"schedule": None, "calibration": None}),
            "num_key_steps": num_key_steps,
            "num_inference_steps": arguments["num_inference_steps"],
            "pictures": pictures,
        },
        *(
            f"kept {picture['file']}, drawn before"
            if picture["kept"]
            else f"wrote {picture['file']} ({picture['seconds']:.2f} s)"
            for picture in pictures
        ),
    )


def _followed(
    model: str, schedule: str | None, calibration: str | None, num_key_steps: int | None, steps: int | None
) -> "tuple[Source, Followed] | None":
    if schedule is not None and calibration is not None:
        raise typer.BadParameter("give --schedule or --calibration, not both.")
    if calibration is not None and num_key_steps is None:
        raise typer.BadParameter("say for how many key steps to plan: --calibration FILE -k 13.")
    if schedule is not None and num_key_steps is not None:
        raise typer.BadParameter("a schedule has its key steps: leave out -k, or leave out --schedule.")
    if schedule is not None:
        return Source(schedule), read_schedule(schedule, steps, model=model)
    if calibration is not None:
        return Source(calibration, num_key_steps), read_calibration(calibration)
    return None if num_key_steps is None else (Source(None, num_key_steps), None)


def _for_ray(model: str, prompts: list[str] | None, file: Path | None, output: Path) -> Any:
    """What to draw on a cluster: the file, or a list."""
    if output.suffix:
        raise typer.BadParameter("with --ray pictures go into a folder: name one, for example -o pictures/.")
    check_folder(output)
    check_name(model)
    if file is not None and str(file) != "-" and not prompts:
        return file
    if file is not None and file.suffix in JSON_LINES:
        raise typer.BadParameter(f"give prompts as they are or in {file.name}, whose lines have names, not both.")
    return read_inputs(model, prompts, file, held_out=True, count=1)


def _told_apart(followed: "tuple[Source, Followed] | None") -> Any:
    """What of a schedule, calibration or number of key steps a picture depends on."""
    from dpcache.integrations.folder import told_apart
    from dpcache.plan.schedule import Schedule

    if followed is None:
        return None
    source, found = followed
    if isinstance(found, Schedule):
        return told_apart(found)
    measured = [] if found is None else [found.facts.model_dump(mode="json"), found.gram]
    return [*measured, source.num_key_steps]
