"""What the page in the browser shows around its pictures, as HTML; its colours, and its two scripts."""

import html
import math
from collections.abc import Mapping

import gradio as gr

from dpcache.judge.metrics import Picture, psnr, ssim

from .studio import Drawn, Studio

FULL, CACHED = "In full", "With the cache"


def head(title: str, studio: Studio) -> str:
    """The page's heading: the model, and what plans are made from."""
    name = type(studio.pipeline).__name__
    if studio.calibration is None:
        told = f"{name}, nothing calibrated: the steps to compute lie on a smooth curve"
    else:
        facts = studio.calibration.facts
        inputs = "1 input" if facts.num_inputs == 1 else f"{facts.num_inputs} inputs"
        told = f"{name}, calibrated on {inputs} and {facts.num_inference_steps} steps"
    return f"<header class='dp-head'><h1>{html.escape(title)}</h1><p>{html.escape(told)}</p></header>"


def caption(name: str, told: str, seconds: str = "") -> str:
    """What stands above a picture."""
    return f"<div class='dp-caption'><b>{name}</b><span>{told}</span><b>{seconds}</b></div>"


def caption_of(name: str, drawn: Drawn, num_steps: int) -> str:
    """Likewise, of one that is drawn."""
    return caption(name, f"{len(drawn.key_steps)} of {num_steps} steps computed", f"{drawn.seconds:.2f} s")


def summary(full: Drawn | None, cached: Drawn | None, num_steps: int) -> str:
    """Three figures, and which steps were computed."""
    figures = [("–", "speedup", ""), ("–", "PSNR", ""), ("–", "SSIM", "")]
    computed: set[int] = set()
    if full is not None and cached is not None:
        computed = set(cached.key_steps)
        distance = psnr(full.picture, cached.picture)
        figures = [
            (f"{full.seconds / cached.seconds:.2f}×", "speedup", f"T/K is {num_steps / len(computed):.2f}"),
            ("equal" if math.isinf(distance) else f"{distance:.1f} dB", "PSNR", "against the full run, in float"),
            (_ssim(full.picture, cached.picture), "SSIM", "1 is equal"),
        ]
    tiles = "".join(
        f"<div><dt>{name}</dt><dd>{value}</dd><small>{note or '&nbsp;'}</small></div>" for value, name, note in figures
    )
    cells = "".join(f"<i class='{'on' if t in computed else ''}' title='step {t}'></i>" for t in range(num_steps))
    told = f"{len(computed)} of {num_steps} steps computed, from the noisiest to the last" if computed else "&nbsp;"
    strip = f"<div class='dp-strip' role='img' aria-label='{told}'>{cells}</div><p class='dp-muted'>{told}</p>"
    return f"<section class='dp-summary'><dl>{tiles}</dl>{strip}</section>"


def curve(found: Mapping[int, float], num_key_steps: int, num_steps: int) -> str:
    """K against PSNR: a point for every number of key steps that was drawn, to be pressed.

    Args:
        found: {K: PSNR in dB}; what is equal stands at the top.
        num_key_steps: the K that is shown.
        num_steps: T.
    """
    finite = [value for value in found.values() if math.isfinite(value)]
    if not finite:
        return "<section class='dp-curve empty'><p class='dp-muted'>Nothing drawn yet.</p></section>"
    low, high = min(finite), max(finite)
    first, last = (math.log(k) for k in (min(found), max(found)))

    def place(k: int) -> tuple[float, float]:
        """In percent of the width, from the left, and of the height, from the top."""
        x = 50.0 if last == first else 6 + 88 * (math.log(k) - first) / (last - first)
        y = 45.0 if high == low else 22 + 52 * (high - min(found[k], high)) / (high - low)
        return x, y

    line = " ".join(f"{x:.2f},{y:.2f}" for x, y in map(place, found))
    points, taken = "", -math.inf
    # The one that is shown has a place for its label before all others, and those too near to another have none.
    shown_at = place(num_key_steps)[0] if num_key_steps in found else -math.inf
    for k, value in found.items():
        x, y = place(k)
        here = k == num_key_steps
        labelled = here or (x - taken > 7 and abs(x - shown_at) > 7)
        taken = x if labelled else taken
        told = "equal" if math.isinf(value) else f"{value:.1f}"
        about = f"{k} key steps, {num_steps / k:.1f} times fewer: {told}{'' if math.isinf(value) else ' dB'}"
        texts = f"<b>{told}</b><span>{k}<small>{num_steps / k:.1f}×</small></span>" if labelled else ""
        points += (
            f"<button type='button' data-k='{k}' class='{'here' if here else ''}' style='left:{x:.2f}%;--y:{y:.2f}%' "
            f"aria-label='{about}' title='{about}'><i></i>{texts}</button>"
        )
    box = "viewBox='0 0 100 100' preserveAspectRatio='none' aria-hidden='true'"
    drawn = f"<svg {box}><polyline points='{line}'/></svg>"
    return f"<section class='dp-curve'><div class='plot'>{points}{drawn}</div></section>"


