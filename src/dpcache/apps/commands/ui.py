"""`dpcache ui`."""

import contextlib
import time
from typing import Annotated, Literal

import typer

from . import terminal
from .arguments import load, read_inputs, read_settings
from .following import read_calibration
from .loading import Loading, loads
from .options import CALIBRATION_HELP, KeySteps, Model, PromptFile, Prompts, Settings


@loads
def ui(
    model: Model,
    prompts: Prompts = None,
    calibration: Annotated[
        str | None, typer.Option("--calibration", help=f"{CALIBRATION_HELP}. Unless given, it calibrates.")
    ] = None,
    prompt_file: PromptFile = None,
    steps: Annotated[int, typer.Option("--steps", "-t", min=4, help="T, if it calibrates: of the sampling loop.")] = 50,
    sensitivity: Annotated[
        Literal["sampler", "measured"],
        typer.Option(help="What an error does, if it calibrates: measured (some ten times as many runs, far better)."),
    ] = "measured",
    num_key_steps: KeySteps = 13,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port to listen on [a free one from 7860].")] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page.")] = True,
    settings: Settings = None,
    loading: Loading = Loading(),
) -> None:
    """Opens a page that draws prompts in full and cached, side by side, with times, for any number of key steps.

    Calibrates at start unless given a --calibration: some 25 full runs, or 2 with --sensitivity sampler. The prompts
    given are calibrated on and offered. Ctrl-C ends it.

    --json: model, calibration (the one given, or null), url; told as soon as the page is there.
    """
    from dpcache.apps.ui import Studio, build

    found = read_calibration(calibration) if calibration is not None else None
    inputs = read_inputs(model, prompts, prompt_file, held_out=found is not None, count=2)
    arguments = read_settings(model, settings, loading)
    pipeline, inputs = load(model, inputs, arguments, loading)
    if found is None:
        from dpcache.measure.measuring import calibrate

        terminal.note(f"calibrating {model} on {terminal.counted(len(inputs), 'input')}, {steps} steps each")
        found = calibrate(
            pipeline,
            inputs,
            num_inference_steps=steps,
            sensitivity=sensitivity,
            progress=terminal.progress(),
            **arguments,
        )
    page, look = build(Studio(pipeline, found, arguments), inputs, title=model, num_key_steps=num_key_steps)
    _, url, _ = page.launch(
        server_name=host, server_port=port, inbrowser=browser, prevent_thread_lock=True, quiet=True, **look
    )
    terminal.result(
        {"model": model, "calibration": calibration, "url": url}, f"open {url} in a browser; Ctrl-C ends it"
    )
    with contextlib.suppress(KeyboardInterrupt):  # the way to end it
        while page.is_running:
            time.sleep(1)
    page.close(verbose=False)
