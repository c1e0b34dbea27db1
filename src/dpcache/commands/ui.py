"""`dpcache ui`: a page in the browser that draws in full and cached, side by side."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def ui(
    model: Annotated[str, typer.Argument(help="A bundled model (tiny-flux), a diffusers directory, or a hub id.")],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts to calibrate on and to offer. Bundled models bring some.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option("--calibration", "-c", help="A calibration: a file, a directory, or user/repo on the Hub."),
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompts", help="A file with one prompt per line.")] = None,
    steps: Annotated[int, typer.Option("--steps", "-t", min=4, help="T, if it calibrates: of the sampling loop.")] = 50,
    sensitivity: Annotated[
        Literal["sampler", "measured"],
        typer.Option(help="What an error does, if it calibrates: measured (some ten times as many runs, far better)."),
    ] = "measured",
    num_key_steps: Annotated[int, typer.Option("--key-steps", "-k", min=1, help="K to begin with.")] = 13,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port to listen on [a free one from 7860].")] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page.")] = True,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Further argument of the pipeline's call; may be repeated."),
    ] = None,
) -> None:
    """Opens a page that draws prompts in full and cached, side by side, with times, for any number of key steps.

    Calibrates at start unless given a --calibration: some 25 full runs, or 2 with --sensitivity sampler.
    """
    from dpcache.cli import _inputs, _load, out
    from dpcache.sources import calibration_from
    from dpcache.ui import Studio, build

    found = calibration_from(calibration) if calibration else None
    inputs = _inputs(model, prompts, prompt_file, held_out=found is not None, count=2)
    pipeline, arguments = _load(model, settings)
    if found is None:
        from dpcache.measuring import calibrate

        out.print(f"calibrating {model} on {len(inputs)} inputs, {steps} steps each")
        found = calibrate(pipeline, inputs, num_inference_steps=steps, sensitivity=sensitivity, **arguments)
    page, look = build(Studio(pipeline, found, arguments), inputs, title=model, num_key_steps=num_key_steps)
    _, url, _ = page.launch(
        server_name=host, server_port=port, inbrowser=browser, prevent_thread_lock=True, quiet=True, **look
    )
    out.print(f"open {url} in a browser; Ctrl-C ends it")
    page.block_thread()
