"""Pictures, clips and what differs in them -> data URIs that a page can carry within itself."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image

Picture = npt.NDArray[np.floating[Any]]

#: Longest side of an embedded picture, in pixels, and pixels of all of them together: a page of a hundred large
#: pictures would otherwise be too heavy for a browser.
LONGEST_SIDE = 1024
PIXEL_BUDGET = 50_000_000
#: Small pictures are shown enlarged by a whole number, to about this width in pixels.
SHOWN_WIDTH = 320
#: Clips up to this many pixels are kept exact; larger ones are compressed, or a page would weigh hundreds of megabytes.
LOSSLESS_PIXELS = 2**20

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_HEAT = (matplotlib.colormaps["inferno"](np.arange(256))[:, :3] * 255).round().astype(np.uint8).tobytes()


@dataclass(frozen=True)
class Embedded:
    """One picture or clip as the page carries it.

    Attributes:
        uri: data URI of the picture, or of a clip's first frame, as PNG.
        frames: data URIs of all frames of a clip, as WebP; none for a picture.
        width: in pixels.
        height: likewise.
    """

    uri: str
    frames: tuple[str, ...]
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
    return _embedded(
        [_image(frame, scale) for frame in (picture if picture.ndim == 4 else picture[None])], picture.ndim
    )


def amplification(full: Picture, others: Sequence[Picture]) -> float:
    """By how much to multiply the differences so that they can be seen: 1, 2 or 5 times a power of ten.

    The largest such number that leaves all but a thousandth of the pixels within the scale; 1 where nothing differs.
    """
    peak = max(float(np.quantile(_difference(full, other), 0.999)) for other in others)
    if not peak > 0:
        return 1.0
    power = 10.0 ** math.floor(-math.log10(peak))
    return max(n * power for n in (1, 2, 5) if n == 1 or n * power * peak <= 1)


def embed_difference(full: Picture, other: Picture, amplified: float, scale: float = 1.0) -> Embedded:
    """Mean absolute difference over the channels, times `amplified`: black where equal, bright where it reaches 1."""
    difference = (_difference(full, other) * amplified)[..., None]
    images = [_image(frame, scale) for frame in (difference if full.ndim == 4 else difference[None])]
    for image in images:
        image.putpalette(_HEAT)
    return _embedded(images, full.ndim)


def _difference(full: Picture, other: Picture) -> Picture:
    difference = np.abs(full.astype(np.float64) - other.astype(np.float64)).mean(axis=-1)
    return np.asarray(np.nan_to_num(difference, nan=1.0))


def _embedded(frames: Sequence[Image.Image], ndim: int) -> Embedded:
    width, height = frames[0].size
    if ndim == 3:
        return Embedded(_png(frames[0]), (), width, height)
    exact = len(frames) * width * height <= LOSSLESS_PIXELS
    return Embedded(_png(frames[0]), tuple(_webp(frame, exact) for frame in frames), width, height)


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


def _webp(image: Image.Image, exact: bool) -> str:
    buffer = io.BytesIO()
    image.convert("RGBA" if image.mode == "RGBA" else "RGB").save(
        buffer, "WEBP", lossless=exact, exact=exact, quality=90
    )
    return _data_uri("image/webp", buffer)


def _data_uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
