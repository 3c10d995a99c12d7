"""What a run is fed: its images, in their order, from whatever source, for training and to show."""

from collections.abc import Generator, Iterable
from pathlib import Path

import torch
from torch import Tensor

from vqhit import distributed
from vqhit.data import Batch, CenterCrops, Skipped, TrainingCrops, TrainingStream, training_batches
from vqhit.folder import DataError, FolderSource
from vqhit.recipe import RunConfig
from vqhit.runs import RunFolder
from vqhit.sources import (
    ImageSource,
    SourceConfig,
    StreamSource,
    evenly_spaced,
    is_image_folder,
    open_source,
    open_stream,
)

_STREAM_EPOCH_IMAGES = 50_000
SHOWN_IMAGES = 16


def open_shared(config: SourceConfig, split: str, kept: Path | None = None) -> ImageSource:
    """`open_source` in all processes, of which one lists an image folder, or takes the list that was `kept` of it."""
    if not is_image_folder(config.path):
        return open_source(config, split=split)

    def listed() -> bytes:
        try:
            return _listed(config.path, kept)
        except DataError:  # of another folder
            return FolderSource.scan(config.path).index

    return open_source(config, distributed.on_first(listed))


def _listed(path: str, kept: Path | None) -> bytes:
    """The index of an image folder, or that which was `kept` of it by the run that is continued."""
    if kept is None or not kept.exists():
        return FolderSource.scan(path).index
    try:
        source = FolderSource(path, kept.read_bytes())
    except DataError as error:
        raise DataError(f"{kept}: {error}") from None
    some = [source.name(index) for index in evenly_spaced(len(source), 10)]
    if not any(Path(name).exists() for name in some):
        raise DataError(
            f"{path}: not the folder that the run began with; {kept} lists {some[0]}, which is not there, nor others"
        )
    return source.index


class Feed:
    """The training images of a run."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        self.config = config
        self.source = self._open(folder)
        self.count = None if isinstance(self.source, StreamSource) else len(self.source)
        """Number of images; None for a stream."""
        self.skipped = Skipped(config.data.max_bad, self.count)
        self.start_at(0)

    def _open(self, folder: RunFolder) -> ImageSource | StreamSource:
        """The source; of an image folder, as the run has listed it if it is to be continued."""
        data = self.config.data
        if data.streaming:
            return open_stream(data)
        if not is_image_folder(data.path):
            return open_source(data)

        return open_source(
            data, distributed.on_first(lambda: _listed(data.path, folder.index if folder.exists() else None))
        )

    @property
    def index(self) -> bytes | None:
        """The list of an image folder, for the run to keep."""
        return self.source.index if isinstance(self.source, FolderSource) else None

    @property
    def epoch_images(self) -> int:
        """Images of an epoch; of a stream, as many as are counted as one."""
        return self.count or _STREAM_EPOCH_IMAGES

    def start_at(self, first_step: int) -> None:
        """Begin, or go on, at a step."""
        data, size, seed = self.config.data, self.config.model.image_size, self.config.seed
        self.crops: TrainingCrops | TrainingStream
        if isinstance(self.source, StreamSource):
            self.crops = TrainingStream(self.source, data, size, seed, first_step)
        else:
            self.crops = TrainingCrops(self.source, data, size, seed)
        self.first_step = first_step
        self._kept: list[Batch] = []
        self._shown: Tensor | None = None

    def batches(self) -> Generator[Batch]:
        """This process's share of each batch that is left to train on."""
        train = self.config.train
        return training_batches(self.crops, train.batch_size, self.first_step, train.steps, self.config.data.workers)

    def first_batches(self, count: int, size: int) -> Iterable[Batch]:
        """The first batches of the run's order, of `size` images in every process; of a stream, of this start, kept."""
        size, workers = size * distributed.world_size(), self.config.data.workers
        if not isinstance(self.crops, TrainingStream):
            return training_batches(self.crops, size, 0, count, workers)
        if not self._kept:
            self._kept = list(training_batches(self.crops, size, 0, count, workers))
        return self._kept

    def shown(self) -> Tensor:
        """Up to 16 images, always the same, (N, 3, S, S) uint8: center crops; of a stream, its first crops."""
        if self._shown is None:
            if isinstance(self.source, StreamSource):
                first = iter(self.crops)
                samples = [next(first) for _ in range(SHOWN_IMAGES)]
            else:
                crops = CenterCrops(self.source, self.config.model.image_size)
                samples = [crops[index] for index in evenly_spaced(len(crops), SHOWN_IMAGES)]
            size = self.config.model.image_size
            read = [sample.image for sample in samples if sample.image.numel()]
            self._shown = torch.stack(read) if read else torch.empty(0, 3, size, size, dtype=torch.uint8)
        return self._shown
