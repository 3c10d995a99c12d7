"""Where images come from: a folder of files, a `datasets` folder (Arrow, Parquet), a data set of the Hugging Face Hub.

A source is a numbered list of images that `images.py` decodes when they are asked for, never their library.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from vqhit import images
from vqhit.config import Config, Text
from vqhit.folder import DataError, Encoded, FolderSource, file_bytes, one_line

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LABEL = "label"
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")


class SourceConfig(Config):
    """A folder of image files, searched with all its subfolders, or a `datasets` folder, or an id on the Hub."""

    path: Text
    """A folder or file that is there, else the id of a data set on the Hub (owner/name)."""
    split: Text | None = None
    """Of a data set that has splits; by default train, or validation where images are evaluated."""
    revision: Text | None = None
    """Of a data set on the Hub: a branch, a tag or a commit."""
    image_column: Text | None = None
    """By default the first column of images, or one named image, img, jpg, jpeg, png or webp."""


class ImageSource(Protocol):
    """A numbered list of images."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call an image in a message."""

    def read(self, index: int) -> Image.Image:
        """Decode an image to RGB; raises `ImageError` naming one that cannot be."""

    def encoded(self, index: int) -> Encoded:
        """The bytes of an image as they are stored; raises `ImageError` naming one that has none."""

    def origin(self, index: int) -> str | None:
        """File name of an image, relative to the folder that was read; None if a row of a data set has none."""


class DatasetSource:
    """Rows of a `datasets.Dataset` with a column of encoded images.

    `labels` is the data set's column `label` alone, or its only column of class labels, named so; None if it has none.
    """

    def __init__(self, dataset: Any, config: SourceConfig) -> None:
        self.column = _image_column(dataset.features, config)
        self.path, self.rows = config.path, _encoded(dataset, self.column)
        self.labels = _labels(dataset)
        self.fingerprint = str(dataset._fingerprint)
        """Changes with the rows; of Parquet and Arrow files also with their place and date."""

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """The data set, the row, and the file that the image was made from, where that is known."""
        return _row_name(self.path, index, self._cell(index))

    def _cell(self, index: int) -> Any:
        if self.rows._indices is not None:  # rows chosen or ordered by the library
            return self.rows[index][self.column]
        return self.rows.data.column(self.column)[index].as_py()  # a tenth of the time

    def read(self, index: int) -> Image.Image:
        """Decode an image to RGB; raises `ImageError` naming a row that cannot be."""
        return _decode(self._cell(index), self.path, index)

    def encoded(self, index: int) -> Encoded:
        """The bytes in a row, or of the file that it names; raises `ImageError` naming a row that has none."""
        cell = self._cell(index)
        name = _row_name(self.path, index, cell)
        return Encoded(_cell_bytes(cell, name), name, _relative(_origin(cell)))

    def origin(self, index: int) -> str | None:
        """Name of the file that a row was made from, None where that is not known."""
        if self.rows._indices is not None:
            return _relative(_origin(self.rows[index][self.column]))
        cell = self.rows.data.column(self.column)[index]  # an image's bytes stay where they are
        return _relative(cell["path"].as_py()) if "path" in getattr(cell, "keys", tuple)() else None


class StreamSource:
    """Rows of a data set read from its beginning to its end, in shards: for those too large to download.

    The order is approximate: shards and a buffer of rows are shuffled by a seed.
    """

    def __init__(self, dataset: Any, config: SourceConfig) -> None:
        if dataset.features is None:
            dataset = dataset._resolve_features()
        self.column = _image_column(dataset.features, config)
        # decode, as a cast comes too late for the Hub's folders of image files, whose rows are decoded on the way
        self.path, self.rows = config.path, _encoded(dataset.decode(False), self.column)

    def shards(self, part: int = 0, parts: int = 1) -> int:
        """Number of shards that one part of several reads: more loader processes than that are of no use."""
        return int(self._part(part, parts).num_shards)

    def _part(self, part: int, parts: int) -> Any:
        from datasets.distributed import split_dataset_by_node

        return split_dataset_by_node(self.rows, rank=part, world_size=parts) if parts > 1 else self.rows

    def read(self, seed: int, buffer: int, part: int = 0, parts: int = 1) -> Iterator[tuple[Image.Image | None, str]]:
        """Images and their names in an order drawn from `seed`, or None and what is wrong; of each `parts` rows one.

        In a loader process, those of its shards only. Raises `DataError` if the stream breaks off.
        """
        rows = self._part(part, parts)
        if buffer:
            rows = rows.shuffle(seed=seed % 2**63, buffer_size=buffer)
        try:
            for row in rows:
                name = _unnumbered_name(self.path, row[self.column])
                try:
                    yield images.decode_image(_cell_bytes(row[self.column], name), name), name
                except images.ImageError as error:
                    yield None, str(error)
        except Exception as error:  # of the network, the file system or a file format
            raise DataError(f"{self.path}: the stream broke off ({one_line(error)})") from None


def open_source(config: SourceConfig, index: bytes | None = None, split: str = "train") -> ImageSource:
    """Open what a configuration names; `index` is that of an image folder listed before.

    Raises `DataError` that says what was looked for and what went wrong.
    """
    if is_image_folder(config.path):
        for name in ("split", "revision", "image_column"):
            if (value := getattr(config, name)) is not None:
                raise DataError(f"{name} {value!r}: {config.path} is a folder of image files, which has none")
        return FolderSource.scan(config.path) if index is None else FolderSource(config.path, index)
    return DatasetSource(_load(config, split, streaming=False), config)


