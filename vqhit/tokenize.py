"""Images to tokens, by any number of processes; interrupted, the same command goes on without duplicate or gap."""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from signal import Signals
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqhit import __version__, distributed
from vqhit.config import Count, NonNegativeInt
from vqhit.data import BadShare, Batch, Skipped, load_batches
from vqhit.distributed import StopSignal
from vqhit.files import check_apart, sha256, write_atomic
from vqhit.folder import DataError, FolderSource
from vqhit.hub import WEIGHTS_FILE, locate
from vqhit.images import from_uint8
from vqhit.labels import Labels, labels_of, readable
from vqhit.measure import copied_ahead, exact_float32
from vqhit.models import VQHiT
from vqhit.norms import in_eval_mode
from vqhit.progress import ProgressBar, say
from vqhit.sources import DatasetSource, ImageSource, SourceConfig, evenly_spaced, is_image_folder, open_source
from vqhit.token_folder import FORMAT_VERSION, TokenFolder, digest
from vqhit.token_shards import Partition, ShardFormat, ShardRows, Skip
from vqhit.views import DESCRIPTIONS, VIEW_COUNTS, ImageViews, Views, crop_size

_SPLIT = "train"


class TokenizeConfig(SourceConfig):
    """Which images to tokenise, and how."""

    views: Views = "none"
    """Crops of each image: its center crop; that and its mirror image; or ten."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the encoder under autocast; the nearest code is found in float32 all the same."""
    batch_size: Count = 32
    """Crops that pass through the encoder at a time."""
    workers: NonNegativeInt = 0
    """Loader processes of each process; 0 loads in the process itself."""
    images_per_shard: Count = 2048
    """Images of a file, skipped ones counted. Files are what processes share out, and what an interruption costs."""
    max_bad: BadShare = 0.01
    """Images that cannot be read, or are narrower than 8 px, are left out; with more than this share it stops."""
    limit: Count | None = None
    """Tokenise so many images only, evenly spaced."""


class ModelIdentity(NamedTuple):
    """Which tokenizer it is, by name and by content."""

    id: str
    """A folder, the name of a packaged model, or an id on the Hub."""
    commit: str | None
    """Of a model on the Hub."""
    weights_sha256: str
    tokens_sha256: str | None = None
    """Of all that tokens come from, encoder and codebook: models that share them may decode each other's."""


def load_identified(model: str, *, device: torch.device | str) -> tuple[VQHiT, ModelIdentity]:
    """A tokenizer, from wherever `from_pretrained` finds one, and its identity; raises as that does."""
    with distributed.first_here():
        located = locate(model)
    tokenizer = VQHiT.from_pretrained(located.folder, device=device)
    weights = sha256(located.folder / WEIGHTS_FILE)
    return tokenizer, ModelIdentity(located.name, located.commit, weights, _tokens_sha256(tokenizer))


