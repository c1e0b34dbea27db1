"""What each default reaches at every K, beside the plain ways: is any of them ever worse than doing nothing clever?

    python -m benchmarks.defaults                               # every model, 50 steps and fewer, then docs/defaults.md
    python -m benchmarks.defaults hard-flux --steps 50 -k 5 9 13 --inputs 16
    python -m benchmarks.defaults hard-flux --ways optimize     # anew; what other ways reached is kept
    python -m benchmarks.defaults --resume                      # go on after an interruption
    python -m benchmarks.defaults --page-only                   # the page from the figures already measured

Writes benchmarks/results/defaults_<model>_<steps>.json and docs/defaults.md.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from tqdm.auto import tqdm

import dpcache
from benchmarks.subjects import RESULTS, ROOT, Row, Subject, plain, regime, rounded, scores, shown, table, titled
from dpcache.search.objectives import ObjectiveName
from dpcache.zoo import BUNDLED

KEY_STEPS = {50: tuple(range(4, 21)), 8: (4, 5, 6), 20: (6, 8, 10), 28: (6, 8, 10)}
"""K for every T: base models take 20 to 50 steps, distilled ones 4 to 12."""
CALIBRATED = 10
BUDGET = 60
"""Of `optimize`, full runs for each K."""
GRACE = 0.3
"""Of the best plain way, dB: less than two seeds differ by."""
EVEN = {f"even spacing, order {order}": order for order in (0, 1, 2)}
FEWER = "K steps of the sampler"
PLAIN = (*EVEN, FEWER)
DEFAULTS = ("no calibration", "one plan", "optimize")
PAPER = "the paper's plan"
WAYS = (*PLAIN, *DEFAULTS, PAPER)


class Measured:
    """One model: schedules by way and K, and what they reach."""

    def __init__(
        self, model: str, inputs: int, key_steps: Sequence[int], steps: int, path: Path, **search: Any
    ) -> None:
        self.subject = Subject(model, inputs)
        self.key_steps, self.steps, self.path, self.search = key_steps, steps, path, search
        self.full, _ = self.subject.draw(steps=steps)
        self.rows: list[Row] = []
        self._calibration: dpcache.Calibration | None = None

    def run(self, ways: Sequence[str], *, resume: bool) -> None:
        """The ways at every K, written to the file after each row; rows of others stay in it."""
        known = json.loads(self.path.read_text())["rows"] if self.path.exists() else []
        anew = set() if resume else set(itertools.product(ways, self.key_steps))
        self.rows = [row for row in known if (row["way"], row["k"]) not in anew]
        done = {(row["way"], row["k"]) for row in self.rows}
        for way in ways:
            for k in self.key_steps:
                if (way, k) not in done and k <= self.steps:
                    self._add(way, k)

    def _add(self, way: str, k: int) -> None:
        if way == FEWER:
            schedule, (pictures, _) = None, self.subject.draw(steps=k)
        else:
            schedule = self._schedule(way, k)
            pictures, _ = self.subject.draw(schedule, self.steps)
        found = scores(self.full, pictures)
        row = {"way": way, "k": k, "psnr_mean": found["psnr_mean"], "psnr_p5": found["psnr_p5"]}
        if schedule is not None:
            row |= {"key_steps": schedule.key_steps, "predictor": str(schedule.predictor), "source": schedule.source}
        self.rows.append(json.loads(json.dumps(row, default=plain)))
        tqdm.write(f"{self.subject.model.name}: {way}, K = {k}: {shown(row)}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        head = {"model": self.subject.model.name, "inputs": len(self.subject.inputs), "steps": self.steps}
        self.path.write_text(_lines({**head, "budget": self.search["budget"]}, rounded(self.rows)))

    def _schedule(self, way: str, k: int) -> dpcache.Schedule:
        if way in EVEN:
            return dpcache.Schedule.uniform(k, self.steps, order=EVEN[way])
        if way == "no calibration":
            return self.subject.uncalibrated(k, self.steps)
        if way == "optimize":
            return self._optimize(k)
        recipe = dpcache.Recipe(method="paper") if way == PAPER else dpcache.Recipe()
        return self._calibrate().plan(k, recipe=recipe)

    def _calibrate(self) -> dpcache.Calibration:
        if self._calibration is None:
            inputs = self.subject.model.calibration_inputs(CALIBRATED)
            call = {"num_inference_steps": self.steps, **self.subject.model.call_defaults}
            self._calibration = dpcache.calibrate(
                self.subject.pipe, inputs, sensitivity="measured", progress=False, **call
            )
        return self._calibration

    def _optimize(self, k: int) -> dpcache.Schedule:
        """A search for this K alone, with a budget of its own."""
        return dpcache.optimize(
            self.subject.pipe,
            self.subject.model.calibration_inputs(2 * CALIBRATED),
            num_key_steps=k,
            num_inference_steps=self.steps,
            **self.search,
            progress=False,
            **self.subject.model.call_defaults,
        )


def _lines(head: Row, rows: Sequence[Row]) -> str:
    """JSON with one row a line."""
    body = ",\n  ".join(json.dumps(row) for row in rows)
    return f'{{{json.dumps(head)[1:-1]}, "rows": [\n  {body}\n]}}\n'


ABOUT = """# Every default at every K

