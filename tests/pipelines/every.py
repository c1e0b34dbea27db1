"""Every small pipeline there is."""

from collections.abc import Callable

from tests.pipelines import (
    small_flux,
    small_image,
    small_ltx,
    small_motion,
    small_newer,
    small_others,
    small_pictures,
    small_sound,
    small_stages,
    small_unet,
    small_variants,
    small_video,
    small_videos,
)
from tests.pipelines.small import SMALL, WIDE, Built

#: How to build each, by the name of its class; where a class is built in several ways, more in parentheses.
BUILDS: dict[str, Callable[[], Built]] = {**WIDE, **{name: entry.build for name, entry in SMALL.items()}}

__all__ = [
    "BUILDS",
    "SMALL",
    "WIDE",
    "small_flux",
    "small_image",
    "small_ltx",
    "small_motion",
    "small_newer",
    "small_others",
    "small_pictures",
    "small_sound",
    "small_stages",
    "small_unet",
    "small_variants",
    "small_video",
    "small_videos",
]
