"""Training images: stateless order, crops, loaders, and what happens to images that cannot be read.

The order of images, their crops and flips are functions of the seed and the global sample index alone, so that nothing
of a loader needs saving, and any number of workers and of processes sees the same run.
"""

import functools
import itertools
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import AfterValidator, BeforeValidator, Field, Strict
from torch import Tensor
from torch._C import _remove_worker_pids
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from vqhit import distributed, images
from vqhit.config import Flag, NonNegativeInt
from vqhit.folder import DataError
from vqhit.sources import ImageSource, SourceConfig, StreamSource

_TRIES = 100
_PATIENCE_S = 2.0
_FIRST_CHECK = 1000
MIN_SIDE_PX = 8

Share = Annotated[float, Strict(), Field(gt=0, le=1)]


def _both_ends(value: Any) -> Any:
    return (value, value) if isinstance(value, int | float) else value


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"found {list(pair)}; the smaller share comes first")
    return pair


CropProportion = Annotated[tuple[Share, Share], BeforeValidator(_both_ends), AfterValidator(_ascending)]
BadShare = Annotated[float, Strict(), Field(ge=0, le=1)]


class DataConfig(SourceConfig):
    """Training images and how they are cropped.

    A training crop is a square, anywhere in the image, whose side is `crop_proportion` times the short side: a share
    drawn evenly between two values, or one value (0.875 on ImageNet, as the official code).
    """

    streaming: Flag = False
    """Read a data set from its beginning to its end, without downloading all of it. Shuffled approximately, and a
    continued run sees its images in another order."""
    shuffle_buffer: NonNegativeInt = 1000
    """streaming: rows that are shuffled at a time."""
    crop_proportion: CropProportion = (0.875, 0.875)
    flip: Flag = True
    max_bad: BadShare = 0.01
    """Images that cannot be read, or are narrower than 8 px, are skipped; with more than this share the run stops."""
    workers: NonNegativeInt = 0
    """Loader processes of each training process; 0 loads in the training process."""
    cache_images: NonNegativeInt = 0
    """Decoded images that each process keeps in memory: for small sets of large photographs."""


class Sample(NamedTuple):
    """An image, and what was wrong with those that had to be skipped for it."""

    image: Tensor
    """(3, S, S) uint8."""
    skipped: tuple[str, ...] = ()


class Batch(NamedTuple):
    """Images of one step, and what was wrong with those that had to be skipped."""

    images: Tensor
    """(B, 3, S, S) uint8."""
    skipped: list[str]
    kept: list[int]
    """Of evaluation: which of the images that were asked for could be read, by their positions in the batch."""


class TrainingCrops(Dataset[Sample]):
    """Sample n of an endless, shuffled, augmented pass over the images.

    Epoch n // N visits every image once, in an order drawn from (seed, epoch); the crop and flip of sample n are drawn
    from (seed, n), and so is the image that takes the place of one that cannot be read.
    """

    def __init__(self, source: ImageSource, config: DataConfig, size: int, seed: int) -> None:
        self.source, self.config, self.size, self.seed = source, config, size, seed
        self._start_caches()

    def _start_caches(self) -> None:
        self._load = functools.lru_cache(maxsize=self.config.cache_images)(functools.partial(read_image, self.source))
        self._order = functools.lru_cache(maxsize=2)(self._epoch_order)

    def __getstate__(self) -> dict[str, Any]:  # a loader process starts its own caches
        return {name: value for name, value in self.__dict__.items() if name not in ("_load", "_order")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._start_caches()

    def _epoch_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.source))

    def __getitem__(self, sample: int) -> Sample:
        epoch, position = divmod(sample, len(self.source))
        index, others, skipped = int(self._order(epoch)[position]), None, []
        while True:
            try:
                image = self._load(index)
                break
            except images.ImageError as error:
                skipped.append(str(error))
            if len(skipped) == _TRIES:
                raise _too_many(skipped)
            others = others or np.random.default_rng((self.seed, 2, sample))
            index = int(others.integers(len(self.source)))
        rng = np.random.default_rng((self.seed, 1, sample))
        return Sample(augmented(image, self.size, self.config, rng), tuple(skipped))


