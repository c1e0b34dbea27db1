"""What commands write: results to standard output, in words or as JSON, and everything else to standard error."""

import contextlib
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from rich.console import Console, RenderableType

#: Columns where nobody sees the edge of a window: a pipe, a file.
UNBOUNDED = 200


@dataclass
class Asked:
    """What was asked of this run of the command line.

    Attributes:
        json: the result, and any error, as JSON.
        quiet: no progress bars and no notes.
        debug: tracebacks, and warnings of every kind.
    """

    json: bool = False
    quiet: bool = False
    debug: bool = False


asked = Asked()


def begin() -> None:
    """Forgets what an earlier run in this process was asked for, and sets up the streams."""
    asked.json = asked.quiet = asked.debug = False
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a bar or an arrow gets a question mark, not an error.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    warnings.showwarning = _show_warning


def result(document: Mapping[str, Any], *words: RenderableType) -> None:
    """What a command found, its only output: the document with --json, else the words."""
    if asked.json:
        file = _results or sys.stdout
        file.write(json.dumps(finite(document), indent=2, allow_nan=False) + "\n")
        file.flush()  # a full disk is an error of this command, not of the interpreter's last breath
        return
    console = _console(sys.stdout)
    for part in words:
        # Text is left as long as it is: a path in two lines is of no use.
        console.print(part, soft_wrap=isinstance(part, str), markup=False, emoji=False, highlight=False)
    sys.stdout.flush()


def note(text: str) -> None:
    """Something worth knowing that is not the result; nothing with --quiet."""
    if not asked.quiet:
        aside(text, style="dim")


def aside(text: str, *, style: str | None = None, heading: str = "") -> None:
    """One line on standard error, above any progress bar."""
    bars = sys.modules.get("tqdm")
    with bars.tqdm.external_write_mode(file=sys.stderr) if bars else contextlib.nullcontext():
        console = _console(sys.stderr)
        if heading:
            console.print(f"{heading}: ", style="bold red", end="", highlight=False)
        console.print(text, style=style, soft_wrap=True, markup=False, emoji=False, highlight=False)


def error_document(document: Mapping[str, Any]) -> None:
    """An error as one line of JSON, on standard error."""
    sys.stderr.write(json.dumps(finite(document), allow_nan=False) + "\n")


def counted(number: int, noun: str) -> str:
    """ "1 input", "2 inputs"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def progress() -> bool:
    """Whether to show progress bars: to people who look at a terminal and did not ask for quiet."""
    return not asked.quiet and sys.stderr.isatty()


def finite(value: Any) -> Any:
    """The value with None for every number that JSON has no word for, and lists for tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return value


#: Where results go while `results_apart` keeps everything else from standard output.
_results: TextIO | None = None


@contextlib.contextmanager
def results_apart() -> Iterator[None]:
    """With --json, whatever prints while a command runs, a pipeline's own code for instance, goes to standard error."""
    global _results
    if not asked.json:
        yield
        return
    _results = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _results = None


@contextlib.contextmanager
def hush() -> Iterator[None]:
    """Libraries say nothing below an error, until `listen`: what they have to say while they load is for developers."""
    before = logging.root.manager.disable
    if "--debug" not in sys.argv[1:]:
        logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def listen() -> None:
    """The pipeline is loaded: what libraries warn of from now on is about its calls."""
    logging.disable(logging.NOTSET)


def _console(file: TextIO) -> Console:
    # The window's own width where there is one, or what the environment says.
    width = None if file.isatty() or "COLUMNS" in os.environ else UNBOUNDED
    return Console(file=file, width=width)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    # Deprecations are for developers.
    if asked.debug or not issubclass(category, FutureWarning | DeprecationWarning | PendingDeprecationWarning):
        where = f" ({filename}:{lineno})" if asked.debug else ""
        aside(f"warning: {' '.join(str(message).split())}{where}", style="yellow")
