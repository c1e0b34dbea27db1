"""`dpcache generate --ray`: many prompts over the machines of a Ray cluster."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpcache.errors import GenerationError


def generate_on_ray(
    model: str,
    prompts: "Path | Sequence[str | Mapping[str, Any]]",
    output: Path,
    *,
    say: Callable[[str], object],
    **options: Any,
) -> None:
    """Draws the prompts into the folder `output` and says what came of it.

    Args:
        model: a bundled model, a diffusers directory, or a hub id.
        prompts: a file, or what one would hold.
        output: the folder.
        say: prints a line.
        **options: further arguments of `dpcache.integrations.ray.generate`.

    Raises:
        GenerationError: some prompt could not be drawn; the others were.
    """
    try:
        from dpcache.integrations.folder import INDEX
        from dpcache.integrations.ray import generate
    except ImportError as error:
        raise GenerationError(str(error)) from error

    # Ray tells of every plan it makes, and that its progress bars are off; there is one of dpcache's own.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    results = generate(model, prompts, output, **options)
    index = output / INDEX
    failed = [result for result in results if result.error is not None]
    say(f"wrote {index}: {len(results) - len(failed)} of {len(results)} prompts have their picture in {output}")
    if failed:
        first = failed[0]
        raise GenerationError(
            f"{len(failed)} of {len(results)} prompts could not be drawn, {first.id} for one: {first.error} The column "
            f"`error` of {index} has the others; the same command tries them again."
        )
