"""The report's figures, as SVG that takes its colours and fonts from the page around it."""

import html
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

Array = npt.NDArray[np.float64]

# Stand-ins that the finished SVG replaces by the page's colours, so that one figure serves light and dark pages.
INK, MUTED, LINE, ACCENT = "#010101", "#020202", "#030303", "#040404"
_PAGE_COLOURS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    ACCENT: "var(--accent)",
}
MARKERS = "osD^vPX"
TICKS = (1, 2, 5, 10)
WIDTH, HEIGHT = 5.4, 4.9  # inches at 72 points: half a page, and text still legible on a telephone
_MAP = (0.115, 0.115, 0.86, 0.86)
#: Left, top, width and height of the heat map's cells within its SVG, in the units of that SVG.
MAP_AREA = tuple(
    round(72 * share, 3)
    for share in (WIDTH * _MAP[0], HEIGHT * (1 - _MAP[1] - _MAP[3]), WIDTH * _MAP[2], HEIGHT * _MAP[3])
)


def cheapest_hops(cost: Array) -> Array:
    """[T, T+1]: the least finite cost of going from key step j to the next one k, whatever came before j."""
    return np.asarray(np.where(np.isfinite(cost), cost, np.inf).min(axis=0)[: cost.shape[1] - 1])


def cost_map(cost: Array, schedules: Mapping[str, Sequence[int]], description: str) -> str:
    """SVG heat map of the cost tensor: rows j, columns k, least over i; the schedules' hops are marked.

    Args:
        cost: [T, T+1, T+1] or [T+1, T+1, T+1], infinite where there is no hop.
        schedules: {name: key steps}.
        description: what it shows, for readers who cannot see it.
    """
    hops = cheapest_hops(cost)
    steps = hops.shape[0]
    with figure_of_the_page() as figure:
        axes = figure.add_axes(_MAP)
        _heat(figure, axes, hops)
        _mark_hops(axes, schedules, steps)
        axes.set(xlim=(-0.5, steps + 0.5), ylim=(steps - 0.5, -0.5))
        axes.set_xlabel(f"next key step k ({steps} is the end)")
        axes.set_ylabel("key step j")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(6, integer=True, steps=TICKS))
        if schedules:  # no hop leads backwards, so the lower left is always empty
            axes.legend(
                loc="lower left", bbox_to_anchor=(0.012, 0.2), title="hops of", alignment="left", labelcolor=INK
            )
        return as_svg(figure, "cost-map", description)


def trade_off(
    plans: Mapping[int, float],
    chosen: Mapping[str, tuple[int, float]],
    num_inference_steps: int,
    description: str,
    *,
    what: Literal["cost", "expected error"] = "cost",
) -> str:
    """SVG curve of what plans cost against the number of key steps K and the speedup T/K, the chosen schedules marked.

    Args:
        plans: {K: cost of the best plan}.
        chosen: {name: (K, cost)}; a schedule that is no plan lies above the curve.
        num_inference_steps: T.
        description: what it shows, for readers who cannot see it.
        what: the cost is; an expected error is a share, and shown in percent.
    """
    curve = sorted(plans.items())
    marks = {name: (budget, cost) for name, (budget, cost) in chosen.items() if np.isfinite(cost)}
    if any(cost > 0 for _, cost in curve):
        # Nothing skipped costs nothing, which has no place on a logarithmic scale.
        curve = [(budget, cost) for budget, cost in curve if cost > 0]
        marks = {name: (budget, cost) for name, (budget, cost) in marks.items() if cost > 0}
    costs = [cost for _, cost in [*curve, *marks.values()]]
    with figure_of_the_page() as figure:
        axes = figure.add_axes((0.18, 0.115, 0.79, 0.755))
        if curve:
            axes.plot(*zip(*curve, strict=True), color=MUTED, linewidth=1.4, marker="o", markersize=2.6)
        for number, (budget, cost) in enumerate(marks.values()):
            marker = MARKERS[number % len(MARKERS)]
            axes.plot([budget], [cost], color=ACCENT, marker=marker, markersize=9, linestyle="none")
        if min(costs, default=0) > 0:
            _log_scale(axes, min(costs), max(costs), _number if what == "cost" else _percent)
        axes.grid(color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel("number of key steps K")
        axes.set_ylabel(what)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=TICKS))
        speedup_scale(axes, num_inference_steps)
        _name_marks(axes, marks)
        return as_svg(figure, "trade-off" if what == "cost" else "expected-errors", description)


def _heat(figure: Any, axes: Any, hops: Array) -> None:
    """The coloured cells, and their scale in the empty corner."""
    finite = hops[np.isfinite(hops)]
    positive = finite[finite > 0]
    if not positive.size:
        return
    low, high = float(positive.min()), float(positive.max())
    norm = LogNorm(low, high if high > low else 2 * low)
    # Without its darkest and lightest tenth viridis stands out from black and from white.
    colours = LinearSegmentedColormap.from_list("hops", matplotlib.colormaps["viridis"](np.linspace(0.1, 0.95, 256)))
    # Hops that cost nothing have no logarithm; they are as good as the cheapest.
    cells = np.ma.masked_invalid(np.maximum(hops, low))
    image = axes.imshow(cells, norm=norm, cmap=colours, interpolation="none", aspect="auto")
    scale = axes.inset_axes((0.045, 0.1, 0.56, 0.035))
    bar = figure.colorbar(image, cax=scale, orientation="horizontal")
    bar.solids.set_rasterized(True)
    bar.outline.set_visible(False)
    scale.set_title("least cost of the hop", loc="left", fontsize=10.5, pad=5, color=INK)
    scale.xaxis.set_major_locator(LogLocator(numticks=4))
    scale.xaxis.set_major_formatter(FuncFormatter(_number))
    scale.xaxis.set_minor_formatter(NullFormatter())
    scale.tick_params(which="minor", length=0)


