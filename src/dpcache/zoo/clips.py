"""Captioned clips of one coloured shape crossing a plain background: what the bundled video model learns to draw.

A caption reads "a red ring moving left on a black background".
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from dpcache.zoo import shapes
from dpcache.zoo.shapes import SIDE, Floats

FRAMES = 9
"""Frames of a clip."""

COLOURS = ("red", "yellow", "green", "cyan", "blue", "pink")
SHAPES = ("circle", "square", "triangle", "ring", "cross", "heart")
BACKGROUNDS = ("white", "grey", "black")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Direction words and the way (x, y) the shape moves, with y pointing down."""

RADIUS = 8.0
"""Radius of the circle around the shape, pixels."""
TRAVEL = 12.0
"""Way of the centre from the first frame to the last, through the middle of the picture, pixels."""


@dataclass(frozen=True)
class Clip:
    """What one caption says, a word for each of its four choices."""

    colour: str
    shape: str
    direction: str
    background: str

    @property
    def caption(self) -> str:
        """The caption as the model reads it."""
        return f"a {self.colour} {self.shape} moving {self.direction} on a {self.background} background"


@cache
def all_clips() -> dict[str, Clip]:
    """Every clip the grammar can say, by caption."""
    choices = itertools.product(COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS)
    return {clip.caption: clip for clip in itertools.starmap(Clip, choices)}


def parse(caption: str) -> Clip:
    """The clip a caption describes.

    Raises:
        ValueError: if the grammar cannot say `caption`.
    """
    clip = all_clips().get(caption)
    if clip is None:
        example = next(iter(all_clips()))
        raise ValueError(f"not a caption of the clips grammar: {caption!r}; a valid one is {example!r}")
    return clip


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


@cache
def split_captions() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Training and held-out captions, each in a fixed shuffled order; a hash holds out one caption in four."""
    shuffled = sorted(all_clips(), key=lambda caption: _digest("order " + caption))
    held_out = tuple(caption for caption in shuffled if _digest(caption)[0] % 4 == 0)
    return tuple(caption for caption in shuffled if _digest(caption)[0] % 4), held_out


def render(clips: Sequence[Clip], *, seed: int) -> npt.NDArray[np.uint8]:
    """Draw clips with natural variation, the same for the same seed on every machine.

    Args:
        clips: what to draw.
        seed: seed of the variation in place, size, colour and tone (`shapes.JITTER`), which a clip keeps throughout.

    Returns:
        (n, FRAMES, SIDE, SIDE, 3), RGB, 0 to 255.
    """
    jitter = np.random.default_rng(seed).uniform(-1, 1, size=(len(clips), 7)).astype(np.float32)
    frames = [_render_one(clip, some) for clip, some in zip(clips, jitter, strict=True)]
    return np.stack(frames) if frames else np.empty((0, FRAMES, SIDE, SIDE, 3), np.uint8)


def _render_one(clip: Clip, jitter: Floats) -> npt.NDArray[np.uint8]:
    way = TRAVEL * np.linspace(-0.5, 0.5, FRAMES, dtype=np.float32)[:, None]
    centres = SIDE / 2 + way * np.array(DIRECTIONS[clip.direction]) + shapes.JITTER["shift"] * jitter[0:2]
    radii = np.full(FRAMES, RADIUS * (1 + shapes.JITTER["radius"] * jitter[2]), np.float32)
    colour = np.array(shapes.COLOURS[clip.colour], np.float32) + shapes.JITTER["colour"] * jitter[3:6]
    background = 255 * (1 + shapes.JITTER["tone"] * jitter[6]) * shapes.BACKGROUNDS[clip.background]
    return shapes.paint(shapes.coverage(clip.shape, centres, radii), colour[None], background[None])
