"""The picture of the README: held-out prompts of hard-flux in full and with fewer full calls, from the same noise.

    python -m benchmarks.pictures    # writes docs/full_and_cached.png: a minute

Nothing is calibrated: `enable(pipe, num_key_steps=K)`, of 50 steps, and even spacing beside it. Pictures are enlarged,
nothing else is done to them.
"""

import argparse
from pathlib import Path

import matplotlib

import dpcache
from benchmarks.subjects import STEPS, Subject
from dpcache.judge.comparison import Comparison
from dpcache.zoo import BUNDLED

MODEL = BUNDLED["hard-flux"]
PICTURE = Path(__file__).parents[1] / "docs" / "full_and_cached.png"
WAYS = ("dpcache, 13 of 50", "dpcache, 9 of 50", "even spacing,\nTaylor 1, 9 of 50")
#: Far from the seeds of calibration.
SEED = 1000


def comparisons(num_pictures: int) -> list[Comparison]:
    """One for each of the ways, of the first held-out prompts."""
    subject = Subject(MODEL.name, num_pictures)
    even = dpcache.Schedule.uniform(9, STEPS, order=1)
    ways = [subject.uncalibrated(13), subject.uncalibrated(9), even]
    return dpcache.compare_all(subject.pipe, ways, subject.inputs, seeds=SEED, **MODEL.call_defaults)


def draw(found: list[Comparison], path: Path) -> None:
    """Writes the grid: a row in full, and one for each of the ways."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    samples = [comparison.samples for comparison in found]
    rows = [("full,\n50 of 50", [(sample.full, "") for sample in samples[0]])]
    for way, comparison in zip(WAYS, found, strict=True):
        rows.append((way, [(sample.cached, f"{sample.psnr:.1f} dB") for sample in comparison.samples]))

    height, width = 0.2 + 1.25 * len(rows), 1.1 + 1.1 * len(samples[0])
    figure, grid = pyplot.subplots(
        len(rows), len(samples[0]), figsize=(width, height), layout="constrained", squeeze=False
    )
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
