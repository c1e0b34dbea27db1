"""Calibration, comparisons and plans -> the page."""

import base64
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dpcache import __version__, checks
from dpcache.files.whole import write_whole
from dpcache.judge.comparison import Comparison
from dpcache.judge.differences import amplification
from dpcache.measure.calibration import Calibration
from dpcache.plan.costs import CostTensor
from dpcache.plan.planner import Plan
from dpcache.plan.recipe import Recipe
from dpcache.plan.schedule import Schedule

from .explorer import explorer_data, path_cost
from .pictures import PACKINGS, Embedded, Packing, embed, embed_difference
from .plots import MAP_AREA, cost_map, trade_off
from .quality import histogram, quality_curve
from .timeline import timeline

#: What the page's scripts are made of, each a module of its own.
SCRIPTS = ("theme.js", "pictures.js", "pages.js", "zoom.js", "schedules.js", "costs.js")
#: What a report may weigh, in millions of bytes: so much a browser opens at once.
MEGABYTES = 50.0
#: So many inputs are packed to find out how much all of them would take.
TRIED = 6
#: Fewer pictures than this need no histogram.
MANY = 20


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

    @property
    def size(self) -> int:
        """Bytes that its pictures take in the page."""
        return sum(shot.media.size + (shot.difference.size if shot.difference else 0) for shot in self.shots)


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
    megabytes: float = MEGABYTES,
) -> Path:
    """Writes one HTML page, complete in itself, for readers who have never heard of the method.

    The page loads nothing and may not: styles, scripts, figures and pictures are inside, and its own policy forbids
    connections and any script but these. Pictures are exact where there is room; else they are compressed, then reduced
    to 70 % of their size at the least, then only the worst are shown. The figures are always of all the originals.

    Args:
        path: the file; written whole or not at all.
        title: the page's heading.
        model: what was accelerated, as readers know it.
        comparisons: one per schedule, all over the same inputs.
        calibration: what the schedules were planned from; without it the page says nothing of costs.
        recipe: how the schedules were planned.
        plans: {K: Plan}, as `calibration.plan_all` gives them, for the curve of cost against K.
        facts: further facts to list at the end, {name: value}.
        megabytes: the most that the file may weigh, in millions of bytes; one input is shown even if it weighs more.

    Returns:
        The path written.

    Raises:
        ValueError: no comparisons or samples, comparisons over different inputs, a schedule for another number of
            steps than the calibration's, or a weight that is not above 0.
    """
    room = checks.number("megabytes", megabytes, 0, above=True) * 1e6
    _check(calibration, comparisons)
    names = schedule_names([comparison.schedule for comparison in comparisons])
    named = dict(zip(names, comparisons, strict=True))
    timesteps = calibration.facts.timesteps if calibration else ()
    environment = Environment(
        loader=PackageLoader("dpcache.judge.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("template.html")
    told = {
        "title": title,
        "model": model,
        "summary": _summary(named, model),
        "steps": comparisons[0].schedule.num_inference_steps,
        "noun": _noun(comparisons),
        "baseline": _baseline(comparisons[0]),
        "rows": [_row(name, comparison) for name, comparison in named.items()],
        "count": len(comparisons[0].samples),
        "quality": _quality(named, calibration, recipe, plans),
        "timelines": {name: timeline(comparison.schedule, timesteps) for name, comparison in named.items()},
        "plans": dict(sorted(plans.items())),
        "facts": {**(_calibration_facts(calibration) if calibration else {}), **facts, **_versions()},
        "method": recipe.method,
        "figures": _figures(calibration.cost(recipe), named, plans) if calibration else None,
        "style": Markup(_part("page.css")),
        "scripts": [_script(name) for name in SCRIPTS],
    }

    def render(cases: Sequence[Case], packing: Packing) -> bytes:
        return template.render(**told, cases=cases, packing=packing, megabytes=megabytes).encode()

    page = _packed(named, room, render)
    return write_whole(path, lambda part: part.write_bytes(page))


def _packed(named: Mapping[str, Comparison], room: float, render: Callable[[Sequence[Case], Packing], bytes]) -> bytes:
    """The page with its pictures as good as there is room for; if there is too little, with the worst ones alone."""
    order = _worst_first(named)
    rest = len(render([], Packing()))
    cases: list[Case] = []
    for packing in PACKINGS:
        some = [case.size for case in _cases(order[:: max(1, len(order) // TRIED)], named, packing)]
        if rest + np.mean(some) * len(order) > room and packing is not PACKINGS[-1]:
            continue
        cases = _cases(order, named, packing)
        page = render(cases, packing)
        if len(page) <= room:
            return page
    rest = len(page) - sum(case.size for case in cases)
    ends = rest + np.cumsum([case.size for case in cases])
    return render(cases[: max(1, int(np.searchsorted(ends, room, side="right")))], packing)


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


def _worst_first(named: Mapping[str, Comparison]) -> list[int]:
    """Numbers of the inputs, the one with the worst PSNR under any schedule first."""
    worst = np.min([[sample.psnr for sample in comparison.samples] for comparison in named.values()], axis=0)
    return [int(n) for n in np.argsort(worst, kind="stable")]


def _cases(numbers: Sequence[int], named: Mapping[str, Comparison], packing: Packing) -> list[Case]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda number: _case(number, named, packing), numbers))


def _case(number: int, named: Mapping[str, Comparison], packing: Packing) -> Case:
    samples = {name: comparison.samples[number] for name, comparison in named.items()}
    first = next(iter(samples.values()))
    label = first.label or f"input {number}"
    amplified = amplification(first.full, [sample.cached for sample in samples.values()])
    full = Shot("Full", "", "", f"{label}, seed {first.seed}, drawn in full", embed(first.full, packing))
    cached = [
        Shot(
            name,
            decibels(sample.psnr),
            f"{sample.ssim:.3f}",
            f"{label}, seed {sample.seed}, drawn with {name}: PSNR {decibels(sample.psnr)}",
            embed(sample.cached, packing),
            embed_difference(sample.full, sample.cached, amplified, packing),
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
        "trade_off": Markup(
            trade_off({k: plan.cost for k, plan in plans.items()}, chosen, cost.shape[1] - 1, about_curve)
        ),
        "without_cost": [name for name, (_, cost) in chosen.items() if not math.isfinite(cost)],
        "explorer": {**explorer_data(cost, keys), "map_area": MAP_AREA},
    }


def _quality(
    named: Mapping[str, Comparison], calibration: Calibration | None, recipe: Recipe, plans: Mapping[int, Plan]
) -> dict[str, Markup]:
    """Plots of K against how near the cached pictures are: as measured here, as expected, and picture by picture."""
    found = {}
    if len({comparison.schedule.num_key_steps for comparison in named.values()}) > 1:
        found["measured"] = Markup(quality_curve(list(named.values())))
    if calibration is not None and len(calibration.tried) and plans:
        steps = calibration.facts.num_inference_steps  # with so many key steps there is no error
        schedules = {k: calibration.schedule(plan.key_steps, recipe) for k, plan in plans.items() if k < steps}
        errors = {k: calibration.expected_error(schedule) for k, schedule in schedules.items()}
        marked = {name: one.schedule for name, one in named.items() if one.schedule.num_key_steps < steps}
        chosen = {name: (one.num_key_steps, calibration.expected_error(one)) for name, one in marked.items()}
        told = "; ".join(f"{name}: {error:.2%}" for name, (_, error) in chosen.items())
        about = f"Curve of the expected error against the number of key steps. Marked: {told}."
        found["expected"] = Markup(trade_off(errors, chosen, steps, about, what="expected error"))
    if len(next(iter(named.values())).samples) >= MANY:
        found["histogram"] = Markup(histogram({name: [s.psnr for s in c.samples] for name, c in named.items()}))
    return found


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
