"""Captioned pictures of one coloured shape on a patterned background: what the bundled models learn to draw.

A caption reads "a small red ring on a striped background, top left". Only the shape has a colour word and the
backgrounds are grey, so the words say all there is to say in any order: a text encoder without word order can follow.
"""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

SIDE = 32
"""Height and width of a picture, pixels."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 36, 36),
    "orange": (247, 138, 20),
    "yellow": (252, 226, 40),
    "green": (34, 164, 62),
    "cyan": (38, 205, 215),
    "blue": (38, 72, 226),
    "purple": (132, 42, 182),
    "pink": (252, 130, 192),
}
"""Colour words and their RGB values, 0 to 255."""

SIZES: dict[str, float] = {"small": 6.0, "medium": 8.25, "large": 11.0}
"""Size words and the radius of the circle around the shape, pixels."""

POSITIONS: dict[str, tuple[int, int]] = {
    "top left": (-1, -1),
    "top": (0, -1),
    "top right": (1, -1),
    "left": (-1, 0),
    "center": (0, 0),
    "right": (1, 0),
    "bottom left": (-1, 1),
    "bottom": (0, 1),
    "bottom right": (1, 1),
}
"""Position words and the direction (x, y) in which the shape is pushed towards the border."""

JITTER = {"shift": 0.75, "radius": 0.05, "colour": 8.0, "tone": 0.06}
"""Largest natural variation: of the centre (pixels), radius (fraction), colour (0 to 255), background (fraction)."""

_MARGIN = 1.0
_SUPERSAMPLING = 3


def _circle(u: Floats, v: Floats) -> npt.NDArray[np.bool_]:
    return u**2 + v**2 <= 1


def _square(u: Floats, v: Floats) -> npt.NDArray[np.bool_]:
    return np.maximum(np.abs(u), np.abs(v)) <= 0.84


def _triangle(u: Floats, v: Floats) -> npt.NDArray[np.bool_]:
    return (v <= 0.8) & (np.abs(u) <= 0.56 * (v + 1))


def _diamond(u: Floats, v: Floats) -> npt.NDArray[np.bool_]:
    return 1.35 * np.abs(u) + np.abs(v) <= 1


def _ring(u: Floats, v: Floats) -> npt.NDArray[np.bool_]:
    distance = u**2 + v**2
    return (distance <= 1) & (distance >= 0.56**2)


def _cross(u: Floats, v: Floats) -> npt.NDArray[np.bool_]:
    short, long = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
    return (short <= 0.32) & (long <= 0.98)


def _star(u: Floats, v: Floats) -> npt.NDArray[np.bool_]:
    # Fold the plane into one half of one of the five arms, where the outline is a single straight edge.
    angle = np.arctan2(u, -v)
    fifth = 2 * np.pi / 5
    angle = np.abs((angle + fifth / 2) % fifth - fifth / 2)
    distance = np.hypot(u, v)
    x, y = distance * np.cos(angle), distance * np.sin(angle)
    inner_x, inner_y = 0.45 * np.cos(fifth / 2), 0.45 * np.sin(fifth / 2)
    return np.asarray((x - 1) * inner_y - y * (inner_x - 1) <= 0)


def _heart(u: Floats, v: Floats) -> npt.NDArray[np.bool_]:
    x, y = 1.2 * u, -1.2 * v + 0.12
    return (x**2 + y**2 - 1) ** 3 <= x**2 * y**3


def _crescent(u: Floats, v: Floats) -> npt.NDArray[np.bool_]:
    return (u**2 + v**2 <= 1) & ((u - 0.5) ** 2 + v**2 >= 0.8**2)


SHAPES: dict[str, Callable[[Floats, Floats], npt.NDArray[np.bool_]]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "ring": _ring,
    "cross": _cross,
    "star": _star,
    "heart": _heart,
    "crescent": _crescent,
}
"""Shape words and whether a point (u, v), in radii from the centre with v pointing down, lies inside."""


def _tiles(rows: npt.NDArray[np.bool_], columns: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    return rows[:, None] ^ columns[None, :]


def _backgrounds() -> dict[str, Floats]:
    pixel = np.arange(SIDE)
    odd = (pixel // 4) % 2 == 1
    dot = np.isin(pixel % 8, (3, 4))
    ramp = np.linspace(0.85, 0.3, SIDE)[:, None].repeat(SIDE, axis=1)
    pictures = {
        "white": np.full((SIDE, SIDE), 0.94),
        "grey": np.full((SIDE, SIDE), 0.52),
        "black": np.full((SIDE, SIDE), 0.07),
        "striped": np.where(odd[:, None].repeat(SIDE, axis=1), 0.46, 0.72),
        "checkered": np.where(_tiles(odd, odd), 0.2, 0.42),
        "dotted": np.where(dot[:, None] & dot[None, :], 0.4, 0.84),
        "shaded": ramp,
    }
    return {name: picture.astype(np.float32) for name, picture in pictures.items()}


BACKGROUNDS: dict[str, Floats] = _backgrounds()
"""Background words and their grey pictures, (SIDE, SIDE), 0 to 1."""


@dataclass(frozen=True)
class Scene:
    """What one caption says, a word for each of its five choices."""

    size: str
    colour: str
    shape: str
    background: str
    position: str

    @property
    def caption(self) -> str:
        """The caption as the models read it."""
        return f"a {self.size} {self.colour} {self.shape} on a {self.background} background, {self.position}"

    @property
    def centre(self) -> tuple[float, float]:
        """Centre (x, y) of the shape before jitter, pixels from the top left corner of the picture."""
        push = SIDE / 2 - _MARGIN - SIZES[self.size]
        x, y = POSITIONS[self.position]
        return SIDE / 2 + push * x, SIDE / 2 + push * y


@cache
def all_scenes() -> dict[str, Scene]:
    """Every scene the grammar can say, by caption."""
    choices = itertools.product(SIZES, COLOURS, SHAPES, BACKGROUNDS, POSITIONS)
    return {scene.caption: scene for scene in itertools.starmap(Scene, choices)}


def parse(caption: str) -> Scene:
    """The scene a caption describes.

    Raises:
        ValueError: if the grammar cannot say `caption`.
    """
    scene = all_scenes().get(caption)
    if scene is None:
        example = next(iter(all_scenes()))
        raise ValueError(f"not a caption of the shapes grammar: {caption!r}; a valid one is {example!r}")
    return scene


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


@cache
def split_captions() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Training and held-out captions, each in a fixed shuffled order.

    A hash of the caption decides, so the split is the same on every machine and in every release; one caption in
    sixteen is held out.
    """
    shuffled = sorted(all_scenes(), key=lambda caption: _digest("order " + caption))
    held_out = tuple(caption for caption in shuffled if _digest(caption)[0] % 16 == 0)
    return tuple(caption for caption in shuffled if _digest(caption)[0] % 16), held_out


