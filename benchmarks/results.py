"""Everything in docs/results.md: fidelity, calibration size, diversity and memory of the bundled models.

    python -m benchmarks.results                       # every bundled model, then the page
    python -m benchmarks.results tiny-dit --inputs 8   # one model, quickly
    python -m benchmarks.results --page-only           # the page from the figures already measured

Writes benchmarks/results/<model>.json and docs/results.md.
"""

import argparse
import json
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

import dpcache
from benchmarks import memory
from dpcache.judge.metrics import psnr
from dpcache.run.inputs import call_arguments, label
from dpcache.zoo import BUNDLED, Inputs

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
STEPS = 50
BUDGETS = {"tiny-dit": (10, 13, 17), "tiny-flux": (9, 13), "tiny-hunyuan-video": (9, 11)}
"""K at T = 50, as published for each family."""
SAMPLES = (1, 5, 10, 20)
WARM, COLD = ("red", "orange", "yellow", "pink"), ("green", "cyan", "blue", "purple")
FIRST_SEED = 1000
"""Of held-out inputs; calibration counts from 0."""

Pictures = npt.NDArray[np.float32]
Row = dict[str, Any]


class Subject:
    """A bundled model, and its outputs drawn in batches."""

    def __init__(self, model: str, num_inputs: int) -> None:
        self.model = BUNDLED[model]
        self.pipe = dpcache.load_pipeline(model)
        self.pipe.set_progress_bar_config(disable=True)
        self.inputs = self.model.held_out_inputs(num_inputs)
        self.bar = tqdm(desc=model, unit="picture")

    def draw(self, schedule: dpcache.Schedule | None = None, steps: int = STEPS) -> tuple[Pictures, int]:
        """Every held-out input, in full or with a schedule; and the denoiser calls run in full for each batch."""
        return self._draw(self.inputs, schedule, steps)

    def draw_one_input(self, count: int, schedule: dpcache.Schedule | None = None) -> Pictures:
        """The first held-out input from `count` different noises."""
        return self._draw(self.inputs[:1] * count, schedule, STEPS)[0]

    def _draw(
        self, inputs: Sequence[Inputs], schedule: dpcache.Schedule | None, steps: int, batch: int = 16
    ) -> tuple[Pictures, int]:
        pictures: list[Pictures] = []
        calls = 0
        for arguments in self.batches(inputs, steps, batch):
            if schedule is None:
                output = self.pipe(**arguments)
            else:
                with dpcache.enabled(self.pipe, schedule):
                    output = self.pipe(**arguments)
                    calls = dpcache.stats(self.pipe).full_calls
            pictures.extend(np.asarray(output[0], dtype=np.float32))
            self.bar.update(len(arguments["generator"]))
        return np.stack(pictures), calls

    def batches(
        self, inputs: Sequence[Inputs], steps: int, batch: int, first_seed: int = FIRST_SEED
    ) -> Iterator[dict[str, Any]]:
        """Arguments of the pipeline's calls; every input has its own seed, whatever the batch."""
        for start in range(0, len(inputs), batch):
            some = call_arguments(inputs[start : start + batch], {})
            varying = {name: [value for item in some for value in _listed(item[name])] for name in some[0]}
            generators = [torch.Generator().manual_seed(first_seed + start + row) for row in range(len(some))]
            arguments = {"num_inference_steps": steps, "output_type": "np", "generator": generators}
            yield {**arguments, **self.model.call_defaults, **varying}

    def calibrate(self, inputs: Sequence[Inputs], **more: Any) -> dpcache.Calibration:
        arguments = {**self.model.call_defaults, **more}
        return dpcache.calibrate(self.pipe, inputs, num_inference_steps=STEPS, progress=False, **arguments)

    def coloured(self, colours: Sequence[str], count: int) -> list[Inputs]:
        """The first calibration inputs of some colours."""
        pool = self.model.calibration_pool()
        texts = [label(self.pipe, call) for call in call_arguments(pool[:2000], {})]
        return [item for item, text in zip(pool, texts, strict=False) if set(text.split()) & set(colours)][:count]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def scores(full: Pictures, other: Pictures) -> Row:
    """PSNR of every output, in dB and in float, summed up."""
    values = [psnr(a, b) for a, b in zip(full, other, strict=True)]
    row: Row = {"psnr_mean": np.mean(values), "psnr_p5": np.percentile(values, 5), "psnr": values}
    if full.ndim == 5:
        frames = [[psnr(a, b) for a, b in zip(*clips, strict=True)] for clips in zip(full, other, strict=True)]
        row["psnr_by_frame"] = np.mean(frames, axis=0)
    return row


