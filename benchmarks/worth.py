"""What each part of planning was worth where models are hard, measured before most of it was deleted: docs/worth.md.

It measures what is gone now, so it runs with the package as it was at commit 46a1e8d:

    git worktree add ../before 46a1e8d
    PYTHONPATH=../before/src:. python -m benchmarks.worth hard-flux hard-dit
    PYTHONPATH=../before/src:. python -m benchmarks.worth hard-flux --inputs 16 -k 9 --seeds 0    # sooner
    python -m benchmarks.worth --page-only                                     # the page from the figures measured

Writes benchmarks/results/worth_<model>.json and docs/worth.md.
"""

import argparse
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

import dpcache
from benchmarks.subjects import RESULTS, ROOT, STEPS, plain, rounded, scores, shown, table
from dpcache import Recipe, Schedule

BUDGETS = (5, 9, 13)
SEEDS = (0, 1)
CALIBRATED = 10
MODELS = ROOT / "src" / "dpcache" / "zoo" / "models"
OLD: Any = dpcache
"""The package as it was, whose functions had other arguments."""
CALLS: dict[str, dict[str, Any]] = {
    "hard-flux": {"max_sequence_length": 16, "negative_prompt": "", "true_cfg_scale": 7.0},
    "hard-dit": {"guidance_scale": 8.0},
    "tiny-dit": {"guidance_scale": 3.0},
}
Row = dict[str, Any]
Pictures = Any


def _recipe(**fields: Any) -> Callable[["Subject", int], Schedule]:
    return lambda subject, k: subject.calibration.plan(k, recipe=Recipe(**fields))


BASE = {"order": 1, "correct": False, "measured": 0.0}
"""The plain plan that each part is added to: the best of the single recipes where models are hard."""
WAYS: dict[str, Callable[["Subject", int], Schedule]] = {
    "plain plan: Taylor 1": _recipe(**BASE),
    "order 2": _recipe(**{**BASE, "order": 2}),
    "corrections, order 1": _recipe(**{**BASE, "correct": True}),
    "corrections, order 2": _recipe(**{**BASE, "order": 2, "correct": True}),
    "measured sensitivity, share 0.5": _recipe(**{**BASE, "measured": 0.5}),
    "measured sensitivity, share 1": _recipe(**{**BASE, "measured": 1.0}),
    "fitted, order 1": _recipe(**{**BASE, "predictor": "fitted"}),
    "fitted, order 2": _recipe(**{**BASE, "predictor": "fitted", "order": 2}),
    "errors in the first power": _recipe(**BASE, power=1.0),
    "errors in the fourth power": _recipe(**BASE, power=4.0),
    "least largest hop": _recipe(**BASE, objective="max"),
    "the default of before": lambda subject, k: subject.calibration.plan(k),
    "the paper's plan": _recipe(method="paper"),
}
ADAPTIVE = "adaptive, per picture"
WHAT_GOES = {
    "corrections, order 1": "plain plan: Taylor 1",
    "corrections, order 2": "order 2",
    "measured sensitivity, share 0.5": "plain plan: Taylor 1",
    "measured sensitivity, share 1": "plain plan: Taylor 1",
    "fitted, order 1": "plain plan: Taylor 1",
    "fitted, order 2": "order 2",
    "errors in the first power": "plain plan: Taylor 1",
    "errors in the fourth power": "plain plan: Taylor 1",
    "least largest hop": "plain plan: Taylor 1",
    ADAPTIVE: "corrections, order 1",
}
"""What each is compared with."""


