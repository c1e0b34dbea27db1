"""Pictures and clips as PNG files, with a note of how they were made."""

from pathlib import Path

import numpy as np

from .files import write_whole
from .metrics import Picture

#: Under this keyword the file has its note.
_KEYWORD = "dpcache"
#: The last chunk of every PNG file.
_END = b"\0\0\0\0IEND\xaeB`\x82"


def save_picture(path: Path, picture: Picture, note: str | None = None) -> None:
    """Writes a float picture [H, W, C] as PNG, or a clip [F, H, W, C] as an animated one; with a note in the file."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    pixels = (picture * 255).round().clip(0, 255).astype(np.uint8)
    first, *others = [Image.fromarray(frame) for frame in (pixels if pixels.ndim == 4 else pixels[None])]
    options = {"save_all": True, "append_images": others, "duration": 125, "loop": 0} if others else {}
    text = PngInfo()
    if note is not None:
        text.add_text(_KEYWORD, note)
    write_whole(path, lambda part: first.save(part, format="PNG", pnginfo=text, **options))


def is_whole(path: Path) -> bool:
    """Whether there is a PNG file that ends as one should. Reads its last bytes only."""
    if not path.is_file() or path.stat().st_size < len(_END):
        return False
    with path.open("rb") as file:
        file.seek(-len(_END), 2)
        return file.read() == _END


def read_note(path: Path) -> str | None:
    """The note in a whole PNG file; None if it has none, or is something else. Reads the file's beginning only."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            note = picture.info.get(_KEYWORD)
    except UnidentifiedImageError:
        return None
    return note if isinstance(note, str) else None
