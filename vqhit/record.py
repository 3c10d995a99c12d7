"""The record of an evaluation for a JSON file: what was measured how, the seconds, and what was left out."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vqhit import __version__, distributed
from vqhit.comparison import Comparison
from vqhit.files import sha256
from vqhit.inception_score import GROUPS
from vqhit.measure import ImageSet
from vqhit.metrics import PSNR_CEILING_DB, SSIM_WINDOW
from vqhit.perceptual import VGG16_TORCHVISION
from vqhit.protocol import Protocol

DECODING = "PIL, turned as EXIF says, transparency over white, 16-bit grey scaled to 8"
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


def describe_images(images: ImageSet, data: Any, split: str | None, count: int) -> dict[str, Any]:
    """JSON-able: a set of images, which of them could be read, and how they were cut."""
    chosen, there = len(images.indices), len(images.source)
    crop = CROP if images.proportion == 1 else f"middle square of {images.proportion} of the short side, bicubic"
    return {
        "data": str(data),
        "on_hub": not Path(data).exists(),
        "split": split,
        "images": count,
        "selection": "all" if chosen == there else f"{chosen} of {there}, evenly spaced in the list",
        "image_size": images.size,
        "decoding": DECODING,
        "crop": crop if images.cut else "none: the pictures have this size",
    }


def describe_statistics(protocol: Protocol) -> dict[str, Any]:
    """JSON-able: the file that stood for the reference set."""
    assert protocol.settings.stats is not None
    assert protocol.statistics is not None
    origin = protocol.statistics.origin
    return {
        "statistics": protocol.settings.stats,
        "sha256": sha256(Path(protocol.settings.stats)),
        "made_by": origin or "unknown: the file does not say",
        "made_of_images": _images_of(origin),
    }


def _images_of(origin: dict[str, Any] | None) -> int | None:
    """Number of images that statistics were made of, as far as their file says."""
    reference = (origin or {}).get("reference")
    count = reference.get("images") if isinstance(reference, dict) else None
    return count if isinstance(count, int) else None


def closing(
    protocol: Protocol, comparison: Comparison, reference: dict[str, Any], pictures: int, images: int, **more: Any
) -> dict[str, Any]:
    """JSON-able: what was left out, seconds and their split, the protocol.

    `pictures` is how many were measured; `images` how many were gone through in all, for the speed.
    """
    seconds = comparison.watch.seconds
    inside = sum(comparison.watch.parts.get(part, 0.0) for part in _NETWORKS)
    return {
        "left_out": protocol.left_out,
        "seconds": round(seconds, 2),
        "images_per_s": round(images / seconds, 3),
        "seconds_of": {part: round(spent, 3) for part, spent in comparison.watch.parts.items()},
        "share_in_networks": round(inside / seconds, 4),
        "protocol": {
            "reference": reference,
            **more,
            **_describe_metrics(
                protocol, comparison, pictures, reference.get("images", reference.get("made_of_images"))
            ),
            "batch_size": protocol.settings.batch_size,
            "processes": distributed.world_size(),
            **_describe_machine(protocol.device),
        },
    }


def _describe_metrics(
    protocol: Protocol, comparison: Comparison, pictures: int, reference: int | None
) -> dict[str, Any]:
    described: dict[str, Any] = {}
    if protocol.extractor is not None:
        described["network"] = protocol.extractor.describe()
    if comparison.distance is not None:
        described[comparison.distance] = "float64 statistics, unbiased covariance, exact root of singular matrices"
        if min(pictures, reference or 0) < _FULL_SET:
            described["remark"] = (
                f"{pictures} pictures against {reference or 'an unknown number of'} images: the fewer, the higher "
                f"the distance; to be compared with numbers from as many only, not with those from {_FULL_SET}"
            )
    described |= {metric: _DESCRIPTIONS[metric] for metric in sorted(protocol.metrics & _DESCRIPTIONS.keys())}
    if protocol.lpips is not None:
        described["lpips_weights"] = {"file": VGG16_TORCHVISION.name, "sha256": VGG16_TORCHVISION.sha256}
    return described


def _describe_machine(device: torch.device) -> dict[str, Any]:
    cuda: dict[str, Any] = {}
    if device.type == "cuda":
        cuda = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "tf32": False,
        "versions": {
            "vqhit": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **cuda,
            **{name: version(name) for name in _PACKAGES},
        },
    }


def save_statistics(protocol: Protocol, comparison: Comparison, reference: dict[str, Any]) -> None:
    """Write the statistics of the reference set to `save_stats`, if that is asked for."""
    if protocol.settings.save_stats is None or not distributed.is_first():
        return
    assert protocol.extractor is not None
    origin = {**protocol.identity(), "reference": reference, "network": protocol.extractor.describe()}
    statistics = comparison.reference_statistics({**origin, "vqhit": __version__})
    assert statistics is not None
    statistics.save(protocol.settings.save_stats)
