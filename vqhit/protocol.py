"""What an evaluation measures, with which networks, and the words and numbers that say so."""

from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, model_validator

from vqhit import __version__, distributed
from vqhit.comparison import PAIRED, Comparison, Metric
from vqhit.config import Config, Count, NonNegativeInt, Text
from vqhit.data import BadShare
from vqhit.extractors import Extractor, InceptionExtractor, PooledExtractor
from vqhit.files import sha256
from vqhit.frechet import FeatureStatistics
from vqhit.inception_score import GROUPS
from vqhit.measure import check_features
from vqhit.metrics import PSNR_CEILING_DB, SSIM_WINDOW
from vqhit.perceptual import LPIPS, FeaturesConfig, check_image_size, perceptual_network

OF_TOKENIZERS: tuple[Metric, ...] = ("rfid", "is", "psnr", "ssim", "lpips", "codebook")
OF_GENERATORS: tuple[Metric, ...] = ("fid", "is")
OF_PICTURES: tuple[Metric, ...] = (*OF_GENERATORS, *PAIRED)
CROP = "ADM center crop: box halving, bicubic resize of the short side"
_FULL_SET = 50_000
_NETWORKS = ("tokenizer", "generator", "features", "lpips")
"""Parts of the time that are spent inside networks."""
_DESCRIPTIONS = {
    "is": f"mean and standard deviation over {GROUPS} groups of torch-fidelity's permutation (seed 2020)",
    "psnr": f"dB, data range 1, mean over images, at most {PSNR_CEILING_DB:g} each",
    "ssim": f"Gaussian {SSIM_WINDOW}x{SSIM_WINDOW}, sigma 1.5, data range 1, mean over channels and images",
    "lpips": "version 0.1, VGG16 trunk (net='vgg'), mean over images",
    "codebook": "all images and all processes together",
}
_PACKAGES = ("torchvision", "torch-fidelity", "lpips", "numpy", "pillow")


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
        self.left_out: dict[str, str] = {}
        self.extractor = self._extractor()
        self.lpips = self._lpips()
        if "ssim" in self.metrics and size < SSIM_WINDOW:
            self._leave_out({"ssim"}, f"SSIM needs images of at least {SSIM_WINDOW} px; these have {size}")
        if "is" in self.metrics and pictures < GROUPS:
            self._leave_out({"is"}, f"an inception score needs at least {GROUPS} images; found {pictures}")
        if self.metrics & {"rfid", "fid"} and pictures < 2:
            self._leave_out({"rfid", "fid"}, f"a Fréchet distance needs at least 2 images; found {pictures}")
        if not self.metrics:
            raise ValueError(f"nothing can be measured: {next(iter(self.left_out.values()))}")
        self.statistics = self._statistics()

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
        try:
            with distributed.first_here():
                return InceptionExtractor(settings.inception).to(self.device)
        except ValueError as error:
            if settings.inception is not None:
                raise
            self._leave_out(wanted, str(error))
            return None

    def _lpips(self) -> LPIPS | None:
        if "lpips" not in self.metrics:
            return None
        try:
            with distributed.first_here():
                network = perceptual_network("lpips", self.settings.lpips, key="--lpips").to(self.device)
            check_image_size(network, self.size, key="lpips")
            assert isinstance(network, LPIPS)
            return network
        except ValueError as error:
            if self.settings.lpips is not None:
                raise
            self._leave_out({"lpips"}, str(error))
            return None

    def _statistics(self) -> FeatureStatistics | None:
        """Those of the file `stats`, once they are found to be of this network and image size, as far as it says."""
        settings = self.settings
        if not self.metrics & {"rfid", "fid"}:
            if settings.stats is not None or settings.save_stats is not None:
                name = "stats" if settings.stats is not None else "save_stats"
                raise ValueError(f"{name}: no metric that is measured compares features with a reference set")
            return None
        if settings.stats is None:
            return None
        assert self.extractor is not None
        found = FeatureStatistics.load(settings.stats)
        if found.dim != self.extractor.dim:
            raise ValueError(
                f"{settings.stats}: statistics of {found.dim} features; this network has {self.extractor.dim}"
            )
        origin = found.origin or {}
        ours = {"network": self.extractor.describe(), "image_size": self.size}
        for key, value in ours.items():
            if key in origin and origin[key] != value:
                raise ValueError(f"{settings.stats}: made with {key} {origin[key]}; this evaluation has {value}")
        return found

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

    def describe_images(self, data: Any, split: str | None, images: int, crop: str = CROP) -> dict[str, Any]:
        """JSON-able: a set of images and how they were cut."""
        return {"data": str(data), "split": split, "images": images, "image_size": self.size, "crop": crop}

    def describe_statistics(self) -> dict[str, Any]:
        """JSON-able: the file that stood for the reference set."""
        assert self.settings.stats is not None
        assert self.statistics is not None
        return {
            "statistics": self.settings.stats,
            "sha256": sha256(Path(self.settings.stats)),
            "made_by": self.statistics.origin or "unknown: the file does not say",
        }

    def closing(self, comparison: Comparison, reference: dict[str, Any], images: int, **more: Any) -> dict[str, Any]:
        """JSON-able: what was left out, seconds and their split, the protocol. Saves the statistics if it is to."""
        seconds = comparison.watch.seconds
        inside = sum(comparison.watch.parts.get(part, 0.0) for part in _NETWORKS)
        return {
            "left_out": self.left_out,
            "seconds": round(seconds, 2),
            "images_per_s": round(images / seconds, 3),
            "seconds_of": {part: round(spent, 3) for part, spent in comparison.watch.parts.items() if spent},
            "share_in_networks": round(inside / seconds, 4),
            "protocol": {
                "reference": reference,
                **more,
                **self._describe_metrics(comparison, images),
                "batch_size": self.settings.batch_size,
                "processes": distributed.world_size(),
                "device": self.device.type,
                "tf32": False,
                "versions": {
                    "vqhit": __version__,
                    "torch": torch.__version__,
                    **{name: version(name) for name in _PACKAGES},
                },
            },
        }

    def _describe_metrics(self, comparison: Comparison, images: int) -> dict[str, Any]:
        described: dict[str, Any] = {}
        if self.extractor is not None:
            described["network"] = self.extractor.describe()
        if comparison.distance is not None:
            described[comparison.distance] = "float64 statistics, unbiased covariance, exact root of singular matrices"
            if images < _FULL_SET:
                described["remark"] = f"{images} images: not comparable with numbers from {_FULL_SET}, which are lower"
        described |= {metric: _DESCRIPTIONS[metric] for metric in sorted(self.metrics & _DESCRIPTIONS.keys())}
        return described

    def save_statistics(self, comparison: Comparison, reference: dict[str, Any]) -> None:
        """Write the statistics of the reference set to `save_stats`, if that is asked for."""
        if self.settings.save_stats is None or not distributed.is_first():
            return
        assert self.extractor is not None
        origin = {"reference": reference, "network": self.extractor.describe(), "image_size": self.size}
        statistics = comparison.reference_statistics({**origin, "vqhit": __version__})
        assert statistics is not None
        statistics.save(self.settings.save_stats)
