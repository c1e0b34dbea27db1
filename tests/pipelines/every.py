"""Every small pipeline there is."""

from tests.pipelines import small_image, small_video
from tests.pipelines.small import SMALL

__all__ = ["SMALL", "small_image", "small_video"]
