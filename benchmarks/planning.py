"""What the plans are made of: weights, predictors, powers; finer grids; other calibration inputs; expected errors.

    python -m benchmarks.planning                       # two hard models and two easy ones, then docs/planning.md
    python -m benchmarks.planning tiny-dit --inputs 8   # one model, quickly
    python -m benchmarks.planning --page-only           # the page from the figures already measured

Writes benchmarks/results/planning_<model>.json and docs/planning.md.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

import dpcache
from benchmarks.subjects import (
    RESULTS,
    ROOT,
    STEPS,
    Pictures,
    Row,
    Subject,
    plain,
    rounded,
    scores,
    shown,
    table,
    titled,
)
from dpcache.measure.trials import average_error
from dpcache.plan.recipe import Recipe
from dpcache.zoo import BUNDLED

MODELS = ("hard-flux", "hard-dit", "tiny-flux", "tiny-dit")
BUDGETS = (13, 9, 5)
CALIBRATED = 10
FINE = (100, 200)
"""Steps of the finer grids."""
FINE_BUDGETS = (13, 20)
CONVERGED = 1000
"""Steps of the solution that stands for the exact one: all that DDIM has."""
ALIKE = 8
"""Inputs whose pictures are held against each other, and how many of each."""
EXPECTED = (7, 9, 11, 13, 16, 20)
"""K at which the expected error is compared with the measured one."""

DEFAULT = "one plan, as `plan(K)` makes it"
RECIPES = {
    DEFAULT: Recipe(),
    "predicts by Taylor of order 1": Recipe(order=1),
    "by Taylor of order 2": Recipe(order=2),
    "by the trend": Recipe("trend"),
    "by fitted coefficients of order 1": Recipe("fitted", 1),
    "corrects never": Recipe(correct=False),
    "corrects always": Recipe(correct=True),
    "none of the measured sensitivity": Recipe(measured=0.0),
    "all of it (the default is half)": Recipe(measured=1.0),
    "errors in the first power (the default is 2)": Recipe(power=1.0),
    "errors in the fourth power": Recipe(power=4.0),
    "the paper's plan": Recipe(method="paper"),
}
PAPER = RECIPES["the paper's plan"]


class Planned(Subject):
    """A bundled model whose latents are compared as well."""

    def latents(self, steps: int, schedule: dpcache.Schedule | None = None, count: int | None = None) -> Pictures:
        """[inputs, D]: final latents of the first held-out inputs."""
        rows: list[Any] = []
        for arguments in self.batches(self.inputs[:count], steps, 16):
            arguments = {**arguments, "output_type": "latent"}
            if schedule is None:
                output = self.pipe(**arguments)[0]
            else:
                with dpcache.enabled(self.pipe, schedule):
                    output = self.pipe(**arguments)[0]
            rows.extend(np.asarray(output, dtype=np.float64).reshape(len(arguments["generator"]), -1))
            self.bar.update(len(arguments["generator"]))
        return np.stack(rows)

    def calibrated(self, inputs: Sequence[Any], steps: int = STEPS) -> dpcache.Calibration:
        more = {"sensitivity": "measured", "progress": False, **self.model.call_defaults}
        return dpcache.calibrate(self.pipe, inputs, num_inference_steps=steps, **more)


def recipes(subject: Planned, calibration: dpcache.Calibration, full: Pictures) -> list[Row]:
    """Single plans by one recipe after another: nothing selected, nothing tuned."""
    rows = []
    for budget in BUDGETS:
        for name, recipe in RECIPES.items():
            schedule = calibration.plan(budget, recipe=recipe)
            found = scores(full, subject.draw(schedule)[0])
            rows.append({"k": budget, "recipe": name, "key_steps": schedule.key_steps, **_means(found)})
    return rows


def expected_errors(subject: Planned, calibration: dpcache.Calibration) -> list[Row]:
    """What a calibration expects of its plans, and what they err by on inputs that it has never seen."""
    full = subject.latents(STEPS)
    rows = []
    for budget in EXPECTED:
        schedule = calibration.plan(budget)
        errors = np.linalg.norm(subject.latents(STEPS, schedule) - full, axis=1) / np.linalg.norm(full, axis=1)
        quarters = np.percentile(errors, [5, 95])
        rows.append({"k": budget, "expected": schedule.expected_error, "measured": average_error(errors.tolist())})
        rows[-1] |= {"p5": quarters[0], "p95": quarters[1]}
    return rows


def diversity(subject: Planned, calibration: dpcache.Calibration) -> list[Row]:
    """How far pictures of one input, from other noise, lie apart: does what is predicted draw the same ones?"""
    inputs = [item for item in subject.inputs[:ALIKE] for _ in range(ALIKE)]

    def apart(schedule: dpcache.Schedule | None, steps: int = STEPS) -> float:
        pictures, _ = subject.drawn(inputs, schedule, steps)
        of_each = pictures.reshape(len(inputs) // ALIKE, ALIKE, -1)
        two = [pair for some in of_each for pair in combinations(some, 2)]
        return float(np.mean([np.sqrt(((one - other) ** 2).mean()) for one, other in two]))

    rows: list[Row] = [{"k": STEPS, "way": "the full run", "apart": apart(None)}]
    for k in BUDGETS:
        rows.append({"k": k, "way": "one plan", "apart": apart(calibration.plan(k))})
        rows.append({"k": k, "way": "no calibration", "apart": apart(subject.uncalibrated(k))})
        rows.append({"k": k, "way": "the sampler alone", "apart": apart(None, k)})
    return rows


def calibration_sets(subject: Planned, full: Pictures) -> list[Row]:
    """One plan and the paper's, both from the same few inputs and nothing else."""
    pool = subject.model.calibration_inputs(36)
    sets = {"input 0": pool[:1], "inputs 0 to 4": pool[:5], "inputs 5 to 9": pool[5:10]}
    sets |= {"inputs 0 to 9": pool[:10], "inputs 10 to 19": pool[10:20]}
    sets |= {"inputs 0 to 17": pool[:18], "inputs 18 to 35": pool[18:]}
    rows = []
    for name, inputs in sets.items():
        calibration = subject.calibrated(inputs)
        ways = {"one plan": calibration.plan(13), "the paper's plan": calibration.plan(13, recipe=PAPER)}
        for way, schedule in ways.items():
            found = scores(full, subject.draw(schedule)[0])
            rows.append({"set": name, "way": way, "key_steps": schedule.key_steps, **_means(found)})
    return rows


