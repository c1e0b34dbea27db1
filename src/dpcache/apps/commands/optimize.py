"""`dpcache optimize`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from . import terminal
from .arguments import load, read_inputs, read_settings
from .options import Boundary, Checkpoint, KeySteps, Model, Output, PromptFile, Prompts, Restart, Seed, Settings
from .outputs import check_file, check_folder
from .plan import document


def optimize(
    model: Model,
    prompts: Prompts = None,
    num_key_steps: KeySteps = 13,
    output: Output = Path("schedule.json"),
    prompt_file: PromptFile = None,
    steps: Annotated[int, typer.Option("--steps", "-t", min=3, help="T: steps of the sampling loop.")] = 50,
    boundary: Boundary = "blocks",
    trials: Annotated[int, typer.Option(min=1, help="Runs to judge by, and as many to tune on.")] = 8,
    tune: Annotated[int, typer.Option(min=0, help="Rounds of tuning the coefficients; 0: none.")] = 2,
    seed: Seed = 0,
    checkpoint: Checkpoint = None,
    restart: Restart = False,
    settings: Settings = None,
) -> None:
    """The best schedule in one go: calibrates, plans in several ways, runs and tunes the plans, keeps the best.

    Give sixteen prompts as different as those to come. More of them cost no more, only --trials and --tune do. After
    Ctrl-C the same command goes on where it was.

    --json: as `dpcache plan --json`, with the measured error in error.
    """
    check_file(output, "schedule", [".json"])
    if num_key_steps > steps:
        raise typer.BadParameter(f"--key-steps {num_key_steps} is more than --steps {steps}.")
    inputs = read_inputs(model, prompts, prompt_file, held_out=False, count=16)
    arguments = read_settings(model, settings)
    if checkpoint is not None:
        check_folder(checkpoint)
    pipeline, inputs = load(model, inputs, arguments)

    from dpcache.measure.fingerprint import fingerprint
    from dpcache.search.selection import optimize as run

    from .partial import kept

    terminal.note(f"optimizing {num_key_steps} of {steps} steps of {model} on {terminal.counted(len(inputs), 'input')}")
    about = {
        "model": [model, asdict(fingerprint(pipeline))],
        "prompts": inputs,
        "--steps": steps,
        "--boundary": boundary,
        "--seed": seed,
        "--set": arguments,
    }
    with kept(output, checkpoint, about, restart=restart) as folder:
        schedule = run(
            pipeline,
            inputs,
            num_inference_steps=steps,
            num_key_steps=num_key_steps,
            boundary=boundary,
            num_trials=trials,
            tune=tune,
            seed=seed,
            progress=terminal.progress(),
            checkpoint=folder,
            **arguments,
        )
        schedule.save(output)
    terminal.result(
        document(schedule, output),
        f"wrote {output}: {schedule}, error {schedule.error:.2%}, up to {schedule.ideal_speedup:.2f}x faster",
    )
