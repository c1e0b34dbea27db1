"""The page in a browser: draws one input in full and cached, side by side, with times and how far they are apart."""

import html
import inspect
import math
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dpcache.errors import DPCacheError, missing_extra
from dpcache.judge.metrics import Picture, psnr, ssim
from dpcache.plan.recipe import Recipe
from dpcache.run.inputs import Input, call_arguments, label, quiet, seeded
from dpcache.run.pipelines import enabled, stats

try:
    import gradio as gr
except ImportError as error:
    raise missing_extra("`dpcache ui`", error, "dpcache[ui]") from error

if TYPE_CHECKING:
    from dpcache.measure.calibration import Calibration

#: So many full runs are remembered: another number of key steps needs no other full run.
_REMEMBERED = 8
#: Pictures narrower than this are shown enlarged, pixel by pixel.
_SMALL = 128
#: Clips up to this many pixels are kept exact, larger ones are compressed.
_LOSSLESS_PIXELS = 2**20
_FRAME_MILLISECONDS = 125
FULL, CACHED = "In full", "With the cache"


@dataclass(frozen=True)
class Drawn:
    """One output and how it came about.

    Attributes:
        picture: float [H, W, C] in [0, 1], or [F, H, W, C] for a clip.
        seconds: time of the pipeline's call, text encoding and decoding included.
        key_steps: steps computed in full.
    """

    picture: Picture
    seconds: float
    key_steps: tuple[int, ...]


