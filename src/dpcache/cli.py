"""The command line: parses, calls, prints."""

import json
import math
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import DPCacheError

app = typer.Typer(
    help="Diffusion transformers several times faster, without training: plan the key steps, predict the rest.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console()
err = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="A bundled model (tiny-flux), a diffusers directory, or a hub id.")]
Prompts = Annotated[list[str] | None, typer.Argument(help="Prompts. Bundled models bring some of their own.")]
PromptFile = Annotated[Path | None, typer.Option("--prompts", help="A file with one prompt per line.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Further argument of the pipeline's call; may be repeated."),
]
Steps = Annotated[int, typer.Option("--steps", "-t", min=1, help="T: steps of the sampling loop.")]
Seed = Annotated[int, typer.Option(help="Seed of the first input; the next ones count on.")]
Checkpoint = Annotated[
    Path | None, typer.Option(help="A directory that keeps what is measured: the same command goes on from there.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="What to write.")]


@app.callback(invoke_without_command=True)
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,  # read by `main`
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        from . import __version__

        out.print(f"dpcache {__version__}")
        raise typer.Exit


@app.command(epilog="Example: `dpcache demo -o my-demo`")
def demo(
    model: Annotated[str, typer.Option(help="A bundled model.")] = "tiny-flux",
    output: Output = Path("dpcache-demo"),
    inputs: Annotated[int, typer.Option(min=1, help="How many held-out inputs to draw.")] = 8,
) -> None:
    """Calibrates a bundled model, plans, draws held-out inputs in full and cached, and writes a report."""
    from .demo import run_demo

    settle_small_model()
    comparisons, report = run_demo(model, output, inputs, say=out.print)
    _print_comparisons(comparisons)
    out.print(f"open {report} in a browser")


@app.command(epilog='Example: `dpcache calibrate tiny-flux "a small red ring" "a big blue star" -o flux.safetensors`')
def calibrate(
    model: Model,
    prompts: Prompts = None,
    output: Output = Path("calibration.safetensors"),
    prompt_file: PromptFile = None,
    steps: Steps = 50,
    boundary: Annotated[Literal["blocks", "output"], typer.Option(help="What is cached and predicted.")] = "blocks",
    order: Annotated[int, typer.Option(min=0, help="Order of the Taylor prediction.")] = 2,
    sensitivity: Annotated[
        Literal["sampler", "measured"], typer.Option(help="What an error does: by the sampler alone, or measured.")
    ] = "sampler",
    seed: Seed = 0,
    checkpoint: Checkpoint = None,
    settings: Settings = None,
) -> None:
    """Runs a model in full on a few prompts and writes what skipping steps would cost. Five prompts are enough."""
    from .measuring import calibrate as run

    inputs = _inputs(model, prompts, prompt_file, held_out=False, count=5)
    pipeline, arguments = _load(model, settings)
    found = run(
        pipeline,
        inputs,
        num_inference_steps=steps,
        boundary=boundary,
        order=order,
        sensitivity=sensitivity,
        seed=seed,
        checkpoint=checkpoint,
        **arguments,
    )
    found.save(output)
    out.print(f"wrote {output}: {found.facts.num_inputs} inputs, {found.facts.num_inference_steps} steps")
    out.print(f"next: dpcache plan {output} -k 13 -o schedule.json")


@app.command(epilog="Example: `dpcache optimize tiny-flux -k 13 -o flux-13.json`")
def optimize(
    model: Model,
    prompts: Prompts = None,
    num_key_steps: Annotated[int, typer.Option("--key-steps", "-k", help="K: steps to compute in full.")] = 13,
    output: Output = Path("schedule.json"),
    prompt_file: PromptFile = None,
    steps: Steps = 50,
    boundary: Annotated[Literal["blocks", "output"], typer.Option(help="What is cached and predicted.")] = "blocks",
    trials: Annotated[int, typer.Option(min=1, help="Runs to judge by, and as many to tune on.")] = 8,
    tune: Annotated[int, typer.Option(min=0, help="Rounds of tuning the coefficients; 0: none.")] = 2,
    polish: Annotated[int, typer.Option(min=0, help="Runs to spend on moving single key steps before tuning.")] = 0,
    seed: Seed = 0,
    checkpoint: Checkpoint = None,
    settings: Settings = None,
) -> None:
    """The best schedule in one go: calibrates, plans in several ways, runs and tunes the plans, keeps the best.

    Give sixteen prompts as different as those to come. More of them cost no more, only --trials and --tune do.
    """
    from .selection import optimize as run

    inputs = _inputs(model, prompts, prompt_file, held_out=False, count=16)
    pipeline, arguments = _load(model, settings)
    schedule = run(
        pipeline,
        inputs,
        num_inference_steps=steps,
        num_key_steps=num_key_steps,
        boundary=boundary,
        num_trials=trials,
        tune=tune,
        polish=polish,
        seed=seed,
        checkpoint=checkpoint,
        **arguments,
    )
    schedule.save(output)
    out.print(f"wrote {output}: {schedule}, error {schedule.error:.2%}, up to {schedule.ideal_speedup:.2f}x faster")


@app.command(epilog="Example: `dpcache plan flux.safetensors -k 13 -o flux-13.json`")
def plan(
    calibration: Annotated[Path, typer.Argument(help="A calibration file.")],
    num_key_steps: Annotated[int | None, typer.Option("--key-steps", "-k", help="K: steps to compute in full.")] = None,
    speedup: Annotated[float | None, typer.Option(help="T / K instead: as many key steps as it allows.")] = None,
    max_error: Annotated[
        float | None,
        typer.Option(help="As few key steps instead as keep the expected error below this, 0.01 for 1 %."),
    ] = None,
    output: Output = Path("schedule.json"),
    method: Annotated[
        Literal["sampler", "paper"],
        typer.Option(help="How errors are judged: by what the sampler does with them, or as in the paper."),
    ] = "sampler",
    measured: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="What of the measured sensitivity to believe [0.5 where it was measured]."),
    ] = None,
    first: Annotated[
        int | None, typer.Option("--first", help="So many first steps are key steps [1; 3 with --method paper].")
    ] = None,
    last: Annotated[int, typer.Option("--last", help="So many last steps are key steps.")] = 0,
    max_gap: Annotated[int | None, typer.Option(help="Longest way from a key step to the next.")] = None,
) -> None:
    """Finds the best key steps for a budget and writes the schedule."""
    from .calibration import Calibration

    if sum(given is not None for given in (num_key_steps, speedup, max_error)) != 1:
        raise typer.BadParameter("give one of --key-steps, --speedup and --max-error.")
    schedule = Calibration.load(calibration).plan(
        num_key_steps,
        speedup=speedup,
        max_error=max_error,
        method=method,
        measured=measured,
        first_key_steps=first,
        last_key_steps=last,
        max_gap=max_gap,
    )
    schedule.save(output)
    expected = "" if schedule.expected_error is None else f", expected error {schedule.expected_error:.2%}"
    out.print(f"wrote {output}: {schedule}, cost {schedule.cost:.4g}{expected}, up to {schedule.ideal_speedup:.2f}x")


