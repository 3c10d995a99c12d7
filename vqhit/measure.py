"""Running images through a model and comparing, in one process or several: while training and in `vqhit eval`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

from pydantic import model_validator
from torch import Tensor

from vqhit import distributed
from vqhit.codebook import CodebookUsage
from vqhit.comparison import Comparison, Stopwatch
from vqhit.config import Count, Flag, Text
from vqhit.data import CenterCrops, load_batches
from vqhit.extractors import Extractor, InceptionExtractor, PooledExtractor
from vqhit.folder import DataError
from vqhit.generator import Generator
from vqhit.images import from_uint8, to_uint8
from vqhit.models import VQHiT
from vqhit.perceptual import FeaturesConfig
from vqhit.sources import ImageSource, SourceConfig


class EvalConfig(SourceConfig):
    """Images to evaluate on while training, with the model that would be saved.

    Of a tokenizer: PSNR, SSIM and codebook usage. With `fid`, or `features` and a file of that network's weights, also
    the Fréchet distance between features of the images and of their reconstructions, or of as many samples: a generator
    needs one of the two. Only with `fid` is it called FID.
    """

    every: Count = 5000
    """Steps between evaluations; the last step is one too."""
    images: Count = 1000
    """At most so many, evenly spaced: always the same ones."""
    fid: Flag = False
    """Also rFID; FID of a generator, of as many samples."""
    inception: Text | None = None
    """File of FID's network; without it torchvision's cache, or a download."""
    features: FeaturesConfig | None = None
    feature_weights: Text | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_features(self.features, self.feature_weights)
        if self.compares_features and self.images < 2:
            raise ValueError(f"images is {self.images}; a Fréchet distance needs at least 2")
        if self.fid and self.features is not None:
            raise ValueError("fid and features: FID has its own network; leave one out")
        if self.inception is not None and not self.fid:
            raise ValueError("inception: only fid needs it")
        return self

    @property
    def compares_features(self) -> bool:
        """Whether a Fréchet distance is measured."""
        return self.fid or self.features is not None

    def extractor(self, size: int) -> Extractor | None:
        """The network whose features of images of `size` px are compared; raises `ValueError` if it cannot be had."""
        if self.features is not None and self.feature_weights is not None:
            return PooledExtractor(self.features, self.feature_weights, size)
        return InceptionExtractor(self.inception, key="eval.inception") if self.fid else None


def check_features(features: FeaturesConfig | None, weights: str | None) -> None:
    """Raise `ValueError` if there is a network without its weights, or weights without their network."""
    if (features is None) != (weights is None):
        missing = "features, a network," if features is None else "feature_weights, a file,"
        raise ValueError(f"{missing} is missing: a Fréchet distance needs both")


class Crops(NamedTuple):
    """A batch of an evaluation."""

    images: Tensor
    """(B, 3, S, S) uint8, on the device of the evaluation; none that could not be read."""
    numbers: list[int]
    """Which they are of all images that are evaluated."""
    skipped: list[str]


def center_crops(
    source: ImageSource,
    indices: Sequence[int],
    size: int,
    *,
    batch_size: int,
    workers: int,
    watch: Stopwatch,
    cut: bool = True,
) -> Iterator[Crops]:
    """Center crops of this process's share of some images, read ahead by `workers` loader processes."""
    mine = range(len(indices))[distributed.rank() :: distributed.world_size()]
    parts = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    batches = load_batches(
        CenterCrops(source, size, cut), ([indices[number] for number in part] for part in parts), workers
    )
    for part, batch in zip(parts, watch.waiting(batches), strict=True):
        images = batch.images.to(watch.device, non_blocking=True)
        yield Crops(images, [part[position] for position in batch.kept], batch.skipped)


class Taken(NamedTuple):
    """How many images were taken in, and what was wrong with the others."""

    images: int
    skipped: list[str]