class Studio:
    """Draws with one pipeline and plans from one calibration; remembers the latest full runs.

    Args:
        pipeline: a diffusers pipeline.
        calibration: what to plan from, for any number of key steps.
        arguments: of every call of the pipeline, beside the input, seed and number of steps.
    """

    def __init__(self, pipeline: Any, calibration: "Calibration", arguments: Mapping[str, Any]) -> None:
        self.pipeline, self.calibration = pipeline, calibration
        self.arguments = {**arguments, "output_type": "np"}
        #: The paper's costs need nothing of what a scheduler hides, but are good for the recorded grid alone.
        self.recipe = Recipe(method="sampler" if len(calibration.gram) else "paper")
        self._full: OrderedDict[Any, Drawn] = OrderedDict()

    @property
    def takes_classes(self) -> bool:
        """Whether its inputs are class labels instead of prompts."""
        return "class_labels" in inspect.signature(type(self.pipeline).__call__).parameters

    @property
    def class_names(self) -> list[tuple[str, int]]:
        """Names and numbers of the classes, in the order of their numbers."""
        names = {number: name for name, number in getattr(self.pipeline, "labels", {}).items()}
        config = self.pipeline.transformer.config
        count = len(names) or int(config.get("num_embeds_ada_norm") or 1)
        return [(names.get(number, str(number)), number) for number in range(count)]

    def call(self, given: Any, steps: int) -> dict[str, Any]:
        """Arguments of the call for a prompt, a class or whole input."""
        if not isinstance(given, Mapping):
            given = {"class_labels": [int(given)]} if self.takes_classes else str(given)
        return call_arguments([given], {**self.arguments, "num_inference_steps": steps})[0]

    def remembered(self, given: Any, seed: int, steps: int) -> Drawn | None:
        """The full run of this input, if it was drawn lately."""
        return self._full.get((given, seed, steps))

    def full(self, given: Any, seed: int, steps: int) -> Drawn:
        """The input drawn in full."""
        key = (given, seed, steps)
        if key not in self._full:
            picture, seconds = self._timed(given, seed, steps)
            self._full[key] = Drawn(picture, seconds, tuple(range(steps)))
            while len(self._full) > _REMEMBERED:
                self._full.popitem(last=False)
        self._full.move_to_end(key)
        return self._full[key]

    def cached(self, given: Any, seed: int, steps: int, num_key_steps: int) -> Drawn:
        """The input drawn by a plan with this many key steps.

        Raises:
            DPCacheError: there is no such plan.
        """
        with enabled(self.pipeline, self.calibration, num_key_steps=num_key_steps, recipe=self.recipe):
            picture, seconds = self._timed(given, seed, steps)
            return Drawn(picture, seconds, stats(self.pipeline).computed_steps)

    def warm_up(self, given: Input) -> Picture:
        """A call of two steps: the first one pays for what is set up once. Returns what it drew."""
        with quiet(self.pipeline):
            return self._timed(given, 0, 2)[0]

    def _timed(self, given: Any, seed: int, steps: int) -> tuple[Picture, float]:
        arguments = seeded(self.pipeline, self.call(given, steps), seed)
        start = time.perf_counter()
        output = self.pipeline(**arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return np.asarray(output[0][0]), seconds


def build(
    studio: Studio, inputs: Sequence[Input], *, title: str, num_key_steps: int = 13
) -> tuple["gr.Blocks", dict[str, Any]]:
    """The page, and what to hand to its `launch`: how it looks.

    Args:
        studio: what draws.
        inputs: examples to offer; the first is what the page begins with.
        title: name of the model.
        num_key_steps: K to begin with.
    """
    facts = studio.calibration.facts
    steps, fixed_grid = facts.num_inference_steps, studio.calibration.grid is None or studio.recipe.method == "paper"
    first = studio.warm_up(inputs[0])
    examples = [_value(studio, given) for given in inputs]
    folder = tempfile.TemporaryDirectory(prefix="dpcache-ui-")

    def shown(drawn: Drawn) -> str:
        return str(_write(drawn.picture, Path(folder.name)))

    def draw(
        given: Any, seed: float, num_key_steps: float, num_steps: float, progress: Any = _PROGRESS
    ) -> Iterator[tuple[Any, ...]]:
        """Draws an input in full, unless that was done lately, and with this many key steps."""
        seed, k, t = int(seed), int(num_key_steps), int(num_steps)
        try:
            known = studio.remembered(given, seed, t)
            if known is None:
                yield None, None, _caption(FULL, "drawing ..."), _caption(CACHED, "waiting"), _summary(None, None, t)
            full = studio.full(given, seed, t)
            told = _caption(FULL, *_told(full, t))
            yield shown(full), None, told, _caption(CACHED, "drawing ..."), _summary(full, None, t)
            cached = studio.cached(given, seed, t, k)
            yield shown(full), shown(cached), told, _caption(CACHED, *_told(cached, t)), _summary(full, cached, t)
        except (DPCacheError, ValueError) as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error

    def redraw(given: Any, seed: float, num_key_steps: float, num_steps: float) -> Iterator[tuple[Any, ...]]:
        """Draws anew where only the number of key steps is another: the full run is there."""
        if studio.remembered(given, int(seed), int(num_steps)) is None:
            yield (gr.skip(),) * 5
        else:
            yield from draw(given, seed, num_key_steps, num_steps)

    with gr.Blocks(title=f"dpcache: {title}", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(_head(title, studio))
        with gr.Row(equal_height=False, elem_id="studio"):
            with gr.Column(scale=1, min_width=300, elem_id="controls"):
                given: Any
                if studio.takes_classes:
                    given = gr.Dropdown(studio.class_names, value=examples[0], label="Class")
                else:
                    given = gr.Textbox(examples[0], label="Prompt", lines=3, max_lines=6, submit_btn=False)
                with gr.Row(elem_id="seed-row"):
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, scale=3, min_width=120)
                    dice = gr.Button("Another", scale=1, min_width=90, elem_id="dice")
                key_steps = gr.Slider(
                    1,
                    steps,
                    min(num_key_steps, steps),
                    step=1,
                    label="Key steps, K",
                    info="Computed in full; all others are predicted. It redraws when you let go.",
                    buttons=[],
                )
                num_steps = gr.Slider(
                    min(4, steps),
                    steps if fixed_grid else max(100, steps),
                    steps,
                    step=1,
                    label="Steps, T",
                    info=f"Calibrated on {steps}; plans for others are interpolated.",
                    interactive=not fixed_grid,
                    buttons=[],
                )
                button = gr.Button("Draw", variant="primary", size="lg")
                if len(examples) > 1 and not studio.takes_classes:
                    gr.Examples([[text] for text in examples], [given], label="Examples")
            with gr.Column(scale=3, min_width=480):
                with gr.Row(equal_height=True, elem_id="pictures", elem_classes="small" if _narrow(first) else ""):
                    with gr.Column(min_width=220):
                        full_caption = gr.HTML(_caption(FULL, "nothing drawn yet"))
                        full_picture = _picture(FULL)
                    with gr.Column(min_width=220):
                        cached_caption = gr.HTML(_caption(CACHED, "nothing drawn yet"))
                        cached_picture = _picture(CACHED)
                summary = gr.HTML(_summary(None, None, steps))
        asked = [given, seed, key_steps, num_steps]
        answer = [full_picture, cached_picture, full_caption, cached_caption, summary]
        together: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "pipeline", "show_progress": "full"}
        together["show_progress_on"] = [full_picture, cached_picture]
        triggers = [button.click] if studio.takes_classes else [button.click, given.submit]
        gr.on(triggers, draw, asked, answer, api_name="draw", **together)
        key_steps.release(redraw, asked, answer, api_visibility="private", trigger_mode="always_last", **together)
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        dice.click(_another_seed, [], [seed], **hidden)
        num_steps.change(_limited, [num_steps, key_steps], [key_steps], **hidden)
    look = {"css": _CSS, "theme": _theme(), "footer_links": []}
    return page, look


def _another_seed() -> int:
    return int(np.random.default_rng().integers(2**31))


def _limited(num_steps: float, num_key_steps: float) -> Any:
    """K is at most T."""
    return gr.update(maximum=int(num_steps), value=min(int(num_key_steps), int(num_steps)))


