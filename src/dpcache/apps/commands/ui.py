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
    model: Model = "hard-flux",
    prompts: Prompts = None,
    calibration: Annotated[
        str | None, typer.Option("--calibration", help=f"{CALIBRATION_HELP}. Unless given, nothing is calibrated.")
    ] = None,
    prompt_file: PromptFile = None,
    steps: Annotated[int, typer.Option("--steps", "-t", min=4, help="T, without --calibration.")] = 50,
    sensitivity: Annotated[
        Literal["sampler", "measured"] | None,
        typer.Option(help="Calibrate at start: by 2 full runs, or measured by some 25, far better."),
    ] = None,
    num_key_steps: KeySteps = 13,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port to listen on [a free one from 7860].")
    ] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page.")] = True,
    settings: Settings = None,
    loading: Loading = Loading(),
) -> None:
    """Opens a page that draws prompts in full and cached, side by side, with times, for any number of key steps.

    It begins with the first prompt, drawn, and the curve of quality against K. Unless given a --calibration or told to
    calibrate by --sensitivity, key steps lie on a smooth curve. The prompts given are offered. Ctrl-C ends it.

    --json: model, calibration (the one given, or null), url; told as soon as the page is there.
    """
    from dpcache.apps.studio import Studio
    from dpcache.apps.ui import build

    found = read_calibration(calibration) if calibration is not None else None
    calibrates = found is None and sensitivity is not None
    inputs = read_inputs(model, prompts, prompt_file, held_out=not calibrates, count=2 if calibrates else 4)
    arguments = read_settings(model, settings, loading)
    pipeline, inputs = load(model, inputs, arguments, loading)
    if found is None and sensitivity is not None:
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
    page, look = build(Studio(pipeline, found, arguments, steps), inputs, title=model, num_key_steps=num_key_steps)
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
