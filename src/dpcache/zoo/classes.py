"""The classes of the class-conditional models: a shape in a colour, with everything else left to chance."""

import hashlib
import itertools
from dataclasses import dataclass
from functools import cache

from dpcache.zoo.shapes import BACKGROUNDS, POSITIONS, Scene

SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross", "star", "heart")
COLOURS = ("red", "yellow", "green", "blue")
SIZES = ("medium", "large")


@dataclass(frozen=True)
class Class:
    """What all pictures of a class share."""

    shape: str
    colour: str

    @property
    def caption(self) -> str:
        """The name of the class, like "red ring"."""
        return f"{self.colour} {self.shape}"


CLASSES: tuple[Class, ...] = tuple(itertools.starmap(Class, itertools.product(SHAPES, COLOURS)))
"""Every class, in the order of the class ids."""

_IDS = {one: number for number, one in enumerate(CLASSES)}


def class_of(scene: Scene) -> int:
    """The class id of a scene.

    Raises:
        KeyError: if its shape or colour belongs to no class.
    """
    return _IDS[Class(scene.shape, scene.colour)]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


@cache
def all_scenes() -> tuple[Scene, ...]:
    """Every scene whose shape and colour make a class, in a fixed shuffled order."""
    scenes = itertools.starmap(Scene, itertools.product(SIZES, COLOURS, SHAPES, BACKGROUNDS, POSITIONS))
    return tuple(sorted(scenes, key=lambda scene: _digest("order " + scene.caption)))


@cache
def shuffled(name: str, rounds: int) -> tuple[int, ...]:
    """Class ids in an order fixed by `name`: every class once in each round, each round shuffled anew."""
    names = [one.caption for one in CLASSES]
    orders = (
        sorted(range(len(names)), key=lambda number: _digest(f"{name} {turn} {names[number]}"))
        for turn in range(rounds)
    )
    return tuple(itertools.chain.from_iterable(orders))