def _value(studio: Studio, given: Input) -> Any:
    """What stands in the field for an input of a calibration."""
    if isinstance(given, Mapping):
        return given["class_labels"][0] if studio.takes_classes else label(studio.pipeline, given)
    return given


def _picture(name: str) -> Any:
    return gr.Image(
        label=name,
        show_label=False,
        type="filepath",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        height=440,
    )


def _narrow(picture: Picture) -> bool:
    return bool(picture.shape[-2] < _SMALL)


def _write(picture: Picture, folder: Path) -> Path:
    """A picture as PNG, a clip as animated WebP."""
    from PIL import Image

    pixels = (np.nan_to_num(picture) * 255).round().clip(0, 255).astype(np.uint8)
    pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    is_clip = picture.ndim == 4
    first, *others = [Image.fromarray(frame) for frame in (pixels if is_clip else pixels[None])]
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".webp" if is_clip else ".png", delete=False) as file:
        if is_clip:
            exact = math.prod(pixels.shape[:3]) <= _LOSSLESS_PIXELS
            timing: dict[str, Any] = {"save_all": True, "duration": _FRAME_MILLISECONDS, "loop": 0}
            first.save(file, "WEBP", append_images=others, lossless=exact, quality=90, **timing)
        else:
            first.save(file, "PNG")
    return Path(file.name)


def _head(title: str, studio: Studio) -> str:
    facts = studio.calibration.facts
    inputs = "1 input" if facts.num_inputs == 1 else f"{facts.num_inputs} inputs"
    told = f"{facts.pipeline}, calibrated on {inputs} and {facts.num_inference_steps} steps"
    return f"<header class='dp-head'><h1>{html.escape(title)}</h1><p>{html.escape(told)}</p></header>"


def _caption(name: str, told: str, seconds: str = "") -> str:
    return f"<div class='dp-caption'><b>{name}</b><span>{told}</span><b>{seconds}</b></div>"


def _told(drawn: Drawn, num_steps: int) -> tuple[str, str]:
    return f"{len(drawn.key_steps)} of {num_steps} steps computed", f"{drawn.seconds:.2f} s"


def _summary(full: Drawn | None, cached: Drawn | None, num_steps: int) -> str:
    """Three figures, and which steps were computed."""
    figures = [("–", "speedup", ""), ("–", "PSNR", ""), ("–", "SSIM", "")]
    computed: set[int] = set()
    if full is not None and cached is not None:
        computed = set(cached.key_steps)
        distance = psnr(full.picture, cached.picture)
        figures = [
            (f"{full.seconds / cached.seconds:.2f}×", "speedup", f"T/K is {num_steps / len(computed):.2f}"),
            ("equal" if math.isinf(distance) else f"{distance:.1f} dB", "PSNR", "against the full run, in float"),
            (f"{_ssim(full.picture, cached.picture)}", "SSIM", "1 is equal"),
        ]
    tiles = "".join(
        f"<div><dt>{name}</dt><dd>{value}</dd><small>{note or '&nbsp;'}</small></div>" for value, name, note in figures
    )
    cells = "".join(f"<i class='{'on' if t in computed else ''}' title='step {t}'></i>" for t in range(num_steps))
    told = f"{len(computed)} of {num_steps} steps computed, from the noisiest to the last" if computed else "&nbsp;"
    strip = f"<div class='dp-strip' role='img' aria-label='{told}'>{cells}</div><p class='dp-muted'>{told}</p>"
    return f"<section class='dp-summary'><dl>{tiles}</dl>{strip}</section>"


def _ssim(truth: Picture, other: Picture) -> str:
    try:
        return f"{ssim(truth, other):.4f}"
    except ValueError:  # smaller than its window
        return "–"


#: Follows the pipeline's own progress bar.
_PROGRESS = gr.Progress(track_tqdm=True)


def _theme() -> Any:
    """Of fonts that are there, for nothing is fetched from elsewhere."""
    fonts = ["system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
    return gr.themes.Base(
        primary_hue=gr.themes.colors.blue,
        neutral_hue=gr.themes.colors.slate,
        font=fonts,
        font_mono=["ui-monospace", "Consolas", "monospace"],
        radius_size=gr.themes.sizes.radius_sm,
    )


_CSS = """
.dp-head h1 { font-size: 1.6rem; font-weight: 650; margin: .2rem 0 0; }
.dp-head p, .dp-muted { color: var(--body-text-color-subdued); margin: 0; }
.dp-caption { display: flex; gap: .75rem; align-items: baseline; font-variant-numeric: tabular-nums; }
.dp-caption b { font-size: 1.1rem; font-weight: 600; white-space: nowrap; }
.dp-caption span { flex: 1; color: var(--body-text-color-subdued); }
#pictures > div { gap: .35rem; }
#seed-row { align-items: end; }
#pictures img { width: 100%; height: 100%; object-fit: contain; }
#pictures.small img { image-rendering: pixelated; }
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
"""