def _leaves() -> Any:
    """`dpcache.zoo.leaves` of this tree: the package as it was has none."""
    spec = importlib.util.spec_from_file_location("leaves", ROOT / "src" / "dpcache" / "zoo" / "leaves.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["leaves"] = module
    spec.loader.exec_module(module)
    return module


class Subject:
    """A model, its inputs for one seed, and its full run."""

    def __init__(self, model: str, directory: Path, count: int, seed: int) -> None:
        from diffusers import DiffusionPipeline

        self.model, self.seed, self.call = model, seed, CALLS[model]
        self.pipe = DiffusionPipeline.from_pretrained(str(directory))
        self.pipe.set_progress_bar_config(disable=True)
        known, held_out = self._pools()
        if model == "hard-flux":
            self.pipe.default_sample_size = 16
        start = seed * CALIBRATED
        self.known = known[start : start + CALIBRATED]
        self.inputs = [held_out[(seed * count + n) % len(held_out)] for n in range(count)]
        self.full = self.draw(None)
        self.calibration = OLD.calibrate(
            self.pipe,
            self.known,
            num_inference_steps=STEPS,
            sensitivity="measured",
            progress=False,
            seed=seed,
            **self.call,
        )

    def _pools(self) -> tuple[list[Any], list[Any]]:
        if self.model == "tiny-dit":
            row = dpcache.zoo.BUNDLED[self.model]
            return list(row.calibration_pool()), list(row.held_out_pool())
        leaves = _leaves()
        if self.model == "hard-flux":
            return tuple(map(list, leaves.split_captions()))  # type: ignore[return-value]
        return tuple(
            [{"class_labels": [n]} for n in leaves.shuffled_classes(name)] for name in ("calibration", "held-out")
        )  # type: ignore[return-value]

    def draw(self, schedule: Any, batch: int = 16, **how: Any) -> Pictures:
        """Every held-out input, in float; with how many full calls in the mean in `self.calls`."""
        pictures, calls = [], []
        for start in range(0, len(self.inputs), batch):
            some = self.inputs[start : start + batch]
            call: Row = {**self.call, "num_inference_steps": STEPS, "output_type": "np"}
            call["generator"] = [
                torch.Generator().manual_seed(10_000 * (self.seed + 1) + start + row) for row in range(len(some))
            ]
            if isinstance(some[0], str):
                call |= {"prompt": some, "negative_prompt": [""] * len(some)}
            else:
                call |= {"class_labels": [label for item in some for label in item["class_labels"]]}
            if schedule is None:
                pictures.extend(self.pipe(**call)[0])
                continue
            with OLD.enabled(self.pipe, schedule, **how):
                pictures.extend(self.pipe(**call)[0])
                calls.append(len(OLD.stats(self.pipe).computed_steps))
        self.calls = float(np.mean(calls)) if calls else float(STEPS)
        return np.asarray(pictures, dtype=np.float32)


def measure(model: str, directory: Path, path: Path, count: int, budgets: Sequence[int], seeds: Sequence[int]) -> None:
    """Every way at every K and seed, written after each row; rows that are there are kept."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for seed in seeds:
        subject = Subject(model, directory, count, seed)
        for k in budgets:
            for way in (*WAYS, ADAPTIVE):
                if any((row["way"], row["k"], row["seed"]) == (way, k, seed) for row in rows):
                    continue
                if way == ADAPTIVE:
                    how = {"num_key_steps": k, "adaptive": True, "on_drift": "ignore"}
                    recipe = Recipe(order=1, measured=0.0)
                    pictures = subject.draw(subject.calibration, 1, recipe=recipe, **how)
                else:
                    pictures = subject.draw(WAYS[way](subject, k))
                row = {"way": way, "k": k, "seed": seed, "calls": subject.calls, **scores(subject.full, pictures)}
                rows.append(json.loads(json.dumps(row, default=plain)))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(rounded({"model": model, "inputs": count, "rows": rows}), indent=1) + "\n")
                tqdm.write(f"{model}, seed {seed}, K = {k}, {way}: {shown(row)}")


ABOUT = """# What each part of planning was worth

Made by `python -m benchmarks.worth` with the package as it was at commit 46a1e8d (how: the head of that file). PSNR
against the full run of 50 steps, in float, mean (5th percentile) in dB, over {inputs} held-out inputs of each seed:
other calibration inputs, other held-out noise. Boundary `"blocks"`. The gain is over the line that the part is added
to, mean (5th percentile), averaged over the seeds.
"""


def page(results: Sequence[Row]) -> str:
    parts = [ABOUT.format(inputs=results[0]["inputs"])]
    for result in results:
        rows = {(row["way"], row["k"], row["seed"]): row for row in result["rows"]}
        budgets = sorted({k for _, k, _ in rows})
        seeds = sorted({seed for _, _, seed in rows})
        body = []
        for way in (*WAYS, ADAPTIVE):
            cells: list[Any] = [way]
            for k in budgets:
                found = [rows[way, k, seed] for seed in seeds if (way, k, seed) in rows]
                than = [rows[WHAT_GOES.get(way, way), k, seed] for seed in seeds if (way, k, seed) in rows]
                if not found:
                    cells += ["", ""]
                    continue
                cells.append("; ".join(map(shown, found)))
                gains = [np.mean([a[name] - b[name] for a, b in zip(found, than, strict=True)]) for name in _FIGURES]
                cells.append(f"{gains[0]:+.1f} ({gains[1]:+.1f})" if way in WHAT_GOES else "")
            body.append(cells)
        head = ["way", *(text for k in budgets for text in (f"K = {k}", "gain"))]
        adaptive = [row for row in result["rows"] if row["way"] == ADAPTIVE]
        calls = ", ".join(f"{row['calls']:.1f} for K = {row['k']}" for row in adaptive)
        parts.append(f"## {result['model']}\n\nFull calls of the adaptive way, mean: {calls}.\n\n{table(head, body)}")
    return "\n".join([*parts, VERDICT])


VERDICT = """## What came of it

- **Adaptive key steps and drift are gone**: over the same plan with corrections they gained 0.7 dB at most, with 0.7
  calls more a picture.
- **Tuning is gone** with the old search, for what it cost: hundreds of runs. Coefficients fitted in runs, hop by hop,
  came later and cost little ([fits.md](fits.md)).
- **Corrections** do harm with few key steps and help with more: a plan corrects only where its errors are small.
- **Order 2** of Taylor is no better than order 1, and both are far from the best. The trend, which is newer than this
  table, and fitted coefficients of order 1 are: `optimize` tries both, and a plan takes the trend where it is cheaper.
- **Measured sensitivity** stays: on `hard-flux` it is worth 1 to 2 dB, and 7 dB at the 5th percentile at K = 13. On
  `hard-dit` it is worth nothing, and half of it loses 0.6 dB at K = 5.
- **The fourth power** loses 0.7 and 3.1 dB in single plans of `hard-flux` at K = 9 and 13 today
  ([planning.md](planning.md)), but among the candidates of a search it heeds the worst inputs: 14 of 52 searches on
  hard models end with such a plan ([defaults.md](defaults.md)).
- **The largest hop is gone**: in place of the sum it lost 3.1 dB in single plans of `hard-flux` at K = 13 and gained
  0.5 at most elsewhere (`python -m benchmarks.planning` at commit 56bcd31).
- **The first power** loses 1.2 and 2.6 dB at K = 13: `Recipe(power=...)` is for what lies above 2.
"""
_FIGURES = ("psnr_mean", "psnr_p5")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="example: python -m benchmarks.worth hard-flux --inputs 16 -k 9"
    )
    parser.add_argument(
        "models", nargs="*", default=["hard-flux", "hard-dit"], metavar="MODEL", help="[both hard ones]"
    )
    parser.add_argument("--directory", type=Path, help="where the model is, if not among the bundled ones")
    parser.add_argument("-k", "--key-steps", type=int, nargs="+", default=BUDGETS, help="K [5 9 13]")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="[0 1]")
    parser.add_argument("--inputs", type=int, default=32, help="held-out inputs of each seed [32]")
    parser.add_argument("--page-only", action="store_true", help="measure nothing, write the page")
    options = parser.parse_args()
    for model in () if options.page_only else options.models:
        path = RESULTS / f"worth_{model}.json"
        sizes = (options.inputs, options.key_steps, options.seeds)
        measure(model, options.directory or MODELS / model, path, *sizes)
    paths = [RESULTS / f"worth_{model}.json" for model in options.models]
    (ROOT / "docs" / "worth.md").write_text(page([json.loads(path.read_text()) for path in paths if path.exists()]))


if __name__ == "__main__":
    main()
