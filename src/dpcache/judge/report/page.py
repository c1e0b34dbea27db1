"""Calibration, comparisons and plans -> the page."""

import base64
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dpcache import __version__
from dpcache.files.whole import write_whole
from dpcache.judge.comparison import Comparison, Sample
from dpcache.measure.calibration import Calibration
from dpcache.plan.costs import CostTensor
from dpcache.plan.planner import Plan
from dpcache.plan.recipe import Recipe
from dpcache.plan.schedule import Schedule

from .explorer import explorer_data, path_cost
from .pictures import Embedded, amplification, common_scale, embed, embed_difference
from .plots import MAP_AREA, cost_map, trade_off
from .timeline import timeline

#: What the page's scripts are made of, each a module of its own.
SCRIPTS = ("theme.js", "pictures.js", "schedules.js", "costs.js")


@dataclass(frozen=True)
class Row:
    """One line of the table of results: every figure as text, notes to stand small below a figure."""

    name: str
    source: str
    speedup: str
    ideal: str
    seconds: str
    blocks: str
    blocks_note: str = ""
    psnr_mean: str = ""
    psnr_note: str = ""
    psnr_p5: str = ""
    psnr_worst: str = ""
    ssim: str = ""
    flip: str = ""


@dataclass(frozen=True)
class Shot:
    """One picture or clip with what is written below it; of a cached one also what differs from the full one."""

    name: str
    psnr: str
    ssim: str
    alt: str
    media: Embedded
    difference: Embedded | None = None


@dataclass(frozen=True)
class Case:
    """One input: drawn in full, then with each schedule; differences all amplified by the same number."""

    number: int
    label: str
    seed: int
    amplified: str
    shots: tuple[Shot, ...]


@dataclass(frozen=True)
class Script:
    """One of the page's scripts, and its digest, by which the page's policy admits it and nothing else."""

    source: Markup
    digest: str


