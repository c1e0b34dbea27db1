"""`dpcache optimize`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from . import terminal
from .arguments import load, read_inputs, read_settings
from .following import check_budget
from .loading import Loading, loads
from .options import Boundary, Checkpoint, Model, Output, PromptFile, Prompts, Restart, Seed, Settings
from .outputs import check_file, check_folder
from .plan import document


@loads
def optimize(
    model: Model,
    prompts: Prompts = None,
    key_steps: Annotated[
        str,
        typer.Option("--key-steps", "-k", metavar="K[,K...]", help="K: steps to compute in full; several like 9,13."),
    ] = "13",
    budget: Annotated[
        str,
        typer.Option(metavar="RUNS|TIME", help='What it may cost: full runs, like 60, or a time, like "15 min".'),
    ] = "60",
    output: Output = Path("schedule.json"),
    prompt_file: PromptFile = None,
    steps: Annotated[int, typer.Option("--steps", "-t", min=1, help="T: steps of the sampling loop.")] = 50,
    boundary: Boundary = "blocks",
    objective: Annotated[
        Literal["mean", "worst"], typer.Option(help="What to make least: the mean error, or that of the worst quarter.")
    ] = "mean",
    seed: Seed = 0,
    checkpoint: Checkpoint = None,
    restart: Restart = False,
    settings: Settings = None,
    loading: Loading = Loading(),
) -> None:
    """The best schedule that a budget finds: runs many candidates on your prompts, ever fewer on ever more of them.

    Give sixteen prompts as different as those to come (for `calibrate` five do): they cost no more than two. With
    several K, s.json becomes s-9.json and s-13.json. After Ctrl-C the same command goes on where it was.

    --json: as `dpcache plan --json`, with the measured error in error; a list of these in schedules for several K.
    """
    check_file(output, "schedule", [".json"])
    wanted = _numbers(key_steps, steps)
    outputs = {k: output if len(wanted) == 1 else output.with_stem(f"{output.stem}-{k}") for k in wanted}
    _check_budget(budget)
    inputs = read_inputs(model, prompts, prompt_file, held_out=False, count=16)
    arguments = read_settings(model, settings, loading)
    if checkpoint is not None:
        check_folder(checkpoint)
    pipeline, inputs = load(model, inputs, arguments, loading)

    from dpcache.measure.fingerprint import fingerprint
    from dpcache.search.optimize import optimize as run

    from .partial import kept

    many = " and ".join(map(str, wanted))
    terminal.note(f"optimizing {many} of {steps} steps of {model} on {terminal.counted(len(inputs), 'input')}")
    about = {
        "model": [model, asdict(fingerprint(pipeline))],
        "prompts": inputs,
        "--steps": steps,
        "--boundary": boundary,
        "--objective": objective,
        "--seed": seed,
        "--set": arguments,
    }
    with kept(output, checkpoint, about, restart=restart) as folder:
        schedules = run(
            pipeline,
            inputs,
            num_key_steps=wanted,
            budget=budget,
            num_inference_steps=steps,
            boundary=boundary,
            objective=objective,
            seed=seed,
            progress=terminal.progress(),
            checkpoint=folder / "search.jsonl",
            **arguments,
        )
        for k, schedule in schedules.items():
            schedule.save(outputs[k])
    documents = [document(schedule, outputs[k]) for k, schedule in schedules.items()]
    lines = [
        f"wrote {outputs[k]}: {schedule}{'' if schedule.error is None else f', error {schedule.error:.2%}'}, "
        f"up to {schedule.ideal_speedup:.2f}x faster"
        for k, schedule in schedules.items()
    ]
    terminal.result(documents[0] if len(wanted) == 1 else {"schedules": documents}, "\n".join(lines))


def _numbers(text: str, steps: int) -> list[int]:
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise typer.BadParameter(f"--key-steps {text} is neither a number nor several like 9,13.") from None
    if found[0] < 1:
        raise typer.BadParameter(f"--key-steps {found[0]} is less than 1.")
    check_budget(found[-1], steps)
    if found[-1] == steps:
        raise typer.BadParameter(f"with --key-steps {steps} of --steps {steps} nothing is skipped: give fewer.")
    return found


def _check_budget(text: str) -> None:
    from dpcache.search.budget import parsed

    try:
        parsed(text)
    except ValueError as error:
        raise typer.BadParameter(f"--budget: {error}") from error
