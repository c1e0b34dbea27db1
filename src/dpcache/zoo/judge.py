"""Does a picture show what its caption or class says? Told by matching renderings, with no network involved.

`python -m dpcache.zoo.judge tiny-flux` draws held-out inputs and prints how many came out right.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dpcache.zoo import BUNDLED, Inputs, classes, load_pipeline, shapes
from dpcache.zoo.classes import Class
from dpcache.zoo.shapes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIDE, SIZES, Floats, Scene

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SHIFTS = np.linspace(-1, 1, 5)
"""Displacements of the centre to try in x and in y, pixels."""
RADIUS_FACTORS = (0.94, 1.0, 1.06)
"""Factors on the radius to try."""
TONES = (0.85, 1.15)
"""Least and most brightness of a background, as a factor; wider, and white, grey and black would be one."""
LARGEST_ERROR = 0.1
"""Root mean square difference (of values 0 to 1) above which a picture shows no shape at all, whatever fits it best."""


@dataclass(frozen=True)
class Verdict:
    """What a picture was found to show."""

    shape: str
    colour: str
    background: str
    error: float
    """Root mean square difference from the best matching rendering, of values 0 to 1."""

    def shows(self, scene: Scene | Class) -> bool:
        """Whether shape and colour are those of the scene or class, and clearly drawn."""
        return self.error <= LARGEST_ERROR and (self.shape, self.colour) == (scene.shape, scene.colour)


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
    masks = np.concatenate([shapes.coverage(shape, centres, radii).reshape(len(radii), -1) for shape in SHAPES])
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


def judge(picture: npt.NDArray[np.uint8], scene: Scene) -> Verdict:
    """Find the shape, colour and background that match a picture best.

    Of the scene, only size and position are used, as the region to search.

    Args:
        picture: (SIDE, SIDE, 3), RGB, 0 to 255.
        scene: what the caption says.
    """
    return _judge_at(picture, scene.size, scene.position)


def judge_anywhere(picture: npt.NDArray[np.uint8]) -> Verdict:
    """Find the shape, colour and background that match a picture best, of any size in any position.

    Args:
        picture: (SIDE, SIDE, 3), RGB, 0 to 255.
    """
    verdicts = itertools.starmap(partial(_judge_at, picture), itertools.product(SIZES, POSITIONS))
    return min(verdicts, key=lambda verdict: verdict.error)


def _judge_at(picture: npt.NDArray[np.uint8], size: str, position: str) -> Verdict:
    values = (picture.reshape(SIDE * SIDE, 3) / 255).astype(np.float32)
    error, colour = _fit(values, _candidates(size, position))
    best, background = np.unravel_index(int(error.argmin()), error.shape)
    names = list(SHAPES)
    return Verdict(
        shape=names[best * len(names) // len(error)],
        colour=_name_colour(colour[best, background]),
        background=list(BACKGROUNDS)[background],
        error=float(np.sqrt(max(0.0, float(error[best, background])) / values.size)),
    )


def draw(
    pipeline: "DiffusionPipeline", inputs: Sequence[Inputs], *, seed: int = 0, batch: int = 25, **call: Any
) -> npt.NDArray[np.uint8]:
    """Draw captions or classes, each from noise of its own seed whatever the batch: (n, SIDE, SIDE, 3), 0 to 255."""
    import torch

    pictures = [np.empty((0, SIDE, SIDE, 3), np.float32)]
    for start in range(0, len(inputs), batch):
        some = inputs[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + row) for row in range(len(some))]
        pictures.append(pipeline(generator=generators, output_type="np", **_together(some), **call).images)
    return np.rint(np.concatenate(pictures) * 255).astype(np.uint8)


def _together(inputs: Sequence[Inputs]) -> dict[str, Any]:
    """Arguments of one call that draws all the inputs."""
    if isinstance(inputs[0], str):
        return {"prompt": list(inputs), "height": SIDE, "width": SIDE}
    return {"class_labels": [label for item in inputs if isinstance(item, dict) for label in item["class_labels"]]}


def reconstruction_psnr(pipeline: "DiffusionPipeline", count: int = 200) -> float:
    """Mean peak signal-to-noise ratio of fresh held-out pictures through the autoencoder, decibels."""
    import torch

    scenes = [shapes.parse(caption) for caption in shapes.split_captions()[1][:count]]
    pixels = torch.from_numpy(shapes.render(scenes, seed=1_000_003)).permute(0, 3, 1, 2).to(pipeline.vae.device) / 255
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels * 2 - 1).latent_dist.mean
        decoded = (pipeline.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    error = (decoded - pixels).square().mean(dim=(1, 2, 3))
    return float((-10 * error.log10()).mean())


def save_sheet(pictures: npt.NDArray[np.uint8], path: Path, columns: int = 20, scale: int = 3) -> None:
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
        prog="python -m dpcache.zoo.judge",
        description="Draw held-out inputs and count the pictures that show the right shape in the right colour.",
        epilog="example: python -m dpcache.zoo.judge tiny-flux --count 200 --sheet sheet.png",
    )
    parser.add_argument("model", choices=list(BUNDLED), help="which model")
    parser.add_argument("--path", help="a pipeline directory to judge in place of the bundled one")
    parser.add_argument("--count", type=int, default=200, help="how many inputs [200]")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps [50]")
    parser.add_argument("--pad", type=int, help="max_sequence_length of the call, for captions [32]")
    parser.add_argument("--guidance", type=float, help="guidance_scale of the call, for classes [3]")
    parser.add_argument("--sheet", type=Path, help="save all the pictures in one image")
    return parser.parse_args(arguments)


def _wanted(item: Inputs) -> Scene | Class:
    return shapes.parse(item) if isinstance(item, str) else classes.CLASSES[item["class_labels"][0]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge as the command line says; returns the exit status."""
    options = _parse(arguments)
    bundled = BUNDLED[options.model]
    pipeline = load_pipeline(options.path or options.model)
    pipeline.set_progress_bar_config(desc="drawing", leave=False)
    inputs = bundled.held_out_inputs(options.count)
    given = {"max_sequence_length": options.pad, "guidance_scale": options.guidance}
    call = {**bundled.call_defaults, **{name: value for name, value in given.items() if value is not None}}
    pictures = draw(pipeline, inputs, num_inference_steps=options.steps, **call)
    scenes = [_wanted(item) for item in inputs]
    pairs = [
        (judge(picture, scene) if isinstance(scene, Scene) else judge_anywhere(picture), scene)
        for picture, scene in zip(pictures, scenes, strict=True)
    ]
    figures = {
        "shape and colour right": np.mean([verdict.shows(scene) for verdict, scene in pairs]),
        "shape right": np.mean([verdict.shape == scene.shape for verdict, scene in pairs]),
        "colour right": np.mean([verdict.colour == scene.colour for verdict, scene in pairs]),
    }
    backgrounds = [verdict.background == scene.background for verdict, scene in pairs if isinstance(scene, Scene)]
    if backgrounds:
        figures["background right"] = np.mean(backgrounds)
    print(f"{options.count} held-out inputs, {options.steps} steps, {call}")
    for name, value in figures.items():
        print(f"{name:24s}{value:8.1%}")
    print(f"{'median match error':24s}{np.median([verdict.error for verdict, _ in pairs]):8.3f}")
    print(f"{'autoencoder PSNR':24s}{reconstruction_psnr(pipeline):8.1f} dB")
    for verdict, scene in pairs:
        if not verdict.shows(scene):
            print(f"wrong: {scene.caption}: {verdict.colour} {verdict.shape}, error {verdict.error:.3f}")
    if options.sheet:
        save_sheet(pictures, options.sheet)
    return 0


if __name__ == "__main__":
    sys.exit(main())