Schedules = dict[int, dpcache.Schedule]


def fidelity(subject: Subject, calibration: dpcache.Calibration, full: Pictures) -> list[Row]:
    """At every budget: single plans, even spacing, and the pipeline run with that many steps."""
    rows = []
    for budget in BUDGETS[subject.model.name]:
        ways = {
            "planned": calibration.plan(budget),
            'planned, method="paper"': calibration.plan(budget, recipe=dpcache.Recipe(method="paper")),
            "uniform Taylor": dpcache.Schedule.uniform(budget, STEPS),
        }
        for way, schedule in ways.items():
            pictures, calls = subject.draw(schedule)
            rows.append({"k": budget, "way": way, "calls": calls, "key_steps": schedule.key_steps})
            rows[-1]["source"] = schedule.source
            rows[-1] |= scores(full, pictures)
        pictures, _ = subject.draw(steps=budget)
        rows.append({"k": budget, "way": f"pipeline with {budget} steps", "calls": budget, **scores(full, pictures)})
    return rows


def calibration_size(subject: Subject, full: Pictures) -> list[Row]:
    """Plans from more and fewer inputs, and from inputs that have no colour in common."""
    sets = {f"{count}": subject.model.calibration_inputs(count) for count in SAMPLES}
    sets |= {"5 warm": subject.coloured(WARM, 5), "5 cold": subject.coloured(COLD, 5)}
    calibrations = {name: subject.calibrate(inputs) for name, inputs in sets.items()}
    rows = []
    for method in ("sampler", "paper"):
        most = set(calibrations[f"{SAMPLES[-1]}"].plan(13, recipe=dpcache.Recipe(method=method)).key_steps)
        for name, calibration in calibrations.items():
            schedule = calibration.plan(13, recipe=dpcache.Recipe(method=method))
            row = {"method": method, "inputs": name, "key_steps": schedule.key_steps}
            row["shared"] = len(most & set(schedule.key_steps))
            rows.append(row | scores(full, subject.draw(schedule)[0]))
    return rows


def diversity(subject: Subject, plans: Schedules, count: int) -> list[Row]:
    """Mean distance between every two outputs of one input: root mean square difference of values 0 to 1."""
    schedules = {"full": None, **{f"K = {k}": schedule for k, schedule in plans.items()}}
    rows = []
    for name, schedule in schedules.items():
        flat = subject.draw_one_input(count, schedule).reshape(count, -1).astype(np.float64)
        square = (flat**2).sum(axis=1)
        squares = square[:, None] + square - 2 * flat @ flat.T
        distances = np.sqrt(np.maximum(squares[np.triu_indices(count, 1)], 0) / flat.shape[1])
        rows.append({"way": name, "mean_distance": distances.mean(), "least_distance": distances.min()})
    return rows


def measure(model: str, num_inputs: int) -> Row:
    """All figures of one model."""
    subject = Subject(model, num_inputs)
    calibration = subject.calibrate(subject.model.calibration_inputs(10), sensitivity="measured")
    plans = {k: calibration.plan(k) for k in BUDGETS[model]}
    full, _ = subject.draw()
    result = {
        "model": model,
        "pipeline": type(subject.pipe).__name__,
        "inputs": num_inputs,
        "versions": {name: version(name) for name in ("torch", "diffusers")},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, float32 on the CPU",
        "fidelity": fidelity(subject, calibration, full),
        "calibration": calibration_size(subject, full),
        "diversity": diversity(subject, plans, min(32, num_inputs)),
        "memory": memory.measured(subject.pipe, subject.inputs[0], STEPS, dict(subject.model.call_defaults)),
    }
    subject.bar.close()
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(type(value))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


# ----------------------------------------------------------------------------------------------------------- the page


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def _db(value: float) -> str:
    return f"{value:.1f}"


