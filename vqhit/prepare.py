"""Images made ready for training, once: resized so that training crops need no resampling, stored as `datasets` does.

A prepared folder holds Arrow shards that `datasets.load_from_disk` opens, prepare.json (how it was made) and, if images
were left out, skipped.txt (which, and why).
"""

import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from PIL import Image
from pydantic import Field, Strict, model_validator
from torch.utils.data import DataLoader, Dataset

from vqhit import __version__, images
from vqhit.config import Count, NonNegativeInt
from vqhit.data import BadShare, Share, Skipped, started, too_small
from vqhit.files import InUseError, check_apart, flush, lock
from vqhit.folder import DataError
from vqhit.progress import ProgressBar
from vqhit.sources import DatasetSource, ImageSource, SourceConfig, open_source

LONGEST_PX = 16000  # WebP holds no more than 16383
_BATCH_IMAGES = 16
_BUFFER_BYTES = 16 * 2**20  # of a record batch, held in memory until it is written


class PrepareConfig(SourceConfig):
    """Which images to prepare, and for crops of which size."""

    size: Count = 256
    """Side of a training crop in px."""
    crop_proportion: Share = 0.875
    """That of the training to come; the short side becomes size / crop_proportion px."""
    format: Literal["jpeg", "png", "webp"] = "jpeg"
    quality: Annotated[int, Strict(), Field(ge=1, le=100)] = 95
    """Of JPEG and WebP."""
    max_bad: BadShare = 0.01
    """Images that cannot be read, or are narrower than 8 px, are left out; with more than this share it stops."""
    workers: NonNegativeInt = 0
    """Loader processes; 0 works in the one process."""
    shard_mb: Annotated[float, Field(gt=0)] = 500
    """A file of images is closed once it has grown to this size."""

    @property
    def short_side_px(self) -> int:
        """Short side of every prepared image."""
        return round(self.size / self.crop_proportion)

    @model_validator(mode="after")
    def _check(self) -> "PrepareConfig":
        if self.short_side_px > LONGEST_PX:
            raise ValueError(
                f"size {self.size} / crop_proportion {self.crop_proportion:g} makes a short side of "
                f"{self.short_side_px} px; allowed: up to {LONGEST_PX}"
            )
        return self


def prepare(config: PrepareConfig, destination: Path | str) -> dict[str, Any]:
    """Write a prepared folder and return what its prepare.json says.

    It is made under a hidden name beside `destination` and renamed when it is whole. Raises `DataError` for a source
    that cannot be had or has too many bad images, and `ValueError` for a destination that is there already.
    """
    target = Path(destination)
    _check_paths(config.path, target)
    source = open_source(config)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _folder_renamed_to(target) as folder:
        return _write(source, config, folder)


def prepared(data: bytes, name: str, config: PrepareConfig) -> bytes:
    """An image file resized and encoded as `config` says; one that is so already is left as it is.

    Raises `ImageError` if it cannot be decoded or is too small.
    """
    image = images.decode_image(data, name)
    if (problem := too_small(image)) is not None:
        raise images.ImageError(f"{name}: {problem}")
    if config.format == "jpeg" and min(image.size) == config.short_side_px and _is_plain_jpeg(data):
        return data
    file = BytesIO()
    quality = {} if config.format == "png" else {"quality": config.quality}
    subsampling = {"subsampling": "4:4:4"} if config.format == "jpeg" else {}
    # A colour profile is left out, as reading leaves it unused.
    resized(image, config.short_side_px).save(file, config.format, icc_profile=b"", **quality, **subsampling)
    return file.getvalue()


