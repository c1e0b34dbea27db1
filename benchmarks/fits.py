"""What corrections without a calibration are worth, and fits in runs: the same key steps, with and without them.

    python -m benchmarks.fits                       # the hard models, then docs/fits.md
    python -m benchmarks.fits hard-dit -k 9 --inputs 16

Fitted on 6 calibration inputs (`search/hops.py`), at the key steps of one plan; scored on held-out inputs.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import dpcache
from benchmarks.subjects import RESULTS, ROOT, STEPS, Row, Subject, plain, rounded, scores, shown, table
from dpcache.plan.corrections import by_gram, corrected
from dpcache.run.entry import entered
from dpcache.run.inputs import seeded
from dpcache.search.full_runs import Draw, recorded
from dpcache.search.hops import fitted
from dpcache.search.objectives import Objective
from dpcache.search.sharing import Sharing
from dpcache.zoo import BUNDLED

CALIBRATED, FITTED = 10, 6
BASES = {
    "trend": dpcache.Recipe("trend", correct=False),
    "trend, corrected": dpcache.Recipe("trend", correct=True),
    "Taylor of order 2, corrected": dpcache.Recipe("taylor", order=2, correct=True),
}


def fit(subject: Subject, base: dpcache.Schedule, calibration: dpcache.Calibration) -> dpcache.Schedule:
    """The schedule, fitted on the first calibration inputs."""
    frame = calibration._frame
    assert frame is not None
    correct: Callable[[dpcache.Schedule], dpcache.Schedule] = (
        partial(corrected, frame=frame, interpolate=by_gram(calibration.gram.mean(axis=0), frame.moves))
        if base.corrections
        else (lambda schedule: schedule)
    )
    calls = subject.batches(subject.model.calibration_inputs(FITTED), STEPS, 1, first_seed=5000)
    draws = [Draw("", {**call, "output_type": "latent"}, 0) for call in calls]
    full = [recorded(subject.pipe, draw, base.boundary, Objective("mean"), samples=True) for draw in draws]
    sharing = Sharing()
    with entered(subject.pipe, base.boundary, sharing):
        runs = [sharing.runs(subject.pipe, seeded(subject.pipe, draw.call, 0), ((0, STEPS - 1),)) for draw in draws]
        return fitted(base, runs, [run.samples or {} for run in full], correct)


def schedules(subject: Subject, k: int, calibration: dpcache.Calibration) -> Iterator[tuple[str, dpcache.Schedule]]:
    """What is compared, by name."""
    curve = subject.uncalibrated(k)
    yield "no calibration, not corrected", dpcache.Schedule.smooth(k, STEPS, boundary="output")
    if curve.corrections:
        yield "no calibration, corrected", curve
    keys = calibration.plan(k).key_steps
    for name, recipe in BASES.items():
        base = calibration.schedule(keys, recipe)
        yield f"one plan's key steps, {name}", base
        yield f"one plan's key steps, {name}, fitted", fit(subject, base, calibration)


def measured(model: str, num_inputs: int, key_steps: list[int]) -> Row:
    subject = Subject(model, num_inputs)
    full, _ = subject.draw()
    calibration = subject.calibrate(subject.model.calibration_inputs(CALIBRATED), sensitivity="measured")
    rows = []
    for k in key_steps:
        for way, schedule in schedules(subject, k, calibration):
            pictures, _ = subject.draw(schedule)
            rows.append({"way": way, "k": k, **scores(full, pictures)})
            print(f"{model}, K = {k}, {way}: {shown(rows[-1])}", flush=True)
    found: Row = json.loads(json.dumps({"model": model, "inputs": num_inputs, "rows": rows}, default=plain))
    return found


def page(results: list[Row]) -> str:
    text = (
        "# What corrections and fits are worth\n\nMade by `python -m benchmarks.fits`. PSNR against the full run of 50 "
        "steps, in float, mean (5th percentile) in dB over held-out inputs.\nFitted: coefficients fitted in runs of "
        f"{FITTED} other inputs, at the same key steps ([how](how-it-works.md#one-search-one-budget)).\n"
    )
    for result in results:
        found = {(row["way"], row["k"]): shown(row) for row in result["rows"]}
        ks = sorted({k for _, k in found})
        body = [[way, *(found.get((way, k), "") for k in ks)] for way in dict.fromkeys(way for way, _ in found)]
        head = ["", *(f"K = {k}" for k in ks)]
        text += f"\n## {result['model']}\n\n{result['inputs']} inputs.\n\n{table(head, body)}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(BUNDLED)} (default: the hard ones)")
    parser.add_argument("-k", "--key-steps", type=int, nargs="+", default=[5, 9, 13])
    parser.add_argument("--inputs", type=int, default=32, help="held-out inputs (default 32)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the figures")
    options = parser.parse_args()
    for model in options.models or ["hard-flux", "hard-dit"]:
        found = rounded(measured(model, options.inputs, options.key_steps))
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"fits_{model}.json").write_text(json.dumps(found, indent=1) + "\n")
    paths = [options.out / f"fits_{model}.json" for model in BUNDLED]
    written = ROOT / "docs" / "fits.md" if options.out == RESULTS else options.out / "fits.md"
    written.write_text(page([json.loads(path.read_text()) for path in paths if path.exists()]))
    print(f"wrote {written}")


if __name__ == "__main__":
    main()
