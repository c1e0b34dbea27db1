"""`dpcache bench`."""

import itertools
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from dpcache.errors import GridError

from . import terminal
from .arguments import load, read_inputs, read_settings
from .compare import plans
from .following import Source, check, check_budget, num_steps, read_calibration, read_schedule
from .loading import Loading, loads
from .options import SCHEDULE_HELP, CalibrationName, Model, Output, PromptFile, Prompts, Seed, Settings
from .outputs import check_file

if TYPE_CHECKING:
    from dpcache.judge.bench import Benched, Row
    from dpcache.judge.ways import Way
    from dpcache.measure.calibration import Calibration
    from dpcache.plan.schedule import Schedule

FORMAT, VERSION = "dpcache.bench", 1
#: K / T unless given: 13 of 50 steps.
_SHARE = 0.26
_TAYLORSEER = "diffusers TaylorSeer"


@loads
def bench(
    model: Model,
    prompts: Prompts = None,
    num_key_steps: Annotated[
        int | None,
        typer.Option("--key-steps", "-k", min=1, help="K: full calls of each way [that of the schedule, or 13 of 50]."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Inputs to draw, each in every way.")] = 8,
    schedule: Annotated[str | None, typer.Option("--schedule", "-s", help=f"{SCHEDULE_HELP}.")] = None,
    calibration: CalibrationName = None,
    output: Output = Path("bench.json"),
    report: Annotated[Path | None, typer.Option(help="The HTML report [OUTPUT with .html instead of .json].")] = None,
    prompt_file: PromptFile = None,
    steps: Annotated[
        int | None, typer.Option("--steps", "-t", min=2, help="T: that of the schedule or calibration, or 50.")
    ] = None,
    seed: Seed = 0,
    settings: Settings = None,
    loading: Loading = Loading(),
) -> None:
    """Measures on your own model and device what dpcache and others reach with the same number of full calls.

    Draws varied prompts (or yours, or classes) in full; with no calibration; with a --schedule or the plan of a
    --calibration, if given; with even spacing; with diffusers' TaylorSeer, at the best of its settings, where it runs;
    and with K steps of the sampler. After the first full run it says how long everything takes: with 8 inputs and
    13 of 50 steps some 25 full runs. OUTPUT is one JSON with the device, versions, settings and all figures, fit to be
    handed on. After Ctrl-C everything is of the inputs that were drawn by then.

    --json: what OUTPUT holds: format, version, device, versions, model, pipeline, denoiser, scheduler, dtype, loading,
    arguments, inputs, seed, num_inference_steps, num_key_steps, size, num_inputs, seconds (of everything), report, and
    rows, a list: name, told (what to set it up with), psnr_mean, psnr_worst, psnr (of each output; null: infinite),
    full_calls, seconds (of a call), cached_bytes, peak_bytes, ssim_mean, flip_mean, cannot_run (why there are no
    figures).
    """
    if schedule is not None and calibration is not None:
        raise typer.BadParameter("give --schedule or --calibration, not both.")
    check_file(output, "measurement", [".json"])
    report = report or output.with_suffix(".html")
    check_file(report, "report", [".html"])
    from dpcache.judge.report import write_report

    followed: Schedule | Calibration | None = None
    if schedule is not None:
        followed = read_schedule(schedule, steps, model=model)
    elif calibration is not None:
        followed = read_calibration(calibration)
    steps = steps or num_steps(followed)
    budget = _budget(num_key_steps, followed if schedule is not None else None, steps)
    from dpcache.zoo import BUNDLED

    given = bool(prompts or prompt_file or model in BUNDLED)
    inputs = read_inputs(model, prompts, prompt_file, held_out=True, count=count, seed=seed) if given else []
    arguments = read_settings(model, settings, loading)
    pipeline, inputs = load(model, inputs, arguments, loading)
    if not given:
        from dpcache.apps.varied import inputs_for

        inputs = inputs_for(pipeline, count)
    inputs = list(itertools.islice(itertools.cycle(inputs), count))
    arguments["num_inference_steps"] = steps
    ways = _ways(pipeline, budget, steps, schedule or calibration, followed, inputs[0], arguments, seed)

    from dpcache.judge.bench import bench as run
    from dpcache.run.inputs import call_arguments, label

    terminal.note(f"drawing {terminal.counted(len(inputs), 'input')} in full and in {len(ways)} ways")
    found = run(
        pipeline,
        ways,
        inputs,
        num_key_steps=budget,
        seed=seed,
        say=lambda text: terminal.note(f"bench: {text}"),
        progress=terminal.progress(),
        **arguments,
    )
    about = _about(model, pipeline, loading, arguments, budget, found) | {
        "inputs": [label(pipeline, call) for call in call_arguments(inputs, {})[: found.num_inputs]],
        "seed": seed,
        "report": str(report),
    }
    document: dict[str, Any] = terminal.finite(about | {"rows": [_row(row) for row in found.rows]})
    from dpcache.files.whole import write_whole

    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    write_whole(output, lambda part: part.write_text(text, encoding="utf-8"))
    write_report(
        report,
        title=f"dpcache on {model}",
        model=model,
        comparisons=list(found.comparisons.values()),
        facts={"Device": about["device"], **_facts(found)},
    )
    terminal.result(document, table(found), f"wrote {output} and {report}")
    if not found.is_whole:
        raise KeyboardInterrupt(f"interrupted: everything is of {found.num_inputs} of {len(inputs)} inputs.")


def _budget(given: int | None, schedule: "Schedule | Calibration | None", steps: int) -> int:
    """K, of every way."""
    own = getattr(schedule, "num_key_steps", None)
    if own is not None and given not in (None, own):
        raise typer.BadParameter(f"the schedule has {own} key steps, not {given}: leave out -k.")
    budget: int = own or given or max(2, round(_SHARE * steps))
    check_budget(budget, steps)
    return budget


def _ways(
    pipeline: Any,
    budget: int,
    steps: int,
    name: str | None,
    followed: "Schedule | Calibration | None",
    first_input: Any,
    arguments: dict[str, Any],
    seed: int,
) -> "dict[str, Way | list[Way] | Exception]":
    from dpcache.judge.ways import fewer_steps, scheduled, taylorseers
    from dpcache.plan.schedule import Schedule

    call: tuple[Any, dict[str, Any], int] = first_input, arguments, seed
    found: dict[str, Way | list[Way] | Exception] = {}
    try:
        ((_, curve),) = plans(pipeline, [Source(None, budget)], None, *call)
        found["no calibration"] = scheduled(curve)
    except GridError as error:  # the sampler's noise levels are not known
        found["no calibration"] = error
    if isinstance(followed, Schedule):
        check(pipeline, Source(name), followed)
        found[f"schedule {Source(name).short}"] = scheduled(followed)
    elif followed is not None:
        ((_, plan),) = plans(pipeline, [Source(name, budget)], followed, *call)
        found[f"plan of {Source(name).short}"] = scheduled(plan)
    found["even spacing"] = scheduled(Schedule.uniform(budget, steps, boundary="output"))
    try:
        found[_TAYLORSEER] = taylorseers(budget, steps, pipeline.dtype)
    except ImportError as error:
        found[_TAYLORSEER] = error
    found[f"{budget} sampler steps"] = fewer_steps(budget, type(pipeline.scheduler).__name__)
    return found


def _about(
    model: str,
    pipeline: Any,
    loading: Loading,
    arguments: dict[str, Any],
    budget: int,
    found: "Benched",
) -> dict[str, Any]:
    """What the figures are of."""
    import torch

    from dpcache import __version__
    from dpcache.measure.measuring import device_of
    from dpcache.run.denoisers import find_denoisers

    steps = arguments["num_inference_steps"]
    device = torch.device(device_of(pipeline))
    return {
        "format": FORMAT,
        "version": VERSION,
        "device": _device_name(device),
        "versions": {"dpcache": __version__, **{name: version(name) for name in ("torch", "diffusers")}},
        "model": model,
        "pipeline": type(pipeline).__name__,
        "denoiser": type(find_denoisers(pipeline)[0]).__name__,
        "scheduler": type(pipeline.scheduler).__name__,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "loading": {**loading.facts(), **({"offload": loading.offload} if loading.offload else {})},
        "arguments": {name: _plain(value) for name, value in arguments.items()},
        "num_inference_steps": steps,
        "num_key_steps": budget,
        "size": list(found.shape),
        "num_inputs": found.num_inputs,
        "seconds": found.seconds,
    }


def _plain(value: Any) -> Any:
    """A value that JSON can hold; of a picture, what it is."""
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        return type(value).__name__


def _device_name(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text(encoding="utf-8").splitlines() if cpus.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else f"{device.type}, {name}"


def _row(row: "Row") -> dict[str, Any]:
    psnr = {"psnr_mean": row.psnr_mean, "psnr_worst": row.psnr_worst, "psnr": row.psnr}
    return {"name": row.name, "told": row.told, **psnr, **vars(row)}


def _facts(found: "Benched") -> dict[str, str]:
    """What the report has no pictures of."""
    facts = {}
    for row in found.rows[1:]:
        if row.cannot_run is not None:
            facts[row.name] = f"does not run: {row.cannot_run}"
        elif row.name not in found.comparisons:
            flip = "" if row.flip_mean is None else f", FLIP {row.flip_mean:.3f}"
            facts[row.name] = (
                f"PSNR {row.psnr_mean:.1f} dB, worst {row.psnr_worst:.1f} dB, SSIM {row.ssim_mean:.3f}{flip}"
            )
    return facts


def table(found: "Benched") -> Table:
    """A row for every way."""
    has_flip = any(row.flip_mean is not None for row in found.rows)
    has_peak = any(row.peak_bytes is not None for row in found.rows)
    drawn = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    drawn.add_column("way", overflow="fold")
    headings = ["calls", "PSNR dB", "worst", "SSIM", "FLIP", "s", "held", "peak"]
    left_out = {"FLIP": not has_flip, "peak": not has_peak}
    for heading in headings:
        if not left_out.get(heading):
            drawn.add_column(heading, no_wrap=True)
    for row in found.rows:
        cells = {
            "calls": _figure(row.full_calls, ".4g"),
            "PSNR dB": _figure(row.psnr_mean, ".1f"),
            "worst": _figure(row.psnr_worst, ".1f"),
            "SSIM": _figure(row.ssim_mean, ".3f"),
            "FLIP": _figure(row.flip_mean, ".3f"),
            "s": _figure(row.seconds, ".3g"),
            "held": _bytes(row.cached_bytes),
            "peak": _bytes(row.peak_bytes),
        }
        drawn.add_row(escape(row.name), *(cells[name] for name in headings if not left_out.get(name)))
    reasons = [f"{row.name} does not run: {row.cannot_run}" for row in found.rows if row.cannot_run is not None]
    words = "s: of a call, the median; held: by the cache, at most" + (
        "; peak: of the GPU's memory" if has_peak else ""
    )
    drawn.caption = escape("\n".join([f"{words}.", *reasons]))
    return drawn


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _bytes(count: int | None) -> str:
    if count is None:
        return "-"
    unit = next(unit for unit in ("kB", "MB", "GB") if count < 1000 * _UNITS[unit] or unit == "GB")
    return f"{count / _UNITS[unit]:.3g} {unit}"


_UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
