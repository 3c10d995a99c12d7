"""Evaluation that names its protocol: of tokenizers, of generators, and of pictures that anything else has made."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vqhit import distributed
from vqhit.comparison import PAIRED, Comparison
from vqhit.data import Skipped
from vqhit.folder import DataError, FolderSource
from vqhit.generator import Generator
from vqhit.images import ImageError
from vqhit.measure import ImageSet, exact_float32, measure, take_pairs, take_pictures, take_reference, take_samples
from vqhit.models import VQHiT
from vqhit.plots import codebook_histogram
from vqhit.progress import ProgressBar
from vqhit.protocol import OF_GENERATORS, OF_PICTURES, OF_TOKENIZERS, EvaluationSettings, Protocol
from vqhit.record import closing, describe_images, describe_statistics, save_statistics
from vqhit.sources import ImageSource, SourceConfig, evenly_spaced, is_image_folder, open_source

_SPLIT = "validation"


def evaluate_tokenizer(model: VQHiT, data: Path | str, settings: EvaluationSettings | None = None) -> dict[str, Any]:
    """Measure a tokenizer, in eval mode, on a folder of images or a data set: JSON-able, with each number's protocol.

    rFID compares Inception features of the images' center crops with those of their reconstructions, both uint8. Each
    process takes its share, all return the same. Raises `DataError` for images, and `ValueError` for a network that
    cannot be had or a metric that a tokenizer has not.
    """
    settings = settings or EvaluationSettings()
    if settings.crop_proportion != 1:
        raise ValueError(
            f"crop_proportion {settings.crop_proportion}: a tokenizer reconstructs ADM's crops; leave it out"
        )
    weight = model.quant_conv.weight
    images = _open(data, settings.split, settings, model.config.image_size)
    protocol = Protocol(
        settings,
        "a tokenizer",
        OF_TOKENIZERS,
        size=images.size,
        device=weight.device,
        pictures=len(images.indices),
    )
    with exact_float32(), _bar("eval", images) as bar:
        comparison = protocol.comparison()
        measured = measure(model, images, comparison, bar.advance)
    _check_skipped(images, measured.skipped)
    found = measured.result()
    if "codebook" in comparison.metrics and settings.codebook_picture is not None and distributed.is_first():
        codebook_histogram(measured.usage, settings.codebook_picture)
    originals = describe_images(images, data, _split(data, settings.split), measured.images)
    save_statistics(protocol, comparison, originals)
    return {
        **found,
        "codebook_size": model.codebook_size,
        "tokens_per_image": model.num_tokens,
        "skipped_images": measured.skipped,
        **closing(
            protocol,
            comparison,
            describe_statistics(protocol) if protocol.statistics else originals,
            pictures=measured.images,
            images=measured.images,
            originals=originals,
            pictures_are="reconstructions of the originals, clamped and rounded to uint8",
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
    weight, samples = next(model.parameters()), settings.samples
    protocol = Protocol(
        settings, "a generator", OF_GENERATORS, size=model.image_size, device=weight.device, pictures=samples
    )
    with exact_float32():
        comparison = protocol.comparison()
        reference, skipped = _take_reference(protocol, comparison, data, "data")
        mine = len(range(samples)[distributed.rank() :: distributed.world_size()])
        with ProgressBar("samples", -(-mine // settings.batch_size), hidden=not distributed.is_first()) as bar:
            take_samples(
                comparison, model, samples, seed=settings.seed, batch_size=settings.batch_size, on_batch=bar.advance
            )
        comparison.gather()
    found = comparison.result()
    save_statistics(protocol, comparison, reference)
    compared = reference.get("images")
    return {
        "images": compared,
        "samples": samples,
        "skipped": len(skipped),
        **found,
        "skipped_images": skipped,
        **closing(
            protocol,
            comparison,
            reference,
            pictures=samples,
            images=samples + (compared or 0),
            pictures_are=f"{samples} samples of seed {settings.seed}, clamped and rounded to uint8",
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
    and LPIPS, if they are asked for, compare each picture with the image of the same name, the suffix apart; pairs of
    which one cannot be read are left out. `settings.split` is the reference's. Otherwise as `evaluate_tokenizer`.
    """
    settings = settings or EvaluationSettings()
    made = _open(pictures, None, settings, size)
    protocol = Protocol(
        settings,
        "pictures",
        OF_PICTURES,
        size=made.size,
        device=torch.device(device),
        pictures=len(made.indices),
        default=OF_GENERATORS,
    )
    paired = protocol.metrics.intersection(PAIRED)
    originals = _originals(made, reference, settings) if paired else None
    of_pairs: dict[str, Any] = {}
    with exact_float32():
        comparison = protocol.comparison()
        described, skipped = _take_reference(protocol, comparison, reference, "reference", needed=not paired)
        with _bar("pictures", made) as bar:
            taken = take_pictures(comparison, made, bar.advance)
        _check_skipped(made, taken.skipped)
        gone_through = taken.images + (described.get("images") or 0)
        if originals is not None:
            with _bar("pairs", made) as bar:
                pairs = take_pairs(comparison, originals, made, bar.advance)
            _check_skipped(originals, pairs.skipped)
            skipped = list(dict.fromkeys([*skipped, *pairs.skipped]))
            gone_through += 2 * pairs.images
            split = _split(reference, settings.split)
            of_pairs = {"originals": describe_images(originals, reference, split, pairs.images)}
            described = described or of_pairs["originals"]
        comparison.gather()
    found = comparison.result()
    save_statistics(protocol, comparison, described)
    return {
        "images": taken.images,
        "reference_images": described.get("images"),
        **({"pairs": comparison.pairs} if of_pairs else {}),
        "skipped": len(taken.skipped) + len(skipped),
        **found,
        "skipped_images": taken.skipped + skipped,
        **closing(
            protocol,
            comparison,
            described,
            pictures=taken.images,
            images=gone_through,
            pictures_are=describe_images(made, pictures, None, taken.images),
            **of_pairs,
        ),
    }


