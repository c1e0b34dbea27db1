"""Writing files whole or not at all, and telling what went wrong when reading them."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from dpcache.errors import FileFormatError


def write_whole(path: "str | os.PathLike[str]", write: Callable[[Path], object]) -> Path:
    """Calls `write` on a file beside `path`, then renames it: readers see the old file or the new one, never a part."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    os.close(descriptor)
    part = Path(name)
    try:
        write(part)
        # mkstemp makes files private; a file written by open() would follow the umask.
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target


def read_bytes(path: "str | os.PathLike[str]", kind: str) -> bytes:
    """The bytes of a schedule or calibration file, if they begin as those of its format do.

    JSON begins with a bracket. safetensors begins with the length of its header, eight bytes that can be anything, then
    the header's bracket.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: the file begins otherwise. A pickle or a PyTorch archive does; reading one could run code.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}. A {kind} is made by {MAKERS[kind]}.") from None
    if (data[8:9] if kind == "calibration" else data.lstrip()[:1]) == b"{":
        return data
    if data[:1] == b"\x80" or data[:2] == b"PK":
        raise FileFormatError(
            f"{path} is a pickle or PyTorch archive, which is never read because it can run code. "
            f"A {kind} is made by {MAKERS[kind]}."
        )
    form = {"calibration": "safetensors", "schedule": "JSON"}[kind]
    raise FileFormatError(f"{path} is not a whole {form} file. Make it anew with {MAKERS[kind]}.")


def check_version(path: "str | os.PathLike[str]", kind: str, found: object, read: object) -> None:
    """Raises FileFormatError unless the file is of the format version that this release reads."""
    if found != read:
        raise FileFormatError(
            f"{path} is a {kind} of format version {found}; this release reads version {read}. "
            f"Make it anew with {MAKERS[kind]}."
        )


#: How each kind of file is made anew: the remedy in every message about a bad one.
MAKERS = {
    "calibration": "`dpcache.calibrate(...).save(path)` or `dpcache calibrate`",
    "schedule": "`calibration.plan(...).save(path)` or `dpcache plan`",
}
