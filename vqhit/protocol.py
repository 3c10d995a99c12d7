"""What an evaluation measures, with which networks, and the words and numbers that say so."""

from collections.abc import Callable
from typing import Any, Self, TypeVar

import torch
from pydantic import Field, model_validator

from vqhit import distributed
from vqhit.comparison import PAIRED, Comparison, Metric
from vqhit.config import Config, Count, NonNegativeInt, Text
from vqhit.data import BadShare, Share
from vqhit.extractors import Extractor, InceptionExtractor, PooledExtractor, check_features
from vqhit.frechet import FeatureStatistics
from vqhit.inception_score import GROUPS
from vqhit.metrics import SSIM_WINDOW
from vqhit.perceptual import LPIPS, FeaturesConfig, check_image_size, perceptual_network

T = TypeVar("T")
OF_TOKENIZERS: tuple[Metric, ...] = ("rfid", "is", "psnr", "ssim", "lpips", "codebook")
OF_GENERATORS: tuple[Metric, ...] = ("fid", "is")
OF_PICTURES: tuple[Metric, ...] = (*OF_GENERATORS, *PAIRED)


class EvaluationSettings(Config):
    """What to measure, on how many images, with which networks."""

    metrics: tuple[Metric, ...] | None = Field(default=None, min_length=1)
    """By default all that apply, less those whose network cannot be had, which are named."""
    split: Text | None = None
    limit: Count | None = None
    """At most so many images, evenly spaced in the list."""
    samples: Count = 50_000
    """Of a generator."""
    seed: NonNegativeInt = 0
    """Of a generator's samples."""
    batch_size: Count = 16
    workers: NonNegativeInt = 0
    max_bad: BadShare = 0.01
    """Images that cannot be read are left out and listed; with more than this share `DataError` is raised."""
    crop_proportion: Share = 1.0
    """Of the reference set of a generator or of pictures: below 1, the middle square of that share of the short side
    (0.875 on ImageNet, in the paper's code) instead of ADM's center crop."""
    inception: Text | None = None
    """File of FID's network; without it torchvision's cache, or a download."""
    lpips: Text | None = None
    """File of torchvision's VGG16; without it torchvision's cache, or a download."""
    features: FeaturesConfig | None = None
    """Another network in the place of FID's, with the file of its weights; the result is then not called FID."""
    feature_weights: Text | None = None
    stats: Text | None = None
    """An .npz file with `mu` and `sigma` of the reference set, instead of its images."""
    save_stats: Text | None = None
    """Where to write those of this reference set."""
    codebook_picture: Text | None = None
    """Where to draw how often the codes are chosen, as PNG."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_features(self.features, self.feature_weights)
        if self.stats is not None and self.save_stats is not None:
            raise ValueError("stats and save_stats: statistics that are read need not be saved; leave one out")
        if self.metrics is not None and len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"metrics: found {', '.join(self.metrics)}; each once")
        return self


class Protocol:
    """The metrics that were asked for, or all that can be had, with their networks on a device.

    `allowed` are those that `kind` has, of which `default` are measured if none are named. A metric that was named and
    cannot be had raises `ValueError`; one that was not named is left out, and `left_out` says why.
    """

    def __init__(
        self,
        settings: EvaluationSettings,
        kind: str,
        allowed: tuple[Metric, ...],
        *,
        size: int,
        device: torch.device,
        pictures: int,
        default: tuple[Metric, ...] | None = None,
    ) -> None:
        self.settings, self.size, self.device, self.pictures = settings, size, device, pictures
        for metric in settings.metrics or ():
            if metric not in allowed:
                raise ValueError(f"metric {metric!r}: not of {kind}; allowed: {', '.join(allowed)}")
        self.metrics: set[Metric] = set(settings.metrics or default or allowed)
        self._check_files()
        self.left_out: dict[str, str] = {}
        if "ssim" in self.metrics and size < SSIM_WINDOW:
            self._leave_out({"ssim"}, f"SSIM needs images of at least {SSIM_WINDOW} px; these have {size}")
        if "is" in self.metrics and pictures < GROUPS:
            self._leave_out({"is"}, f"an inception score needs at least {GROUPS} images; found {pictures}")
        if self.metrics & {"rfid", "fid"} and pictures < 2:
            self._leave_out({"rfid", "fid"}, f"a Fréchet distance needs at least 2 images; found {pictures}")
        given = None if settings.stats is None else FeatureStatistics.load(settings.stats)
        self.extractor = self._extractor()
        self.lpips = self._lpips()
        if not self.metrics:
            raise ValueError(f"nothing can be measured: {next(iter(self.left_out.values()))}")
        self.statistics = self._checked(given)

    def _check_files(self) -> None:
        """Raise `ValueError` for a network's file that no metric uses."""
        compares = self.metrics & {"rfid", "fid", "is"}
        if self.settings.inception is not None and (not compares or self.settings.features is not None):
            reason = "features stand for it" if compares else "none of the metrics needs it"
            raise ValueError(f"inception: {reason}; leave it out")
        if self.settings.lpips is not None and "lpips" not in self.metrics:
            raise ValueError("lpips: none of the metrics needs its file; leave it out")

    def _leave_out(self, metrics: set[Metric], reason: str) -> None:
        if self.settings.metrics is not None:
            raise ValueError(reason)
        self.left_out |= dict.fromkeys(sorted(metrics & self.metrics), reason)
        self.metrics -= metrics

    def _extractor(self) -> Extractor | None:
        settings = self.settings
        wanted: set[Metric] = self.metrics & {"rfid", "fid", "is"}
        if settings.features is not None and settings.feature_weights is not None:
            if "is" in wanted:
                network = settings.features.network
                self._leave_out(
                    {"is"}, f"is: features of {network} have no classes; an inception score has Inception's"
                )
            if not wanted - {"is"}:
                raise ValueError("features: none of the metrics compares features; leave them out, or add fid or rfid")
            return PooledExtractor(settings.features, settings.feature_weights, self.size).to(self.device)
        if not wanted:
            return None
        return self._had(wanted, settings.inception, lambda: InceptionExtractor(settings.inception).to(self.device))

    def _had(self, metrics: set[Metric], path: str | None, build: Callable[[], T]) -> T | None:
        """What `build` returns; None, and the metrics left out, if it cannot be had in every process."""
        network, reason = None, None
        try:
            with distributed.first_here():
                network = build()
        except ValueError as error:
            if path is not None:
                raise
            reason = str(error)
        reasons = [found for found in distributed.gather_objects(reason) if found is not None]
        if reasons:
            self._leave_out(metrics, reasons[0])
            return None
        return network

    def _lpips(self) -> LPIPS | None:
        if "lpips" not in self.metrics:
            return None
        return self._had({"lpips"}, self.settings.lpips, self._build_lpips)

    def _build_lpips(self) -> LPIPS:
        network = perceptual_network("lpips", self.settings.lpips, key="--lpips").to(self.device)
        check_image_size(network, self.size, key="lpips")
        assert isinstance(network, LPIPS)
        return network

    def _checked(self, found: FeatureStatistics | None) -> FeatureStatistics | None:
        """Statistics of the file `stats`, if they are of this network and image size, as far as they say."""
        settings = self.settings
        if not self.metrics & {"rfid", "fid"}:
            if settings.stats is not None or settings.save_stats is not None:
                name = "stats" if settings.stats is not None else "save_stats"
                reasons = [f" ({reason})" for metric, reason in self.left_out.items() if metric in ("rfid", "fid")]
                raise ValueError(f"{name}: no metric that is measured compares features{''.join(reasons)}")
            return None
        if found is None:
            return None
        assert self.extractor is not None
        if found.dim != self.extractor.dim:
            raise ValueError(
                f"{settings.stats}: statistics of {found.dim} features; this network has {self.extractor.dim}"
            )
        theirs, ours = found.origin or {}, self.identity()
        for key, value in ours.items():
            if key in theirs and theirs[key] != value:
                raise ValueError(f"{settings.stats}: made with {key} {theirs[key]}; this evaluation has {value}")
        return found

    def identity(self) -> dict[str, Any]:
        """What statistics must have in common to be compared."""
        assert self.extractor is not None
        return {"sha256": self.extractor.sha256, "preprocessing": self.extractor.preprocessing, "image_size": self.size}

    def comparison(self) -> Comparison:
        """What takes in the images, its clock started."""
        return Comparison(
            self.metrics,
            self.device,
            extractor=self.extractor,
            lpips=self.lpips,
            pictures=self.pictures,
            statistics=self.statistics,
        )
