"""Captions of heaps of textured things, of which the words leave most open: what the hard models learn to draw.

A caption reads "a heap of striped circles in ocean colours". Where they lie, how large and in which order is
left to chance, so a sampler has to decide it.
"""

import hashlib
import itertools
from dataclasses import dataclass
from functools import cache

KINDS = ("circles", "squares", "triangles", "sticks")
"""What a heap is made of."""

TEXTURES = ("", "plain", "striped", "shaded")
"""What covers the things; with no word each of them has a texture of its own."""

PALETTES = ("sunset", "ocean", "forest", "candy", "autumn", "desert", "winter", "berry", "tropical", "coal")
"""Where the colours come from."""


@dataclass(frozen=True)
class Heap:
    """What one caption says."""

    texture: str
    kind: str
    palette: str

    @property
    def caption(self) -> str:
        """The caption as the models read it."""
        things = f"{self.texture} {self.kind}".strip()
        return f"a heap of {things} in {self.palette} colours"


@cache
def all_heaps() -> dict[str, Heap]:
    """Every heap the grammar can say, by caption."""
    choices = itertools.product(TEXTURES, KINDS, PALETTES)
    return {heap.caption: heap for heap in itertools.starmap(Heap, choices)}


def parse(caption: str) -> Heap:
    """The heap a caption describes.

    Raises:
        ValueError: if the grammar cannot say `caption`.
    """
    heap = all_heaps().get(caption)
    if heap is None:
        example = next(reversed(all_heaps()))
        raise ValueError(f"not a caption of the leaves grammar: {caption!r}; a valid one is {example!r}")
    return heap


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


@cache
def split_captions() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Training and held-out captions, each in a fixed shuffled order; a hash of the caption decides, about 1 in 5."""
    shuffled = sorted(all_heaps(), key=lambda caption: _digest("order " + caption))
    held_out = tuple(caption for caption in shuffled if _digest(caption)[0] % 5 == 0)
    return tuple(caption for caption in shuffled if _digest(caption)[0] % 5), held_out


CLASSES: tuple[tuple[str, str], ...] = tuple(itertools.product(KINDS, PALETTES))
"""What the class-conditional model knows, kind and palette, in the order of the class ids."""

_IDS = {one: number for number, one in enumerate(CLASSES)}


def class_of(heap: Heap) -> int:
    """The class id of a heap."""
    return _IDS[heap.kind, heap.palette]


@cache
def shuffled_classes(name: str, rounds: int = 4) -> tuple[int, ...]:
    """Class ids in an order fixed by `name`: every class once in each round, each round shuffled anew."""
    orders = (
        sorted(range(len(CLASSES)), key=lambda number: _digest(f"{name} {turn} {CLASSES[number]}"))
        for turn in range(rounds)
    )
    return tuple(itertools.chain.from_iterable(orders))
