"""Running images through a model and comparing, in one process or several: while training and in `vqhit eval`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqhit import distributed
from vqhit.codebook import CodebookUsage
from vqhit.comparison import Comparison
from vqhit.data import Batch, CenterCrops, Skipped, load_batches
from vqhit.folder import DataError
from vqhit.generator import Generator
from vqhit.images import from_uint8, to_uint8
from vqhit.models import VQHiT
from vqhit.norms import in_eval_mode
from vqhit.sources import ImageSource
from vqhit.stopwatch import Stopwatch


class Crops(NamedTuple):
    """A batch of an evaluation."""

    images: Tensor
    """(B, 3, S, S) uint8, on the device of the evaluation; none that could not be read."""
    numbers: list[int]
    """Which they are of all images that are evaluated."""
    skipped: list[str]


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Some images of a source, and how they are cut (see `CenterCrops`) and read.

    With more than the share `max_bad` that cannot be read, reading raises `DataError`.
    """

    source: ImageSource
    indices: Sequence[int]
    size: int
    batch_size: int
    workers: int
    proportion: float = 1.0
    cut: bool = True
    max_bad: float = 1.0

    def crops(self, watch: Stopwatch) -> Iterator[Crops]:
        """This process's share, on the clock's device, read ahead by the loader processes."""
        mine = range(len(self.indices))[distributed.rank() :: distributed.world_size()]
        parts = [mine[start : start + self.batch_size] for start in range(0, len(mine), self.batch_size)]
        dataset = CenterCrops(self.source, self.size, proportion=self.proportion, cut=self.cut)
        batches = load_batches(dataset, ([self.indices[number] for number in part] for part in parts), self.workers)
        total = len(self.indices)
        skipped, asked_for = Skipped(self.max_bad, total), 0
        for part, batch in zip(parts, watch.waiting(copied_ahead(batches, watch.device)), strict=True):
            asked_for = min(asked_for + len(part) * distributed.world_size(), total)
            skipped.add(batch.skipped)
            skipped.check(asked_for)  # as if the other processes had no bad ones
            yield Crops(batch.images, [part[position] for position in batch.kept], batch.skipped)


def copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches with their images on the device; to a GPU, copied while it works on the batch before."""
    if device.type != "cuda":
        yield from (batch._replace(images=batch.images.to(device)) for batch in batches)
        return
    copying = torch.cuda.Stream(device)
    ahead: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(copying):
            copied = batch._replace(images=batch.images.to(device, non_blocking=True))
        if ahead is not None:
            yield ahead
        working = torch.cuda.current_stream(device)
        working.wait_stream(copying)
        copied.images.record_stream(working)
        ahead = copied
    if ahead is not None:
        yield ahead


class Taken(NamedTuple):
    """How many images were taken in, and what was wrong with the others, in all processes."""

    images: int
    skipped: list[str]

    @classmethod
    def gather(cls, images: int, skipped: list[str]) -> "Taken":
        """Add up what each process has."""
        shares = distributed.gather_objects((images, skipped))
        return cls(sum(count for count, _ in shares), [problem for _, problems in shares for problem in problems])


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
        """Encode, decode, in eval mode, and compare (B, 3, S, S) uint8 images; returns the reconstructions, uint8."""
        originals = originals.to(self.device)
        with self.comparison.watch.part("tokenizer"), in_eval_mode(self.model):
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
        self.images, self.skipped = Taken.gather(self.images, self.skipped)

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


OnBatch = Callable[[int], None] | None


def measure(
    model: VQHiT, images: ImageSet, comparison: Comparison | None = None, on_batch: OnBatch = None
) -> Reconstruction:
    """Reconstruct images and compare; each process takes its share, all return the same.

    `on_batch` is told how many images each batch of this process had.
    """
    measured = Reconstruction(model, comparison)
    for crops in images.crops(measured.comparison.watch):
        if crops.numbers:
            measured.update(crops.images, crops.numbers)
        measured.skipped += crops.skipped
        if on_batch is not None:
            on_batch(len(crops.numbers))
    measured.gather()
    return measured


def take_reference(comparison: Comparison, images: ImageSet, on_batch: OnBatch = None) -> Taken:
    """Take in a reference set; each process takes its share, all return the same."""
    return _take(comparison, images, lambda batch, _: comparison.add_reference(batch), on_batch)


def take_pictures(comparison: Comparison, images: ImageSet, on_batch: OnBatch = None) -> Taken:
    """Take in ready-made pictures; each process takes its share, all return the same."""
    return _take(comparison, images, comparison.add_pictures, on_batch)


def _take(
    comparison: Comparison, images: ImageSet, add: Callable[[Tensor, list[int]], None], on_batch: OnBatch
) -> Taken:
    count = 0
    skipped: list[str] = []
    for batch, numbers, problems in images.crops(comparison.watch):
        if numbers:
            add(batch, numbers)
        count, skipped = count + len(numbers), skipped + problems
        if on_batch is not None:
            on_batch(len(numbers))
    return Taken.gather(count, skipped)


def take_pairs(comparison: Comparison, originals: ImageSet, pictures: ImageSet, on_batch: OnBatch = None) -> Taken:
    """Compare pictures with the originals of the same numbers where both can be read; tells of bad originals."""
    count = 0
    skipped: list[str] = []
    pairs = zip(originals.crops(comparison.watch), pictures.crops(comparison.watch), strict=True)
    for original, picture in pairs:
        both = sorted(set(original.numbers).intersection(picture.numbers))
        if both:
            rows = [original.numbers.index(number) for number in both]
            picture_rows = [picture.numbers.index(number) for number in both]
            comparison.add_pairs(original.images[rows], picture.images[picture_rows])
        count, skipped = count + len(both), skipped + original.skipped
        if on_batch is not None:
            on_batch(len(both))
    return Taken.gather(count, skipped)


def take_samples(
    comparison: Comparison,
    model: Generator,
    count: int,
    *,
    seed: int,
    batch_size: int,
    on_batch: OnBatch = None,
) -> None:
    """Take in the first `count` samples of a seed, rounded to uint8; each process draws its share."""
    mine = range(count)[distributed.rank() :: distributed.world_size()]
    numbers = iter(mine)
    watch = comparison.watch
    for images in watch.waiting(model.samples(mine, seed=seed, batch_size=batch_size), "generator"):
        comparison.add_pictures(to_uint8(images), [next(numbers) for _ in images])
        if on_batch is not None:
            on_batch(len(images))


@contextmanager
def exact_float32() -> Iterator[None]:
    """On CUDA, do not round float32 to TF32 (cuDNN's convolutions do by default)."""
    places: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
