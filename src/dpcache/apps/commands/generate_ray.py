"""`dpcache generate --ray`: many prompts over the machines of a Ray cluster."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpcache.errors import GenerationError

from . import terminal


def generate_on_ray(
    model: str, prompts: "Path | Sequence[str | Mapping[str, Any]]", output: Path, name: str | None, **options: Any
) -> None:
    """Draws the prompts into the folder `output` and says what came of it.

    Args:
        model: a bundled model, a diffusers directory, or a hub id.
        prompts: a file, or what one would hold.
        output: the folder.
        name: of the schedule, as it was typed; None without one.
        **options: further arguments of `dpcache.integrations.ray.generate`.

    Raises:
        MissingExtraError: Ray is not installed.
        GenerationError: some prompt could not be drawn; the others were.
    """
    from dpcache.integrations.folder import INDEX
    from dpcache.integrations.ray import generate

    # Ray tells of every plan it makes, and that its progress bars are off; there is one of dpcache's own.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    terminal.listen()
    try:
        results = generate(model, prompts, output, progress=terminal.progress(), **options)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(
            f"interrupted: what was drawn so far is in {output}, the same command goes on from there."
        ) from interrupt
    index = output / INDEX
    failed = [result for result in results if result.error is not None]
    drawn = len(results) - len(failed)
    terminal.result(
        {
            "model": model,
            "schedule": name,
            "output": str(output),
            "index": str(index),
            "num_prompts": len(results),
            "num_pictures": drawn,
        },
        f"wrote {index}: {drawn} of {len(results)} prompts have their picture in {output}",
    )
    if failed:
        first = failed[0]
        raise GenerationError(
            f"{len(failed)} of {len(results)} prompts could not be drawn, {first.id} for one: {first.error} The column "
            f"`error` of {index} has the others; the same command tries them again."
        )
