"""Writes docs/models.md from verdicts.json, which count.py keeps: `python -m tests.pipelines.models_page`."""

import json
import sys
from pathlib import Path
from typing import Any

from tests.pipelines import since
from tests.pipelines.count import KEPT, class_of, classes, why_not_built
from tests.pipelines.every import SMALL
from tests.pipelines.following import FAILS, NOT_DESCRIBED, REFUSED, RIGHT
from tests.pipelines.unbuilt import REFUSED as WHY_REFUSED

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

HEAD = """# Models

<!-- Written by `python -m tests.pipelines.models_page`; edit tests/pipelines/small_*.py instead. -->

What is cached and predicted at each boundary:

- `"blocks"`: the last transformer block's output. The blocks of these denoisers are described in
  `src/dpcache/run/layouts.py`; describe others with `dpcache.register_denoiser`.
- `"output"`: the denoiser's output. Needs no description and works with any pipeline whose loop calls a denoiser
  once or several times for every step of its scheduler, in this table or not.

Every class below was built from small random components and run through its own `__call__`, by `python -m
tests.pipelines.count`. "Right" means that all steps as key steps give the same bits, that with fewer key steps the
denoiser (or every one of its blocks) really runs exactly as often as the schedule says, that a second generation
equals the first, that a skipped step is what the denoiser's head makes of the predicted value, and that disabling
brings the first bits back. In the column "plan" it was calibrated at the boundary `"output"`, and a schedule planned
from that was followed. **Bold** ones are put through the invariants of [architecture.md](architecture.md) besides, in
`tests/pipelines/test_table.py`. The column "diffusers" has the first release with the pipeline, of 0.35 to the one
here (0.35 or before; by `python -m tests.pipelines.since`); `make oldest` tests the bold ones that 0.35 has. All this
says nothing about the quality of pictures, which depends on weights and schedule.
"""

_HEADING = '| pipeline | denoiser | diffusers | `"blocks"` | `"output"` | plan | remarks |'
_SHOWN = {RIGHT: "right", REFUSED: "refused", NOT_DESCRIBED: "not described", FAILS: "**fails**"}
NOT_RIGHT = {FAILS, REFUSED}


def read() -> dict[str, Any]:
    """What count.py found last."""
    return dict(json.loads(KEPT.read_text(encoding="utf-8")))


def render(kept: dict[str, Any]) -> str:
    """The page of these findings."""
    rows: list[str] = []
    stubborn: list[str] = []
    refused: list[str] = []
    releases = since.read()
    for name, found in kept["found"].items():
        if found["runs"]:
            stubborn.append(f"| {name} | does not run with small random components here |")
            continue
        verdicts = found["verdicts"]
        if verdicts["output"] == REFUSED:
            why = WHY_REFUSED.get(class_of(name)) or found["reasons"]["output"]
            refused.append(f"| {name} | {why} |")
            continue
        shown = " | ".join(_SHOWN[verdicts[where]] for where in ("blocks", "output", "plan"))
        bold = f"**{name}**" if name in SMALL else name
        cells = (bold, found["denoiser"], releases[class_of(name)], shown, _remarks(name, found))
        rows.append(f"| {' | '.join(cells)} |")
    built = {class_of(name) for name in kept["found"]}
    left = [f"| {name} | {why_not_built(name, lacks)} |" for name, lacks in classes().items() if name not in built]
    table = [_HEADING, "|---|---|---|---|---|---|---|", *rows]
    parts = [HEAD, f"With diffusers {kept['diffusers']}: {_counts(kept)}\n", *table]
    why = ["| pipeline | why |", "|---|---|"]
    parts += ["\nRefused, when enabling and when calibrating:\n", *why, *refused]
    parts += ["\nNot tried:\n", *why, *stubborn, *left]
    return "\n".join(parts) + "\n"


def _counts(kept: dict[str, Any]) -> str:
    running = [found["verdicts"] for found in kept["found"].values() if not found["runs"]]
    right = {where: sum(verdicts[where] == RIGHT for verdicts in running) for where in ("output", "blocks")}
    refused = sum(verdicts["output"] == REFUSED for verdicts in running)
    figures = f'{right["output"]} of them right at `"output"` and {right["blocks"]} at `"blocks"`, {refused} refused'
    return f"{len(running)} are built here, {figures}."


def _remarks(name: str, found: dict[str, Any]) -> str:
    remarks = [SMALL[name].note] if name in SMALL and SMALL[name].note else []
    remarks += [f"{where}: {reason}" for where, reason in found["reasons"].items() if reason]
    return " ".join(remarks).replace("|", "/")


def main() -> int:
    PAGE.write_text(render(read()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
