"""The picture of the README: held-out prompts of hard-flux in full and with 9 of 50 full calls, from the same noise.

    python -m benchmarks.pictures    # writes docs/hard_flux.png: two minutes

A row in full, then `enable(pipe, num_key_steps=9)` with nothing calibrated, the paper's plan, and even spacing with
Taylor. The prompts are the first held-out ones. Pictures are enlarged, nothing else is done to them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

import dpcache
from benchmarks.defaults import CALIBRATED
from benchmarks.subjects import FIRST_SEED, STEPS, Subject
from dpcache.judge.comparison import Comparison
from dpcache.zoo import BUNDLED

MODEL = BUNDLED["hard-flux"]
PICTURE = Path(__file__).parents[1] / "docs" / "hard_flux.png"
KEY_STEPS = 9
WAYS = ("dpcache,\nnothing\ncalibrated", "the paper's\nplan", "even spacing,\nTaylor 1")
#: How many times a picture is enlarged; pixels between pictures, for a caption, and for the names of the ways.
ENLARGED, GAP, CAPTION, NAMES = 3, 8, 20, 118


def comparisons(num_pictures: int) -> list[Comparison]:
    """One for each of the ways, of the first held-out prompts."""
    subject = Subject(MODEL.name, num_pictures)
    calibration = subject.calibrate(MODEL.calibration_inputs(CALIBRATED))
    ways = [
        subject.uncalibrated(KEY_STEPS),
        calibration.plan(KEY_STEPS, recipe=dpcache.Recipe(method="paper")),
        dpcache.Schedule.uniform(KEY_STEPS, STEPS, order=1),
    ]
    return dpcache.compare_all(subject.pipe, ways, subject.inputs, seeds=FIRST_SEED, **MODEL.call_defaults)


def draw(found: Sequence[Comparison], path: Path) -> None:
    """Writes the grid: a row in full, and one for each of the ways."""
    first = found[0].samples
    rows = [(f"in full,\n{STEPS} of {STEPS}", [(sample.full, "") for sample in first])]
    for way, comparison in zip(WAYS, found, strict=True):
        name = f"{way},\n{KEY_STEPS} of {STEPS}"
        rows.append((name, [(sample.cached, f"{sample.psnr:.1f} dB") for sample in comparison.samples]))

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    small, large = (ImageFont.truetype(fonts / "DejaVuSans.ttf", size) for size in (13, 15))
    side = ENLARGED * first[0].full.shape[0]
    page = Image.new(
        "RGB", (NAMES + len(first) * (side + GAP), side + GAP + len(found) * (side + CAPTION + GAP)), "white"
    )
    pen = ImageDraw.Draw(page)
    top = 0
    for name, pictures in rows:
        pen.multiline_text((NAMES - GAP, top + side // 2), name, "black", small, anchor="rm", align="right", spacing=3)
        for number, (picture, caption) in enumerate(pictures):
            left = NAMES + number * (side + GAP)
            levels = (np.asarray(picture) * 255).round().clip(0, 255).astype(np.uint8)
            page.paste(Image.fromarray(levels).resize((side, side), Image.Resampling.NEAREST), (left, top))
            pen.text((left + side // 2, top + side + CAPTION // 2), caption, "black", large, anchor="mm")
        top += side + GAP + (CAPTION if pictures[0][1] else 0)
    page.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=4, help="how many prompts")
    parser.add_argument("-o", type=Path, default=PICTURE, help="where to write it")
    arguments = parser.parse_args()
    found = comparisons(arguments.n)
    draw(found, arguments.o)
    for comparison in found:
        print(f"{comparison.schedule}: {comparison.psnr_mean:.1f} dB on the pictures drawn")


if __name__ == "__main__":
    main()
