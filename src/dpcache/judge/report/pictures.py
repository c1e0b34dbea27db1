"""Pictures, clips and what differs in them -> data URIs that a page can carry within itself, as WebP."""

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dpcache.judge.differences import HEAT, difference

Picture = npt.NDArray[np.floating[Any]]

#: Small pictures are shown enlarged by a whole number, to about this width in pixels.
SHOWN_WIDTH = 320
#: Of compressed pictures the differences are carried at half their size where they are wider or higher than this.
HALVED_FROM = 512
#: WebP has no larger sides.
LONGEST_SIDE = 16_383

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class Packing:
    """How pictures are made to fit into a page.

    Attributes:
        quality: of WebP, 0 to 100; None keeps every pixel exact.
        scale: by how much they are reduced.
    """

    quality: int | None = None
    scale: float = 1.0


#: The best first. Nothing is reduced below 70 % of its size.
PACKINGS = (
    Packing(),
    *(Packing(quality) for quality in (95, 90, 80, 70, 60)),
    Packing(70, 0.85),
    Packing(70, 0.7),
    Packing(50, 0.7),
    Packing(35, 0.7),
)


@dataclass(frozen=True)
class Embedded:
    """One picture or clip as the page carries it.

    Attributes:
        uri: data URI of the picture, or of a clip's first frame.
        frames: data URIs of all frames of a clip; none for a picture.
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

    @property
    def size(self) -> int:
        """Bytes that it takes in the page."""
        return len(self.uri) + sum(map(len, self.frames))


def embed(picture: Picture, packing: Packing = PACKINGS[0]) -> Embedded:
    """The picture [H, W, C] or clip [F, H, W, C], values in [0, 1], as a data URI.

    Raises:
        ValueError: neither a picture nor a clip, or not 1, 3 or 4 channels.
    """
    if picture.ndim not in (3, 4) or picture.shape[-1] not in _MODES:
        raise ValueError(
            f"a picture must be [H, W, C] and a clip [F, H, W, C], with 1, 3 or 4 channels; got {list(picture.shape)}. "
            'Compare with output_type="np".'
        )
    return _embedded(picture, packing)


def embed_difference(full: Picture, other: Picture, amplified: float, packing: Packing = PACKINGS[0]) -> Embedded:
    """Mean absolute difference over the channels, times `amplified`: black where equal, bright where it reaches 1."""
    levels = (difference(full, other) * amplified)[..., None]
    if packing.quality is not None and max(levels.shape[-3:-1]) * packing.scale > HALVED_FROM:
        packing = Packing(packing.quality, packing.scale / 2)
    return _embedded(levels, packing, HEAT.tobytes())


def _embedded(picture: Picture, packing: Packing, palette: bytes | None = None) -> Embedded:
    images = [_image(frame, packing.scale) for frame in (picture if picture.ndim == 4 else picture[None])]
    for image in images:
        if palette is not None:
            image.putpalette(palette)
    uris = tuple(_webp(image, packing) for image in images)
    return Embedded(uris[0], uris if picture.ndim == 4 else (), *images[0].size)


def _image(frame: Picture, scale: float) -> Image.Image:
    values = np.nan_to_num(frame.astype(np.float32)).clip(0, 1)
    levels = (values * 255).round().astype(np.uint8)
    mode = _MODES[levels.shape[-1]]
    image = Image.fromarray(levels[..., 0] if mode == "L" else levels)
    scale = min(scale, LONGEST_SIDE / max(image.size))
    if scale == 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _webp(image: Image.Image, packing: Packing) -> str:
    buffer = io.BytesIO()
    if packing.quality is None:  # then `quality` is how hard to try
        options: dict[str, Any] = {"lossless": True, "exact": True, "quality": 20, "method": 2}
    else:
        options = {"quality": packing.quality}
    image.convert("RGBA" if image.mode == "RGBA" else "RGB").save(buffer, "WEBP", **options)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