def coverage(shape: str, centres: Floats, radii: Floats) -> Floats:
    """How much of each pixel a shape covers, by supersampling.

    Args:
        shape: a key of `SHAPES`.
        centres: (n, 2), x and y in pixels.
        radii: (n,), pixels.

    Returns:
        (n, SIDE, SIDE), 0 to 1.
    """
    fine = SIDE * _SUPERSAMPLING
    grid = ((np.arange(fine) + 0.5) / _SUPERSAMPLING).astype(np.float32)
    radii = radii.astype(np.float32)[:, None, None]
    u = (grid[None, None, :] - centres[:, 0, None, None].astype(np.float32)) / radii
    v = (grid[None, :, None] - centres[:, 1, None, None].astype(np.float32)) / radii
    inside = SHAPES[shape](u, v).reshape(-1, SIDE, _SUPERSAMPLING, SIDE, _SUPERSAMPLING)
    covered: Floats = inside.mean(axis=(2, 4), dtype=np.float32)
    return covered


def paint(covered: Floats, colours: Floats, backgrounds: Floats) -> npt.NDArray[np.uint8]:
    """Blend a colour into a grey background where a shape covers it.

    Args:
        covered: (n, SIDE, SIDE), 0 to 1.
        colours: (n or 1, 3), about 0 to 255.
        backgrounds: (n or 1, SIDE, SIDE), about 0 to 255.

    Returns:
        (n, SIDE, SIDE, 3), RGB, 0 to 255.
    """
    alpha = covered[..., None]
    pictures = alpha * colours[:, None, None, :] + (1 - alpha) * backgrounds[..., None]
    pixels: npt.NDArray[np.uint8] = np.clip(np.rint(pictures), 0, 255).astype(np.uint8)
    return pixels


def _render_chunk(scenes: Sequence[Scene], jitter: Floats) -> npt.NDArray[np.uint8]:
    centres = np.array([scene.centre for scene in scenes], np.float32) + JITTER["shift"] * jitter[:, 0:2]
    radii = np.array([SIZES[scene.size] for scene in scenes], np.float32) * (1 + JITTER["radius"] * jitter[:, 2])
    colours = np.array([COLOURS[scene.colour] for scene in scenes], np.float32) + JITTER["colour"] * jitter[:, 3:6]
    tones = 255 * (1 + JITTER["tone"] * jitter[:, 6])
    backgrounds = np.stack([BACKGROUNDS[scene.background] for scene in scenes]) * tones[:, None, None]
    covered = np.empty((len(scenes), SIDE, SIDE), np.float32)
    names = np.array([scene.shape for scene in scenes])
    for shape in np.unique(names):
        chosen = names == shape
        covered[chosen] = coverage(str(shape), centres[chosen], radii[chosen])
    return paint(covered, colours, backgrounds)


def render(scenes: Sequence[Scene], *, seed: int) -> npt.NDArray[np.uint8]:
    """Draw scenes with natural variation, the same for the same seed on every machine.

    Args:
        scenes: what to draw.
        seed: seed of the variation in place, size, colour and tone (`JITTER`).

    Returns:
        (n, SIDE, SIDE, 3), RGB, 0 to 255.
    """
    jitter = np.random.default_rng(seed).uniform(-1, 1, size=(len(scenes), 7)).astype(np.float32)
    chunks = [slice(start, start + 512) for start in range(0, len(scenes), 512)]
    empty = np.empty((0, SIDE, SIDE, 3), np.uint8)
    return np.concatenate([empty, *(_render_chunk(scenes[chunk], jitter[chunk]) for chunk in chunks)])
