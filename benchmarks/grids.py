"""Plans for other grids from one calibration of 50 steps, against calibrating on those grids.

Writes benchmarks/results/grids.json and docs/grids.md.
"""

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch

import dpcache
from benchmarks.subjects import RESULTS, ROOT, STEPS, Pictures, Row, Subject, plain, rounded, scores, shown, table

MODELS = ("tiny-flux", "tiny-dit", "tiny-hunyuan-video")
COUNTS = (20, 28, 40, 100)
SHIFTS = (0.5, 2.0)
"""Of the recorded one, for flow models."""
SPEEDUP = 3.85
OTHER_SPEEDUPS = (5.6, 4.7, 3.3, 2.8)
"""A key step more or less can make a plan a decibel better by chance: the mean over several budgets says more."""
INPUTS = 5
TARGET = 0.5
"""dB that an interpolated plan may lose."""
INTERPOLATED, DIRECT, UNIFORM = "interpolated", "direct", "uniform Taylor"


@dataclass
class Grid:
    """A number of steps and, for flow models, the scheduler's shift."""

    steps: int
    shift: float | None = None

    def __str__(self) -> str:
        return f"T = {self.steps}" + (f", shift {self.shift:g}" if self.shift is not None else "")

    def budget(self, speedup: float = SPEEDUP) -> int:
        return round(self.steps / speedup)


def grids(subject: Subject) -> list[Grid]:
    shift = subject.pipe.scheduler.config.get("shift")
    return [*(Grid(steps) for steps in COUNTS), *(Grid(STEPS, shift * factor) for factor in SHIFTS if shift)]


def calibrate(subject: Subject, steps: int) -> dpcache.Calibration:
    return dpcache.calibrate(
        subject.pipe,
        subject.model.calibration_inputs(INPUTS),
        num_inference_steps=steps,
        sensitivity="measured",
        progress=False,
        **subject.model.call_defaults,
    )


def on_grid(subject: Subject, calibration: dpcache.Calibration, grid: Grid) -> list[Row]:
    """What plans for this grid, made in each way, are worth there."""
    recorded = subject.pipe.scheduler
    if grid.shift is not None:
        subject.pipe.scheduler = type(recorded).from_config(recorded.config, shift=grid.shift)
    try:
        full, _ = subject.draw(steps=grid.steps)
        began = time.perf_counter()
        interpolated = calibration.on_grid(scheduler=subject.pipe.scheduler)
        interpolated.plan(grid.budget())
        seconds = time.perf_counter() - began
        direct = calibrate(subject, grid.steps)
        rows = []
        for budget in sorted({grid.budget(speedup) for speedup in (SPEEDUP, *OTHER_SPEEDUPS)}):
            ways = {INTERPOLATED: interpolated.plan(budget), DIRECT: direct.plan(budget)}
            if budget == grid.budget():
                ways[UNIFORM] = dpcache.Schedule.uniform(budget, grid.steps)
            rows += [
                {"grid": str(grid), "k": budget, "way": way, **judged(subject, schedule, full)}
                for way, schedule in ways.items()
            ]
        return [{**row, "planning_ms": 1000 * seconds} if row["way"] == INTERPOLATED else row for row in rows]
    finally:
        subject.pipe.scheduler = recorded


def judged(subject: Subject, schedule: dpcache.Schedule, full: Pictures) -> Row:
    pictures, calls = subject.draw(schedule, schedule.num_inference_steps)
    found = scores(full, pictures)
    figures = {name: float(found[name]) for name in ("psnr_mean", "psnr_p5")}
    return {"key_steps": schedule.key_steps, "calls": calls, **figures, "psnr": [float(v) for v in found["psnr"]]}


def measure(model: str, num_inputs: int) -> Row:
    subject = Subject(model, num_inputs)
    calibration = calibrate(subject, STEPS)
    rows = [row for grid in grids(subject) for row in on_grid(subject, calibration, grid)]
    subject.bar.close()
    return {
        "model": model,
        "pipeline": type(subject.pipe).__name__,
        "scheduler": type(subject.pipe.scheduler).__name__,
        "inputs": num_inputs,
        "versions": {name: version(name) for name in ("torch", "diffusers")},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, float32 on the CPU",
        "interpolation_error": calibration.interpolation_error,
        "rows": rows,
    }