@app.command(epilog='Example: `dpcache generate tiny-flux "a small red ring" --schedule flux-13.json -o ring.png`')
def generate(
    model: Model,
    prompts: Prompts = None,
    schedule: Annotated[Path | None, typer.Option("--schedule", "-s", help="A schedule; none: in full.")] = None,
    output: Output = Path("image.png"),
    prompt_file: PromptFile = None,
    steps: Annotated[int | None, typer.Option("--steps", "-t", min=1, help="Steps; the schedule's, or 50.")] = None,
    seed: Seed = 0,
    settings: Settings = None,
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
    """Draws prompts, in full or with a schedule. Several pictures are numbered: image-0.png, image-1.png, ..."""
    if ray is not None:
        if output.suffix:
            raise typer.BadParameter("with --ray pictures go into a folder: name one, for example -o pictures/.")
        from .commands.generate_ray import generate_on_ray

        arguments = {**_arguments(model, settings), **({"num_inference_steps": steps} if steps else {})}
        generate_on_ray(
            model,
            prompt_file
            if prompt_file and not prompts
            else _inputs(model, prompts, prompt_file, held_out=True, count=1),
            output,
            say=out.print,
            schedule=schedule,
            num_workers=workers,
            gpus_per_worker=gpus_per_worker,
            batch_size=batch or 1,
            seed=seed,
            address=ray,
            **arguments,
        )
        return
    if workers or gpus_per_worker is not None or batch:
        raise typer.BadParameter("--workers, --gpus-per-worker and --batch are for --ray.")
    from .inputs import call_arguments, seeded
    from .pictures import save_picture
    from .schedule import Schedule

    followed = Schedule.load(schedule) if schedule else None
    inputs = _inputs(model, prompts, prompt_file, held_out=True, count=1, seed=seed)
    pipeline, arguments = _load(model, settings)
    arguments["num_inference_steps"] = steps or (followed.num_inference_steps if followed else 50)
    if followed is not None:
        from .cache import enable

        enable(pipeline, followed)
    for number, call in enumerate(call_arguments(inputs, {"output_type": "np", **arguments})):
        start = time.perf_counter()
        pictures = pipeline(**seeded(pipeline, call, seed + number))[0]
        seconds = time.perf_counter() - start
        for index, picture in enumerate(pictures):
            many = len(inputs) * len(pictures) > 1
            path = output.with_stem(f"{output.stem}-{number * len(pictures) + index}") if many else output
            save_picture(path, picture)
            out.print(f"wrote {path} ({seconds:.2f} s)")


@app.command(epilog="Example: `dpcache compare tiny-flux --schedule flux-13.json --schedule flux-9.json`")
def compare(
    model: Model,
    prompts: Prompts = None,
    *,
    schedule: Annotated[list[Path], typer.Option("--schedule", "-s", help="A schedule; may be repeated.")],
    prompt_file: PromptFile = None,
    count: Annotated[int, typer.Option(min=1, help="Held-out inputs of a bundled model, where none are given.")] = 8,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report here.")] = None,
    seed: Seed = 0,
    settings: Settings = None,
) -> None:
    """Draws prompts in full and with each schedule, from the same noise, and prints how they differ."""
    from .comparison import compare_all
    from .schedule import Schedule

    schedules = [Schedule.load(path) for path in schedule]
    inputs = _inputs(model, prompts, prompt_file, held_out=True, count=count)
    pipeline, arguments = _load(model, settings)
    comparisons = compare_all(pipeline, schedules, inputs, seeds=seed, **arguments)
    _print_comparisons(comparisons)
    if report is not None:
        from .report import write_report

        write_report(report, title=f"dpcache on {model}", model=model, comparisons=comparisons)
        out.print(f"wrote {report}")


@app.command(epilog="Example: `dpcache show flux.safetensors -k 13` or `dpcache show flux-13.json`")
def show(
    file: Annotated[Path, typer.Argument(help="A calibration or schedule file.")],
    num_key_steps: Annotated[
        int | None, typer.Option("--key-steps", "-k", help="Of a calibration: the number of key steps to point at.")
    ] = None,
    schedule: Annotated[
        Path | None, typer.Option("--schedule", "-s", help="Of a calibration: the schedule to point at.")
    ] = None,
) -> None:
    """Prints what a calibration or schedule file holds; of a calibration, error against speedup for every budget."""
    if file.suffix == ".json":
        from .schedule import Schedule

        _show_schedule(Schedule.load(file))
    else:
        from .calibration import Calibration

        if schedule is not None:
            from .schedule import Schedule

            num_key_steps = Schedule.load(schedule).num_key_steps
        _show_calibration(Calibration.load(file), num_key_steps)


def _show_schedule(schedule: Any) -> None:
    keys = set(schedule.key_steps)
    out.print(f"schedule: {schedule}", highlight=False)
    out.print("".join("█" if t in keys else "·" for t in range(schedule.num_inference_steps)), highlight=False)
    table = Table(show_header=False, box=None)
    model = schedule.model
    for name, value in (
        ("speedup", f"at most {schedule.ideal_speedup:.2f}x"),
        ("boundary", schedule.boundary),
        ("predictor", f"{schedule.predictor}, order {schedule.order}"),
        ("model", f"{model.denoiser}, configuration {model.config or 'any'}" if model else "any"),
        ("cost", "not known" if schedule.cost is None else f"{schedule.cost:.6g}"),
        ("measured error", "not known" if schedule.error is None else f"{schedule.error:.3%}"),
        ("expected error", "not known" if schedule.expected_error is None else f"{schedule.expected_error:.3%}"),
        ("source", schedule.source or "not known"),
    ):
        table.add_row(name, escape(str(value)))
    out.print(table)


def _show_calibration(calibration: Any, chosen: int | None) -> None:
    facts = calibration.facts
    table = Table(show_header=False, box=None)
    for name, value in facts.model_dump(exclude={"timesteps", "model", "calls"}).items():
        table.add_row(name.replace("_", " "), str(value))
    table.add_row("model", f"{facts.model.denoiser}, configuration {facts.model.config}")
    measured = "yes" if calibration.is_measured else "no (calibrate with --sensitivity measured)"
    table.add_row("sensitivity measured", measured)
    out.print(table)
    out.print(_trade_off(calibration, chosen))


def _trade_off(calibration: Any, chosen: int | None) -> Table:
    """Error against speedup: a bar for every budget, on a logarithmic scale."""
    method = "sampler" if len(calibration.gram) else "paper"
    steps = calibration.facts.num_inference_steps
    found = calibration.plan_all(method=method)
    plans = {k: plan for k, plan in found.items() if plan.cost > 0 and (k <= steps // 2 or k == chosen)}
    if len(calibration.tried):
        errors = {k: calibration.expected_error(calibration.schedule(plan.key_steps)) for k, plan in plans.items()}
    else:
        errors = {k: plan.cost ** (0.5 if method == "sampler" else 1.0) for k, plan in plans.items()}
    kind = "expected error" if len(calibration.tried) else "error, of no known unit"
    table = Table("", "K", "T/K", kind, title=f"best single plans, {method} cost", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    table.add_column("key steps", no_wrap=True)
    logs = [math.log(error) for error in errors.values()]
    for k, plan in plans.items():
        share = (math.log(errors[k]) - min(logs)) / ((max(logs) - min(logs)) or 1.0)
        figure = f"{errors[k]:.3%}" if len(calibration.tried) else f"{errors[k]:.3g}"
        bar = "█" * (1 + round(23 * share))
        style = "bold" if k == chosen else None
        keys = " ".join(map(str, plan.key_steps))
        table.add_row("→" if k == chosen else "", str(k), f"{steps / k:.2f}", figure, bar, keys, style=style)
    if chosen in plans:
        table.caption = f"{chosen} key steps: {' '.join(map(str, plans[chosen].key_steps))}"
    elif chosen is not None:
        table.caption = f"{chosen} key steps are none of these: they are infeasible, or nothing is skipped."
    return table


def _print_comparisons(comparisons: Any) -> None:
    headings = ("key steps", "blocks run", "speedup", "T/K", "PSNR dB", "5th pct", "worst", "SSIM")
    table = Table(*headings, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for c in comparisons:
        blocks = f"{c.cached_block_runs} of {c.full_block_runs}" if c.full_block_runs else "not known"
        decibels = [f"{value:.1f}" for value in (c.psnr_mean, c.psnr_p5, c.psnr_worst)]
        table.add_row(
            f"{c.schedule.num_key_steps} of {c.schedule.num_inference_steps}",
            blocks,
            f"{c.speedup:.2f}x",
            f"{c.schedule.ideal_speedup:.2f}",
            *decibels,
            f"{c.ssim_mean:.4f}",
        )
    out.print(table)


def _inputs(
    model: str, prompts: list[str] | None, file: Path | None, *, held_out: bool, count: int, seed: int | None = None
) -> list[Any]:
    """Prompts from the command line, a file, or the bundled model's own.

    Lines of JSON bring their noise along where a seed is given; else all of it comes from the command's own.
    """
    from .prompts import JSON_LINES, read_requests
    from .zoo import BUNDLED

    given: list[Any] = list(prompts or [])
    if file is not None and file.suffix in JSON_LINES:
        from .inputs import noise_of

        requests = read_requests(file, seed=seed or 0)
        given += [{**r.arguments, **({} if seed is None else noise_of(r.seed))} for r in requests]
    elif file is not None:
        given += [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if given:
        return given
    if model not in BUNDLED:
        raise typer.BadParameter("give prompts, or a file of them with --prompts: only bundled models bring their own.")
    bundled = BUNDLED[model]
    return list(bundled.held_out_inputs(count) if held_out else bundled.calibration_inputs(count))


def _load(model: str, settings: list[str] | None) -> tuple[Any, dict[str, Any]]:
    """The pipeline, and the arguments of its calls."""
    from .zoo import BUNDLED, load_pipeline

    if model in BUNDLED:
        settle_small_model()
    arguments = _arguments(model, settings)
    return load_pipeline(model), arguments


def _arguments(model: str, settings: list[str] | None) -> dict[str, Any]:
    """Arguments of a pipeline's calls: a bundled model's own, then those of --set."""
    from .zoo import BUNDLED

    arguments = dict(BUNDLED[model].call_defaults) if model in BUNDLED else {}
    for setting in settings or []:
        name, equals, text = setting.partition("=")
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"{setting!r} is not NAME=VALUE, for example guidance_scale=3.5.")
        try:
            arguments[name] = json.loads(text)
        except json.JSONDecodeError:
            arguments[name] = text  # a word, not a number
    return arguments


def settle_small_model() -> None:
    """For a bundled model: no progress bars while loading, and one thread.

    Its layers are so small that a second core gains nothing, and on a busy machine two threads that wait for each other
    at every layer can take far longer.
    """
    import diffusers
    import torch
    import transformers

    torch.set_num_threads(1)

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def main() -> None:
    """Runs the command line. Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    # Advice to developers (which image processor to import, ...) is noise in a terminal.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except (DPCacheError, OSError, ValueError) as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        err.print("interrupted")
        raise SystemExit(130) from None
