"""Reconstruction quality: PSNR, SSIM, codebook usage; a Fréchet distance, of samples too; with the protocol of each."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import model_validator
from torch import Tensor

from vqhit import __version__, distributed
from vqhit.codebook import CodebookUsage
from vqhit.config import Count, Text
from vqhit.data import Batch, CenterCrops, Skipped, load_batches
from vqhit.files import sha256
from vqhit.folder import DataError
from vqhit.frechet import FeatureSums, frechet_distance
from vqhit.generator import Generator
from vqhit.images import from_uint8, to_uint8
from vqhit.metrics import PSNR_CEILING_DB, psnr, ssim
from vqhit.models import VQHiT
from vqhit.perceptual import FeatureDistance, FeaturesConfig, feature_network
from vqhit.progress import ProgressBar
from vqhit.sources import ImageSource, SourceConfig, evenly_spaced, open_source


class EvalConfig(SourceConfig):
    """Images to evaluate on while training, with the model that would be saved.

    Of a tokenizer: PSNR, SSIM and codebook usage. With `features` and a file of that network's weights, which a
    generator needs, also the Fréchet distance between its features of the images and of their reconstructions, or of as
    many samples: a proxy, not FID.
    """

    every: Count = 5000
    """Steps between evaluations; the last step is one too."""
    images: Count = 1000
    """At most so many, evenly spaced: always the same ones."""
    features: FeaturesConfig | None = None
    feature_weights: Text | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.features is None) != (self.feature_weights is None):
            missing = "features, a network," if self.features is None else "feature_weights, a file,"
            raise ValueError(f"{missing} is missing: a Fréchet distance needs both")
        if self.features is not None and self.images < 2:
            raise ValueError(f"images is {self.images}; a Fréchet distance needs at least 2")
        return self


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
    for batch in _my_crops(source, indices, model.config.image_size, batch_size, workers):
        if len(batch.images):
            measured.update(batch.images)
        measured.skipped += batch.skipped
        if on_batch is not None:
            on_batch(len(batch.images))
    measured.gather()
    return measured


def _my_crops(source: ImageSource, indices: Sequence[int], size: int, batch_size: int, workers: int) -> Iterator[Batch]:
    """Center crops of this process's share of some images."""
    mine = indices[distributed.rank() :: distributed.world_size()]
    order = (mine[start : start + batch_size] for start in range(0, len(mine), batch_size))
    return iter(load_batches(CenterCrops(source, size), order, workers))


def image_features(
    network: FeatureDistance,
    source: ImageSource,
    indices: Sequence[int],
    size: int,
    *,
    batch_size: int,
    workers: int,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[FeatureSums, list[str]]:
    """Pooled features of the center crops of some images, of all processes; and what was wrong with unreadable ones.

    Raises `DataError` if fewer than two can be read.
    """
    sums, skipped = FeatureSums(network.pooled_dim(size)), []
    for batch in _my_crops(source, indices, size, batch_size, workers):
        if len(batch.images):
            sums.update(network.pooled(from_uint8(batch.images.to(network.mean.device))))
        skipped += batch.skipped
        if on_batch is not None:
            on_batch(len(batch.images))
    sums.gather()
    skipped = [problem for those in distributed.gather_objects(skipped) for problem in those]
    if sums.count < 2:
        reason = f"; the first problem: {skipped[0]}" if skipped else ""
        raise DataError(f"a Fréchet distance needs at least 2 images; {sums.count} can be read{reason}")
    return sums, skipped


def sample_features(
    network: FeatureDistance,
    model: Generator,
    count: int,
    *,
    seed: int = 0,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> FeatureSums:
    """Pooled features of the first `count` samples of a seed, rounded to uint8, of all processes."""
    sums = FeatureSums(network.pooled_dim(model.image_size))
    mine = range(count)[distributed.rank() :: distributed.world_size()]
    for images in model.samples(mine, seed=seed, batch_size=batch_size):
        sums.update(network.pooled(from_uint8(to_uint8(images))))
        if on_batch is not None:
            on_batch(len(images))
    sums.gather()
    return sums


def evaluate_generator(
    model: Generator,
    data: Path | str,
    *,
    features: FeaturesConfig,
    feature_weights: Path | str,
    samples: int = 50_000,
    seed: int = 0,
    split: str | None = None,
    batch_size: int = 16,
    limit: int | None = None,
    workers: int = 0,
    max_bad: float = 0.01,
) -> dict[str, Any]:
    """Fréchet distance between samples and the images of a folder or a data set; JSON-able, with its protocol.

    It is a proxy, not FID: it depends on the network and on both numbers of images. `limit` takes that many images,
    evenly spaced; images that cannot be read as for `evaluate_tokenizer`.
    """
    if samples < 2:
        raise ValueError(f"a Fréchet distance needs at least 2 samples; found {samples}")
    network = feature_network(features, feature_weights).to(next(model.parameters()).device)
    source = open_source(SourceConfig(path=str(data), split=split), split="validation")
    indices = evenly_spaced(len(source), limit)
    started = time.perf_counter()
    batches = math.ceil(len(indices) / batch_size) + math.ceil(samples / batch_size)
    with _exact_float32(), ProgressBar("eval", batches) as bar:
        settings: dict[str, Any] = {"batch_size": batch_size, "on_batch": bar.advance}
        of_images, bad = image_features(network, source, indices, model.image_size, workers=workers, **settings)
        skipped = Skipped(max_bad, len(indices))
        skipped.add(bad)
        skipped.check(len(indices))
        of_samples = sample_features(network, model, samples, seed=seed, **settings)
    return {
        "images": of_images.count,
        "samples": of_samples.count,
        "skipped": len(bad),
        "frechet_distance": frechet_distance(of_images, of_samples),
        "skipped_images": bad,
        "seconds": round(time.perf_counter() - started, 2),
        "protocol": {
            **_describe_data(data, split, model.image_size),
            "seed": seed,
            "rounding": "samples clamped and rounded to uint8",
            "frechet_distance": _describe(features, feature_weights, "images and of the uint8 samples"),
            **_describe_run(next(model.parameters())),
        },
    }


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
        network = feature_network(features, feature_weights).to(model.quant_conv.weight.device)
        described = {
            "frechet_distance": _describe(features, feature_weights, "images and of their uint8 reconstructions")
        }
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
            **_describe_data(data, split, model.config.image_size),
            "rounding": "reconstructions clamped and rounded to uint8",
            "psnr": f"dB, data range 1, mean over images, at most {PSNR_CEILING_DB:g} each",
            "ssim": "Gaussian 11x11, sigma 1.5, data range 1, mean over channels and images",
            **described,
            **_describe_run(model.quant_conv.weight),
        },
    }


def _describe_data(data: Path | str, split: str | None, size: int) -> dict[str, Any]:
    return {
        "data": str(data),
        "split": split,
        "image_size": size,
        "crop": "ADM center crop: box halving, bicubic resize of the short side",
    }


def _describe_run(weight: Tensor) -> dict[str, Any]:
    return {
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
        "tf32": False,
        "vqhit": __version__,
        "torch": torch.__version__,
    }


def _describe(features: FeaturesConfig, weights: Path | str, of: str) -> dict[str, Any]:
    return {
        "features": f"activations, means over positions, of the {of}; not FID",
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
