"""Pictures and clips -> data URIs that a page can carry within itself."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Picture = npt.NDArray[np.floating[Any]]

#: Longest side of an embedded picture, in pixels, and pixels of all of them together: a page of a hundred large
#: pictures would otherwise be too heavy for a browser.
LONGEST_SIDE = 1024
PIXEL_BUDGET = 100_000_000
#: Small pictures are shown enlarged by a whole number, to about this width in pixels.
SHOWN_WIDTH = 320
#: A clip does not say how fast it plays.
FRAME_MILLISECONDS = 125
#: Clips up to this many pixels are kept exact; larger ones are compressed, or a page would weigh hundreds of megabytes.
LOSSLESS_PIXELS = 2**20

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class Embedded:
    """One picture or clip as the page carries it.

    Attributes:
        uri: data URI, PNG for a picture and animated WebP for a clip.
        still: data URI of a clip's first frame, for readers who asked for less motion; None for a picture.
        width: in pixels.
        height: likewise.
    """

    uri: str
    still: str | None
    width: int
    height: int

    @property
    def shown_width(self) -> int:
        """CSS pixels to show it at where there is room: tiny pictures enlarged by a whole number."""
        return self.width * max(1, SHOWN_WIDTH // self.width)


def common_scale(pictures: Sequence[Picture]) -> float:
    """By how much to reduce all pictures alike, so that the page stays readable; 1 where nothing needs reducing."""
    longest: int = max(side for picture in pictures for side in picture.shape[-3:-1])
    pixels: int = sum(math.prod(picture.shape[:-1]) for picture in pictures)
    return min(1.0, LONGEST_SIDE / longest, math.sqrt(PIXEL_BUDGET / pixels))


def embed(picture: Picture, scale: float = 1.0) -> Embedded:
    """The picture [H, W, C] or clip [F, H, W, C], values in [0, 1], as a data URI.

    Raises:
        ValueError: neither a picture nor a clip, or not 1, 3 or 4 channels.
    """
    if picture.ndim not in (3, 4) or picture.shape[-1] not in _MODES:
        raise ValueError(
            f"a picture must be [H, W, C] and a clip [F, H, W, C], with 1, 3 or 4 channels; got {list(picture.shape)}. "
            'Compare with output_type="np".'
        )
    frames = [_image(frame, scale) for frame in (picture if picture.ndim == 4 else picture[None])]
    width, height = frames[0].size
    if picture.ndim == 3:
        return Embedded(_png(frames[0]), None, width, height)
    return Embedded(_webp(frames), _png(frames[0]), width, height)


def _image(frame: Picture, scale: float) -> Image.Image:
    values = np.nan_to_num(frame.astype(np.float32)).clip(0, 1)
    levels = (values * 255).round().astype(np.uint8)
    mode = _MODES[levels.shape[-1]]
    image = Image.fromarray(levels[..., 0] if mode == "L" else levels)
    if scale == 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return _data_uri("image/png", buffer)


def _webp(frames: Sequence[Image.Image]) -> str:
    buffer = io.BytesIO()
    exact = len(frames) * math.prod(frames[0].size) <= LOSSLESS_PIXELS
    frames[0].save(
        buffer,
        "WEBP",
        save_all=True,
        append_images=frames[1:],
        duration=FRAME_MILLISECONDS,
        loop=0,
        lossless=exact,
        quality=90,
    )
    return _data_uri("image/webp", buffer)


def _data_uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
