"""Does a picture or clip show what its caption or class says? Told by matching renderings, with no network involved.

`python -m training.judge tiny-flux` draws held-out inputs and prints how many came out right.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dpcache.zoo import BUNDLED, Inputs, classes, clips, load_pipeline, shapes
from dpcache.zoo.classes import Class
from dpcache.zoo.clips import Clip
from dpcache.zoo.shapes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIDE, SIZES, Floats, Scene

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Pixels = npt.NDArray[np.uint8]
"""A picture, (SIDE, SIDE, 3), or a clip, (frames, SIDE, SIDE, 3), or several of one kind; RGB, 0 to 255."""
Wanted = Scene | Class | Clip
"""What a caption or class says."""

SHIFTS = np.linspace(-1, 1, 5)
"""Displacements of the centre to try in x and in y, pixels."""
RADIUS_FACTORS = (0.94, 1.0, 1.06)
"""Factors on the radius to try."""
CLIP_SHIFTS = np.arange(-7, 8)
"""Displacements from the middle to try in x and in y in every frame of a clip, pixels."""
LEAST_TRAVEL = clips.TRAVEL / 2
"""Way, in pixels, below which a shape does not move in a direction."""
TONES = (0.85, 1.15)
"""Least and most brightness of a background, as a factor; wider, and white, grey and black would be one."""
LARGEST_ERROR = 0.1
"""Root mean square difference (of values 0 to 1) above which a picture shows no shape at all, whatever fits it best."""
SHOWN = ("shape", "colour", "direction")
"""What a picture or clip must have right, of what is wanted."""


@dataclass(frozen=True)
class Verdict:
    """What a picture or clip was found to show."""

    shape: str
    colour: str
    background: str
    error: float
    """Root mean square difference from the best matching rendering, of values 0 to 1."""
    direction: str | None = None
    """Where the shape moves; none in a picture, or if it hardly moves."""

    def has(self, name: str, wanted: Wanted) -> bool:
        """Whether one of the choices in `wanted` is right, or left open there."""
        return not hasattr(wanted, name) or getattr(self, name) == getattr(wanted, name)

    def shows(self, wanted: Wanted) -> bool:
        """Whether shape, colour and direction are those wanted, and clearly drawn."""
        return self.error <= LARGEST_ERROR and all(self.has(name, wanted) for name in SHOWN)


_BACKGROUND_PIXELS: Floats = np.stack(list(BACKGROUNDS.values())).reshape(len(BACKGROUNDS), -1)


@dataclass(frozen=True)
class _Candidates:
    """Every shape near one place and size, (candidates, pixels), and what its fits share."""

    masks: Floats
    inside: Floats
    """Sum of mask², (candidates, 1)."""
    across: Floats
    """Sum of mask (1 - mask) background, (candidates, backgrounds)."""
    outside: Floats
    """Sum of (1 - mask)² background², (candidates, backgrounds)."""


@lru_cache(maxsize=64)
def _candidates(size: str, position: str) -> _Candidates:
    centre = Scene(size, "red", "circle", "grey", position).centre
    x, y, factor = (grid.ravel() for grid in np.meshgrid(SHIFTS, SHIFTS, RADIUS_FACTORS, indexing="ij"))
    centres = np.stack([centre[0] + x, centre[1] + y], axis=1).astype(np.float32)
    radii = (SIZES[size] * factor).astype(np.float32)
    return _cover(SHAPES, centres, radii)


@lru_cache(maxsize=1)
def _clip_candidates() -> tuple[_Candidates, Floats]:
    """Every shape of the clips near the middle, and where, (places, 2)."""
    x, y, factor = (grid.ravel() for grid in np.meshgrid(CLIP_SHIFTS, CLIP_SHIFTS, RADIUS_FACTORS, indexing="ij"))
    centres = SIDE / 2 + np.stack([x, y], axis=1).astype(np.float32)
    return _cover(clips.SHAPES, centres, (clips.RADIUS * factor).astype(np.float32)), centres


def _cover(names: Iterable[str], centres: Floats, radii: Floats) -> _Candidates:
    """Each shape at each centre with its radius, shape by shape."""
    masks = np.concatenate([shapes.coverage(shape, centres, radii).reshape(len(radii), -1) for shape in names])
    return _Candidates(
        masks=masks,
        inside=(masks**2).sum(axis=1)[:, None],
        across=(masks * (1 - masks)) @ _BACKGROUND_PIXELS.T,
        outside=(1 - masks) ** 2 @ (_BACKGROUND_PIXELS**2).T,
    )


def _fit(picture: Floats, candidates: _Candidates) -> tuple[Floats, Floats]:
    """Least squares fit of `mask * colour + (1 - mask) * tone * background`, colour and tone unknown.

    Args:
        picture: (pixels, 3), 0 to 1.
        candidates: the masks to try.

    Returns:
        Squared errors (candidates, backgrounds) and colours (candidates, backgrounds, 3).
    """
    inside, across, outside = candidates.inside, candidates.across, candidates.outside
    under_mask = (candidates.masks @ picture)[:, None, :]
    shaded = _BACKGROUND_PIXELS * picture.sum(axis=1)
    around = shaded.sum(axis=1) - candidates.masks @ shaded.T
    # Normal equations: inside colour + across tone = under_mask, across sum(colour) + 3 outside tone = around.
    tone = (around - across * under_mask.sum(axis=2) / inside) / (3 * (outside - across**2 / inside))
    tone = tone.clip(*TONES)
    colour = (under_mask - (across * tone)[..., None]) / inside[..., None]
    explained = 2 * ((under_mask * colour).sum(axis=2) + around * tone)
    square = inside * (colour**2).sum(axis=2) + 2 * across * tone * colour.sum(axis=2) + 3 * outside * tone**2
    return (picture**2).sum() - explained + square, colour


def _name_colour(value: Floats) -> str:
    distances = {name: float(np.square(value - np.array(rgb) / 255).sum()) for name, rgb in COLOURS.items()}
    return min(distances, key=lambda name: distances[name])


def judge(picture: Pixels, scene: Scene) -> Verdict:
    """Find the shape, colour and background that match a picture best.

    Of the scene, only size and position are used, as the region to search.

    Args:
        picture: (SIDE, SIDE, 3), RGB, 0 to 255.
        scene: what the caption says.
    """
    return _judge_at(picture, scene.size, scene.position)


def judge_anywhere(picture: Pixels) -> Verdict:
    """Find the shape, colour and background that match a picture best, of any size in any position.

    Args:
        picture: (SIDE, SIDE, 3), RGB, 0 to 255.
    """
    verdicts = itertools.starmap(partial(_judge_at, picture), itertools.product(SIZES, POSITIONS))
    return min(verdicts, key=lambda verdict: verdict.error)


def _judge_at(picture: Pixels, size: str, position: str) -> Verdict:
    values = _values(picture)
    error, colour = _fit(values, _candidates(size, position))
    best, background = np.unravel_index(int(error.argmin()), error.shape)
    names = list(SHAPES)
    return Verdict(
        shape=names[best * len(names) // len(error)],
        colour=_name_colour(colour[best, background]),
        background=list(BACKGROUNDS)[background],
        error=float(np.sqrt(max(0.0, float(error[best, background])) / values.size)),
    )


def judge_clip(frames: Pixels) -> Verdict:
    """Find the shape, colour, background and direction that match a clip best.

    Shape and background are the same in all frames; in each the shape may be anywhere near the middle.

    Args:
        frames: (frames, SIDE, SIDE, 3), RGB, 0 to 255.
    """
    candidates, centres = _clip_candidates()
    fits = [_fit(_values(frame), candidates) for frame in frames]
    errors = np.stack([error.reshape(len(clips.SHAPES), len(centres), -1) for error, _ in fits])
    total = errors.min(axis=2).sum(axis=0)
    shape, background = np.unravel_index(int(total.argmin()), total.shape)
    places = errors[:, shape, :, background].argmin(axis=1)
    row = shape * len(centres)
    colour = np.mean([colour[row + place, background] for (_, colour), place in zip(fits, places, strict=True)], axis=0)
    return Verdict(
        shape=clips.SHAPES[shape],
        colour=_name_colour(colour),
        background=list(BACKGROUNDS)[background],
        error=float(np.sqrt(max(0.0, float(total[shape, background])) / frames.size)),
        direction=_name_direction(centres[places[-1]] - centres[places[0]]),
    )


def _name_direction(way: Floats) -> str | None:
    travels = {name: float(way @ np.array(step)) for name, step in clips.DIRECTIONS.items()}
    best = max(travels, key=lambda name: travels[name])
    return best if travels[best] >= LEAST_TRAVEL else None


def _values(picture: Pixels) -> Floats:
    """(pixels, 3), 0 to 1."""
    return (picture.reshape(SIDE * SIDE, 3) / 255).astype(np.float32)


def draw(
    pipeline: "DiffusionPipeline", inputs: Sequence[Inputs], *, seed: int = 0, batch: int = 25, **call: Any
) -> Pixels:
    """Draw captions or classes, each from noise of its own seed whatever the batch.

    Returns:
        (n, SIDE, SIDE, 3), or (n, frames, SIDE, SIDE, 3) for clips, 0 to 255.
    """
    import torch

    drawn: list[Floats] = []
    for start in range(0, len(inputs), batch):
        some = inputs[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + row) for row in range(len(some))]
        arguments = {**_together(some), "generator": generators, "output_type": "np", **call}
        drawn.append(pipeline(**arguments)[0])
    return np.rint(np.concatenate(drawn) * 255).astype(np.uint8)


def _together(inputs: Sequence[Inputs]) -> dict[str, Any]:
    """Arguments of one call that draws all the inputs."""
    if isinstance(inputs[0], str):
        return {"prompt": list(inputs), "height": SIDE, "width": SIDE}
    return {"class_labels": [label for item in inputs if isinstance(item, dict) for label in item["class_labels"]]}


def reconstruction_psnr(pipeline: "DiffusionPipeline", drawn: Pixels) -> float:
    """Mean peak signal-to-noise ratio of several pictures or clips through the autoencoder, decibels."""
    import torch

    pixels = torch.from_numpy(np.moveaxis(drawn, -1, 1)).to(pipeline.vae.device) / 255
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels * 2 - 1).latent_dist.mean
        decoded = (pipeline.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    error = (decoded - pixels).square().flatten(1).mean(dim=1)
    return float((-10 * error.log10()).mean())


def fresh_pictures(count: int) -> Pixels:
    """Pictures of held-out captions that no training has seen."""
    return shapes.render([shapes.parse(caption) for caption in shapes.split_captions()[1][:count]], seed=1_000_003)


def fresh_clips(count: int) -> Pixels:
    """Clips of held-out captions that no training has seen."""
    return clips.render([clips.parse(caption) for caption in clips.split_captions()[1][:count]], seed=1_000_003)


@dataclass(frozen=True)
class Task:
    """What a model has to draw, and how that is judged."""

    wanted: Callable[[Any], Wanted]
    """What an input says."""
    judge: Callable[[Pixels, Any], Verdict]
    """What was drawn for something wanted, (drawn, wanted)."""
    fresh: Callable[[int], Pixels]
    """So many of what the autoencoder should reconstruct."""


TASKS = {
    "tiny-flux": Task(shapes.parse, judge, fresh_pictures),
    "tiny-dit": Task(
        lambda item: classes.CLASSES[item["class_labels"][0]], lambda drawn, _: judge_anywhere(drawn), fresh_pictures
    ),
    "tiny-hunyuan-video": Task(clips.parse, lambda drawn, _: judge_clip(drawn), fresh_clips),
}
"""The task of every bundled model, by name."""


def save_sheet(pictures: Pixels, path: Path, columns: int = 20, scale: int = 3) -> None:
    """Save pictures side by side, enlarged without smoothing."""
    from PIL import Image

    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * columns, SIDE + 2, SIDE + 2, 3), 128, np.uint8)
    sheet[: len(pictures), 1:-1, 1:-1] = pictures
    sheet = sheet.reshape(rows, columns, SIDE + 2, SIDE + 2, 3).swapaxes(1, 2)
    image = Image.fromarray(sheet.reshape(rows * (SIDE + 2), columns * (SIDE + 2), 3))
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.judge",
        description="Draw held-out inputs and count the pictures or clips that show what they should.",
        epilog="example: python -m training.judge tiny-flux --count 200 --sheet sheet.png",
    )
    parser.add_argument("model", choices=list(TASKS), help="which model")
    parser.add_argument("--path", help="a pipeline directory to judge in place of the bundled one")
    parser.add_argument("--count", type=int, default=100, help="how many inputs [100]")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps [50]")
    parser.add_argument("--pad", type=int, help="max_sequence_length of the call, for captions")
    parser.add_argument("--guidance", type=float, help="guidance_scale of the call, for classes")
    parser.add_argument("--sheet", type=Path, help="save all the pictures in one image")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge as the command line says; returns the exit status."""
    options = _parse(arguments)
    bundled, task = BUNDLED[options.model], TASKS[options.model]
    pipeline = load_pipeline(options.path or options.model)
    pipeline.set_progress_bar_config(desc="drawing", leave=False)
    inputs = bundled.held_out_inputs(options.count)
    given = {"max_sequence_length": options.pad, "guidance_scale": options.guidance}
    call = {**bundled.call_defaults, **{name: value for name, value in given.items() if value is not None}}
    drawn = draw(pipeline, inputs, num_inference_steps=options.steps, **call)
    wanted = [task.wanted(item) for item in inputs]
    pairs = [(task.judge(one, asked), asked) for one, asked in zip(drawn, wanted, strict=True)]
    print(f"{options.count} held-out inputs, {options.steps} steps, {call}")
    print(f"{'all right':24s}{np.mean([verdict.shows(asked) for verdict, asked in pairs]):8.1%}")
    for name in (*SHOWN, "background"):
        if hasattr(wanted[0], name):
            print(f"{name + ' right':24s}{np.mean([verdict.has(name, asked) for verdict, asked in pairs]):8.1%}")
    print(f"{'median match error':24s}{np.median([verdict.error for verdict, _ in pairs]):8.3f}")
    print(f"{'autoencoder PSNR':24s}{reconstruction_psnr(pipeline, task.fresh(100)):8.1f} dB")
    for verdict, asked in pairs:
        if not verdict.shows(asked):
            print(f"wrong: {asked.caption}: {verdict}")
    if options.sheet:
        frames = drawn.shape[1] if drawn.ndim == 5 else 1
        save_sheet(drawn.reshape(-1, SIDE, SIDE, 3), options.sheet, columns=frames * (20 // frames))
    return 0


if __name__ == "__main__":
    sys.exit(main())
