"""Running metrics of pictures, beside their originals and beside a reference set: one pass, constant memory."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from vqhit import distributed
from vqhit.extractors import Extractor
from vqhit.frechet import FeatureStatistics, FeatureSums, frechet_distance
from vqhit.images import from_uint8
from vqhit.inception_score import InceptionScore
from vqhit.metrics import psnr, ssim
from vqhit.perceptual import LPIPS

T = TypeVar("T")
Metric = Literal["rfid", "fid", "is", "psnr", "ssim", "lpips", "codebook"]
PAIRED: tuple[Metric, ...] = ("psnr", "ssim", "lpips")
"""Metrics of two images; the others are of sets of images."""


class Stopwatch:
    """Seconds spent in each part of a loop; on a GPU a part ends when its work has."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.started = time.perf_counter()
        self.parts: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of this block to a part."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - start

    def waiting(self, items: Iterable[T], name: str = "waiting for images") -> Iterator[T]:
        """The items, the time until each is there added to a part."""
        iterator = iter(items)
        while True:
            with self.part(name):
                found = next(iterator, None)
            if found is None:
                return
            yield found

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.perf_counter() - self.started


class Comparison:
    """Running metrics of uint8 pictures (B, 3, S, S), on the device where they are to be computed.

    `rfid` and `fid` compare the features of all pictures with those of a reference, images or their `statistics`; `is`
    needs the number of all `pictures`; `psnr`, `ssim` and `lpips` compare each picture with its original.
    """

    def __init__(
        self,
        metrics: Iterable[Metric],
        device: torch.device | str,
        *,
        extractor: Extractor | None = None,
        lpips: LPIPS | None = None,
        pictures: int = 0,
        statistics: FeatureStatistics | None = None,
    ) -> None:
        self.metrics = frozenset(metrics)
        self.device = torch.device(device)
        self.extractor, self.lpips, self.statistics = extractor, lpips, statistics
        self.watch = Stopwatch(self.device)
        exact = self.device if self.device.type == "cuda" else torch.device("cpu")  # others have no float64
        self._paired = torch.zeros(1 + len(PAIRED), dtype=torch.float64, device=exact)
        """Number of pairs, then the sum of each paired metric."""
        self.of_pictures = self.of_reference = None
        if self.distance is not None:
            assert extractor is not None
            self.of_pictures = FeatureSums(extractor.dim, exact)
            self.of_reference = FeatureSums(extractor.dim, exact) if statistics is None else None
        self.score = None
        if "is" in self.metrics:
            assert extractor is not None
            self.score = InceptionScore(pictures, extractor.classes, exact)

    @property
    def distance(self) -> str | None:
        """What the distance of the features is called, if it is measured: only Inception's is FID."""
        asked = self.metrics & {"rfid", "fid"}
        if not asked or self.extractor is None:
            return None
        return next(iter(asked)) if self.extractor.is_fid else "frechet_distance"

    @torch.no_grad()
    def add_reference(self, images: Tensor) -> None:
        """Take in images of the reference set."""
        if self.of_reference is not None and self.extractor is not None:
            with self.watch.part("features"):
                features = self.extractor(images).features
            with self.watch.part("sums"):
                self.of_reference.update(features)

    @torch.no_grad()
    def add_pictures(self, pictures: Tensor, numbers: Sequence[int]) -> None:
        """Take in pictures of these numbers, each 0 to `pictures` - 1."""
        if self.extractor is None or (self.of_pictures is None and self.score is None):
            return
        with self.watch.part("features"):
            features, logits = self.extractor(pictures)
        with self.watch.part("sums"):
            if self.of_pictures is not None:
                self.of_pictures.update(features)
            if self.score is not None:
                self.score.update(logits, numbers)

    @torch.no_grad()
    def add_pairs(self, originals: Tensor, pictures: Tensor) -> None:
        """Compare pictures with their originals, one by one."""
        if not self.metrics.intersection(PAIRED):
            return
        found = [torch.ones(len(pictures))]
        with self.watch.part("psnr, ssim"):
            pair = originals.to(self._paired.device), pictures.to(self._paired.device)
            for name, metric in (("psnr", psnr), ("ssim", ssim)):
                found.append(metric(*pair) if name in self.metrics else torch.zeros(len(pictures)))
        with self.watch.part("lpips"):
            if "lpips" in self.metrics and self.lpips is not None:
                found.append(self.lpips.per_image(from_uint8(pictures), from_uint8(originals)))
            else:
                found.append(torch.zeros(len(pictures)))
        self._paired += torch.stack([values.to(self._paired).sum() for values in found])

    def gather(self) -> None:
        """Take in what the other processes have."""
        distributed.total(self._paired)
        for sums in (self.of_pictures, self.of_reference, self.score):
            if sums is not None:
                sums.gather()

    def reference_statistics(self, origin: dict[str, Any]) -> FeatureStatistics | None:
        """Statistics of the reference set, made of its images or given; None if no distance is measured."""
        return self.statistics if self.of_reference is None else self.of_reference.statistics(origin)

    def result(self) -> dict[str, float]:
        """The metrics by their names; raises `ValueError` if there were too few images."""
        found: dict[str, float] = {}
        if self.distance is not None and self.of_pictures is not None:
            with self.watch.part("distance"):
                reference = self.reference_statistics({})
                assert reference is not None
                found[self.distance] = frechet_distance(self.of_pictures.statistics(), reference)
        if self.score is not None:
            found["is"], found["is_std"] = self.score.result()
        pairs, *sums = self._paired.tolist()
        found |= {name: value / pairs if pairs else math.nan for name, value in zip(PAIRED, sums, strict=True)}
        return {name: value for name, value in found.items() if name not in PAIRED or name in self.metrics}
