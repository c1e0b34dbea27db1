"""Whether a result can be written, asked before the long work that makes it."""

import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import typer


def check_file(path: Path, kind: str, suffixes: Sequence[str]) -> None:
    """Nothing, if a file of this kind can be written there.

    Raises:
        typer.BadParameter: the name has none of the suffixes.
        OSError: it is a folder, or the folder it would be in cannot be written to.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it, for example {path / f'{kind}{suffixes[0]}'}.")
    if path.suffix.lower() not in suffixes:
        others = f" (or {', '.join(suffixes[1:])})" if suffixes[1:] else ""
        raise typer.BadParameter(f"{path} is no name for a {kind}: call it {path.with_suffix(suffixes[0])}{others}.")
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Nothing, if files can be written there, the folder made where there is none.

    Raises:
        OSError: they cannot.
    """
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists() or place.is_symlink())
    try:
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with tempfile.TemporaryFile(dir=place):  # asking for permissions misses full disks and read-only mounts
            pass
    except OSError as error:
        raise OSError(f"cannot write to {place} ({error.strerror}): choose another place with --output.") from error
