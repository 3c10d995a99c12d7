"""Reconstruction quality: PSNR, SSIM, codebook usage and perplexity, with the protocol beside the numbers."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqhit import __version__
from vqhit.codebook import CodebookUsage
from vqhit.data import CenterCrops, list_images, load_batches
from vqhit.images import from_uint8, to_uint8
from vqhit.models import VQHiT
from vqhit.progress import ProgressBar

PSNR_CEILING_DB = 100.0
"""Reported for images that are equal, whose PSNR has no finite value."""


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair in dB: two (B, 3, H, W) uint8 -> (B,) float64, at most 100."""
    error = (first.double() - second.double()).square().mean((1, 2, 3)) / 255**2
    return (-10 * error.log10()).clamp(max=PSNR_CEILING_DB)


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity of each pair: two (B, 3, H, W) uint8, at least 11 px a side -> (B,) float64.

    Wang et al. 2004: Gaussian window 11x11, sigma 1.5, data range 1, biased variances, mean over colour channels and
    over window positions that lie inside the image. Raises `ValueError` for images smaller than the window.
    """
    if min(first.shape[-2:]) < 11:
        raise ValueError(f"images are {tuple(first.shape[-2:])} px; SSIM needs at least 11x11")
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


class Reconstruction:
    """Running PSNR, SSIM and codebook usage of a tokenizer over batches of uint8 images."""

    def __init__(self, model: VQHiT) -> None:
        self.model = model
        self.usage = CodebookUsage(model.codebook_size)
        self.images = 0
        self._psnr = self._ssim = 0.0

    def update(self, originals: Tensor) -> Tensor:
        """Encode, decode and compare (B, 3, S, S) uint8 images; returns the reconstructions, uint8 on the CPU."""
        tokens = self.model.encode(from_uint8(originals).to(self.model.quant_conv.weight))
        reconstructions = to_uint8(self.model.decode(tokens)).cpu()
        self.usage.update(tokens)
        self._psnr += float(psnr(originals, reconstructions).sum())
        self._ssim += float(ssim(originals, reconstructions).sum())
        self.images += len(originals)
        return reconstructions

    def result(self) -> dict[str, Any]:
        """Means over all images so far, and codebook counts."""
        return {
            "images": self.images,
            "psnr": self._psnr / self.images,
            "ssim": self._ssim / self.images,
            "codes_used": self.usage.codes_used,
            "codebook_usage": self.usage.usage,
            "codebook_perplexity": self.usage.perplexity,
        }


def evenly_spaced(paths: list[Path], limit: int | None) -> list[Path]:
    """Return at most `limit` paths, evenly spaced in the list."""
    if limit is None or limit >= len(paths):
        return paths
    return [paths[index * len(paths) // limit] for index in range(limit)]


def measure(
    model: VQHiT, paths: list[Path], batch_size: int, workers: int, on_batch: Callable[[int], None] | None = None
) -> Reconstruction:
    """Reconstruct the center crops of image files and compare; `on_batch` is told how many images each batch had."""
    measured = Reconstruction(model)
    crops = CenterCrops(paths, model.config.image_size)
    for originals in load_batches(crops, range(len(paths)), batch_size, workers):
        measured.update(originals)
        if on_batch is not None:
            on_batch(len(originals))
    return measured


def evaluate_tokenizer(
    model: VQHiT, data: Path | str, *, batch_size: int = 16, limit: int | None = None, workers: int = 0
) -> dict[str, Any]:
    """Measure a tokenizer on a folder of images; the result is JSON-able and names its protocol.

    `limit` takes that many images, evenly spaced in the sorted list.
    """
    paths = evenly_spaced(list_images(data), limit)
    started = time.perf_counter()
    with ProgressBar("eval", -(-len(paths) // batch_size)) as bar:
        measured = measure(model, paths, batch_size, workers, bar.advance)
    return {
        **measured.result(),
        "codebook_size": model.codebook_size,
        "tokens_per_image": model.num_tokens,
        "seconds": round(time.perf_counter() - started, 2),
        "protocol": {
            "data": str(data),
            "image_size": model.config.image_size,
            "crop": "ADM center crop: box halving, bicubic resize of the short side",
            "rounding": "reconstructions clamped and rounded to uint8",
            "psnr": f"dB, data range 1, mean over images, at most {PSNR_CEILING_DB:g} each",
            "ssim": "Gaussian 11x11, sigma 1.5, data range 1, mean over channels and images",
            "dtype": str(model.quant_conv.weight.dtype).removeprefix("torch."),
            "device": model.quant_conv.weight.device.type,
            "vqhit": __version__,
            "torch": torch.__version__,
        },
    }
