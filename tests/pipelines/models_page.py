"""Writes docs/models.md from what the tests of the table find: `python -m tests.pipelines.models_page`."""

import sys
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest

from dpcache.run.denoisers import find_denoisers
from tests.pipelines.every import SMALL
from tests.pipelines.small import Small

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
TESTS = Path(__file__).with_name("test_table.py")

#: Pipelines that the library cannot follow, and why. Every other one in the table of denoisers can be built small.
NOT_FOLLOWED = {
    "SkyReelsV2DiffusionForcingPipeline": "Every frame has its own step: it steps copies of its scheduler, one for "
    "each frame, and there is no step of the whole. Enabling and calibrating say so.",
}

HEAD = """# Models

<!-- Written by `python -m tests.pipelines.models_page`; edit tests/pipelines/small_*.py instead. -->

What is cached and predicted at each boundary:

- `"blocks"`: the last transformer block's output. The blocks of these denoisers are described in
  `src/dpcache/run/layouts.py`; describe others with `dpcache.register_denoiser`.
- `"output"`: the denoiser's output. Needs no description and works with any pipeline that has a `transformer` or `unet`
  and a scheduler, in this table or not.

"Verified" means that the tests in `tests/pipelines/test_table.py` pass on the pipeline's own `__call__`, with small
random components: all steps as key steps give the same bits, recording changes nothing, disabling leaves nothing
behind, the blocks run exactly as often as the schedule says, and a prediction is the weighted sum it should be. It says
nothing about the quality of pictures, which depends on weights and schedule.
"""


@cache
def denoiser(name: str) -> str:
    """Class name of what the pipeline calls at every step."""
    pipe, _ = SMALL[name].build()
    return type(find_denoisers(pipe)[0]).__name__


def render(failed: set[tuple[str, str]], version: str) -> str:
    """The page, when the tests of these pipelines at these boundaries have failed."""
    lines = [HEAD, f"With diffusers {version}:\n"]
    lines += ['| pipeline | denoiser | `"blocks"` | `"output"` | remarks |', "|---|---|---|---|---|"]
    for name, entry in sorted(SMALL.items()):
        verdicts = [_verdict(entry, boundary, failed) for boundary in ("blocks", "output")]
        lines.append(f"| {name} | {denoiser(name)} | {' | '.join(verdicts)} | {entry.note} |")
    lines += ["\nNot followed:\n", "| pipeline | why |", "|---|---|"]
    lines += [f"| {name} | {why} |" for name, why in NOT_FOLLOWED.items()]
    return "\n".join(lines) + "\n"


def _verdict(entry: Small, boundary: str, failed: set[tuple[str, str]]) -> str:
    if boundary not in entry.boundaries:
        return "not described"
    return "not verified" if (entry.name, boundary) in failed else "verified"


class _Failures:
    """Notes which pipelines at which boundaries failed a test: their names are the tests' parameters."""

    def __init__(self) -> None:
        self.failed: set[tuple[str, str]] = set()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            name, boundary = report.nodeid.split("[")[1].removesuffix("]").rsplit("-", 1)
            self.failed.add((name, boundary))


def main() -> int:
    failures = _Failures()
    status = pytest.main([str(TESTS)], plugins=[failures])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(status)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render(failures.failed, diffusers.__version__), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