# ----------------------------------------------------------------------------------------------------------- the page


def _by_grid(result: Row) -> list[list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in result["rows"]:
        found.setdefault(row["grid"], []).append(row)
    return list(found.values())


def _gain(rows: list[Row]) -> tuple[float, float]:
    """dB that interpolated plans are better than direct ones: at the budget of the table, and mean over all budgets."""
    (budget,) = {row["k"] for row in rows if row["way"] == UNIFORM}
    gains = {}
    for k in {row["k"] for row in rows}:
        means = {row["way"]: row["psnr_mean"] for row in rows if row["k"] == k}
        gains[k] = means[INTERPOLATED] - means[DIRECT]
    return gains[budget], sum(gains.values()) / len(gains)


def _line(rows: list[Row]) -> list[object]:
    (budget,) = {row["k"] for row in rows if row["way"] == UNIFORM}
    ways = {row["way"]: row for row in rows if row["k"] == budget}
    pairs = list(map(shown, ways.values()))
    gain, mean = _gain(rows)
    reached = "yes" if gain >= -TARGET else "no"
    return [rows[0]["grid"], budget, *pairs, f"{gain:+.2f}", reached, f"{mean:+.2f}", f"{rows[0]['planning_ms']:.0f}"]


def page(results: Sequence[Row]) -> str:
    difference = "interpolated - direct, dB"
    head = [
        "grid",
        "K",
        INTERPOLATED,
        DIRECT,
        UNIFORM,
        difference,
        f"within {TARGET} dB",
        "mean over 5 K",
        "planned in, ms",
    ]
    gains = [_gain(rows) for result in results for rows in _by_grid(result)]
    kept, kept_mean = (sum(gain[n] >= -TARGET for gain in gains) for n in (0, 1))
    average = sum(gain[1] for gain in gains) / len(gains)
    parts = [
        "# One calibration, other grids\n",
        "Made by `python -m benchmarks.grids`; the figures behind it are in `benchmarks/results/grids.json`. One "
        f"calibration of {STEPS} steps and {INPUTS} inputs serves every row: `interpolated` plans from it "
        "(`calibration.plan(K, scheduler=...)`), `direct` from a calibration made on that grid with the same inputs "
        f'and noise. Both with `sensitivity="measured"`, K = T / {SPEEDUP}. PSNR of held-out inputs against the full '
        "run on the same grid, in float: mean (5th percentile), dB. `mean over 5 K` is the difference averaged over "
        f"T / K = {', '.join(f'{s:g}' for s in sorted((SPEEDUP, *OTHER_SPEEDUPS), reverse=True))}: moving one key step "
        "by one can make a plan a decibel better or worse, which averages out. Planning includes stepping a copy of "
        "the scheduler, interpolation and the cost tensor.\n",
        f"\n{kept} of {len(gains)} rows are within {TARGET} dB of direct calibration or better, of the means over five "
        f"budgets {kept_mean}. On average over all grids and budgets the difference is {average:+.2f} dB. Single rows "
        "say little: calibrating on other inputs of the same kind changes a plan by as much "
        "([planning.md](planning.md#other-calibration-inputs)).\n",
    ]
    for result in results:
        libraries = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
        parts += [
            f"\n## {result['model']} ({result['pipeline']}, {result['scheduler']})\n",
            f"{result['inputs']} held-out inputs; {libraries}, {result['machine']}. Steps left out of the calibration "
            f"are interpolated with a relative error of {result['interpolation_error']:.2%}.\n",
            table(head, [_line(rows) for rows in _by_grid(result)]),
        ]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="example: python -m benchmarks.grids tiny-dit --inputs 8"
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)} (default: all)")
    parser.add_argument("--inputs", type=int, default=64, help="held-out inputs (default 64)")
    parser.add_argument("--page-only", action="store_true", help="measure nothing, write the page")
    options = parser.parse_args()
    if unknown := set(options.models) - set(MODELS):
        parser.error(f"no bundled model named {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    path = RESULTS / "grids.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for model in () if options.page_only else options.models or MODELS:
        found[model] = rounded(json.loads(json.dumps(measure(model, options.inputs), default=plain)))
        path.write_text(json.dumps(found, indent=1) + "\n")
    (ROOT / "docs" / "grids.md").write_text(page([found[model] for model in MODELS if model in found]))


if __name__ == "__main__":
    main()
