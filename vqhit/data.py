"""Photographs for training and evaluation: sources, stateless order, loaders.

The order of images, their crops and flips are functions of the seed and the global sample index alone, so that nothing
of a loader needs saving and any number of workers sees the same run.
"""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from pydantic import AfterValidator, BeforeValidator, Field, Strict
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vqhit import images
from vqhit.config import Config, Flag, NonNegativeInt, Text

Share = Annotated[float, Strict(), Field(gt=0, le=1)]


def _both_ends(value: Any) -> Any:
    return (value, value) if isinstance(value, int | float) else value


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"found {list(pair)}; the smaller share comes first")
    return pair


CropProportion = Annotated[tuple[Share, Share], BeforeValidator(_both_ends), AfterValidator(_ascending)]


class DataConfig(Config):
    """Training images: a folder, searched with all its subfolders.

    A training crop is a square, anywhere in the image, whose side is `crop_proportion` times the short side: a share
    drawn evenly between two values, or one value (0.875 on ImageNet, as the official code).
    """

    path: Text
    validation_path: Text | None = None
    """Images to evaluate on while training."""
    crop_proportion: CropProportion = (0.875, 0.875)
    flip: Flag = True
    workers: NonNegativeInt = 0
    """Loader processes; 0 loads in the training process."""
    cache_images: NonNegativeInt = 0
    """Decoded images that each process keeps in memory: for small sets of large photographs."""


def list_images(folder: Path | str) -> list[Path]:
    """Return all image files below a folder, sorted by path; raises `ValueError` if there is no folder or no image."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of images")
    found: list[str] = []
    pending, seen = [str(folder)], set()
    while pending:
        directory = pending.pop()
        if (real := os.path.realpath(directory)) in seen:  # a link back up, or two links to one folder
            continue
        seen.add(real)
        with os.scandir(directory) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir():
                    pending.append(entry.path)
                elif os.path.splitext(entry.name)[1].lower() in images.SUFFIXES:  # noqa: PTH122  (a million files)
                    found.append(entry.path)
    if not found:
        raise ValueError(f"{folder}: no images in it or below ({', '.join(sorted(images.SUFFIXES))})")
    return [Path(path) for path in sorted(found)]


class TrainingCrops(Dataset[Tensor]):
    """Sample n of an endless, shuffled, augmented pass over the images: n -> (3, S, S) uint8.

    Epoch n // N visits every image once, in an order drawn from (seed, epoch); the crop and flip of sample n are drawn
    from (seed, n).
    """

    def __init__(self, paths: list[Path], config: DataConfig, size: int, seed: int) -> None:
        self.paths, self.config, self.size, self.seed = paths, config, size, seed
        self._start_caches()

    def _start_caches(self) -> None:
        self._load = functools.lru_cache(maxsize=self.config.cache_images)(images.load_image)
        self._order = functools.lru_cache(maxsize=2)(self._epoch_order)

    def __getstate__(self) -> dict[str, Any]:  # a loader process starts its own caches
        return {name: value for name, value in self.__dict__.items() if name not in ("_load", "_order")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._start_caches()

    def _epoch_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.paths))

    def __getitem__(self, sample: int) -> Tensor:
        epoch, position = divmod(sample, len(self.paths))
        image = self._load(self.paths[self._order(epoch)[position]])
        rng = np.random.default_rng((self.seed, 1, sample))
        image = random_crop(image, self.size, self.config.crop_proportion, rng)
        if self.config.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return images.pil_to_uint8(image)


def random_crop(
    image: Image.Image, size: int, proportion: tuple[float, float], rng: np.random.Generator
) -> Image.Image:
    """A random square of `proportion` times the short side, resized to `size` px (see `DataConfig`)."""
    side = min(image.size) * rng.uniform(*proportion)
    left, top = rng.uniform(0, image.width - side), rng.uniform(0, image.height - side)
    return images.crop_box(image, (left, top, side), size)


def training_batches(
    dataset: TrainingCrops, batch_size: int, first_step: int, last_step: int, workers: int
) -> Iterator[Tensor]:
    """Batches of steps first_step .. last_step - 1, each (B, 3, S, S) uint8."""
    return load_batches(dataset, range(first_step * batch_size, last_step * batch_size), batch_size, workers)


def load_batches(dataset: Dataset[Tensor], order: range, batch_size: int, workers: int) -> Iterator[Tensor]:
    """Batches (B, 3, S, S) uint8 of the samples in `order`; raises `ImageError` naming a file that is no image."""
    loader = DataLoader(
        dataset, batch_size=batch_size, sampler=order, num_workers=workers, pin_memory=torch.cuda.is_available()
    )
    try:
        yield from loader
    except images.ImageError as error:  # from a worker its text is a whole traceback, the cause last
        raise images.ImageError(str(error).strip().splitlines()[-1].split("ImageError: ")[-1]) from None


class CenterCrops(Dataset[Tensor]):
    """ADM center crops of image files, for evaluation: n -> (3, S, S) uint8."""

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return images.pil_to_uint8(images.center_crop(images.load_image(self.paths[index]), self.size))
