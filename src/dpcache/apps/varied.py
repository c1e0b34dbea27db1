"""Inputs as different as can be, for a model that brings none of its own."""

import itertools
from typing import Any

from dpcache.run.denoisers import find_denoisers
from dpcache.run.inputs import accepts

#: People, animals, places, things, letters, light and dark, drawn and photographed, crowded and empty.
PROMPTS = (
    "a portrait of an old fisherman with a grey beard, soft window light, photograph",
    "a red fox running through deep snow at dawn",
    "a street in Tokyo at night after rain, neon signs reflected in puddles, many people with umbrellas",
    "a bowl of ramen with an egg and spring onions, seen from above",
    "a wide mountain valley with a river and scattered clouds, oil painting",
    "an astronaut riding a horse on the moon, the earth in the black sky",
    "a shop window with a wooden sign that says OPEN ON SUNDAYS",
    "a single white egg on a white table, hard shadow",
    "a flat vector illustration of a girl watering plants on a balcony",
    "a steam train crossing a stone viaduct in autumn, aerial view",
    "a crowded market hall with fruit stalls and hanging lamps",
    "a macro photograph of a bee on a purple thistle",
    "an ancient library with spiral stairs and dust in the sunbeams, fantasy art",
    "two children building a sandcastle on a beach, seen from behind",
    "a black cat sleeping on a pile of books, pencil drawing",
    "a glass teapot with green tea leaves on a mirror, studio light",
    "a lighthouse in a storm, huge waves, dark clouds",
    "a robot made of copper repairing a pocket watch, extreme detail",
    "a minimalist poster of three overlapping circles in blue, yellow and red",
    "a herd of elephants walking through tall dry grass at sunset",
    "a ballet dancer in mid jump on an empty stage, motion blur",
    "a cosy kitchen with copper pans, a cat on the window sill and snow outside",
    "the skyline of Manhattan in fog, black and white photograph",
    "a bouquet of sunflowers and cornflowers in a chipped blue vase, impressionist painting",
)


def inputs_for(pipeline: Any, count: int) -> list[Any]:
    """So many inputs for a pipeline: prompts, or classes spread over all that there are.

    Raises:
        ValueError: it takes neither.
    """
    if accepts(pipeline, "prompt"):
        return list(itertools.islice(itertools.cycle(PROMPTS), count))
    if accepts(pipeline, "class_labels"):
        labels = getattr(pipeline, "labels", None) or {}
        denoiser: Any = find_denoisers(pipeline)[0]
        classes = len(set(labels.values())) or int(denoiser.config["num_embeds_ada_norm"])
        return [{"class_labels": [number * classes // count % classes]} for number in range(count)]
    raise ValueError(
        f"{type(pipeline).__name__} takes neither a prompt nor a class: give its inputs as lines of JSON, in a .jsonl "
        "file with --prompts."
    )
