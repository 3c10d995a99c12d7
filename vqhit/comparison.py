"""Running metrics of pictures, beside their originals and beside a reference set: one pass, constant memory."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from vqhit import distributed
from vqhit.extractors import Extractor
from vqhit.frechet import FeatureStatistics, FeatureSums, frechet_distance
from vqhit.images import from_uint8
from vqhit.inception_score import InceptionScore
from vqhit.metrics import psnr, ssim
from vqhit.perceptual import LPIPS
from vqhit.stopwatch import Stopwatch

Metric = Literal["rfid", "fid", "is", "psnr", "ssim", "lpips", "codebook"]
PAIRED: tuple[Metric, ...] = ("psnr", "ssim", "lpips")
"""Metrics of two images; the others are of sets of images."""


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
        self.pairs = 0
        """Number of pictures that were compared with their originals."""
        paired = [name for name in PAIRED if name in self.metrics]
        self._sums = {name: torch.zeros((), dtype=torch.float64, device=exact) for name in paired}
        self.of_pictures = self.of_reference = self.score = None
        if "lpips" in self.metrics and lpips is None:
            raise ValueError("lpips needs its network")
        if asked := sorted(self.metrics & {"rfid", "fid", "is"}):
            if extractor is None:
                raise ValueError(f"{', '.join(asked)}: needs a network of features")
            if "is" in asked:
                self.score = InceptionScore(pictures, extractor.classes, exact)
            if asked != ["is"]:
                self.of_pictures = FeatureSums(extractor.dim, exact)
                self.of_reference = FeatureSums(extractor.dim, exact) if statistics is None else None

    @property
    def distance(self) -> str | None:
        """What the distance of the features is called, if it is measured: only Inception's is FID."""
        if self.of_pictures is None or self.extractor is None:
            return None
        return ("rfid" if "rfid" in self.metrics else "fid") if self.extractor.is_fid else "frechet_distance"

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
        self.pairs += len(pictures)
        for name, total in self._sums.items():
            with self.watch.part(name):
                if name == "lpips":
                    assert self.lpips is not None
                    found = self.lpips.per_image(from_uint8(pictures), from_uint8(originals))
                else:
                    metric = psnr if name == "psnr" else ssim
                    found = metric(originals.to(total.device), pictures.to(total.device))
                total += found.to(total.device).to(total.dtype).sum()

    def gather(self) -> None:
        """Take in what the other processes have."""
        self.pairs = sum(distributed.gather_objects(self.pairs))
        for total in self._sums.values():
            distributed.total(total)
        for sums in (self.of_pictures, self.of_reference, self.score):
            if sums is not None:
                sums.gather()

    def reference_statistics(self, origin: dict[str, Any]) -> FeatureStatistics | None:
        """Statistics of the reference set, made of its images or given; None if no distance is measured."""
        return self.statistics if self.of_reference is None else self.of_reference.statistics(origin)

    def result(self) -> dict[str, float]:
        """The metrics by their names; stops the watch. Raises `ValueError` if there were too few images."""
        found: dict[str, float] = {}
        if self.distance is not None and self.of_pictures is not None:
            with self.watch.part("distance"):
                reference = self.reference_statistics({})
                assert reference is not None
                found[self.distance] = frechet_distance(self.of_pictures.statistics(), reference)
        if self.score is not None:
            found["is"], found["is_std"] = self.score.result()
        if self._sums and not self.pairs:
            raise ValueError(f"{', '.join(self._sums)}: no picture and its original that can be read")
        found |= {name: float(total) / self.pairs for name, total in self._sums.items()}
        self.watch.stop()
        return found
