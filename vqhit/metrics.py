"""How alike two images are: PSNR and SSIM, of uint8 images, in float64."""

import torch
import torch.nn.functional as F
from torch import Tensor

PSNR_CEILING_DB = 100.0
"""Reported for images that are equal, whose PSNR has no finite value."""
SSIM_WINDOW = 11
"""Side of SSIM's window in px, and the least that an image may have."""


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair in dB: two (B, 3, H, W) uint8 -> (B,) float64, at most 100."""
    error = (first.double() - second.double()).square().mean((1, 2, 3)) / 255**2
    return (-10 * error.log10()).clamp(max=PSNR_CEILING_DB)


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity of each pair: two (B, 3, H, W) uint8, at least 11 px a side -> (B,) float64.

    Wang et al. 2004: Gaussian window 11x11, sigma 1.5, data range 1, biased variances, mean over colour channels and
    over window positions that lie inside the image. Raises `ValueError` for images smaller than the window.
    """
    if min(first.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"images are {tuple(first.shape[-2:])} px; SSIM needs at least {SSIM_WINDOW}x{SSIM_WINDOW}")
    taps = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64, device=first.device) ** 2) / (2 * 1.5**2))
    taps = taps / taps.sum()
    x, y = (images.double().flatten(0, 1).unsqueeze(1) / 255 for images in (first, second))

    def blur(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))

    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    )
    return similarity.mean((1, 2, 3)).view(first.shape[:2]).mean(1)
