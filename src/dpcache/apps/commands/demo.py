"""`dpcache demo`."""

from pathlib import Path
from typing import Annotated

import typer

from . import terminal
from .arguments import settle_small_model
from .compare import document, table
from .options import BundledModel, Output
from .outputs import check_folder


def demo(
    model: BundledModel = "tiny-flux",
    output: Output = Path("dpcache-demo"),
    steps: Annotated[int, typer.Option("--steps", "-t", min=3, help="T: steps of the sampling loop.")] = 50,
    inputs: Annotated[int, typer.Option(min=1, help="How many held-out inputs to draw.")] = 8,
) -> None:
    """Calibrates a bundled model, plans, draws held-out inputs in full and cached, and writes a report.

    --json: output, report, and comparisons as `dpcache compare --json` has them.
    """
    check_folder(output)

    from dpcache.apps.demo import run_demo

    from .following import Source

    settle_small_model()
    comparisons, report = run_demo(
        model, output, inputs, say=terminal.note, num_inference_steps=steps, progress=terminal.progress()
    )
    sources = [Source(str(output / f"schedule-{c.schedule.num_key_steps}.json")) for c in comparisons]
    terminal.result(
        {"output": str(output), "report": str(report), "comparisons": document(sources, comparisons)},
        table(sources, comparisons),
        f"open {report} in a browser",
    )
