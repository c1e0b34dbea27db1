"""The page in a browser: draws one input in full and cached, with times, how far they are apart, and the curve of K."""

import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dpcache.checks import whole
from dpcache.errors import DPCacheError, missing_extra
from dpcache.judge.differences import amplification, heat
from dpcache.judge.metrics import Picture
from dpcache.run.inputs import Input, label

try:
    import gradio as gr
except ImportError as error:
    raise missing_extra("`dpcache ui`", error, "dpcache[ui]") from error

from . import ui_looks as looks
from .commands.failures import failure
from .studio import Asked, Drawn, Studio
from .ui_looks import CACHED, FULL

#: Pictures narrower than this are shown enlarged, pixel by pixel.
_SMALL = 128
#: Clips up to this many pixels are kept exact, larger ones are compressed.
_LOSSLESS_PIXELS = 2**20
_FRAME_MILLISECONDS = 125
#: The curve is drawn without being asked for, where a full run takes no longer than this.
_QUICK_SECONDS = 30.0
_HEIGHT = "36vh"
#: Follows the pipeline's own progress bar.
_PROGRESS = gr.Progress(track_tqdm=True)

Answer = Iterator[tuple[Any, ...]]


def build(
    studio: Studio, inputs: Sequence[Input], *, title: str, num_key_steps: int = 13
) -> tuple["gr.Blocks", dict[str, Any]]:
    """The page, and what to hand to its `launch`: how it looks.

    Args:
        studio: what draws.
        inputs: examples to offer; the first is what the page begins with, drawn.
        title: name of the model.
        num_key_steps: K to begin with.
    """
    steps = studio.steps
    first = studio.warm_up(inputs[0])
    examples = [_value(studio, given) for given in inputs]
    small = "dp-small" if first.shape[-2] < _SMALL else ""

    with gr.Blocks(title=f"dpcache: {title}", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(looks.head(title, studio))
        with gr.Row(equal_height=False, elem_id="studio"):
            with gr.Column(scale=1, min_width=280, elem_id="controls"):
                given: Any
                if studio.takes_classes:
                    given = gr.Dropdown(studio.class_names, value=examples[0], label="Class")
                else:
                    given = gr.Textbox(examples[0], label="Prompt", lines=3, max_lines=6, submit_btn=False)
                with gr.Row(elem_id="seed-row"):
                    seed = gr.Number(0, label="Seed", precision=0, scale=3, min_width=120)
                    dice = gr.Button("Another", scale=1, min_width=90, elem_id="dice")
                about_steps = "of the whole run"
                if studio.calibration is not None:
                    about_steps = f"Calibrated on {steps}; plans for others are interpolated."
                num_steps = gr.Slider(
                    min(4, steps),
                    steps if studio.fixed_grid else max(100, steps),
                    steps,
                    step=1,
                    label="Steps, T",
                    info=about_steps,
                    interactive=not studio.fixed_grid,
                    buttons=[],
                    elem_classes="dp-typed",
                )
                button = gr.Button("Draw", variant="primary", size="lg")
                if len(examples) > 1 and not studio.takes_classes:
                    gr.Examples([[text] for text in examples], [given], label="Examples")
            with gr.Column(scale=3, min_width=300, elem_id="shown"):
                with gr.Tabs():
                    with gr.Tab("Side by side"), gr.Row(equal_height=True, elem_id="pictures", elem_classes=small):
                        with gr.Column(min_width=120):
                            full_caption = gr.HTML(looks.caption(FULL, "nothing drawn yet"))
                            full_picture = _picture(FULL, elem_classes="dp-picture")
                        with gr.Column(min_width=120):
                            cached_caption = gr.HTML(looks.caption(CACHED, "nothing drawn yet"))
                            cached_picture = _picture(CACHED, elem_classes="dp-picture")
                    with gr.Tab("Slider"):
                        wipe = gr.ImageSlider(
                            label="Left in full, right cached",
                            type="filepath",
                            format="png",
                            interactive=False,
                            buttons=["fullscreen"],
                            max_height=360,
                            elem_id="wipe",
                            elem_classes=small,
                        )
                    with gr.Tab("Difference"):
                        difference_caption = gr.HTML(looks.caption("Difference", "nothing drawn yet"))
                        difference = _picture("Difference", elem_classes=f"dp-picture {small}")
                key_steps = gr.Slider(
                    1,
                    steps,
                    min(num_key_steps, steps),
                    step=1,
                    label="Key steps, K",
                    info="Computed in full; all others are predicted. It redraws when you let go.",
                    buttons=[],
                    elem_classes="dp-typed",
                )
                with gr.Row(elem_id="curve-head"):
                    gr.HTML("<p class='dp-muted'>PSNR against the full run in dB, by K and T/K. Press a point.</p>")
                    measure = gr.Button("Draw the whole curve", size="sm", min_width=150, scale=0)
                    save = gr.DownloadButton("Save this schedule", interactive=False, size="sm", min_width=150, scale=0)
                curve = gr.HTML(looks.curve({}, 0, steps), js_on_load=looks.PICKS)
                summary = gr.HTML(looks.summary(None, None, steps))

        answer = [full_picture, cached_picture, full_caption, cached_caption, summary]
        answer += [wipe, difference, difference_caption, curve, save]
        artist = _Artist(studio, title)
        asked = [given, seed, key_steps, num_steps]
        together: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "pipeline", "show_progress": "full"}
        together["show_progress_on"] = [full_picture, cached_picture]
        triggers = [button.click] if studio.takes_classes else [button.click, given.submit]
        drawn = [gr.on(triggers, artist.draw, asked, answer, api_name="draw", **together)]
        together["api_visibility"] = "private"
        drawn.append(page.load(artist.draw, asked, answer, **together))
        drawn.append(key_steps.release(artist.redraw, asked, answer, trigger_mode="always_last", **together))
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        chosen = curve.select(_picked, [], [key_steps], **hidden)
        drawn.append(chosen.then(artist.redraw, asked, answer, **together))
        for event in drawn:
            event.success(artist.complete, asked, [curve], **hidden)
        first_drawn = measure.click(artist.draw, asked, answer, **together)
        first_drawn.success(artist.measure, asked, [curve], **hidden)
        dice.click(_another_seed, [], [seed], **hidden)
        page.unload(artist.leave)
        num_steps.change(_limited, [num_steps, key_steps], [key_steps], **hidden)
    look = {"css": looks.CSS, "js": looks.TYPED, "theme": looks.theme(), "footer_links": [], "show_error": True}
    return page, look


