"""`dpcache export`."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from . import terminal
from .following import read_schedule
from .options import SCHEDULE_HELP
from .outputs import check_file

#: What a file of text to paste is called, by program.
_SUFFIX = {"cache-dit": ".py", "sglang": ".sh", "vllm-omni": ".sh", "xdit": ".sh"}


def export(
    schedule: Annotated[str, typer.Argument(help=f"{SCHEDULE_HELP}.")],
    to: Annotated[Literal["cache-dit", "sglang", "vllm-omni", "xdit"], typer.Option("--to", help="For which program.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="What to write, .json for settings; printed if not given.")
    ] = None,
) -> None:
    """Prints a schedule's key steps as a step mask for cache-dit, or as settings of an engine that embeds it.

    What cannot be carried over, like tuned coefficients, is told in notes. SGLang reads the JSON for cache-dit with
    `--backend diffusers --cache-dit-config`.

    --json: the settings and notes, a list, as a file named .json has them; and output, where there is one.
    """
    if output is not None:
        check_file(output, "configuration", [_SUFFIX[to], ".json"])
    found = read_schedule(schedule)

    from dpcache.files.whole import write_whole
    from dpcache.integrations import cache_dit

    settings, text = cache_dit.as_json(found, to), cache_dit.text(found, to)
    if output is None:
        terminal.result(settings, text.removesuffix("\n"))
        return
    if output.suffix.lower() == ".json":
        text = json.dumps(settings, indent=1) + "\n"
    write_whole(output, lambda part: part.write_text(text, encoding="utf-8"))
    terminal.result({"output": str(output), **settings}, f"wrote {output}")