class TrainingStream(IterableDataset[Sample]):
    """The crops of one process of several, read from a stream; endless.

    Crop and flip of the n-th image of a loader process are drawn from the seed, n, the process and the step at which
    this start of the run began, the order of the stream from the seed, that step and the epoch.
    """

    def __init__(self, source: StreamSource, config: DataConfig, size: int, seed: int, first_step: int) -> None:
        self.source, self.config, self.size, self.seed, self.first_step = source, config, size, seed, first_step
        self.part, self.parts = distributed.rank(), distributed.world_size()

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        reader = self.part if worker is None else self.part + self.parts * worker.id
        skipped: list[str] = []
        number = epoch = 0
        while True:
            before = number
            order = np.random.SeedSequence((self.seed, self.first_step, epoch)).generate_state(1, np.uint64)
            for image, name in self.source.read(int(order[0]), self.config.shuffle_buffer, self.part, self.parts):
                if image is None or (problem := too_small(image)):
                    skipped.append(name if image is None else f"{name}: {problem}")
                    if len(skipped) == _TRIES:
                        raise _too_many(skipped)
                    continue
                rng = np.random.default_rng((self.seed, 1, number, reader, self.first_step))
                yield Sample(augmented(image, self.size, self.config, rng), tuple(skipped))
                skipped, number = [], number + 1
            if number == before:
                raise DataError(f"{self.source.path}: no image that can be read in a whole pass")
            epoch += 1


def read_image(source: ImageSource, index: int) -> Image.Image:
    """Decode an image; raises `ImageError` also for one that is too small to show anything."""
    image = source.read(index)
    if (problem := too_small(image)) is not None:
        raise images.ImageError(f"{source.name(index)}: {problem}")
    return image


def too_small(image: Image.Image) -> str | None:
    """What is wrong with an image that is too small to show anything, or None."""
    if min(image.size) >= MIN_SIDE_PX:
        return None
    return f"{image.width}x{image.height} px; images need at least {MIN_SIDE_PX} a side"


def _too_many(skipped: Sequence[str]) -> DataError:
    return DataError(f"{skipped[-1]}; and {len(skipped) - 1} others in a row cannot be read either")


def augmented(image: Image.Image, size: int, config: DataConfig, rng: np.random.Generator) -> Tensor:
    """A random crop, flipped or not: (3, size, size) uint8."""
    crop = images.pil_to_uint8(random_crop(image, size, config.crop_proportion, rng))
    return crop.flip(-1) if config.flip and rng.random() < 0.5 else crop


def random_crop(
    image: Image.Image, size: int, proportion: tuple[float, float], rng: np.random.Generator
) -> Image.Image:
    """A random square of `proportion` times the short side, resized to `size` px (see `DataConfig`).

    Where the square comes within half a pixel of `size`, as in images that `prepare` made, it is cut out unresampled.
    """
    side = min(image.size) * rng.uniform(*proportion)
    if round(side) == size <= min(image.size):
        left, top = (int(rng.integers(0, length - size, endpoint=True)) for length in image.size)
        return image.crop((left, top, left + size, top + size))
    left_px, top_px = rng.uniform(0, image.width - side), rng.uniform(0, image.height - side)
    return images.crop_box(image, (left_px, top_px, side), size)


def training_batches(
    dataset: TrainingCrops | TrainingStream, batch_size: int, first_step: int, last_step: int, workers: int
) -> Generator[Batch]:
    """Batches of steps first_step .. last_step - 1, of which each process gets its even share."""
    share = batch_size // distributed.world_size()
    start = distributed.rank() * share
    steps = range(first_step, last_step)
    if isinstance(dataset, TrainingStream):
        workers = min(workers, dataset.source.shards(dataset.part, dataset.parts))
        return _load(DataLoader(dataset, share, **_loading(workers)), len(steps))
    order = (range(step * batch_size + start, step * batch_size + start + share) for step in steps)
    return load_batches(dataset, order, workers)


def load_batches(dataset: Dataset[Sample], order: Iterable[Sequence[int]], workers: int) -> Generator[Batch]:
    """Batches of the samples in `order`; raises `DataError` if there are none that can be read."""
    return _load(DataLoader(dataset, batch_sampler=order, **_loading(workers)))  # type: ignore[arg-type]


