"""What an interrupted measurement leaves behind, so that the same command goes on from there."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpcache.errors import CalibrationError
from dpcache.files.journal import digest
from dpcache.files.whole import write_whole
from dpcache.measure.fingerprint import FILE

from . import terminal

#: The file in the folder that tells what the rest of it was measured on.
_ABOUT = "command.json"
#: What `calibrate` and `optimize` keep in it.
_MEASURED = ("input-*.safetensors", "tried*.jsonl", "search.jsonl")


@contextlib.contextmanager
def kept(output: Path, checkpoint: Path | None, about: Mapping[str, Any], *, restart: bool) -> Iterator[Path]:
    """A folder to measure into, with what an interrupted run of the same command has left there.

    Args:
        output: what the command writes in the end. The folder is beside it, and goes when this block is left in peace.
        checkpoint: another folder instead, which stays.
        about: what the measurements depend on, by a name that the user knows.
        restart: start over, whatever is there.

    Raises:
        CalibrationError: the folder holds what was measured on something else.
        KeyboardInterrupt: again, with a message that says what is kept, if anything is.
    """
    folder = checkpoint or output.with_name(f"{output.name}.partial")
    marks = {name: digest(value) for name, value in about.items()}
    if restart:
        _clear(folder)
    if _files(folder):
        _check(folder, marks, may_be_unmarked=checkpoint is not None)
    write_whole(folder / _ABOUT, lambda part: part.write_text(json.dumps(marks, indent=1) + "\n", encoding="utf-8"))
    if _files(folder):
        terminal.note(f"going on from {folder}: {_measured(folder)} measured already")
    try:
        yield folder
    except BaseException as error:
        if checkpoint is None and not _files(folder):
            _clear(folder)
        if not isinstance(error, KeyboardInterrupt) or not _files(folder):
            raise
        raise KeyboardInterrupt(
            f"interrupted: what was measured so far ({_measured(folder)}) is kept in {folder}, the same command goes "
            "on from there."
        ) from error
    if checkpoint is None:
        _clear(folder)


def _measured(folder: Path) -> str:
    if (folder / "search.jsonl").exists():
        with (folder / "search.jsonl").open("rb") as lines:
            return terminal.counted(sum(1 for _ in lines) - 1, "run")
    return terminal.counted(len(list(folder.glob("input-*.safetensors"))), "input")


def _files(folder: Path) -> list[Path]:
    """What measurements have left there; nothing else of the folder is ever touched."""
    return [path for pattern in _MEASURED for path in folder.glob(pattern)]


def _clear(folder: Path) -> None:
    for path in [*_files(folder), folder / _ABOUT, folder / FILE]:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty, or not there
        folder.rmdir()


def _check(folder: Path, marks: Mapping[str, str], *, may_be_unmarked: bool) -> None:
    """Refuses to go on from what something else was measured on."""
    try:
        known = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        changed = [name for name in marks if known.get(name) != marks[name]]
    except FileNotFoundError:
        if may_be_unmarked:  # made by dpcache.calibrate(..., checkpoint=...), which looks at the inputs itself
            return
        changed = list(marks)
    except (ValueError, AttributeError) as error:
        raise CalibrationError(f"{folder / _ABOUT} cannot be read ({error}): start over with --restart.") from error
    if changed:
        raise CalibrationError(
            f"{folder} keeps what a command with other {' and '.join(changed)} has measured: run that one again, name "
            "another --output, or start over with --restart."
        )
