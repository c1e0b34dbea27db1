"""`dpcache compare`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from . import terminal
from .arguments import load, read_inputs, read_settings
from .following import Source, check, check_budget, num_steps, planned, read_calibration, read_schedule
from .loading import Loading, loads
from .options import SCHEDULE_HELP, CalibrationName, Model, PromptFile, Prompts, Seed, Settings
from .outputs import check_file

if TYPE_CHECKING:
    from dpcache.judge.comparison import Comparison
    from dpcache.measure.calibration import Calibration
    from dpcache.plan.schedule import Schedule


@loads
def compare(
    model: Model,
    prompts: Prompts = None,
    *,
    schedule: Annotated[
        list[str] | None, typer.Option("--schedule", "-s", help=f"{SCHEDULE_HELP}; may be repeated.")
    ] = None,
    calibration: CalibrationName = None,
    num_key_steps: Annotated[
        list[int] | None,
        typer.Option("--key-steps", "-k", min=1, help="K, with --calibration or alone; may be repeated."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", "-t", min=1, help="T: that of the schedules or the calibration.")
    ] = None,
    prompt_file: PromptFile = None,
    count: Annotated[int, typer.Option(min=1, help="Held-out inputs of a bundled model, where none are given.")] = 8,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report here.")] = None,
    seed: Seed = 0,
    settings: Settings = None,
    loading: Loading = Loading(),
) -> None:
    """Draws prompts in full and with each schedule, from the same noise, and prints how they differ.

    After Ctrl-C the table and the report are of the inputs that were drawn by then.

    --json: model, num_inference_steps, num_inputs, report, and comparisons, a list, one for each schedule: schedule and
    calibration (the one given, or null; both null where nothing was measured), num_key_steps, key_steps, ideal_speedup
    (T / K), speedup (of median times), full_seconds and cached_seconds (medians), full_block_runs and cached_block_runs
    (null where not known), psnr_mean, psnr_p5 and psnr_worst in dB (null: infinite, as the outputs are equal; psnr_p5,
    the 5th percentile, also of fewer than 20 outputs), ssim_mean, flip_mean (null where flip-evaluator is not
    installed), and samples: input, seed, psnr, ssim, flip.
    """
    if not schedule and not num_key_steps:
        raise typer.BadParameter("say what to compare with: -k 13, or a --schedule, or a --calibration with -k 13.")
    if report is not None:
        check_file(report, "report", [".html"])
        from dpcache.judge.report import write_report
    fixed = _schedules(model, schedule or [], steps)
    measured = read_calibration(calibration) if calibration is not None else None
    steps = steps or num_steps(fixed[0][1] if fixed else measured)
    check_budget(max(num_key_steps or [1]), steps)
    inputs = read_inputs(model, prompts, prompt_file, held_out=True, count=count)
    arguments = read_settings(model, settings, loading)
    pipeline, inputs = load(model, inputs, arguments, loading)
    for source, found in fixed:
        check(pipeline, source, found)
    if num_key_steps:
        arguments["num_inference_steps"] = steps
        sources = [Source(calibration, budget) for budget in num_key_steps]
        fixed += plans(pipeline, sources, measured, inputs[0], arguments, seed)

    from dpcache.judge.comparison import ComparisonInterrupted, compare_all

    sources = [source for source, _ in fixed]
    terminal.note(f"drawing {terminal.counted(len(inputs), 'input')} in full and with {', '.join(map(str, sources))}")
    interrupted = None
    try:
        comparisons = compare_all(
            pipeline, [found for _, found in fixed], inputs, seeds=seed, progress=terminal.progress(), **arguments
        )
    except ComparisonInterrupted as interrupt:
        interrupted, comparisons = interrupt, interrupt.comparisons
    done = len(comparisons[0].full_seconds)
    if report is not None:
        write_report(
            report, title=f"dpcache on {model}", model=model, comparisons=comparisons, **_costs(measured, steps)
        )
    terminal.result(
        {
            "model": model,
            "num_inference_steps": steps,
            "num_inputs": done,
            "report": str(report) if report is not None else None,
            "comparisons": document(sources, comparisons),
        },
        table(sources, comparisons),
        *([f"wrote {report}"] if report is not None else []),
    )
    if interrupted is not None:
        what = "the table and the report are" if report is not None else "the table is"
        raise KeyboardInterrupt(f"interrupted: {what} of {done} of {len(inputs)} inputs.") from interrupted


def document(sources: Sequence[Source], comparisons: "Sequence[Comparison]") -> list[dict[str, Any]]:
    """What JSON says of comparisons."""
    import numpy as np

    return [
        {
            **source.document(),
            "num_key_steps": c.schedule.num_key_steps,
            "key_steps": c.schedule.key_steps,
            "ideal_speedup": c.schedule.ideal_speedup,
            "speedup": c.speedup,
            "full_seconds": float(np.median(c.full_seconds)),
            "cached_seconds": float(np.median(c.cached_seconds)),
            "full_block_runs": c.full_block_runs or None,
            "cached_block_runs": c.cached_block_runs if c.full_block_runs else None,
            "psnr_mean": c.psnr_mean,
            "psnr_p5": c.psnr_p5,
            "psnr_worst": c.psnr_worst,
            "ssim_mean": c.ssim_mean,
            "flip_mean": c.flip_mean,
            "samples": [
                {"input": s.label, "seed": s.seed, "psnr": s.psnr, "ssim": s.ssim, "flip": s.flip} for s in c.samples
            ],
        }
        for source, c in zip(sources, comparisons, strict=True)
    ]


def table(sources: Sequence[Source], comparisons: "Sequence[Comparison]") -> Table:
    """A row for every schedule."""
    first = comparisons[0]
    found = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption="PSNR in dB, against the full run.")
    found.add_column("schedule", overflow="fold")
    headings = ["K", "blocks run", "speedup", "PSNR", "worst", "SSIM"]
    if first.psnr_p5 is not None:
        headings.insert(4, "5th pct")
    if first.flip_mean is not None:
        headings.append("FLIP")
    for heading in headings:
        found.add_column(heading, no_wrap=True)
    short = len({source.short.name for source in sources}) == len({source.name for source in sources})
    for source, c in zip(sources, comparisons, strict=True):
        blocks = f"{c.cached_block_runs} of {c.full_block_runs}" if c.full_block_runs else "not known"
        decibels = [f"{value:.1f}" for value in (c.psnr_mean, c.psnr_p5, c.psnr_worst) if value is not None]
        found.add_row(
            escape(str(source.short if short else source)),
            f"{c.schedule.num_key_steps} of {c.schedule.num_inference_steps}",
            blocks,
            f"{c.speedup:.2f}x",
            *decibels,
            f"{c.ssim_mean:.4f}",
            *([] if c.flip_mean is None else [f"{c.flip_mean:.4f}"]),
        )
    return found


def _costs(calibration: "Calibration | None", steps: int) -> dict[str, Any]:
    """What the report tells of a calibration: its costs, and the best plans for every K."""
    from dpcache.errors import CalibrationError, GridError

    if calibration is None:
        return {}
    try:
        there = calibration.on_grid(steps)
        return {"calibration": there, "plans": there.plan_all()}
    except (CalibrationError, GridError) as error:
        terminal.note(f"the report says nothing of costs: {error}")
        return {}


def _schedules(model: str, names: Sequence[str], steps: int | None) -> "list[tuple[Source, Schedule]]":
    """The schedules; all of one number of steps, so that the full runs can be shared."""
    found = [(Source(name), read_schedule(name, steps, model=model)) for name in names]
    counts = [schedule.num_inference_steps for _, schedule in found]
    if len(set(counts)) > 1:
        listed = ", ".join(f"{source} has {count}" for (source, _), count in zip(found, counts, strict=True))
        raise typer.BadParameter(f"compare schedules of one number of steps at a time: {listed}.")
    return found


def plans(
    pipeline: Any,
    sources: Sequence[Source],
    calibration: "Calibration | None",
    first_input: Any,
    arguments: dict[str, Any],
    seed: int,
) -> "list[tuple[Source, Schedule]]":
    """What is followed with each number of key steps, planned from the calibration if there is one."""
    from dpcache.run.inputs import call_arguments, seeded
    from dpcache.run.plans import plans_for

    for source in sources:
        check(pipeline, source, calibration)
    found = [plans_for(calibration, num_key_steps=source.num_key_steps) for source in sources]
    (call,) = call_arguments([first_input], {"output_type": "np", **arguments})
    return list(zip(sources, planned(pipeline, found, found[0].boundary, seeded(pipeline, call, seed)), strict=True))
