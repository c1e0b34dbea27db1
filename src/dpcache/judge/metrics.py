"""How close one picture is to another, in float."""

import math
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt
import torch

from dpcache.errors import missing_extra
from dpcache.files.pictures import Picture as Picture

#: Whether FLIP can be computed: there is a wheel for the usual machines, and not for all.
HAS_FLIP = find_spec("flip_evaluator") is not None


def psnr(truth: Picture, other: Picture) -> float:
    """Peak signal-to-noise ratio in dB of two pictures with values in [0, 1]; infinite where they are equal."""
    error = np.mean((_checked(truth) - _checked(other)) ** 2)
    return math.inf if error == 0 else float(-10 * np.log10(error))


def ssim(truth: Picture, other: Picture) -> float:
    """Structural similarity (Wang et al. 2004) of two pictures [..., H, W, C] with values in [0, 1].

    Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03, over the pixels whose window lies inside; mean
    over channels and, for a clip, frames.

    Raises:
        ValueError: pictures smaller than the window, or of different shapes.
    """
    a, b = _planes(truth), _planes(other)
    if a.shape != b.shape or min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs two pictures of one shape, 11 pixels or more; got {truth.shape}, {other.shape}.")
    offsets = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = torch.outer(window, window) / window.sum() ** 2

    def local_mean(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, window[None, None])

    mean_a, mean_b = local_mean(a), local_mean(b)
    var_a, var_b = local_mean(a * a) - mean_a**2, local_mean(b * b) - mean_b**2
    covariance = local_mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    )
    return float(similarity.mean())


def flip(truth: Picture, other: Picture) -> float:
    """FLIP (Andersson et al. 2020) of two pictures [..., H, W, C] with values in [0, 1]: 0 is equal, 1 the farthest.

    What an eye would see that flips between the two, at 67 pixels per degree; mean over pixels and, for a clip, frames.
    One channel counts as grey, a fourth one is left out.

    Raises:
        ValueError: pictures of different shapes.
        MissingExtraError: flip-evaluator is not installed.
    """
    if truth.shape != other.shape:
        raise ValueError(f"FLIP needs two pictures of one shape; got {truth.shape}, {other.shape}.")
    try:
        from flip_evaluator import evaluate
    except ImportError as error:
        raise missing_extra("FLIP", error, "flip-evaluator") from error

    pairs = list(zip(_colours(truth), _colours(other), strict=True))
    if not all(np.isfinite(a).all() and np.isfinite(b).all() for a, b in pairs):
        return math.nan
    return float(np.mean([evaluate(a, b, "LDR", applyMagma=False)[1] for a, b in pairs]))


def _checked(picture: Picture) -> npt.NDArray[np.float64]:
    if not np.issubdtype(picture.dtype, np.floating):
        raise ValueError(f"pictures must be floating point in [0, 1], got {picture.dtype}: integers would wrap around.")
    return picture.astype(np.float64)


def _planes(picture: Picture) -> torch.Tensor:
    """[..., H, W, C] as [N, 1, H, W]."""
    planes = np.moveaxis(_checked(picture), -1, -3)
    return torch.as_tensor(np.ascontiguousarray(planes)).reshape(-1, 1, *planes.shape[-2:])


def _colours(picture: Picture) -> npt.NDArray[np.float32]:
    """[..., H, W, C] as [N, H, W, 3]."""
    found = _checked(picture).astype(np.float32).reshape(-1, *picture.shape[-3:])
    return np.ascontiguousarray(np.repeat(found, 3, axis=-1) if found.shape[-1] == 1 else found[..., :3])
