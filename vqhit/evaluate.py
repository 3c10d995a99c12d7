"""Reconstruction quality: PSNR, SSIM, codebook usage, a Fréchet distance; with the protocol beside the numbers."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqhit import __version__, distributed
from vqhit.codebook import CodebookUsage
from vqhit.config import Count
from vqhit.data import CenterCrops, Skipped, load_batches
from vqhit.files import sha256
from vqhit.folder import DataError
from vqhit.frechet import FeatureSums, frechet_distance
from vqhit.images import from_uint8, to_uint8
from vqhit.models import VQHiT
from vqhit.perceptual import FeatureDistance, FeaturesConfig, perceptual_network
from vqhit.progress import ProgressBar
from vqhit.sources import ImageSource, SourceConfig, evenly_spaced, open_source

PSNR_CEILING_DB = 100.0
"""Reported for images that are equal, whose PSNR has no finite value."""
SSIM_WINDOW = 11
"""Side of SSIM's window in px, and the least that an image may have."""


class EvalConfig(SourceConfig):
    """Images to evaluate on while training: PSNR, SSIM and codebook usage of the model that would be saved."""

    every: Count = 5000
    """Steps between evaluations; the last step is one too."""
    images: Count = 1000
    """At most so many, evenly spaced: always the same ones."""


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


class Reconstruction:
    """Running PSNR, SSIM and codebook usage of a tokenizer over batches of uint8 images.

    With a network, also the Fréchet distance between its pooled features of the images and of the reconstructions.
    """

    def __init__(self, model: VQHiT, network: FeatureDistance | None = None) -> None:
        self.model, self.network = model, network
        self.features: tuple[FeatureSums, ...] = ()
        """Of the images and of their reconstructions."""
        if network is not None:
            dim = network.pooled_dim(model.config.image_size)
            self.features = FeatureSums(dim), FeatureSums(dim)
        self.usage = CodebookUsage(model.codebook_size)
        self.images = 0
        self.skipped: list[str] = []
        """What was wrong with images that could not be read."""
        self._psnr = self._ssim = 0.0

    def update(self, originals: Tensor) -> Tensor:
        """Encode, decode and compare (B, 3, S, S) uint8 images; returns the reconstructions, uint8 on the CPU."""
        tokens = self.model.encode(from_uint8(originals).to(self.model.quant_conv.weight))
        reconstructions = to_uint8(self.model.decode(tokens)).cpu()
        self.usage.update(tokens)
        self._psnr += float(psnr(originals, reconstructions).sum())
        self._ssim += float(ssim(originals, reconstructions).sum())
        self.images += len(originals)
        if self.network is not None:
            for sums, pictures in zip(self.features, (originals, reconstructions), strict=True):
                sums.update(self.network.pooled(from_uint8(pictures.to(self.model.quant_conv.weight.device))))
        return reconstructions

    def gather(self) -> None:
        """Take in what the other processes have measured."""
        sums = torch.tensor([self.images, self._psnr, self._ssim], dtype=torch.float64)
        images, self._psnr, self._ssim = distributed.total(sums).tolist()
        self.images, self.usage = int(images), self.usage.gather()
        for each in self.features:
            each.gather()
        self.skipped = [problem for those in distributed.gather_objects(self.skipped) for problem in those]

    def result(self) -> dict[str, Any]:
        """Means over all images so far, and codebook counts; raises `DataError` if there was none."""
        if not self.images:
            raise DataError(f"no image to evaluate on can be read; the first: {self.skipped[0]}")
        distance = {} if not self.features else {"frechet_distance": frechet_distance(*self.features)}
        return {
            "images": self.images,
            "skipped": len(self.skipped),
            "psnr": self._psnr / self.images,
            "ssim": self._ssim / self.images,
            **distance,
            "codes_used": self.usage.codes_used,
            "codebook_usage": self.usage.usage,
            "codebook_perplexity": self.usage.perplexity,
        }


