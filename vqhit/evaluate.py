"""Evaluation that names its protocol: of tokenizers, of generators, and of pictures that anything else has made."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vqhit import distributed
from vqhit.comparison import PAIRED, Comparison
from vqhit.data import Skipped
from vqhit.folder import DataError, FolderSource
from vqhit.generator import Generator
from vqhit.measure import Crops, center_crops, measure, take_pairs, take_pictures, take_reference, take_samples
from vqhit.models import VQHiT
from vqhit.plots import codebook_histogram
from vqhit.progress import ProgressBar
from vqhit.protocol import OF_GENERATORS, OF_PICTURES, OF_TOKENIZERS, EvaluationSettings, Protocol
from vqhit.sources import ImageSource, SourceConfig, evenly_spaced, open_source


def evaluate_tokenizer(model: VQHiT, data: Path | str, settings: EvaluationSettings | None = None) -> dict[str, Any]:
    """Measure a tokenizer on a folder of images or a data set: JSON-able, with the protocol of each number.

    rFID compares Inception features of the images' center crops with those of their reconstructions, both uint8. Each
    process takes its share, all return the same. Raises `DataError` for images, and `ValueError` for a network that
    cannot be had or a metric that a tokenizer has not.
    """
    settings = settings or EvaluationSettings()
    size, weight = model.config.image_size, model.quant_conv.weight
    source, indices = _open(data, settings)
    protocol = Protocol(settings, "a tokenizer", OF_TOKENIZERS, size=size, device=weight.device, pictures=len(indices))
    with _exact_float32(), _bar("eval", len(indices), settings) as bar:
        comparison = protocol.comparison()
        measured = measure(
            model,
            source,
            indices,
            batch_size=settings.batch_size,
            workers=settings.workers,
            comparison=comparison,
            on_batch=bar.advance,
        )
    _check_skipped(settings, measured.skipped, len(indices))
    found = measured.result()
    if "codebook" in comparison.metrics and settings.codebook_picture is not None and distributed.is_first():
        codebook_histogram(measured.usage, settings.codebook_picture)
    reference = protocol.describe_images(data, settings.split, measured.images)
    protocol.save_statistics(comparison, reference)
    return {
        **found,
        "codebook_size": model.codebook_size,
        "tokens_per_image": model.num_tokens,
        "skipped_images": measured.skipped,
        **protocol.closing(
            comparison,
            protocol.describe_statistics() if protocol.statistics else reference,
            measured.images,
            originals=reference,
            pictures="reconstructions of the originals, clamped and rounded to uint8",
            dtype=_name(weight.dtype),
        ),
    }


def evaluate_generator(
    model: Generator, data: Path | str | None, settings: EvaluationSettings | None = None
) -> dict[str, Any]:
    """Measure `settings.samples` samples of a generator against the images of a folder or a data set, or `stats`.

    FID compares the features of the samples with those of the images' center crops, both uint8. Otherwise as
    `evaluate_tokenizer`.
    """
    settings = settings or EvaluationSettings()
    weight = next(model.parameters())
    samples = settings.samples
    protocol = Protocol(
        settings, "a generator", OF_GENERATORS, size=model.image_size, device=weight.device, pictures=samples
    )
    with _exact_float32():
        comparison = protocol.comparison()
        reference, skipped = _take_reference(protocol, comparison, data, "data")
        with _bar("samples", samples, settings) as bar:
            take_samples(
                comparison, model, samples, seed=settings.seed, batch_size=settings.batch_size, on_batch=bar.advance
            )
        comparison.gather()
    found = comparison.result()
    protocol.save_statistics(comparison, reference)
    return {
        "images": reference.get("images"),
        "samples": samples,
        "skipped": len(skipped),
        **found,
        "skipped_images": skipped,
        **protocol.closing(
            comparison,
            reference,
            samples,
            pictures=f"{samples} samples of seed {settings.seed}, clamped and rounded to uint8",
            dtype=_name(weight.dtype),
        ),
    }


def evaluate_pictures(
    pictures: Path | str,
    reference: Path | str | None,
    settings: EvaluationSettings | None = None,
    *,
    size: int | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Measure pictures that anything else has made against reference images, or `stats`, under the same protocol.

    All pictures must be squares of one size, to which the reference is center-cropped; with `size` both are. PSNR, SSIM
    and LPIPS, if they are asked for, compare each picture with the image of the same name, the suffix apart. Otherwise
    as `evaluate_tokenizer`.
    """
    settings = settings or EvaluationSettings()
    source, indices = _open(pictures, settings)
    cut, size = size is not None, size or _size_of_first(source)
    protocol = Protocol(
        settings,
        "pictures",
        OF_PICTURES,
        size=size,
        device=torch.device(device),
        pictures=len(indices),
        default=OF_GENERATORS,
    )
    pairs = _pairs(source, indices, reference) if protocol.metrics.intersection(PAIRED) else None
    with _exact_float32():
        comparison = protocol.comparison()
        described, skipped = _take_reference(protocol, comparison, reference, "reference")
        with _bar("pictures", len(indices), settings) as bar:
            taken = take_pictures(comparison, _crops(protocol, comparison, source, indices, cut), bar.advance)
        _check_skipped(settings, taken.skipped, len(indices))
        if pairs is not None:
            originals, partners = pairs
            with _bar("pairs", len(indices), settings) as bar:
                take_pairs(
                    comparison,
                    _crops(protocol, comparison, originals, partners),
                    _crops(protocol, comparison, source, indices, cut),
                    bar.advance,
                )
        comparison.gather()
    found = comparison.result()
    protocol.save_statistics(comparison, described)
    return {
        "images": taken.images,
        "reference_images": described.get("images"),
        "skipped": len(taken.skipped) + len(skipped),
        **found,
        "skipped_images": taken.skipped + skipped,
        **protocol.closing(
            comparison,
            described,
            taken.images,
            pictures=protocol.describe_images(
                pictures, settings.split, taken.images, *([] if cut else ["none: the pictures have this size"])
            ),
        ),
    }