class Reconstruction:
    """Running metrics of a tokenizer over batches of uint8 images; by default PSNR, SSIM and codebook usage."""

    def __init__(self, model: VQHiT, comparison: Comparison | None = None) -> None:
        self.model = model
        self.device = model.quant_conv.weight.device
        self.comparison = comparison or Comparison(("psnr", "ssim", "codebook"), self.device)
        self.usage = CodebookUsage(model.codebook_size)
        self.images = 0
        self.skipped: list[str] = []
        """What was wrong with images that could not be read."""

    def update(self, originals: Tensor, numbers: Sequence[int] = ()) -> Tensor:
        """Encode, decode and compare (B, 3, S, S) uint8 images; returns the reconstructions, uint8."""
        originals = originals.to(self.device)
        with self.comparison.watch.part("tokenizer"):
            tokens = self.model.encode(from_uint8(originals).to(self.model.quant_conv.weight))
            reconstructions = to_uint8(self.model.decode(tokens))
        self.usage.update(tokens)
        self.images += len(originals)
        self.comparison.add_reference(originals)
        self.comparison.add_pictures(reconstructions, numbers)
        self.comparison.add_pairs(originals, reconstructions)
        return reconstructions

    def gather(self) -> None:
        """Take in what the other processes have measured."""
        self.comparison.gather()
        self.usage = self.usage.gather()
        shares = distributed.gather_objects((self.images, self.skipped))
        self.images = sum(images for images, _ in shares)
        self.skipped = [problem for _, problems in shares for problem in problems]

    def result(self) -> dict[str, Any]:
        """Metrics over all images so far, and codebook counts; raises `DataError` if there was none."""
        if not self.images:
            raise DataError(f"no image to evaluate on can be read; the first: {self.skipped[0]}")
        codebook = {
            "codes_used": self.usage.codes_used,
            "dead_codes": self.usage.dead_codes,
            "codebook_usage": self.usage.usage,
            "codebook_perplexity": self.usage.perplexity,
        }
        return {
            "images": self.images,
            "skipped": len(self.skipped),
            **self.comparison.result(),
            **(codebook if "codebook" in self.comparison.metrics else {}),
        }


def measure(
    model: VQHiT,
    source: ImageSource,
    indices: Sequence[int],
    *,
    batch_size: int,
    workers: int,
    comparison: Comparison | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Reconstruction:
    """Reconstruct the center crops of some images and compare; each process takes its share, all return the same.

    `on_batch` is told how many images each batch of this process had.
    """
    measured = Reconstruction(model, comparison)
    watch = measured.comparison.watch
    size = model.config.image_size
    for crops in center_crops(source, indices, size, batch_size=batch_size, workers=workers, watch=watch):
        if crops.numbers:
            measured.update(crops.images, crops.numbers)
        measured.skipped += crops.skipped
        if on_batch is not None:
            on_batch(len(crops.numbers))
    measured.gather()
    return measured


def take_reference(
    comparison: Comparison, crops: Iterator[Crops], on_batch: Callable[[int], None] | None = None
) -> Taken:
    """Take in the images of a reference set; each process takes its share, all return the same."""
    return _take(comparison, crops, on_batch, lambda images, _: comparison.add_reference(images))


def take_pictures(comparison: Comparison, crops: Iterator[Crops], on_batch: Callable[[int], None]) -> Taken:
    """Take in ready-made pictures; each process takes its share, all return the same."""
    return _take(comparison, crops, on_batch, comparison.add_pictures)


def _take(
    comparison: Comparison,
    crops: Iterator[Crops],
    on_batch: Callable[[int], None] | None,
    add: Callable[[Tensor, list[int]], None],
) -> Taken:
    count = 0
    skipped: list[str] = []
    for images, numbers, problems in crops:
        if numbers:
            add(images, numbers)
        count, skipped = count + len(numbers), skipped + problems
        if on_batch is not None:
            on_batch(len(numbers))
    shares = distributed.gather_objects((count, skipped))
    return Taken(sum(count for count, _ in shares), [problem for _, problems in shares for problem in problems])


def take_pairs(
    comparison: Comparison, originals: Iterator[Crops], pictures: Iterator[Crops], on_batch: Callable[[int], None]
) -> None:
    """Compare pictures with the originals of the same numbers, where both can be read."""
    for first, second in zip(originals, pictures, strict=True):
        both = sorted(set(first.numbers).intersection(second.numbers))
        if both:
            rows = ([batch.numbers.index(number) for number in both] for batch in (first, second))
            comparison.add_pairs(first.images[next(rows)], second.images[next(rows)])
        on_batch(len(both))


def take_samples(
    comparison: Comparison,
    model: Generator,
    count: int,
    *,
    seed: int,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> None:
    """Take in the first `count` samples of a seed, rounded to uint8; each process draws its share."""
    mine = range(count)[distributed.rank() :: distributed.world_size()]
    numbers = iter(mine)
    watch = comparison.watch
    for images in watch.waiting(model.samples(mine, seed=seed, batch_size=batch_size), "generator"):
        comparison.add_pictures(to_uint8(images), [next(numbers) for _ in images])
        if on_batch is not None:
            on_batch(len(images))