def measure(
    model: VQHiT,
    source: ImageSource,
    indices: Sequence[int],
    batch_size: int,
    workers: int,
    on_batch: Callable[[int], None] | None = None,
    network: FeatureDistance | None = None,
) -> Reconstruction:
    """Reconstruct the center crops of some images and compare; each process takes its share, all return the same.

    `on_batch` is told how many images each batch of this process had.
    """
    measured = Reconstruction(model, network)
    mine = indices[distributed.rank() :: distributed.world_size()]
    order = (mine[start : start + batch_size] for start in range(0, len(mine), batch_size))
    for batch in load_batches(CenterCrops(source, model.config.image_size), order, workers):
        if len(batch.images):
            measured.update(batch.images)
        measured.skipped += batch.skipped
        if on_batch is not None:
            on_batch(len(batch.images))
    measured.gather()
    return measured


def evaluate_tokenizer(
    model: VQHiT,
    data: Path | str,
    *,
    split: str | None = None,
    batch_size: int = 16,
    limit: int | None = None,
    workers: int = 0,
    max_bad: float = 0.01,
    features: FeaturesConfig | None = None,
    feature_weights: Path | str | None = None,
) -> dict[str, Any]:
    """Measure a tokenizer on a folder of images or a data set; the result is JSON-able and names its protocol.

    `limit` takes that many images, evenly spaced in the list. Those that cannot be read are left out and listed; raises
    `DataError` if they are more than the share `max_bad`. With `features` and a file of that network's weights, the
    Fréchet distance between its pooled features of images and reconstructions is measured too: a proxy, not FID, which
    depends on the network and on the number of images.
    """
    network: FeatureDistance | None = None
    described = {}
    if features is not None and feature_weights is not None:
        built = perceptual_network("features", feature_weights, features)
        assert isinstance(built, FeatureDistance)
        network = built.to(model.quant_conv.weight.device)
        described = {"frechet_distance": _describe(features, feature_weights)}
    elif features is not None or feature_weights is not None:
        missing = "a network and its layers (features)" if features is None else "a file of weights (feature_weights)"
        raise ValueError(f"the Fréchet distance needs {missing} too")
    source = open_source(SourceConfig(path=str(data), split=split), split="validation")
    indices = evenly_spaced(len(source), limit)
    if network is not None and len(indices) < 2:
        raise ValueError(f"a Fréchet distance needs at least 2 images; found {len(indices)}")
    started = time.perf_counter()
    with _exact_float32(), ProgressBar("eval", -(-len(indices) // batch_size)) as bar:
        measured = measure(model, source, indices, batch_size, workers, bar.advance, network)
    skipped = Skipped(max_bad, len(indices))
    skipped.add(measured.skipped)
    skipped.check(len(indices))
    return {
        **measured.result(),
        "skipped_images": measured.skipped,
        "codebook_size": model.codebook_size,
        "tokens_per_image": model.num_tokens,
        "seconds": round(time.perf_counter() - started, 2),
        "protocol": {
            "data": str(data),
            "split": split,
            "image_size": model.config.image_size,
            "crop": "ADM center crop: box halving, bicubic resize of the short side",
            "rounding": "reconstructions clamped and rounded to uint8",
            "psnr": f"dB, data range 1, mean over images, at most {PSNR_CEILING_DB:g} each",
            "ssim": "Gaussian 11x11, sigma 1.5, data range 1, mean over channels and images",
            **described,
            "dtype": str(model.quant_conv.weight.dtype).removeprefix("torch."),
            "device": model.quant_conv.weight.device.type,
            "tf32": False,
            "vqhit": __version__,
            "torch": torch.__version__,
        },
    }


def _describe(features: FeaturesConfig, weights: Path | str) -> dict[str, Any]:
    return {
        "features": "activations, means over positions, of the images and of their uint8 reconstructions; not FID",
        **features.to_dict(),
        "weights_sha256": sha256(Path(weights).expanduser()),
        "statistics": "float64, unbiased covariance",
    }


@contextmanager
def _exact_float32() -> Iterator[None]:
    """On CUDA, do not round float32 to TF32 (cuDNN's convolutions do by default)."""
    places: tuple[Any, ...] = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = False
        yield
    finally:
        for place, allowed in zip(places, before, strict=True):
            place.allow_tf32 = allowed