def _open(data: Path | str, settings: EvaluationSettings) -> tuple[ImageSource, Sequence[int]]:
    source = open_source(SourceConfig(path=str(data), split=settings.split), split="validation")
    return source, evenly_spaced(len(source), settings.limit)


def _crops(
    protocol: Protocol, comparison: Comparison, source: ImageSource, indices: Sequence[int], cut: bool = True
) -> Iterator[Crops]:
    settings = protocol.settings
    return center_crops(
        source,
        indices,
        protocol.size,
        batch_size=settings.batch_size,
        workers=settings.workers,
        watch=comparison.watch,
        cut=cut,
    )


def _take_reference(
    protocol: Protocol, comparison: Comparison, data: Path | str | None, key: str
) -> tuple[dict[str, Any], list[str]]:
    """Take in the reference set, if a metric needs it; what describes it, and which images cannot be read."""
    settings = protocol.settings
    if protocol.statistics is not None:
        return protocol.describe_statistics(), []
    if comparison.of_reference is None:
        return {}, []
    if data is None:
        raise ValueError(f"{key} is missing: a folder of images or a data set to compare with, or stats of one")
    source, indices = _open(data, settings)
    with _bar("reference", len(indices), settings) as bar:
        taken = take_reference(comparison, _crops(protocol, comparison, source, indices), bar.advance)
    _check_skipped(settings, taken.skipped, len(indices))
    return protocol.describe_images(data, settings.split, taken.images), taken.skipped


def _size_of_first(source: ImageSource) -> int:
    width, height = source.read(0).size
    if width != height:
        raise DataError(f"{source.name(0)}: {width}x{height} px; pictures are squares, unless a size to cut is given")
    return width


def _pairs(
    source: ImageSource, indices: Sequence[int], reference: Path | str | None
) -> tuple[ImageSource, Sequence[int]]:
    """The originals of some pictures, by their names; raises `DataError` naming a picture that has none."""
    if reference is None:
        raise ValueError(f"reference is missing: {', '.join(PAIRED)} compare each picture with its original")
    originals = open_source(SourceConfig(path=str(reference)), split="validation")
    if not isinstance(source, FolderSource) or not isinstance(originals, FolderSource):
        raise DataError(f"{', '.join(PAIRED)} need two folders of image files, paired by their names")
    numbers: dict[str, int] = {}
    for number in range(len(originals)):
        if (other := numbers.setdefault(name := originals.stem(number), number)) != number:
            raise DataError(f"{originals.name(other)} and {originals.name(number)}: both are called {name}")
    for index in indices:
        if source.stem(index) not in numbers:
            raise DataError(f"{source.name(index)}: no image of this name in {reference}")
    return originals, [numbers[source.stem(index)] for index in indices]


def _check_skipped(settings: EvaluationSettings, problems: list[str], asked_for: int) -> None:
    skipped = Skipped(settings.max_bad, asked_for)
    skipped.add(problems)
    skipped.check(asked_for)


def _bar(title: str, images: int, settings: EvaluationSettings) -> ProgressBar:
    mine = len(range(images)[distributed.rank() :: distributed.world_size()])
    return ProgressBar(title, -(-mine // settings.batch_size), hidden=not distributed.is_first())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