def _open(
    data: Path | str, split: str | None, settings: EvaluationSettings, size: int | None, proportion: float = 1.0
) -> ImageSet:
    """The images to evaluate on; without a size, ready-made pictures, of the first one's size."""
    source = open_source(SourceConfig(path=str(data), split=split), split=_SPLIT)
    indices = evenly_spaced(len(source), settings.limit)
    return ImageSet(
        source=source,
        indices=indices,
        size=size or _size_of_first(source, indices),
        batch_size=settings.batch_size,
        workers=settings.workers,
        proportion=proportion,
        cut=size is not None,
        max_bad=settings.max_bad,
    )


def _split(data: Path | str | None, split: str | None) -> str | None:
    """The split that was read; None of a folder of image files, which has none."""
    return None if data is None or is_image_folder(data) else split or _SPLIT


def _take_reference(
    protocol: Protocol, comparison: Comparison, data: Path | str | None, key: str, needed: bool = True
) -> tuple[dict[str, Any], list[str]]:
    """Take in the reference set, if a metric needs it; what describes it, and which images cannot be read.

    Raises `ValueError` for one that is missing, and, if nothing else needs it, for one that is of no use.
    """
    settings = protocol.settings
    if comparison.of_reference is None:
        if data is not None and needed:
            reason = "stats stand for it" if protocol.statistics else "no metric that is measured compares with it"
            raise ValueError(f"{key}: {reason}; leave it out")
        return (describe_statistics(protocol) if protocol.statistics else {}), []
    if data is None:
        raise ValueError(f"{key} is missing: a folder of images or a data set to compare with, or stats of one")
    images = _open(data, settings.split, settings, protocol.size, settings.crop_proportion)
    with _bar("reference", images) as bar:
        taken = take_reference(comparison, images, bar.advance)
    _check_skipped(images, taken.skipped)
    return describe_images(images, data, _split(data, settings.split), taken.images), taken.skipped


def _size_of_first(source: ImageSource, indices: Sequence[int]) -> int:
    """Side of the first picture that can be read; raises `DataError` if that is no square, or there is none."""
    problem = ""
    for index in indices:
        try:
            width, height = source.read(index).size
        except ImageError as error:
            problem = problem or str(error)
            continue
        if width != height:
            raise DataError(
                f"{source.name(index)}: {width}x{height} px; pictures are squares, unless a size to cut is given"
            )
        return width
    raise DataError(f"no picture can be read; the first: {problem}")


def _originals(made: ImageSet, reference: Path | str | None, settings: EvaluationSettings) -> ImageSet:
    """The originals of some pictures, by their names; raises `DataError` naming a picture that has none."""
    if reference is None:
        raise ValueError(f"reference is missing: {', '.join(PAIRED)} compare each picture with its original")
    originals = _open(reference, settings.split, settings, made.size, settings.crop_proportion)
    if not isinstance(made.source, FolderSource) or not isinstance(originals.source, FolderSource):
        raise DataError(f"{', '.join(PAIRED)} need two folders of image files, paired by their names")
    for source, indices in ((made.source, made.indices), (originals.source, range(len(originals.source)))):
        names: dict[str, int] = {}
        for index in indices:
            if (other := names.setdefault(name := source.stem(index), index)) != index:
                raise DataError(f"{source.name(other)} and {source.name(index)}: both are called {name}")
    for index in made.indices:
        if made.source.stem(index) not in names:
            raise DataError(f"{made.source.name(index)}: no image of this name in {reference}")
    return replace(originals, indices=[names[made.source.stem(index)] for index in made.indices])


def _check_skipped(images: ImageSet, problems: list[str]) -> None:
    """Over all processes; each has checked its own share on the way."""
    skipped = Skipped(images.max_bad, len(images.indices))
    skipped.add(problems)
    skipped.check(len(images.indices))


def _bar(title: str, images: ImageSet) -> ProgressBar:
    mine = len(images.indices[distributed.rank() :: distributed.world_size()])
    return ProgressBar(title, -(-mine // images.batch_size), hidden=not distributed.is_first())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