def fine_grids(subject: Planned, count: int) -> list[Row]:
    """Few full calls on finer grids, against a converged solution of the same equation."""
    exact = subject.latents(CONVERGED, None, count)
    rows: list[Row] = []
    for steps in (STEPS, *FINE):
        calibration = subject.calibrated(subject.model.calibration_inputs(CALIBRATED), steps)
        for k in FINE_BUDGETS:
            schedule = calibration.plan(k)
            found = _decibels(exact, subject.latents(steps, schedule, count))
            rows.append({"steps": steps, "k": k, "way": "one plan", "key_steps": schedule.key_steps, "psnr": found})
        for k in (*(FINE_BUDGETS if steps == STEPS else ()), steps):
            found = _decibels(exact, subject.latents(k, None, count))
            rows.append({"steps": k, "k": k, "way": "the sampler alone", "psnr": found})
    return rows


def _decibels(exact: Pictures, found: Pictures) -> float:
    """Mean PSNR of latents; the peak is the range of the exact ones."""
    errors = ((found - exact) ** 2).mean(axis=1)
    return float(np.mean(-10 * np.log10(errors / np.ptp(exact) ** 2)))


def _means(found: Row) -> Row:
    return {name: found[name] for name in ("psnr_mean", "psnr_p5")}


def measure(model: str, num_inputs: int, converged_inputs: int) -> Row:
    subject = Planned(model, num_inputs)
    calibration = subject.calibrated(subject.model.calibration_inputs(CALIBRATED))
    full, _ = subject.draw()
    result = {
        "model": model,
        "inputs": num_inputs,
        "recipes": recipes(subject, calibration, full),
        "expected": expected_errors(subject, calibration),
        "diversity": diversity(subject, calibration),
        "sets": calibration_sets(subject, full),
        "converged_inputs": min(converged_inputs, num_inputs),
        "grids": fine_grids(subject, converged_inputs),
    }
    subject.bar.close()
    return result


# ----------------------------------------------------------------------------------------------------------- the page

ABOUT = """# What the plans are made of

Made by `python -m benchmarks.planning`. T = 50 unless said otherwise, boundary `"blocks"`; calibrated with
`sensitivity="measured"` on {calibrated} inputs, judged on held-out ones ({inputs}). PSNR in dB, in float, of decoded
outputs against the full run: mean (5th percentile). What earlier versions had and this one has not is in
[worth.md](worth.md).
"""