def _fidelity_table(rows: list[Row]) -> str:
    body = []
    uniform = {row["k"]: np.array(row["psnr"]) for row in rows if row["way"] == "uniform Taylor"}
    for row in rows:
        wins = int((np.array(row["psnr"]) > uniform[row["k"]]).sum())
        better = "" if row["way"] == "uniform Taylor" else f"{wins} of {len(row['psnr'])}"
        body.append([row["k"], row["way"], row["calls"], _db(row["psnr_mean"]), _db(row["psnr_p5"]), better])
    return table(["K", "way", "full calls", "PSNR mean, dB", "5th percentile, dB", "better than uniform"], body)


def _frame_table(rows: list[Row]) -> str:
    frames = range(len(rows[0]["psnr_by_frame"]))
    body = [[row["k"], row["way"], *map(_db, row["psnr_by_frame"])] for row in rows]
    return table(["K", "way", *(f"frame {n}" for n in frames)], body)


def _calibration_table(rows: list[Row]) -> str:
    body = [
        [row["method"], row["inputs"], f"{row['shared']} of 13", _db(row["psnr_mean"]), _db(row["psnr_p5"])]
        for row in rows
    ]
    return table(["method", "inputs", "key steps as from 20", "PSNR mean, dB", "5th percentile, dB"], body)


def _diversity_table(rows: list[Row]) -> str:
    body = [[row["way"], f"{row['mean_distance']:.4f}", f"{row['least_distance']:.4f}"] for row in rows]
    return table(["", "mean", "least"], body)


def page(results: Sequence[Row], sizes: Sequence[Row]) -> str:
    parts = [
        "# Results\n",
        "Made by `python -m benchmarks.results`; the figures behind it are in `benchmarks/results/`. T = 50 steps, "
        "order 2, boundary `blocks`, 10 calibration inputs unless said otherwise. `planned` is a single plan, "
        "`calibration.plan`; what selecting and tuning add is in [the comparison with peers]"
        "(../benchmarks/results/peers.md). PSNR is of decoded outputs "
        "against the full run from the same noise, in float. Held-out inputs are captions that neither training "
        "nor calibration has seen; for `tiny-dit`, which has classes only, other seeds of the same classes.\n",
    ]
    for result in results:
        machine = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
        parts += [
            f"\n## {result['model']} ({result['pipeline']})\n",
            f"{result['inputs']} held-out inputs; {machine}, {result['machine']}.\n",
            "### Fidelity at equal full calls\n",
            _fidelity_table(result["fidelity"]),
        ]
        if "psnr_by_frame" in result["fidelity"][0]:
            parts += ["PSNR mean of every frame, dB:\n", _frame_table(result["fidelity"])]
        parts += [
            "### How many calibration inputs, and which\n",
            "K = 13. The warm inputs are all red, orange, yellow or pink, the cold ones green, cyan, blue or purple.\n",
            _calibration_table(result["calibration"]),
            "### Diversity\n",
            f"Distance between every two of {min(32, result['inputs'])} outputs of one input, root mean square of "
            "values 0 to 1.\n",
            _diversity_table(result["diversity"]),
        ]
    parts += ["\n## Memory of the cached values\n", memory.table(results, sizes)]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python -m benchmarks.results tiny-dit --inputs 8",
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(BUDGETS)} (default: all)")
    parser.add_argument("--inputs", type=int, default=64, help="held-out inputs (default 64)")
    parser.add_argument("--page-only", action="store_true", help="measure nothing, write the page")
    options = parser.parse_args()
    if unknown := set(options.models) - set(BUDGETS):
        parser.error(f"no bundled model named {', '.join(sorted(unknown))}; there are {', '.join(BUDGETS)}")
    for model in () if options.page_only else options.models or BUDGETS:
        result = json.loads(json.dumps(measure(model, options.inputs), default=_plain))
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{model}.json").write_text(json.dumps(_rounded(result), indent=1) + "\n")
    found = [json.loads(path.read_text()) for m in BUDGETS if (path := RESULTS / f"{m}.json").exists()]
    (ROOT / "docs" / "results.md").write_text(page(found, memory.published()))


if __name__ == "__main__":
    main()