def open_stream(config: SourceConfig, split: str = "train") -> StreamSource:
    """Open a data set to be read as a stream; raises `DataError` as `open_source` does."""
    if is_image_folder(config.path):
        raise DataError(f"{config.path}: a folder of image files is not read as a stream; leave streaming off")
    return StreamSource(_load(config, split, streaming=True), config)


def is_image_folder(path: Path | str) -> bool:
    """Whether a path is a folder that is no `datasets` folder."""
    return Path(path).is_dir() and not _saved(Path(path)) and not _tables(Path(path))


def _saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _tables(folder: Path) -> list[Path]:
    """Parquet files in a folder or its `data`, or else Arrow files."""
    found = [path for below in (folder, folder / "data") if below.is_dir() for path in below.iterdir()]
    for suffix in (".parquet", ".arrow"):
        if tables := [path for path in found if path.suffix == suffix and path.is_file()]:
            return tables
    return []


def _load(config: SourceConfig, default_split: str, streaming: bool) -> Any:
    """The `datasets.Dataset`, or `IterableDataset`, that a configuration names."""
    path, split = Path(config.path), config.split or default_split
    if not path.exists() and not _HUB_ID.fullmatch(config.path):
        raise DataError(f"{config.path}: no such folder, and no id of a data set on the Hub (owner/name)")
    if path.is_file() and path.suffix not in (".parquet", ".arrow"):
        raise DataError(f"{config.path}: a file; allowed: a Parquet or Arrow file, a folder, or an id on the Hub")
    if path.exists() and config.revision is not None:
        raise DataError(f"revision {config.revision!r}: {config.path} is no data set on the Hub")
    import datasets
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # or it tells of every try
    try:
        if path.is_dir() and _saved(path):
            dataset = datasets.load_from_disk(config.path)
            if isinstance(dataset, datasets.DatasetDict):
                if split not in dataset:
                    raise DataError(f"no split {split!r}; there are: {', '.join(dataset)}")
                dataset = dataset[split]
            elif config.split is not None:
                raise DataError("it has no splits; leave split out")
            return dataset.to_iterable_dataset(num_shards=len(dataset.cache_files)) if streaming else dataset
        if path.exists():
            files = [path] if path.is_file() else _tables(path)
            kind = files[0].suffix.removeprefix(".")
            if path.is_dir() and kind == "parquet":
                return datasets.load_dataset(config.path, split=split, streaming=streaming)
            names = [str(file) for file in sorted(files)]
            return datasets.load_dataset(kind, data_files={split: names}, split=split, streaming=streaming)
        return datasets.load_dataset(config.path, split=split, streaming=streaming, revision=config.revision)
    except Exception as error:  # of the network, the file system, or any of the formats that are read
        found = (
            "cannot be read as a data set" if path.exists() else "no such folder, and no data set that the Hub gives"
        )
        raise DataError(f"{config.path}: {found} ({one_line(error)})") from None


def _image_column(features: Any, config: SourceConfig) -> str:
    import datasets

    name = config.image_column
    if name is not None:
        if name not in features:
            raise DataError(f"{config.path}: no column {name!r}; there are: {', '.join(features)}")
        return name
    found = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    found += [column for column in _IMAGE_COLUMNS if column in features]
    if not found:
        raise DataError(f"{config.path}: no column of images; image_column names one of: {', '.join(features)}")
    return found[0]


def _labels(dataset: Any) -> Any:
    """A column of labels alone, named `label`."""
    import datasets

    classes = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    if _LABEL in dataset.features:
        return dataset.select_columns([_LABEL])
    return dataset.select_columns(classes).rename_column(classes[0], _LABEL) if len(classes) == 1 else None


def _encoded(dataset: Any, column: str) -> Any:
    """The data set with that column only, left encoded."""
    import datasets

    dataset = dataset.select_columns([column])
    feature = dataset.features[column]
    if isinstance(feature, datasets.Image) and feature.decode:
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def _row_name(path: str, number: int, cell: Any) -> str:
    origin = _origin(cell)
    return f"{path} row {number}" + (f" ({origin})" if origin else "")


def _unnumbered_name(path: str, cell: Any) -> str:
    """Of a row of a stream, whose number its shuffling hides: the same in every pass."""
    if origin := _origin(cell):
        return f"{path} ({origin})"
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    content = data if isinstance(data, bytes) else b""
    return f"{path} row of {len(content)} bytes with sha256 {hashlib.sha256(content).hexdigest()[:16]}"


def _origin(cell: Any) -> str | None:
    return cell.get("path") if isinstance(cell, dict) else None


def _relative(origin: str | None) -> str | None:
    if origin and (origin.startswith("/") or "://" in origin):  # a file in the Hub's cache, or on the Hub
        return origin.rpartition("/")[2]
    return origin


def _decode(cell: Any, path: str, number: int) -> Image.Image:
    name = _row_name(path, number, cell)
    return images.decode_image(_cell_bytes(cell, name), name)


def _cell_bytes(cell: Any, name: str) -> bytes:
    """A cell of an image column: encoded bytes, or a struct of bytes and the path of a file."""
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if data is None and (path := _origin(cell)):
        return file_bytes(path)
    if not isinstance(data, bytes):
        raise images.ImageError(f"{name}: holds {type(data).__name__}, not the bytes of an image file")
    return data


def evenly_spaced(count: int, limit: int | None) -> Sequence[int]:
    """Return at most `limit` of the indices 0 to count - 1, evenly spaced."""
    return range(count) if limit is None or limit >= count else [index * count // limit for index in range(limit)]
