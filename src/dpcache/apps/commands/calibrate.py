"""`dpcache calibrate`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from . import terminal
from .arguments import load, read_inputs, read_settings
from .loading import Loading, loads
from .options import Boundary, Checkpoint, Model, Output, PromptFile, Prompts, Restart, Seed, Settings, Steps
from .outputs import check_file, check_folder


@loads
def calibrate(
    model: Model,
    prompts: Prompts = None,
    output: Output = Path("calibration.safetensors"),
    prompt_file: PromptFile = None,
    steps: Steps = 50,
    boundary: Boundary = "blocks",
    order: Annotated[int, typer.Option(min=0, help="Order of the Taylor prediction.")] = 2,
    sensitivity: Annotated[
        Literal["sampler", "measured"], typer.Option(help="What an error does: by the sampler alone, or measured.")
    ] = "sampler",
    seed: Seed = 0,
    checkpoint: Checkpoint = None,
    restart: Restart = False,
    settings: Settings = None,
    loading: Loading = Loading(),
) -> None:
    """Runs a model in full on a few prompts and writes what skipping steps would cost.

    Five prompts do (for `optimize` sixteen). After the first run it says how long the whole takes. After Ctrl-C the
    same command goes on where it was: inputs that were measured are kept in OUTPUT.partial until the calibration is
    written.

    --json: output, num_inputs, num_inference_steps, num_branches, boundary, denoiser, pipeline, scheduler, measured.
    """
    if steps <= order:
        raise typer.BadParameter(f"--order {order} needs more than {order} --steps, got {steps}.")
    check_file(output, "calibration", [".safetensors"])
    inputs = read_inputs(model, prompts, prompt_file, held_out=False, count=5)
    arguments = read_settings(model, settings, loading)
    if checkpoint is not None:
        check_folder(checkpoint)
    pipeline, inputs = load(model, inputs, arguments, loading)

    from dpcache.measure.fingerprint import fingerprint
    from dpcache.measure.measuring import calibrate as run

    from .partial import kept

    terminal.note(f"calibrating {model} on {terminal.counted(len(inputs), 'input')}, {steps} steps each")
    about = {
        "model": [model, asdict(fingerprint(pipeline))],
        "prompts": inputs,
        "--steps": steps,
        "--boundary": boundary,
        "--order": order,
        "--sensitivity": sensitivity,
        "--seed": seed,
        "--set": arguments,
    }
    with kept(output, checkpoint, about, restart=restart) as folder:
        found = run(
            pipeline,
            inputs,
            num_inference_steps=steps,
            boundary=boundary,
            order=order,
            sensitivity=sensitivity,
            seed=seed,
            progress=terminal.progress(),
            checkpoint=folder,
            **arguments,
        )
        found.save(output)
    facts = found.facts
    terminal.result(
        {
            "output": str(output),
            "num_inputs": facts.num_inputs,
            "num_inference_steps": facts.num_inference_steps,
            "num_branches": facts.num_branches,
            "boundary": facts.boundary,
            "denoiser": facts.model.denoiser,
            "pipeline": facts.pipeline,
            "scheduler": facts.scheduler,
            "measured": found.is_measured,
        },
        f"wrote {output}: {terminal.counted(facts.num_inputs, 'input')}, {facts.num_inference_steps} steps",
    )
    quarter = max(1, round(0.26 * facts.num_inference_steps))  # 13 of 50
    terminal.note(f"next: dpcache plan {output} -k {quarter} -o schedule.json")