def _tokens_sha256(model: VQHiT) -> str:
    """Hash of the names, shapes and values, as float32, of the encoder's and the codebook's tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(model.token_part_names):
            found.update(f"{name} {tuple(tensor.shape)}\n".encode())
            found.update(tensor.cpu().float().numpy().tobytes())
    return found.hexdigest()


def tokenize(
    model: VQHiT, config: TokenizeConfig, destination: Path | str, *, identity: ModelIdentity
) -> dict[str, Any] | Signals:
    """Write the tokens of all images into a folder and return its manifest.

    Each process writes some of the shards, and all return the same. A folder that is complete is left as it is, one
    that is not is continued. A signal ends it after the batch that is under way: then the signal is returned, and only
    shards that were complete are kept. Raises `DataError` for images that cannot be had or too many bad ones, for a
    folder that holds anything else or is in use, and `ValueError` for one that cannot be written.
    """
    folder = TokenFolder(destination)
    check_apart(config.path, folder.path)
    source = _open(config)
    partition = Partition(indices=evenly_spaced(len(source), config.limit), per_shard=config.images_per_shard)
    labels = labels_of(source)
    made = _describe(model, identity, config, source, labels, len(partition))
    shard_format = ShardFormat(
        token_grid=model.token_grid,
        codebook_size=model.codebook_size,
        views=VIEW_COUNTS[config.views],
        label_names=labels.names,
        made=digest(made),
    )
    if len(set(distributed.gather_objects(shard_format.made))) > 1:
        raise DataError(
            f"{config.path}: the processes do not see the same images, or not the same tokenizer; name a commit of the "
            "Hub, and give all machines the same data"
        )
    if (found := distributed.on_first(lambda: folder.claim(made, shard_format, partition))) is None:
        return folder.manifest() or {}
    if not folder.data.is_dir():
        raise DataError(f"{folder.path}: not seen by all processes; give all machines the same folder")
    writer = _Writer(model, config, source, labels, partition, shard_format, folder)
    if (signal := writer.run(*found)) is not None:
        return signal
    for share in distributed.gather_objects(list(writer.skipped.problems)):
        writer.skipped.add(share)
    writer.skipped.check(len(partition.indices))
    return distributed.on_first(lambda: folder.finish(made, shard_format.views))


def _open(config: TokenizeConfig) -> ImageSource:
    """The source; a folder is listed by the first process, for all."""
    if not is_image_folder(config.path):
        return open_source(config, split=_SPLIT)
    return open_source(config, distributed.on_first(lambda: FolderSource.scan(config.path).index))


def _describe(
    model: VQHiT, identity: ModelIdentity, config: TokenizeConfig, source: ImageSource, labels: Labels, shards: int
) -> dict[str, Any]:
    """How the tokens are made: what the manifest says, and what must be the same to continue."""
    size = model.config.image_size
    is_folder = isinstance(source, FolderSource)
    return {
        "format_version": FORMAT_VERSION,
        "vqhit_version": __version__,
        "complete": False,
        "model": {
            "id": identity.id,
            "revision": identity.commit,
            "class": type(model).__name__,
            "weights_sha256": identity.weights_sha256,
            "tokens_sha256": identity.tokens_sha256,
            "config": model.config.to_dict(),
        },
        "codebook_size": model.codebook_size,
        "token_grid": list(model.token_grid),
        "image_size": size,
        "preprocessing": {
            "decoding": "PIL, RGB, turned as EXIF says, transparency over white",
            "crop": f"ADM's center crop to {crop_size(size, config.views)} px",
            "views": DESCRIPTIONS[config.views],
        },
        "precision": config.precision,
        "device": model.quant_conv.weight.device.type,
        "source": {
            "path": config.path,
            "split": None if is_folder else config.split or _SPLIT,
            "revision": config.revision,
            "image_column": config.image_column,
            "images": len(source),
            "limit": config.limit,
            "sha256": source.names_sha256 if isinstance(source, FolderSource) else None,
            "fingerprint": source.fingerprint if isinstance(source, DatasetSource) else None,
        },
        "images_per_shard": config.images_per_shard,
        "shards": shards,
        "label_names": None if labels.names is None else list(labels.names),
    }


class _Writer:
    """Writes some shards of a folder, in each process others."""

    def __init__(
        self,
        model: VQHiT,
        config: TokenizeConfig,
        source: ImageSource,
        labels: Labels,
        partition: Partition,
        shard_format: ShardFormat,
        folder: TokenFolder,
    ) -> None:
        self.model, self.config, self.source, self.labels = model, config, source, labels
        self.partition, self.format, self.folder = partition, shard_format, folder
        self.skipped = Skipped(config.max_bad, len(partition.indices))
        self.weight = model.quant_conv.weight
        self.autocast = torch.autocast(self.weight.device.type, torch.bfloat16, enabled=config.precision == "bfloat16")

    def run(self, missing: Sequence[int], skipped: Sequence[Skip]) -> Signals | None:
        """Write this process's share of the missing shards; returns the signal that ended it before, if one did."""
        self.skipped.add(skip.problem for skip in skipped)
        mine = missing[distributed.rank() :: distributed.world_size()]
        total = sum(len(self.partition.images(shard)) for shard in missing)
        self.asked_for = len(self.partition.indices) - total
        dataset = ImageViews(self.source, self.model.config.image_size, self.config.views)
        order = (part for shard in mine for part in self._parts(shard))
        loader = load_batches(dataset, order, self.config.workers)
        bar = ProgressBar("tokenize", total, images=True, hidden=not distributed.is_first())
        with StopSignal() as signal, closing(loader), bar, in_eval_mode(self.model), exact_float32():
            batches = copied_ahead(loader, self.weight.device)
            for shard in mine:
                rows = self._rows(shard, batches, signal, bar)
                if rows is None:
                    return signal.received
                path = self.folder.shard(shard, len(self.partition))
                write_atomic(path, self.format.file(rows))
        return None

    def _parts(self, shard: int) -> Iterator[Sequence[int]]:
        """Images of each batch of a shard."""
        images = self.partition.images(shard)
        step = max(1, self.config.batch_size // self.format.views)
        return (images[start : start + step] for start in range(0, len(images), step))

    def _rows(self, shard: int, batches: Iterator[Batch], signal: StopSignal, bar: ProgressBar) -> ShardRows | None:
        """The tokens of a shard and all that goes with them, or None if a signal comes first."""
        tokens: list[Tensor] = []
        indices: list[int] = []
        skipped: list[Skip] = []
        for part in self._parts(shard):
            if (batch := signal.next(batches)) is None or signal.received:
                return None
            kept = set(batch.kept)
            indices += [part[position] for position in batch.kept]
            bad = [index for position, index in enumerate(part) if position not in kept]
            skipped += map(self._skip, bad, batch.skipped)
            if kept:
                tokens.append(self._encode(batch.images.flatten(0, 1)))
            self._count(part, batch.skipped, bar)
        height, width = self.format.token_grid
        found = torch.cat(tokens).flatten(1).cpu().numpy() if tokens else np.empty((0, height * width))
        sources = [readable(self.source.origin(index) or "") for index in indices]
        return ShardRows(found, indices, self.labels.of(indices), sources, skipped)

    def _skip(self, index: int, problem: str) -> Skip:
        """What is kept of an image that could not be read: its own name, not where the folder lies."""
        name = readable(self.source.origin(index) or f"row {index}")
        return Skip(index, readable(problem.replace(self.source.name(index), name)))

    @torch.no_grad()
    def _encode(self, crops: Tensor) -> Tensor:
        with self.autocast:
            return self.model.encode(from_uint8(crops).to(self.weight.dtype)).int()

    def _count(self, part: Sequence[int], problems: list[str], bar: ProgressBar) -> None:
        """Name images that cannot be read; raises `DataError` once they are too many."""
        processes = distributed.world_size()
        for problem in self.skipped.add(problems):
            say(f"skipped: {problem}", sys.stderr)
        self.asked_for = min(self.asked_for + len(part) * processes, len(self.partition.indices))
        self.skipped.check(self.asked_for)  # as if the other processes had no bad ones
        bar.advance(min(len(part) * processes, bar.total - bar.done))
