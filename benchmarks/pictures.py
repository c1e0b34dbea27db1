"""The picture of the README: held-out prompts of tiny-flux in full and with fewer full calls, from the same noise.

    python -m benchmarks.pictures    # writes docs/full_and_cached.png: a few minutes

Schedules as `optimize` makes them by default, of 50 steps. Pictures are enlarged, nothing else is done to them.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np

import dpcache
from benchmarks.subjects import STEPS
from dpcache.judge.comparison import Comparison
from dpcache.zoo import BUNDLED

MODEL = BUNDLED["tiny-flux"]
PICTURE = Path(__file__).parents[1] / "docs" / "full_and_cached.png"
KEY_STEPS = (13, 9)
SEARCH_INPUTS = 16
#: Far from the seeds of calibration.
SEED = 1000
#: What differs is far too little to be seen.
MAGNIFIED = 100


def comparisons(num_pictures: int) -> list[Comparison]:
    """One for each number of key steps, of the first held-out prompts."""
    pipe = dpcache.load_pipeline(MODEL.name)
    schedules = [
        dpcache.optimize(
            pipe,
            MODEL.calibration_inputs(SEARCH_INPUTS),
            num_key_steps=k,
            num_inference_steps=STEPS,
            **MODEL.call_defaults,
        )
        for k in KEY_STEPS
    ]
    prompts = MODEL.held_out_inputs(num_pictures)
    return dpcache.compare_all(pipe, schedules, prompts, seeds=SEED, **MODEL.call_defaults)


def draw(found: list[Comparison], path: Path) -> None:
    """Writes the grid: a row in full, one for each schedule, and one of what is left between full and the last."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    samples = [comparison.samples for comparison in found]
    rows = [("full\n50 of 50 calls", [(sample.full, "") for sample in samples[0]])]
    for comparison in found:
        pictures = [(sample.cached, f"{sample.psnr:.1f} dB") for sample in comparison.samples]
        rows.append((f"cached\n{comparison.schedule.num_key_steps} of {STEPS} calls", pictures))
    left = [(np.clip(MAGNIFIED * np.abs(sample.cached - sample.full), 0, 1), "") for sample in samples[-1]]
    rows.append((f"difference of\nthe last, x {MAGNIFIED}", left))

    height, width = 0.2 + 1.25 * len(rows), 1.1 + 1.1 * len(left)
    figure, grid = pyplot.subplots(len(rows), len(left), figsize=(width, height), layout="constrained", squeeze=False)
    for axes, (label, pictures) in zip(grid, rows, strict=True):
        axes[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        for ax, (picture, caption) in zip(axes, pictures, strict=True):
            ax.imshow(picture, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.set_xlabel(caption, fontsize=8)
            ax.spines[:].set_visible(False)
    figure.savefig(path, dpi=110, facecolor="white")
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=6, help="how many prompts")
    parser.add_argument("-o", type=Path, default=PICTURE, help="where to write it")
    arguments = parser.parse_args()
    found = comparisons(arguments.n)
    draw(found, arguments.o)
    for comparison in found:
        print(f"{comparison.schedule}: {comparison.psnr_mean:.1f} dB on the pictures drawn")


if __name__ == "__main__":
    main()