def _loading(workers: int) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "collate_fn": _collate,
        "pin_memory": torch.cuda.is_available(),
    }


def _load(loader: DataLoader[Any], count: int | None = None) -> Generator[Batch]:
    """All batches of a loader, or so many of an endless one."""
    iterator = started(loader)
    try:
        yield from itertools.islice(iterator, count)
    except DataError as error:  # from a worker its text is a whole traceback, the cause last
        raise DataError(str(error).strip().splitlines()[-1].split("DataError: ")[-1]) from None
    finally:
        _end_workers(iterator)


def started(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start the processes of a loader, deaf to signals that mean their parent."""
    with distributed.signals_held_back():
        return iter(loader)


def _end_workers(iterator: Any) -> None:
    """End loader processes now; one that is still busy after a while, with a slow disk say, is killed.

    They are deaf to SIGTERM, with which torch would end them, and have nothing to lose.
    """
    if not getattr(iterator, "_worker_pids_set", False):  # there are none, or they have ended
        return
    workers = iterator._workers
    _remove_worker_pids(id(iterator))  # torch: that one of them is killed is no error now
    iterator._worker_pids_set = False
    kill = threading.Timer(_PATIENCE_S, lambda: [worker.kill() for worker in workers])
    kill.daemon = True
    kill.start()
    iterator._shutdown_workers()
    kill.cancel()


def _collate(samples: list[Sample]) -> Batch:
    kept = [position for position, sample in enumerate(samples) if sample.image.numel()]
    read = [samples[position].image for position in kept]
    stacked = torch.stack(read) if read else torch.empty(0, 3, 0, 0, dtype=torch.uint8)
    return Batch(stacked, [problem for sample in samples for problem in sample.skipped], kept)


class CenterCrops(Dataset[Sample]):
    """Center crops for evaluation, ADM's by default; an image that cannot be read gives an empty tensor.

    A `proportion` below 1 cuts the middle square of that share of the short side, resized antialiased and bicubically.
    `cut=False` cuts nothing: the images are ready-made pictures, and one of another size raises `DataError`.
    """

    def __init__(self, source: ImageSource, size: int, *, proportion: float = 1.0, cut: bool = True) -> None:
        self.source, self.size, self.proportion, self.cut = source, size, proportion, cut

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        try:
            image = read_image(self.source, index)
        except images.ImageError as error:
            return Sample(torch.empty(0, dtype=torch.uint8), (str(error),))
        if not self.cut and image.size != (self.size, self.size):
            raise DataError(
                f"{self.source.name(index)}: {image.width}x{image.height} px; the first picture is {self.size}x"
                f"{self.size}, and all must be, unless a size to cut them to is given"
            )
        if self.proportion == 1:
            return Sample(images.pil_to_uint8(images.center_crop(image, self.size)))
        side = self.proportion * min(image.size)
        box = ((image.width - side) / 2, (image.height - side) / 2, side)
        return Sample(images.pil_to_uint8(images.crop_box(image, box, self.size)))


class Skipped:
    """Images that could not be read: each is named once and counted.

    `check` raises `DataError` when they are more than the share `max_share` of the images that were asked for, these
    counted as at least 1000, or all there are.
    """

    def __init__(self, max_share: float, total: int | None) -> None:
        self.max_share, self.total = max_share, total
        self.problems: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self.problems)

    def add(self, problems: Iterable[str]) -> list[str]:
        """Count problems; returns those that are new."""
        new = [problem for problem in dict.fromkeys(problems) if problem not in self.problems]
        self.problems |= dict.fromkeys(new)
        return new

    def check(self, asked_for: int) -> None:
        """Compare with the images asked for so far."""
        seen = max(asked_for, _FIRST_CHECK)
        seen = seen if self.total is None else min(seen, self.total)
        if len(self) > self.max_share * seen:
            raise DataError(
                f"{len(self)} of {seen} images cannot be read, more than max_bad {self.max_share:.3g} allows; "
                f"the last: {next(reversed(self.problems))}"
            )