def _ssim(truth: Picture, other: Picture) -> str:
    try:
        return f"{ssim(truth, other):.4f}"
    except ValueError:  # smaller than its window
        return "–"


def theme() -> "gr.themes.Base":
    """Of fonts that are there, for nothing is fetched from elsewhere."""
    fonts = ["system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
    return gr.themes.Base(
        primary_hue=gr.themes.colors.blue,
        neutral_hue=gr.themes.colors.slate,
        font=fonts,
        font_mono=["ui-monospace", "Consolas", "monospace"],
        radius_size=gr.themes.sizes.radius_sm,
    )


#: A point of the curve that is pressed tells its K.
PICKS = """
element.addEventListener("click", (event) => {
  const point = event.target.closest("[data-k]");
  if (point) trigger("select", { k: Number(point.dataset.k) });
});
"""

#: A number that is typed counts when Enter is pressed or the field is left, and is brought within its limits before.
TYPED = """
() => {
  const typed = (event) => event.target.matches?.(".dp-typed input[type=number]");
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && typed(event)) event.target.blur();
  }, true);
  document.addEventListener("blur", (event) => {
    if (!typed(event)) return;
    const field = event.target, [low, high] = [Number(field.min), Number(field.max)];
    const value = Math.min(Math.max(Math.round(field.valueAsNumber || low), low), high);
    if (field.value === String(value)) return;
    field.value = value;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  }, true);
}
"""

CSS = """
.dp-head h1 { font-size: 1.6rem; font-weight: 650; margin: 0; }
.dp-head p, .dp-muted { color: var(--body-text-color-subdued); margin: 0; }
.dp-caption { display: flex; flex-wrap: wrap; gap: 0 .75rem; align-items: baseline; }
.dp-caption, .dp-curve { font-variant-numeric: tabular-nums; }
.dp-caption b { font-size: 1.1rem; font-weight: 600; white-space: nowrap; }
.dp-caption span { flex: 1 1 auto; color: var(--body-text-color-subdued); }
#pictures { flex-wrap: nowrap; }
#pictures > div { gap: .35rem; min-width: 0 !important; }
#seed-row { align-items: end; }
#curve-head { align-items: center; gap: .5rem; }
#curve-head > :first-child { flex: 1 1 15rem !important; }
.dp-picture img { width: 100%; height: 100%; object-fit: contain; }
.dp-small img { image-rendering: pixelated; }
.dp-summary dl { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1rem; margin: .4rem 0 1.1rem; }
.dp-summary dl div { border-top: 2px solid var(--border-color-primary); padding-top: .5rem; }
.dp-summary dt { color: var(--body-text-color-subdued); }
.dp-summary dd {
  font-size: clamp(1.15rem, 4.5vw, 1.9rem); line-height: 1.2; font-weight: 650; margin: 0;
  white-space: nowrap; font-variant-numeric: tabular-nums;
}
.dp-summary dl div:first-child dd { color: var(--primary-500); }
.dp-summary small { color: var(--body-text-color-subdued); }
.dp-strip { display: flex; gap: 2px; height: 1.6rem; margin-bottom: .35rem; }
.dp-strip i { flex: 1; border-radius: 2px; background: var(--border-color-primary); }
.dp-strip i.on { background: var(--primary-500); }
.dp-curve .plot { position: relative; height: 10.5rem; font-variant-numeric: tabular-nums; }
.dp-curve svg { position: absolute; inset: 0; width: 100%; height: 100%; pointer-events: none; }
.dp-curve polyline { fill: none; stroke: var(--primary-500); stroke-width: 2; vector-effect: non-scaling-stroke; }
.dp-curve button {
  position: absolute; top: 0; bottom: 0; width: 2.6rem; margin: 0 0 0 -1.3rem; padding: 0; border: 0; background: none;
  color: var(--body-text-color); cursor: pointer; font-size: .85rem; line-height: 1.25; border-radius: 4px;
}
.dp-curve button:hover, .dp-curve button.here { background: var(--background-fill-secondary); }
.dp-curve button > * { position: absolute; left: 0; right: 0; text-align: center; z-index: 1; }
.dp-curve i {
  top: var(--y); width: .7rem; height: .7rem; margin: -.35rem auto 0; border-radius: 50%;
  background: var(--body-background-fill); border: 2px solid var(--primary-500);
}
.dp-curve .here i { background: var(--primary-500); }
.dp-curve button b { top: calc(var(--y) - 1.6rem); font-weight: 500; }
.dp-curve button.here b, .dp-curve button.here span { font-weight: 700; }
.dp-curve button span { bottom: 0; }
.dp-curve button small { display: block; color: var(--body-text-color-subdued); font-weight: 400; }
@media (max-width: 640px) {
  #shown { order: -1; }
  #pictures { gap: .6rem; }
  #pictures .dp-picture { height: 42vw !important; min-height: 0 !important; }
  .dp-caption { font-size: .85rem; }
}
"""