def page(results: Sequence[Row]) -> str:
    inputs = ", ".join(f"{result['inputs']} of `{result['model']}`" for result in results)
    parts = [ABOUT.format(calibrated=CALIBRATED, inputs=inputs)]
    names = [result["model"] for result in results]
    heads = [titled(name) for name in names]
    parts += [
        "## One thing changed at a time\n",
        "Single plans: nothing is run to choose among them. Each line differs from the first in what it says.\n",
    ]
    for k in BUDGETS:
        rows = {name: [_row(r["recipes"], k=k, recipe=name) for r in results] for name in RECIPES}
        parts += [f"### K = {k}\n", table(["plan", *heads], [[n, *map(shown, found)] for n, found in rows.items()])]
    parts += [
        "## Other calibration inputs\n",
        "K = 13, from inputs that have nothing in common, and from more and fewer.\n",
    ]
    body = [
        [name, way, *(shown(_row(r["sets"], set=name, way=way)) for r in results)]
        for name in dict.fromkeys(row["set"] for row in results[0]["sets"])
        for way in ("one plan", "the paper's plan")
    ]
    parts.append(table(["calibrated on", "way", *heads], body))
    parts += [
        "## Diversity\n",
        f"RMS difference between two pictures of the same input from other noise, in [0, 1], mean over {ALIKE} inputs "
        f"and the pairs among {ALIKE} pictures of each. A way that draws ever the same shows less than the full run.\n",
    ]
    body = [
        [row["k"], row["way"], *(f"{_row(r['diversity'], k=row['k'], way=row['way'])['apart']:.3f}" for r in results)]
        for row in results[0]["diversity"]
    ]
    parts.append(table(["full calls", "way", *heads], body))
    parts += [
        "## Finer grids\n",
        f"Skipped steps cost next to nothing, so the grid may be finer. PSNR of final latents, dB, against {CONVERGED} "
        "steps of the same sampler, mean over held-out inputs ("
        + ", ".join(f"{r['converged_inputs']} of `{r['model']}`" for r in results)
        + ").\n",
    ]
    keys = [(row["steps"], row["k"], row["way"]) for row in results[0]["grids"]]
    body = [
        [t, k, way, *(f"{_row(r['grids'], steps=t, k=k, way=way)['psnr']:.1f}" for r in results)]
        for t, k, way in sorted(keys, key=lambda key: (key[2] == "one plan", key[1], key[0]))
    ]
    parts.append(table(["steps", "full calls", "way", *heads], body))
    parts += [
        "## Expected and measured errors\n",
        "What `calibration.plan` expects (`Schedule.expected_error`) and what is measured on held-out inputs: RMS "
        "error of the final latents as a share of them, average over inputs (5th to 95th percentile). "
        + " ".join(_how_far(result) for result in results)
        + "\n",
    ]
    body = [[k, *(_expectation(_row(r["expected"], k=k)) for r in results)] for k in EXPECTED]
    parts.append(table(["K", *(f"{name}: expected, measured" for name in names)], body))
    return "\n".join(parts)


def _row(rows: Sequence[Row], **wanted: Any) -> Row:
    (found,) = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return found


def _expectation(row: Row) -> str:
    return f"{row['expected']:.2%}, {row['measured']:.2%} ({row['p5']:.2%} to {row['p95']:.2%})"


def _how_far(result: Row) -> str:
    factors = [row["measured"] / row["expected"] for row in result["expected"]]
    return f"On `{result['model']}` the measured is {min(factors):.2f} to {max(factors):.2f} times the expected."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python -m benchmarks.planning tiny-dit --inputs 8",
    )
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help=f"of {', '.join(BUNDLED)} (default: {', '.join(MODELS)})"
    )
    parser.add_argument("--inputs", type=int, default=64, help="held-out inputs (default 64)")
    parser.add_argument("--converged-inputs", type=int, default=16, help="of them, for the finer grids (default 16)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the results")
    parser.add_argument("--page-only", action="store_true", help="measure nothing, write the page")
    options = parser.parse_args()
    if unknown := set(options.models) - set(BUNDLED):
        parser.error(f"no bundled model named {', '.join(sorted(unknown))}; there are {', '.join(BUNDLED)}")
    options.out.mkdir(parents=True, exist_ok=True)
    for model in () if options.page_only else options.models or MODELS:
        result = json.loads(json.dumps(measure(model, options.inputs, options.converged_inputs), default=plain))
        (options.out / f"planning_{model}.json").write_text(json.dumps(rounded(result), indent=1) + "\n")
    paths = [options.out / f"planning_{model}.json" for model in MODELS]
    found = [json.loads(path.read_text()) for path in paths if path.exists()]
    where = ROOT / "docs" / "planning.md" if options.out == RESULTS else options.out / "planning.md"
    where.write_text(page(found))
    print(f"wrote {where}")


if __name__ == "__main__":
    main()
