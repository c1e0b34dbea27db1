"""PSNR and SSIM against scikit-image, FLIP against its authors' program."""

import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dpcache.judge.metrics import flip, psnr, ssim


@pytest.fixture
def pair():
    rng = np.random.default_rng(3)
    a = rng.random((40, 52, 3)).astype(np.float32)
    return a, np.clip(a + rng.normal(scale=0.1, size=a.shape), 0, 1).astype(np.float32)


def test_against_scikit_image(pair):
    a, b = pair
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1.0), abs=1e-5)
    reference = structural_similarity(
        a.astype(float),
        b.astype(float),
        data_range=1.0,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert ssim(a, b) == pytest.approx(reference, abs=1e-6)


def test_equal_pictures_and_clips(pair):
    a, b = pair
    assert psnr(a, a) == math.inf
    assert math.isnan(psnr(a, a * np.float32("nan")))
    assert ssim(a, a) == pytest.approx(1)
    assert ssim(np.stack([a, a]), np.stack([a, b])) == pytest.approx((1 + ssim(a, b)) / 2)


def test_flip(pair):
    flip_evaluator = pytest.importorskip("flip_evaluator")
    a, b = pair
    assert flip(a, b) == pytest.approx(flip_evaluator.evaluate(a, b, "LDR")[1])
    assert flip(a, a) == 0 < flip(a, b) < 1
    assert flip(np.stack([a, a]), np.stack([a, b])) == pytest.approx(flip(a, b) / 2)
    assert math.isnan(flip(a, a * np.float32("nan")))
    grey = a[..., :1]
    assert flip(grey, b[..., :1]) == pytest.approx(flip(np.repeat(grey, 3, -1), np.repeat(b[..., :1], 3, -1)))
    assert flip(np.concatenate([a, grey], -1), np.concatenate([b, grey], -1)) == flip(a, b)
    with pytest.raises(ValueError, match="one shape"):
        flip(a, b[:20])


def test_integers_are_refused(pair):
    a, _ = pair
    with pytest.raises(ValueError, match="wrap around"):
        psnr(a, (a * 255).astype(np.uint8))
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(a[:8], a[:8])