class _Artist:
    """What the page's buttons do: they yield what it shows, in the order of `build`'s answer, or the curve alone."""

    def __init__(self, studio: Studio, title: str) -> None:
        self.studio, self.title = studio, title
        self._files = tempfile.TemporaryDirectory(prefix="dpcache-ui-")
        self.folder = Path(self._files.name)
        #: Counts what each page in a browser asks for.
        self._turns: Counter[str | None] = Counter()

    def draw(
        self,
        given: Any,
        seed: float,
        num_key_steps: float,
        num_steps: float,
        page: gr.Request,
        progress: Any = _PROGRESS,
    ) -> Answer:
        """Draws an input in full, unless that was done lately, and with this many key steps."""
        self._turns[page.session_hash] += 1
        with _in_words():
            asked, k = _checked(given, seed, num_key_steps, num_steps)
            if self.studio.remembered(asked) is None:
                yield self._shown(asked, k, None, None)
            full = self.studio.full(asked)
            if self.studio.remembered(asked, k) is None:
                yield self._shown(asked, k, full, None)
            yield self._shown(asked, k, full, self.studio.cached(asked, k))

    def redraw(self, given: Any, seed: float, num_key_steps: float, num_steps: float, page: gr.Request) -> Answer:
        """Draws where only the number of key steps is another: the full run is there."""
        with _in_words():
            asked, _ = _checked(given, seed, num_key_steps, num_steps)
        if self.studio.remembered(asked) is not None:
            yield from self.draw(given, seed, num_key_steps, num_steps, page)

    def complete(
        self, given: Any, seed: float, num_key_steps: float, num_steps: float, page: gr.Request
    ) -> Iterator[str]:
        """The curve of what was just drawn, where a full run does not take long."""
        with _in_words():
            asked, _ = _checked(given, seed, num_key_steps, num_steps)
            full = self.studio.remembered(asked)
        if full is not None and full.seconds <= _QUICK_SECONDS:
            yield from self.measure(given, seed, num_key_steps, num_steps, page)

    def measure(
        self, given: Any, seed: float, num_key_steps: float, num_steps: float, page: gr.Request
    ) -> Iterator[str]:
        """Draws with every number of key steps of the curve, until its page asks for something else, or is closed."""
        turn = self._turns[page.session_hash]
        with _in_words():
            asked, k = _checked(given, seed, num_key_steps, num_steps)
            for other in self.studio.ladder(asked.steps):
                if turn != self._turns[page.session_hash]:
                    return
                self.studio.cached(asked, other)
                yield looks.curve(self.studio.curve(asked), k, asked.steps)

    def leave(self, page: gr.Request) -> None:
        """A page is closed: nobody waits for its curve."""
        self._turns.pop(page.session_hash, None)

    def _shown(self, asked: Asked, k: int, full: Drawn | None, cached: Drawn | None) -> tuple[Any, ...]:
        steps = asked.steps
        about = looks.summary(full, cached, steps)
        curve = looks.curve(self.studio.curve(asked), k, steps)
        save: Any = gr.update(value=None, interactive=False)
        if full is None:
            told = (looks.caption(FULL, "drawing ..."), looks.caption(CACHED, "waiting"))
            return None, None, *told, about, None, None, looks.caption("Difference", "waiting"), curve, save
        whole_run, first = self._written(full.picture), looks.caption_of(FULL, full, steps)
        if cached is None:
            told = (first, looks.caption(CACHED, "drawing ..."))
            return whole_run, None, *told, about, None, None, looks.caption("Difference", "waiting"), curve, save
        second = self._written(cached.picture)
        amplified = amplification(full.picture, [cached.picture])
        differing = self._written(heat(full.picture, cached.picture, amplified) / 255)
        how = looks.caption("Difference", f"times {amplified:,.0f}; black is none")
        if cached.schedule is not None:
            path = Path(tempfile.mkdtemp(dir=self.folder)) / f"{Path(self.title).name}-{k}-of-{steps}.json"
            cached.schedule.save(path)
            save = gr.update(value=str(path), interactive=True)
        told = (first, looks.caption_of(CACHED, cached, steps))
        return whole_run, second, *told, about, (whole_run, second), differing, how, curve, save

    def _written(self, picture: Picture) -> str:
        return str(_write(picture, self.folder))


@contextmanager
def _in_words() -> Iterator[None]:
    """Whatever goes wrong is told on the page; what nobody foresaw is shown in the terminal as well."""
    try:
        yield
    except (gr.Error, GeneratorExit):
        raise
    except (DPCacheError, TypeError, ValueError) as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from error
    except Exception as error:
        raise gr.Error(failure(error).message, duration=None) from error


def _checked(given: Any, seed: float, num_key_steps: float, num_steps: float) -> tuple[Asked, int]:
    """What is asked for.

    Raises:
        TypeError, ValueError: a number that cannot be.
    """
    steps = whole("Steps, T", num_steps, 1)
    return Asked(given, whole("Seed", seed, 0), steps), whole("Key steps, K", num_key_steps, 1, steps)


def _picked(event: gr.EventData) -> int:
    """The K of the point that was pressed."""
    return int(event.k)


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


def _picture(name: str, **more: Any) -> Any:
    return gr.Image(
        label=name,
        show_label=False,
        type="filepath",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        height=_HEIGHT,
        **more,
    )


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
