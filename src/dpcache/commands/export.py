"""`dpcache export`: a schedule's key steps for cache-dit and for the engines that embed it."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer


def export(
    schedule: Annotated[Path, typer.Argument(help="A schedule file.")],
    to: Annotated[Literal["cache-dit", "sglang", "vllm-omni"], typer.Option("--to", help="For which program.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="What to write; printed if not given.")] = None,
    as_settings: Annotated[bool, typer.Option("--json", help="Settings as JSON instead of text to paste.")] = False,
) -> None:
    """Prints a schedule's key steps as a step mask for cache-dit, or as settings of an engine that embeds it.

    What cannot be carried over, like tuned coefficients, is told in notes. SGLang reads the JSON for cache-dit with
    `--backend diffusers --cache-dit-config`.
    """
    from dpcache.files import write_whole
    from dpcache.integrations import cache_dit
    from dpcache.schedule import Schedule

    found = Schedule.load(schedule)
    text = json.dumps(cache_dit.as_json(found, to), indent=1) + "\n" if as_settings else cache_dit.text(found, to)
    if output is None:
        typer.echo(text, nl=False)
    else:
        write_whole(output, lambda part: part.write_text(text, encoding="utf-8"))
        typer.echo(f"wrote {output}")
