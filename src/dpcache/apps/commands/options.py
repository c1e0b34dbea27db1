"""Arguments and options that several commands have."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def _bundled(incomplete: str) -> list[tuple[str, str]]:
    """Bundled models that begin so; where none does, the shell completes files."""
    from dpcache.zoo import BUNDLED

    return [(name, model.description) for name, model in BUNDLED.items() if name.startswith(incomplete)]


Model = Annotated[
    str,
    typer.Argument(
        help="A bundled model (tiny-flux, hard-flux, tiny-dit, ...), a diffusers directory, or a hub id.",
        autocompletion=_bundled,
    ),
]
BundledModel = Annotated[str, typer.Option(help="A bundled model.", autocompletion=_bundled)]
Prompts = Annotated[
    list[str] | None,
    typer.Argument(help="Prompts, or classes of a model of classes. Bundled models bring some of their own."),
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help="A file with one prompt per line, or .jsonl with one JSON object per line: prompt, further arguments of "
        "the call, and for generate id and seed; - reads lines of text from standard input.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Further argument of the pipeline's call; may be repeated."),
]
Steps = Annotated[int, typer.Option("--steps", "-t", min=1, help="T: steps of the sampling loop.")]
Boundary = Annotated[Literal["blocks", "output"], typer.Option(help="What is cached and predicted.")]
Seed = Annotated[int, typer.Option(min=0, max=2**62, help="Seed of the first input; the next ones count on.")]
KeySteps = Annotated[int, typer.Option("--key-steps", "-k", min=1, help="K: steps to compute in full.")]
_ON_THE_HUB = "a directory, or user/repo on the Hub"
SCHEDULE_HELP = f"A schedule: a file, {_ON_THE_HUB}, builtin:K or builtin:NAME:K"
CALIBRATION_HELP = f"A calibration: a file, {_ON_THE_HUB}"
CalibrationName = Annotated[
    str | None,
    typer.Option("--calibration", help=f"{CALIBRATION_HELP}. Instead of a schedule: plans for any number of steps."),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="A directory that keeps what is measured, and stays. Unless given OUTPUT.partial, removed in the end."
    ),
]
Restart = Annotated[bool, typer.Option("--restart", help="Start over, whatever an interrupted run has kept.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="What to write.")]