def resized(image: Image.Image, short_side_px: int) -> Image.Image:
    """Resize to a short side (antialiased bicubic); of what would be longer than 16000 px the ends are cut off."""
    scale = short_side_px / min(image.size)
    longest = int(LONGEST_PX / scale)
    if max(image.size) > longest:
        width, height = (min(side, longest) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    width, height = (round(side * scale) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether bytes are a JPEG whose pixels need no turning nor converting."""
    with Image.open(BytesIO(data), formats=images.FORMATS) as image:
        return image.format == "JPEG" and image.mode == "RGB" and images.is_upright(image)


def _check_paths(source: str, target: Path) -> None:
    check_apart(source, target)
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target}: is there already; name a new folder, or remove that one")


@contextlib.contextmanager
def _folder_renamed_to(target: Path) -> Iterator[Path]:
    """A new folder that gets its name when the block ends well and is removed when it does not."""
    folder = target.parent / f".{target.name}.unfinished"
    folder.mkdir(exist_ok=True)
    try:
        claimed = lock(folder / "lock")
    except InUseError as holder:
        raise ValueError(f"{target}: {holder} is writing it now") from None
    with claimed:
        try:
            for path in folder.iterdir():  # what a killed one left
                if path.name != "lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            yield folder
            for path in (*folder.iterdir(), folder):
                flush(path)
            folder.rename(target)
            (target / "lock").unlink()
            flush(target.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


class _Shards:
    """Arrow files that `datasets` opens as one data set, each closed once it has grown to `shard_mb`."""

    def __init__(self, folder: Path, labels: Any, shard_mb: float) -> None:
        import datasets

        self.folder, self.shard_bytes = folder, shard_mb * 1e6
        self.features = datasets.Features({"image": datasets.Image()})
        if labels is not None:
            self.features |= {"label": labels.features["label"]}
        self.labels = labels and labels.with_format("arrow")
        self.schema = self.features.arrow_schema
        self.images = 0
        self.rows: list[int] = []
        """Number of rows of each shard."""
        self._writer: Any = None
        self._cells: list[dict[str, Any]] = []
        self._labels: list[Any] = []
        self._written = self._pending = 0
        self._hash = hashlib.sha256()

    def write(self, row: "_Row") -> None:
        """Add a row to the shard that is open."""
        import pyarrow

        if self._writer is None:
            path = self.folder / f"data-{len(self.rows):05d}.arrow"
            self._writer = pyarrow.ipc.new_stream(str(path), self.schema)
            self.rows.append(0)
            self._written = 0
        assert row.data is not None
        name = row.origin_or_problem and row.origin_or_problem.encode(errors="replace").decode()
        self._cells.append({"bytes": row.data, "path": name})
        if self.labels is not None:
            self._labels.append(self.labels[row.number]["label"].combine_chunks())
        self._hash.update(row.data)
        self.images, self.rows[-1] = self.images + 1, self.rows[-1] + 1
        self._written, self._pending = self._written + len(row.data), self._pending + len(row.data)
        if self._pending >= _BUFFER_BYTES:
            self._flush()
        if self._written >= self.shard_bytes:
            self.close()

    def _flush(self) -> None:
        # Not by datasets.ArrowWriter, which drops an image's bytes if there is a file of its name where it is run.
        import pyarrow

        columns = [pyarrow.array(self._cells, type=self.schema.field("image").type)]
        columns += [pyarrow.concat_arrays(self._labels)] if self._labels else []
        self._writer.write_batch(pyarrow.record_batch(columns, schema=self.schema))
        self._cells, self._labels, self._pending = [], [], 0

    def close(self) -> None:
        """Close the shard that is open, if any."""
        if self._writer is not None:
            if self._cells:
                self._flush()
            self._writer.close()
            self._writer = None

    def name(self) -> None:
        """Give the shards their names, which tell how many there are, and write the files that describe them."""
        import datasets

        empty = datasets.Dataset.from_dict({column: [] for column in self.features}, features=self.features)
        with _no_progress_bars():
            empty.save_to_disk(self.folder / "empty")
        names = [f"data-{shard:05d}-of-{len(self.rows):05d}.arrow" for shard in range(len(self.rows))]
        for shard, name in enumerate(names):
            (self.folder / f"data-{shard:05d}.arrow").rename(self.folder / name)
        state = json.loads((self.folder / "empty" / "state.json").read_text())
        state |= {"_data_files": [{"filename": name} for name in names], "_fingerprint": self._hash.hexdigest()[:16]}
        (self.folder / "state.json").write_text(json.dumps(state, indent=2))
        (self.folder / "empty" / "dataset_info.json").rename(self.folder / "dataset_info.json")
        shutil.rmtree(self.folder / "empty")


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    import datasets

    if shown := not datasets.are_progress_bars_disabled():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


class _Row(NamedTuple):
    """An image to write and its row of the source, or, instead of its bytes, what is wrong with it."""

    number: int
    data: bytes | None
    origin_or_problem: str | None


class _Rows(Dataset[_Row]):
    def __init__(self, source: ImageSource, config: PrepareConfig) -> None:
        self.source, self.config = source, config

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> _Row:
        try:
            image = self.source.encoded(index)
            return _Row(index, prepared(image.data, image.name, self.config), image.origin)
        except images.ImageError as error:
            return _Row(index, None, str(error))


def _write(source: ImageSource, config: PrepareConfig, folder: Path) -> dict[str, Any]:
    labels = source.labels if isinstance(source, DatasetSource) else None
    shards, skipped = _Shards(folder, labels, config.shard_mb), Skipped(config.max_bad, len(source))
    loader = DataLoader(
        _Rows(source, config),
        batch_size=_BATCH_IMAGES,
        collate_fn=list,
        num_workers=config.workers,
    )
    asked_for = 0
    with ProgressBar("prepare", len(loader)) as bar, contextlib.closing(shards):
        for rows in started(loader):
            asked_for += len(rows)
            for row in rows:
                if row.data is not None:
                    shards.write(row)
                    continue
                for problem in skipped.add([str(row.origin_or_problem)]):
                    print(f"left out: {problem}", file=sys.stderr)
            skipped.check(asked_for)
            bar.advance(len(rows))
    if not shards.images:
        raise DataError(f"{config.path}: none of its {len(source)} images can be read")
    shards.name()
    if len(skipped):
        lines = "".join(problem + "\n" for problem in skipped.problems)
        (folder / "skipped.txt").write_text(lines, encoding="utf-8", errors="surrogateescape")
    report = {
        "source": config.path,
        **config.to_dict(),
        "short_side_px": config.short_side_px,
        "images": shards.images,
        "skipped": len(skipped),
        "vqhit_version": __version__,
    }
    del report["path"]
    (folder / "prepare.json").write_text(json.dumps(report, indent=2) + "\n")
    return report
