"""PSNR and SSIM equal scikit-image's and torchmetrics' on real photographs."""

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import peak_signal_noise_ratio as torchmetrics_psnr
from torchmetrics.functional.image import structural_similarity_index_measure as torchmetrics_ssim

from vqhit.images import center_crop, pil_to_uint8
from vqhit.metrics import psnr, ssim


@pytest.fixture(scope="module")
def photographs():
    """Two photographs at 96 px, and the same after a coarse JPEG compression."""
    originals, degraded = [], []
    for array in (skimage.data.astronaut(), skimage.data.chelsea()):
        small = center_crop(Image.fromarray(array), 96)
        originals.append(pil_to_uint8(small))
        degraded.append(pil_to_uint8(small.resize((24, 24)).resize((96, 96))))
    return torch.stack(originals), torch.stack(degraded)


def test_psnr_is_scikit_images(photographs):
    expected = [
        peak_signal_noise_ratio(a.permute(1, 2, 0).numpy(), b.permute(1, 2, 0).numpy(), data_range=255)
        for a, b in zip(*photographs, strict=True)
    ]
    np.testing.assert_allclose(psnr(*photographs), expected, rtol=1e-12)


def test_ssim_is_scikit_images_with_a_gaussian_window(photographs):
    expected = [
        structural_similarity(
            a.permute(1, 2, 0).numpy() / 255,
            b.permute(1, 2, 0).numpy() / 255,
            data_range=1,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(*photographs, strict=True)
    ]
    np.testing.assert_allclose(ssim(*photographs), expected, rtol=1e-9)


def test_equal_images_reach_the_ceiling(photographs):
    originals, _ = photographs
    assert psnr(originals, originals).tolist() == [100.0, 100.0]
    assert ssim(originals, originals).tolist() == pytest.approx([1.0, 1.0])


def test_ssim_refuses_images_smaller_than_its_window():
    small = torch.zeros(1, 3, 10, 10, dtype=torch.uint8)
    with pytest.raises(ValueError, match="SSIM needs at least 11x11"):
        ssim(small, small)


def test_both_are_torchmetrics(photographs):
    originals, degraded = photographs
    pair = degraded.double() / 255, originals.double() / 255
    expected = [torchmetrics_psnr(a[None], b[None], data_range=1.0).item() for a, b in zip(*pair, strict=True)]
    np.testing.assert_allclose(psnr(originals, degraded), expected, rtol=1e-6)  # it takes logarithms in float32
    given = {"gaussian_kernel": True, "sigma": 1.5, "data_range": 1.0, "reduction": "none"}
    _, everywhere = torchmetrics_ssim(*pair, **given, return_full_image=True)
    inside = everywhere[..., 5:-5, 5:-5]  # its own mean counts windows that hang over the border, on reflected pixels
    np.testing.assert_allclose(ssim(originals, degraded), inside.mean((1, 2, 3)), rtol=1e-9)
