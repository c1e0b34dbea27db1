"""Dead leaves: pictures of many overlapping textured things, drawn from their captions (`dpcache.zoo.leaves`).

Things are thrown one upon another, at random places and of power-law sizes, as in natural pictures (Lee, Mumford and
Huang, "Occlusion models for natural images", 2001).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dpcache.zoo.leaves import KINDS, TEXTURES, Heap

Floats = npt.NDArray[np.float32]

SIDE = 64
"""Height and width of a picture, pixels."""


@dataclass(frozen=True)
class Heaping:
    """How full the pictures are."""

    things: int
    """How many are thrown, the ground among them; the last ones lie on top."""
    radii: tuple[float, float]
    """Smallest and largest radius, pixels; their density falls with the square of the radius."""
    turn: float
    """How far axes are turned from upright or level at most, radians."""


USUAL = Heaping(things=10, radii=(10.0, 22.0), turn=0.3)
"""What a small denoiser can learn within an hour."""

CROWDED = Heaping(things=22, radii=(7.0, 26.0), turn=np.pi)
"""What teaches an autoencoder most, with edges everywhere."""

PALETTES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "sunset": ((252, 214, 90), (248, 140, 50), (226, 70, 60), (150, 40, 100), (70, 30, 90)),
    "ocean": ((8, 32, 84), (16, 84, 152), (30, 150, 190), (120, 214, 214), (232, 246, 240)),
    "forest": ((18, 52, 30), (44, 100, 48), (104, 150, 60), (176, 196, 104), (94, 66, 40)),
    "candy": ((252, 120, 180), (255, 196, 220), (130, 220, 230), (255, 244, 170), (176, 130, 236)),
    "autumn": ((120, 40, 24), (190, 84, 26), (224, 150, 44), (240, 206, 110), (88, 92, 40)),
    "desert": ((240, 220, 176), (214, 170, 110), (176, 120, 76), (128, 76, 54), (96, 160, 176)),
    "winter": ((246, 250, 254), (196, 220, 240), (132, 172, 212), (76, 104, 156), (34, 44, 82)),
    "berry": ((66, 14, 60), (132, 20, 84), (204, 36, 96), (244, 130, 160), (48, 60, 150)),
    "tropical": ((255, 92, 70), (255, 200, 40), (40, 190, 120), (20, 150, 200), (240, 60, 150)),
    "coal": ((16, 16, 18), (64, 64, 68), (122, 122, 124), (184, 184, 182), (240, 240, 236)),
}
"""Colours of every palette, RGB, 0 to 255."""


def _circle(u: Floats, v: Floats, r: Floats) -> Floats:
    return np.asarray(r - np.hypot(u, v))


def _square(u: Floats, v: Floats, r: Floats) -> Floats:
    return 0.82 * r - np.maximum(np.abs(u), np.abs(v))


def _triangle(u: Floats, v: Floats, r: Floats) -> Floats:
    return 0.58 * r - np.maximum(v, 0.866 * np.abs(u) - 0.5 * v)


def _stick(u: Floats, v: Floats, r: Floats) -> Floats:
    return np.asarray(0.26 * r - np.hypot(np.maximum(np.abs(u) - 0.84 * r, 0), v))


_DISTANCES: dict[str, Callable[[Floats, Floats, Floats], Floats]] = dict(
    zip(KINDS, (_circle, _square, _triangle, _stick), strict=True)
)
"""How many pixels inside a thing a point lies, about; (u, v) from its centre and along its axes, r its radius."""

# A texture is clip(a * wave(u) + b * u / r + c) between two colours.
_TEXTURES: dict[str, tuple[float, float, float]] = {
    "plain": (0, 0, 0),
    "striped": (2.5, 0, 0.5),
    "shaded": (0, 0.6, 0.5),
}


def _wave(phase: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
    """A triangle wave of period 1, -1 to 1."""
    return np.asarray(4 * np.abs(phase - np.rint(phase)) - 1)


class _Throws:
    """Everything that chance decides, for all things of some pictures, (pictures, things, ...)."""

    def __init__(self, heaps: Sequence[Heap], heaping: Heaping, rng: np.random.Generator) -> None:
        size = (len(heaps), heaping.things)
        self.centre = rng.uniform(-6, SIDE + 6, (*size, 2)).astype(np.float32)
        least, most = heaping.radii
        self.radius = (1 / (1 / least - rng.random(size) * (1 / least - 1 / most))).astype(np.float32)
        angle = np.pi / 2 * rng.integers(0, 2, size) + rng.uniform(-heaping.turn, heaping.turn, size)
        self.axis = np.stack([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)
        # Two or three waves to a thing, none so fine that a small autoencoder would lose it.
        period = np.clip(self.radius * rng.uniform(0.7, 0.9, size), 8, 14)
        self.period = period.astype(np.float32)
        self.phase = rng.random(size).astype(np.float32)
        first = rng.integers(0, 5, size)
        second = (first + rng.integers(1, 5, size)) % 5
        palettes = np.array([PALETTES[heap.palette] for heap in heaps], np.float32)
        rows = np.arange(len(heaps))[:, None]
        tint = rng.uniform(-14, 14, (*size, 3)).astype(np.float32)
        self.colour = palettes[rows, first] + tint
        self.other = 0.6 * palettes[rows, second] + 0.4 * self.colour
        named = np.array([TEXTURES.index(heap.texture) for heap in heaps])[:, None]
        texture = np.where(named, named, rng.integers(1, len(TEXTURES), size))
        # The ground, which is all but covered, is not to distract.
        texture[:, 0] = TEXTURES.index("shaded")
        self.texture = np.array([_TEXTURES[name] for name in TEXTURES[1:]], np.float32)[texture - 1]


def _draw(kind: str, throws: _Throws, rows: npt.NDArray[np.intp]) -> npt.NDArray[np.uint8]:
    """Some pictures of one kind of thing, (rows, SIDE, SIDE, 3)."""
    grid = (np.arange(SIDE) + 0.5).astype(np.float32)
    pictures = np.empty((3, len(rows), SIDE, SIDE), np.float32)
    for turn in range(throws.radius.shape[1]):
        x = grid - throws.centre[rows, turn, 0, None]
        y = grid - throws.centre[rows, turn, 1, None]
        cos, sin = throws.axis[rows, turn, 0, None], throws.axis[rows, turn, 1, None]
        u = (x * cos)[:, None, :] + (y * sin)[:, :, None]
        v = (y * cos)[:, :, None] - (x * sin)[:, None, :]
        r = throws.radius[rows, turn, None, None]
        inside = _DISTANCES[kind](u, v, r)
        a, b, c = throws.texture[rows, turn, :, None, None].swapaxes(0, 1)
        period, phase = throws.period[rows, turn, None, None], throws.phase[rows, turn, None, None]
        pattern = np.clip(a * _wave(u / period + phase) + (b / r) * u + c, 0, 1)
        # A darker rim keeps things apart that have one colour.
        light = np.clip(0.55 + 0.25 * inside, 0.55, 1)
        # What lies at the bottom fills the picture.
        covered = np.clip(inside + 0.5, 0, 1) if turn else np.ones_like(inside)
        light = light if turn else np.ones_like(inside)
        for channel, picture in enumerate(pictures):
            colour = throws.colour[rows, turn, channel, None, None]
            shade = (colour + (throws.other[rows, turn, channel, None, None] - colour) * pattern) * light
            picture[:] = shade if turn == 0 else picture + covered * (shade - picture)
    return np.clip(np.rint(pictures), 0, 255).astype(np.uint8).transpose(1, 2, 3, 0)


def render(heaps: Sequence[Heap], *, seed: int, heaping: Heaping = USUAL, chunk: int = 16) -> npt.NDArray[np.uint8]:
    """Draw heaps, the same for the same seed on every machine.

    Args:
        heaps: what to draw.
        seed: seed of all that the captions leave open.
        heaping: how full the pictures are.
        chunk: pictures drawn at once; few stay in the cache of a core.

    Returns:
        (n, SIDE, SIDE, 3), RGB, 0 to 255.
    """
    throws = _Throws(heaps, heaping, np.random.default_rng(seed))
    pictures = np.empty((len(heaps), SIDE, SIDE, 3), np.uint8)
    kinds = np.array([heap.kind for heap in heaps])
    for kind in KINDS:
        chosen = np.flatnonzero(kinds == kind)
        for start in range(0, len(chosen), chunk):
            rows = chosen[start : start + chunk]
            pictures[rows] = _draw(kind, throws, rows)
    return pictures