def write_report(
    path: "str | os.PathLike[str]",
    *,
    title: str,
    model: str,
    comparisons: Sequence[Comparison],
    calibration: Calibration | None = None,
    recipe: Recipe = Recipe(),
    plans: Mapping[int, Plan] = {},
    facts: Mapping[str, str] = {},
) -> Path:
    """Writes one HTML page, complete in itself, for readers who have never heard of the method.

    The page loads nothing and may not: styles, scripts, figures and pictures are inside, and its own policy forbids
    connections and any script but these. Pictures are reduced where they would make it too heavy for a browser; the
    figures are always of the originals.

    Args:
        path: the file; written whole or not at all.
        title: the page's heading.
        model: what was accelerated, as readers know it.
        comparisons: one per schedule, all over the same inputs.
        calibration: what the schedules were planned from; without it the page says nothing of costs.
        recipe: how the schedules were planned.
        plans: {K: Plan}, as `calibration.plan_all` gives them, for the curve of cost against K.
        facts: further facts to list at the end, {name: value}.

    Returns:
        The path written.

    Raises:
        ValueError: no comparisons or samples, comparisons over different inputs, or a schedule for another number of
            steps than the calibration's.
    """
    _check(calibration, comparisons)
    names = schedule_names([comparison.schedule for comparison in comparisons])
    named = dict(zip(names, comparisons, strict=True))
    cached = [sample.cached for comparison in comparisons for sample in comparison.samples]
    # Every cached picture comes with one of its differences.
    scale = common_scale([sample.full for sample in comparisons[0].samples] + 2 * cached)
    timesteps = calibration.facts.timesteps if calibration else ()
    environment = Environment(
        loader=PackageLoader("dpcache.judge.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("template.html").render(
        title=title,
        model=model,
        summary=_summary(named, model),
        steps=comparisons[0].schedule.num_inference_steps,
        noun=_noun(comparisons),
        baseline=_baseline(comparisons[0]),
        rows=[_row(name, comparison) for name, comparison in named.items()],
        cases=_cases(named, scale),
        scale=scale,
        timelines={name: timeline(comparison.schedule, timesteps) for name, comparison in named.items()},
        plans=dict(sorted(plans.items())),
        facts={**(_calibration_facts(calibration) if calibration else {}), **facts, **_versions()},
        method=recipe.method,
        figures=_figures(calibration.cost(recipe), named, plans) if calibration else None,
        style=Markup(_part("page.css")),
        scripts=[_script(name) for name in SCRIPTS],
    )
    return write_whole(path, lambda part: part.write_text(page, encoding="utf-8"))


def schedule_names(schedules: Sequence[Schedule]) -> list[str]:
    """A short name for every schedule: its K, and as much more as tells it from the others."""
    short = [f"K = {schedule.num_key_steps}" for schedule in schedules]
    origins = [" ".join((schedule.source or "own").split()[:1]) for schedule in schedules]
    longer = [f"{name}, {origin}" for name, origin in zip(short, origins, strict=True)]
    numbered = [f"{name}, no. {number}" for number, name in enumerate(short, start=1)]
    return next(names for names in (short, longer, numbered) if len(set(names)) == len(names))


def decibels(value: float) -> str:
    """PSNR for people."""
    return "identical" if math.isinf(value) else f"{value:.1f} dB"


def _check(calibration: Calibration | None, comparisons: Sequence[Comparison]) -> None:
    if not comparisons or not comparisons[0].samples:
        raise ValueError("there is nothing to report: give one comparison with one sample at least.")
    inputs = [(sample.label, sample.seed) for sample in comparisons[0].samples]
    for number, comparison in enumerate(comparisons):
        if [(sample.label, sample.seed) for sample in comparison.samples] != inputs:
            raise ValueError(
                f"comparison {number} is over other inputs or seeds than comparison 0: make them together with "
                "`dpcache.compare_all`."
            )
        steps = comparison.schedule.num_inference_steps
        if calibration is not None and steps != calibration.facts.num_inference_steps:
            raise ValueError(
                f"comparison {number} is of a schedule for {steps} steps and the calibration is of "
                f"{calibration.facts.num_inference_steps}: give the calibration it was planned from."
            )


def _noun(comparisons: Sequence[Comparison]) -> str:
    return "clip" if comparisons[0].samples[0].full.ndim == 4 else "picture"


def _summary(named: Mapping[str, Comparison], model: str) -> Markup:
    """What happened, in a sentence or two."""
    comparisons = list(named.values())
    steps = comparisons[0].schedule.num_inference_steps
    text = Markup(
        "{} makes a {} in {} steps. With {} of them computed in full and the others predicted from cached "
        "values, it ran <strong>{}&nbsp;times as fast</strong>"
    )
    speeds = [comparison.speedup for comparison in comparisons]
    if len(comparisons) > 2:
        keys = [comparison.schedule.num_key_steps for comparison in comparisons]
        return text.format(model, _noun(comparisons), steps, _span(keys, ""), _span(speeds, ".2f")) + "."
    counts = []
    for name, comparison in named.items():
        _, _, origin = name.partition(", ")
        counts.append(f"{comparison.schedule.num_key_steps}" + (f" ({origin})" if origin else ""))
    text = text.format(model, _noun(comparisons), steps, counts[0], f"{speeds[0]:.2f}")
    for count, speed in zip(counts[1:], speeds[1:], strict=True):
        text += Markup("; with {}, <strong>{:.2f}&nbsp;times</strong>").format(count, speed)
    return text + "."


def _span(values: Sequence[float], form: str) -> str:
    ends = [format(end, form) for end in (min(values), max(values))]
    return " to ".join(dict.fromkeys(ends))


def _baseline(comparison: Comparison) -> Row:
    """The row of the full runs, which all the others are measured against."""
    return Row(
        name="In full",
        source="every step computed",
        speedup="1.00×",
        ideal="1.00×",
        seconds=_duration(float(np.median(comparison.full_seconds))),
        blocks=f"{comparison.full_block_runs:,}" if comparison.full_block_runs else "not counted",
    )


def _row(name: str, comparison: Comparison) -> Row:
    schedule = comparison.schedule
    steps = f"{schedule.num_key_steps} of {schedule.num_inference_steps} steps"
    psnr_mean, psnr_note = _mean([sample.psnr for sample in comparison.samples])
    runs, all_runs = comparison.cached_block_runs, comparison.full_block_runs
    return Row(
        name=name,
        source=f"{steps}, {schedule.source or 'own key steps'}",
        speedup=f"{comparison.speedup:.2f}×",
        ideal=f"{schedule.ideal_speedup:.2f}×",
        seconds=_duration(float(np.median(comparison.cached_seconds))),
        blocks=f"{runs:,}" if all_runs else "not counted",
        blocks_note=f"of {all_runs:,} ({runs / all_runs:.0%})" if all_runs else "",
        psnr_mean=psnr_mean,
        psnr_note=psnr_note,
        psnr_p5="" if comparison.psnr_p5 is None else decibels(comparison.psnr_p5),
        psnr_worst=decibels(comparison.psnr_worst),
        ssim=f"{comparison.ssim_mean:.3f}",
        flip="" if comparison.flip_mean is None else f"{comparison.flip_mean:.3f}",
    )


def _mean(quality: Sequence[float]) -> tuple[str, str]:
    """Mean PSNR and a note: one identical picture among others would make it infinite, so those are counted apart."""
    differing = [value for value in quality if not math.isinf(value)]
    if not differing or len(differing) == len(quality):
        return decibels(float(np.mean(quality))), ""
    return decibels(float(np.mean(differing))), f"without {len(quality) - len(differing)} identical"


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"


def _cases(named: Mapping[str, Comparison], scale: float) -> list[Case]:
    """Every input with its pictures, the one with the worst PSNR under any schedule first."""
    comparisons = list(named.values())
    count = len(comparisons[0].samples)
    order = sorted(range(count), key=lambda n: min(comparison.samples[n].psnr for comparison in comparisons))
    return [_case(n, {name: c.samples[n] for name, c in named.items()}, scale) for n in order]


def _case(number: int, samples: Mapping[str, Sample], scale: float) -> Case:
    first = next(iter(samples.values()))
    label = first.label or f"input {number}"
    amplified = amplification(first.full, [sample.cached for sample in samples.values()])
    full = Shot("Full", "", "", f"{label}, seed {first.seed}, drawn in full", embed(first.full, scale))
    cached = [
        Shot(
            name,
            decibels(sample.psnr),
            f"{sample.ssim:.3f}",
            f"{label}, seed {sample.seed}, drawn with {name}: PSNR {decibels(sample.psnr)}",
            embed(sample.cached, scale),
            embed_difference(sample.full, sample.cached, amplified, scale),
        )
        for name, sample in samples.items()
    ]
    return Case(number, label, first.seed, f"{amplified:,.0f}", (full, *cached))


def _figures(cost: CostTensor, named: Mapping[str, Comparison], plans: Mapping[int, Plan]) -> dict[str, Any]:
    """The plots, what the explorer needs, and the schedules that have no place on the curve for want of a cost."""
    keys = {name: comparison.schedule.key_steps for name, comparison in named.items()}
    chosen = {name: (len(steps), path_cost(cost, steps)) for name, steps in keys.items()}
    costs = "; ".join(f"{name}: {cost:,.4g}" for name, (_, cost) in chosen.items() if math.isfinite(cost))
    about_map = f"Heat map of the cost of every hop between key steps, with the hops of {', '.join(keys)} marked."
    about_curve = f"Curve of cost against the number of key steps. Marked: {costs or 'nothing'}."
    return {
        "cost_map": Markup(cost_map(cost, keys, about_map)),
        "trade_off": Markup(trade_off(plans, chosen, cost.shape[1] - 1, about_curve)),
        "without_cost": [name for name, (_, cost) in chosen.items() if not math.isfinite(cost)],
        "explorer": {**explorer_data(cost, keys), "map_area": MAP_AREA},
    }


def _part(name: str) -> str:
    return resources.files("dpcache.judge.report").joinpath(name).read_text(encoding="utf-8")


def _script(name: str) -> Script:
    source = _part(name)
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode("ascii")
    return Script(Markup(source), f"sha256-{digest}")


def _calibration_facts(calibration: Calibration) -> dict[str, str]:
    facts = calibration.facts
    boundaries = {"blocks": "the last transformer block's output", "output": "the denoiser's output"}
    return {
        "Pipeline": facts.pipeline,
        "Denoiser": facts.model.denoiser,
        "Scheduler": facts.scheduler,
        "Steps (T)": str(facts.num_inference_steps),
        "Calibration inputs": str(facts.num_inputs),
        "Denoiser calls per step": str(facts.num_branches),
        "What is cached": f"{boundaries[facts.boundary]} (boundary “{facts.boundary}”)",
        "Prediction": f"Taylor, order {facts.order}",
    }


def _versions() -> dict[str, str]:
    others = [f"{package} {version(package)}" for package in ("torch", "diffusers", "numpy")]
    return {"Versions": ", ".join([f"dpcache {__version__}", *others])}