Made by `python -m benchmarks.defaults` (`make bench`). PSNR against the full run of T steps, in float, mean (5th
percentile) in dB over held-out inputs. The last column is the best of the plain ways, in the mean and in the
5th percentile each: even spacing with orders 0, 1 and 2, and K steps of the sampler. **Bold** is more than {grace} dB
below it, a miss. No calibration is excused on the easy models, where a plan knows what nothing can guess.

- *no calibration*: `enable(pipe, num_key_steps=K)`, a smooth curve and the trend, corrected where T / K is at most 4,
  at the denoiser's output.
- *one plan*: `calibrate(..., sensitivity="measured")` on {calibrated} inputs, then `plan(K)`.
- *optimize*: one search for each K, with the budget that is named.
"""
WHY = """`tiny-hunyuan-video` misses at the 5th percentile alone; in the mean it gains everywhere. These are its
clips on a white background: errors of the first steps grow there, and die out on black and grey. With so few key
steps plans leave the first steps to prediction, and the first two inputs, whose sensitivity is measured, are both
black. Sensitivity measured on every input was tried and did not mend it: such large errors are not proportional to
small ones any more. With `objective="worst"` the search no longer misses at K = 5 and 6
([figures](choosing-k.md#which-command)).
"""
"""Of misses, what is behind them."""
PAYS = (("one plan", "no calibration", 1), ("optimize", "no calibration", 2), ("optimize", "one plan", 2))
"""What should be so many dB above what costs less, or is said not to be."""


def page(results: Sequence[Row]) -> str:
    """The page of all models, the hard ones first."""
    about = ABOUT.format(grace=GRACE, calibrated=CALIBRATED)
    tables = [_Table(result) for result in results]
    return "\n".join([about, _in_short(tables), *(one.section() for one in tables)])


class _Table:
    """The rows of one model and T, beside the best of the plain ways.

    Attributes:
        about: what the file of figures says of them all.
        name: of the model, for people.
        found: way and K -> its row.
        below: way and K of each cell that counts -> what it has above the best of the plain ways, in the mean or in the
            5th percentile, whichever is less, in dB.
        missed: those cells that are too far below.
    """

    def __init__(self, result: Row) -> None:
        self.about, self.name = result, titled(result["model"])
        self.found = {(row["way"], row["k"]): row for row in result["rows"]}
        excused = "no calibration" if regime(result["model"]) == "easy" else None
        self.below = {
            (way, k): min(row[name] - best for name, best in self._floor(k).items())
            for (way, k), row in self.found.items()
            if way in DEFAULTS and way != excused
        }
        self.missed = [cell for cell, below in self.below.items() if below < -GRACE]

    def _plain(self, k: int) -> list[Row]:
        return [self.found[way, k] for way in PLAIN if (way, k) in self.found]

    def _floor(self, k: int) -> Row:
        """The best of the plain ways, in the mean and in the 5th percentile each."""
        return {name: max(row[name] for row in self._plain(k)) for name in ("psnr_mean", "psnr_p5")}

    def in_short(self) -> list[object]:
        """How many cells miss, which, and by how much the worst of them."""
        ways = {way: [str(k) for one, k in self.missed if one == way] for way in DEFAULTS}
        where = "; ".join(f"{way}, K = {', '.join(some)}" for way, some in ways.items() if some)
        worst = f"{min(self.below.values()):.1f}" if self.missed else ""
        return [self.name, self.about["steps"], f"{len(self.missed)} of {len(self.below)}", where, worst]

    def section(self) -> str:
        ways = [way for way in (*DEFAULTS, PAPER) if any(way == known for known, _ in self.found)]
        body = []
        for k in sorted({k for _, k in self.found}):
            cells = []
            for way in ways:
                text = shown(self.found[way, k]) if (way, k) in self.found else ""
                cells.append(f"**{text}**" if (way, k) in self.missed else text)
            best = max(self._plain(k), key=lambda row: row["psnr_mean"])["way"]
            body.append([k, *cells, shown(self._floor(k)), best])
        head = ["K", *ways, "best plain way", "which (mean)"]
        asked = f"{len(self.missed)} misses" if len(self.missed) != 1 else "1 miss"
        title = f"## {self.name}, T = {self.about['steps']}"
        about = f"{self.about['inputs']} inputs; {asked}; budget {self.about['budget']} full runs."
        return "\n\n".join([title, about, table(head, body).rstrip("\n"), _what_pays(self.found)]) + "\n"


def _in_short(tables: Sequence[_Table]) -> str:
    body = [one.in_short() for one in tables]
    return f"## In short\n\n{table(['model', 'T', 'misses', 'where', 'the worst, dB'], body)}\n{WHY}"


def _what_pays(found: dict[tuple[str, int], Row]) -> str:
    """Where a way that costs more brings little in the mean."""
    told = []
    for way, other, least in PAYS:
        gains = {
            k: [row[name] - found[other, k][name] for name in ("psnr_mean", "psnr_p5")]
            for (one, k), row in sorted(found.items())
            if one == way and (other, k) in found
        }
        little = [f"{k} ({mean:+.1f}, {p5:+.1f})" for k, (mean, p5) in gains.items() if mean < least]
        where = f"at K = {', '.join(little)}" if little else "at no K"
        told.append(f"- *{way}* is less than {least} dB above *{other}* {where}.")
    return "\n".join(
        ["Where a way brings little; in brackets what it gains, in the mean and at the 5th percentile, in dB:\n", *told]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python -m benchmarks.defaults hard-flux --steps 50 -k 5 9 13 --inputs 16",
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(BUNDLED)} (default: all)")
    parser.add_argument("-k", "--key-steps", type=int, nargs="+", help="K (default 4 to 20 of 50, fewer of fewer)")
    parser.add_argument("--steps", type=int, nargs="+", default=list(KEY_STEPS), help="T (default 50, 8, 20 and 28)")
    parser.add_argument("--inputs", type=int, default=64, help="held-out inputs (default 64)")
    parser.add_argument("--budget", type=int, default=BUDGET, help="of optimize, full runs (default 60)")
    names = get_args(ObjectiveName)
    parser.add_argument("--objective", choices=names, default="mean", help="of optimize (default mean)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the figures")
    parser.add_argument("--ways", nargs="+", choices=WAYS, metavar="WAY", help=f"of {', '.join(WAYS)} (default: all)")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are measured already")
    parser.add_argument("--page-only", action="store_true", help="measure nothing, write the page")
    options = parser.parse_args()
    if unknown := set(options.models) - set(BUNDLED):
        parser.error(f"no bundled model named {', '.join(sorted(unknown))}; there are {', '.join(BUNDLED)}")
    for model, steps in itertools.product(options.models or BUNDLED, () if options.page_only else options.steps):
        key_steps = options.key_steps or KEY_STEPS.get(steps, KEY_STEPS[50])
        path = options.out / f"defaults_{model}_{steps}.json"
        search = {"budget": options.budget, "objective": options.objective}
        measured = Measured(model, options.inputs, key_steps, steps, path, **search)
        measured.run(options.ways or WAYS, resume=options.resume)
    paths = [options.out / f"defaults_{model}_{steps}.json" for model, steps in itertools.product(BUNDLED, KEY_STEPS)]
    results = [json.loads(path.read_text()) for path in paths if path.exists()]
    written = ROOT / "docs" / "defaults.md" if options.out == RESULTS else options.out / "defaults.md"
    written.write_text(page(results))
    print(f"wrote {written}")


if __name__ == "__main__":
    main()
