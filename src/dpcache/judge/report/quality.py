"""Figures of how near cached pictures are to the full ones: by the number of key steps, and picture by picture."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator

from dpcache.judge.comparison import Comparison

from .plots import ACCENT, INK, LINE, MARKERS, MUTED, TICKS, as_svg, figure_of_the_page, speedup_scale

#: Inches of a histogram's row, and of what is above and below all of them.
_ROW, _ENDS = 1.05, 0.85
_BINS = 24


def quality_curve(comparisons: Sequence[Comparison]) -> str:
    """SVG of measured PSNR against K: the mean, and down to the worst; schedules of one origin are one curve."""
    steps = comparisons[0].schedule.num_inference_steps
    curves: dict[str, list[tuple[int, float, float]]] = {}
    told = []
    for comparison in sorted(comparisons, key=lambda one: one.schedule.num_key_steps):
        quality = np.array([sample.psnr for sample in comparison.samples])
        finite = quality[np.isfinite(quality)]
        if finite.size:
            count, source = comparison.schedule.num_key_steps, comparison.schedule.source or "own key steps"
            curves.setdefault(_origin(source), []).append((count, float(finite.mean()), float(finite.min())))
            told.append(f"K = {count}, {_origin(source)}: {finite.mean():.1f} dB, worst {finite.min():.1f} dB")
    with figure_of_the_page() as figure:
        axes = figure.add_axes((0.13, 0.115, 0.84, 0.755))
        for number, (origin, points) in enumerate(curves.items()):
            counts, means, worst = zip(*points, strict=True)
            colour = ACCENT if number == 0 else (INK, MUTED)[number % 2]
            mark = {"marker": MARKERS[number % len(MARKERS)], "markersize": 7}
            axes.plot(counts, means, color=colour, linewidth=1.6, label=origin, **mark)
            axes.vlines(counts, worst, means, color=colour, linewidth=1)
            axes.plot(counts, worst, color=colour, marker="_", markersize=9, linestyle="none")
        axes.grid(color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.08, y=0.08)
        axes.set_xlabel("number of key steps K")
        axes.set_ylabel("PSNR in dB")
        every = sorted({count for points in curves.values() for count, *_ in points})
        if len(every) > 8 or min(np.diff(every), default=0) < 0.06 * (every[-1] - every[0]):
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=TICKS))
            speedup_scale(axes, steps)
        else:
            axes.set_xticks(every)
            speedup_scale(axes, steps, [steps / count for count in every])
        if len(curves) > 1:
            axes.legend(loc="lower right", labelcolor=INK)
        return as_svg(figure, "quality-curve", f"Measured PSNR against the number of key steps. {'; '.join(told)}.")


def histogram(quality: Mapping[str, Sequence[float]]) -> str:
    """SVG of how many pictures have which PSNR, a row for every schedule; identical pictures are left out.

    Args:
        quality: {name: PSNR in dB of every picture}.
    """
    finite = {name: np.array([value for value in values if np.isfinite(value)]) for name, values in quality.items()}
    every = np.concatenate(list(finite.values()))
    low, high = (float(every.min()), float(every.max())) if every.size else (0.0, 1.0)
    edges = np.linspace(np.floor(low), max(np.ceil(high), np.floor(low) + 1), _BINS + 1)
    told = [
        f"{name}: median {np.median(values):.1f} dB, from {values.min():.1f} to {values.max():.1f} dB"
        for name, values in finite.items()
        if values.size
    ]
    height = _ROW * len(finite) + _ENDS
    with figure_of_the_page(height) as figure:
        bottom, tall = 0.6 / height, _ROW / height
        for number, (name, values) in enumerate(finite.items()):
            place = bottom + tall * (len(finite) - 1 - number)
            axes = figure.add_axes((0.09, place, 0.88, 0.62 * tall))
            counts, _, _ = axes.hist(values, edges, color=ACCENT, rwidth=0.9)
            axes.spines["left"].set_visible(False)
            axes.set_xlim(edges[0], edges[-1])
            axes.set_ylim(0, 1.05 * max(1.0, float(np.max(counts))))
            axes.yaxis.set_major_locator(MaxNLocator(2, integer=True))
            axes.tick_params(axis="y", length=0)
            if values.size:
                axes.axvline(float(np.median(values)), color=INK, linewidth=1.2)
            identical = len(quality[name]) - len(values)
            beside = f", {identical} more identical" if identical else ""
            axes.set_title(f"{name}{beside}", loc="left", fontsize=11.5, fontweight="bold", color=INK, pad=4)
            axes.tick_params(axis="x", labelbottom=number == len(finite) - 1)
        axes.set_xlabel("PSNR in dB")
        return as_svg(figure, "histogram", f"Histograms of PSNR. {'; '.join(told)}.")


def _origin(source: str) -> str:
    """The beginning of where a schedule is from: what two of one kind have in common."""
    first = source.split(",")[0].split(":")[0].split(" from ")[0]
    return first if len(first) <= 32 else f"{first[:30]} ..."