def _mark_hops(axes: Any, schedules: Mapping[str, Sequence[int]], steps: int) -> None:
    """A mark in the cell of every hop; schedules share hops, so the marks of each stand a little aside and smaller."""
    aside = np.linspace(-0.3, 0.3, len(schedules)) if len(schedules) > 1 and steps <= 30 else np.zeros(len(schedules))
    for number, (name, keys) in enumerate(schedules.items()):
        j, k = zip(*pairwise([*keys, steps]), strict=True)
        axes.plot(
            np.array(k) + aside[number],
            j,
            linestyle="none",
            marker=MARKERS[number % len(MARKERS)],
            markersize=max(5.0, 6.6 - 1.6 * number),
            markerfacecolor=("white", "black")[number % 2],
            markeredgecolor=("black", "white")[number % 2],
            markeredgewidth=0.9,
            clip_on=False,
            label=name,
            gid=f"hops-{number}",
        )


def _name_marks(axes: Any, marks: Mapping[str, tuple[int, float]]) -> None:
    """Names to the upper right of the marks, where a falling curve leaves room, one above the other where they meet."""
    points = 72 / axes.figure.dpi
    right = axes.bbox.x1 * points
    placed: list[tuple[float, float, float]] = []
    for name, (budget, cost) in sorted(marks.items(), key=lambda mark: mark[1][1]):
        mark_x, mark_y = axes.transData.transform((budget, cost)) * points
        width = 8 * len(name)
        x, y = min(mark_x + 9, right - width), mark_y + 7
        for other_x, other_y, other_width in placed:
            if x < other_x + other_width and other_x < x + width and abs(y - other_y) < 15:
                y = other_y + 15
        placed.append((x, y, width))
        axes.annotate(
            name,
            (budget, cost),
            xytext=(x - mark_x, y - mark_y),
            textcoords="offset points",
            color=INK,
            fontsize=12.5,
            fontweight="bold",
            gid=f"name-{len(placed)}",  # the page draws a rim: matplotlib's own would turn the text into outlines
        )


def speedup_scale(axes: Any, steps: int, speedups: Sequence[float] = ()) -> None:
    """T/K along the top, at the speedups given, or at those that people think in, as many as have room."""
    low, high = axes.get_xlim()
    axes.set_xlim(low, high)
    found = list(speedups)
    for speedup in () if speedups else (1, 1.5, 2, 3, 5, 10, 20, 50, 100):
        place = steps / speedup
        if low <= place <= high and (not found or steps / found[-1] - place > 0.09 * (high - low)):
            found.append(speedup)
    top = axes.secondary_xaxis("top")
    top.set_ticks([steps / speedup for speedup in found], [f"{speedup:.2g}×" for speedup in found])
    top.set_xlabel("speedup T/K", labelpad=7)


def _log_scale(axes: Any, low: float, high: float, form: Callable[[float, int], str]) -> None:
    axes.set_yscale("log")
    axes.set_ylim(low / 1.25, high * 1.35)
    few = high / low < 30
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(form))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="minor", length=0)


def _number(value: float, _: int) -> str:
    return f"{value:,.0f}" if 1 <= value < 1e6 else f"{value:g}"


def _percent(value: float, _: int) -> str:
    return f"{100 * value:g} %"


@contextmanager
def figure_of_the_page(height: float = HEIGHT) -> Iterator[Any]:
    """A figure in the report's style, whatever the user's matplotlib settings are, and those left as they were."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "text.parse_math": False,
                "font.sans-serif": ["DejaVu Sans"],  # to measure by; the page puts its own font
                "font.size": 11,
                "axes.edgecolor": MUTED,
                "axes.labelcolor": INK,
                "axes.labelsize": 11.5,
                "axes.spines.right": False,
                "axes.spines.top": False,
                "xtick.color": MUTED,
                "ytick.color": MUTED,
                "xtick.labelcolor": INK,
                "ytick.labelcolor": INK,
                "text.color": INK,
                "legend.frameon": False,
            }
        )
        yield Figure(figsize=(WIDTH, height))


def as_svg(figure: Any, name: str, description: str) -> str:
    """The figure as an SVG element for an HTML page."""
    buffer = io.StringIO()
    # The salt makes the file the same each time and its identifiers different from the other figure's.
    matplotlib.rcParams["svg.hashsalt"] = name
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, dpi=200, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    wide, high = figure.get_size_inches()
    text = re.sub(
        "<svg [^>]*>",
        f'<svg class="plot" id="{name}" role="img" aria-label="{html.escape(description)}" '
        f'viewBox="0 0 {wide * 72:g} {high * 72:g}">',
        text,
        count=1,
    )
    body = text.index(">") + 1
    head, text = text[:body], text[body:]
    for reference in ('id="', 'href="#', "url(#"):
        text = text.replace(reference, f"{reference}{name}-")
    for stand_in, colour in _PAGE_COLOURS.items():
        text = text.replace(stand_in, colour)
    return head + text
