"""Pictures and clips as files; in PNG, with a note of how they were made."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .whole import write_whole

#: float [H, W, C] in [0, 1], or [F, H, W, C] for a clip.
Picture = npt.NDArray[np.floating[Any]]

#: What pictures are written as, by suffix.
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".gif": "GIF"}
#: Under this keyword the file has its note.
_KEYWORD = "dpcache"
#: The last chunk of every PNG file.
_END = b"\0\0\0\0IEND\xaeB`\x82"


def save_picture(path: Path, picture: Picture, note: str | None = None) -> None:
    """Writes a float picture [H, W, C], or a clip [F, H, W, C] as an animated one, in the format of the suffix.

    Args:
        path: the file; it is there whole or not at all.
        picture: in [0, 1].
        note: to keep in the file, which is PNG then.

    Raises:
        ValueError: the suffix is none of PNG, JPEG, WebP and GIF, JPEG is wanted of a clip, or anything but PNG is to
            keep a note.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    kind = _FORMATS.get(path.suffix.lower())
    if kind is None or (kind == "JPEG" and picture.ndim == 4) or (kind != "PNG" and note is not None):
        what = "a note" if note is not None else "a clip" if picture.ndim == 4 else "a picture"
        raise ValueError(f"{path.name} cannot hold {what}: use .png{' or .webp' if note is None else ''}.")

    pixels = (picture * 255).round().clip(0, 255).astype(np.uint8)
    first, *others = [Image.fromarray(frame) for frame in (pixels if pixels.ndim == 4 else pixels[None])]
    options: dict[str, Any] = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    if others:
        options |= {"save_all": True, "append_images": others, "duration": 125, "loop": 0}
    if note is not None:
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text(_KEYWORD, note)
    write_whole(path, lambda part: first.save(part, format=kind, **options))


def is_whole(path: Path) -> bool:
    """Whether there is a PNG file that ends as one should. Reads its last bytes only."""
    if not path.is_file() or path.stat().st_size < len(_END):
        return False
    with path.open("rb") as file:
        file.seek(-len(_END), 2)
        return file.read() == _END


def drawn_from(path: Path, origin: str) -> dict[str, Any] | None:
    """The note of a whole PNG file that was drawn from this origin, a digest; None where there is no such picture."""
    if not is_whole(path):
        return None
    try:
        note = json.loads(read_note(path) or "null")
    except (ValueError, RecursionError):
        return None
    return note if isinstance(note, dict) and note.get("origin") == origin else None


def read_note(path: Path) -> str | None:
    """The note in a whole PNG file; None if it has none, or is something else. Reads the file's beginning only."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            note = picture.info.get(_KEYWORD)
    except UnidentifiedImageError:
        return None
    return note if isinstance(note, str) else None
