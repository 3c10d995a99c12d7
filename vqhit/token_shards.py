"""Tokens in Parquet files that `datasets` opens: a fixed partition of the images, one file a part, each whole.

A shard's metadata says how it was made and which images had to be left out, so that an interrupted command can tell
what is done, and nothing is counted twice.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vqhit.folder import DataError, one_line

_METADATA = b"vqhit"
_UINT16_CODES = 2**16


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Which images of the source each shard holds: the k-th `per_shard` of them."""

    indices: Sequence[int]
    per_shard: int

    def __len__(self) -> int:
        return -(-len(self.indices) // self.per_shard)

    def images(self, shard: int) -> Sequence[int]:
        """Numbers of the images of a shard."""
        return self.indices[shard * self.per_shard : (shard + 1) * self.per_shard]


def shard_name(shard: int, shards: int) -> str:
    """File name of a shard."""
    return f"train-{shard:05d}-of-{shards:05d}.parquet"


class Skip(NamedTuple):
    """An image that could not be read."""

    image: int
    """Its number in the source."""
    problem: str


class ShardRows(NamedTuple):
    """The images of a shard that could be read, and the others."""

    tokens: np.ndarray
    """(images * views, h*w) integers."""
    indices: list[int]
    """Their numbers in the source."""
    labels: list[int | None]
    sources: list[str]
    skipped: list[Skip]


@dataclass(frozen=True, kw_only=True)
class ShardFormat:
    """What all shards of a folder share; `made` stands for how they were made, from the model to the list of images."""

    token_grid: tuple[int, int]
    codebook_size: int
    views: int
    label_names: tuple[str, ...] | None
    made: str

    def schema(self) -> Any:
        """Columns and types, with the metadata by which `datasets` knows them too."""
        import datasets

        label = datasets.ClassLabel(names=list(self.label_names)) if self.label_names else datasets.Value("int64")
        height, width = self.token_grid
        features = {
            "tokens": datasets.List(datasets.Value(token_dtype(self.codebook_size)), length=height * width),
            "height": datasets.Value("uint16"),
            "width": datasets.Value("uint16"),
            "label": label,
            "source": datasets.Value("string"),
            "index": datasets.Value("int64"),
            "view": datasets.Value("uint8"),
        }
        return datasets.Features(features).arrow_schema

    def file(self, rows: ShardRows) -> bytes:
        """A Parquet file of these rows; the same rows give the same bytes."""
        import pyarrow
        from pyarrow import parquet

        schema, count, views = self.schema(), len(rows.indices), self.views
        height, width = self.token_grid
        flat = pyarrow.array(rows.tokens.reshape(-1).astype(token_dtype(self.codebook_size)))
        columns = [
            pyarrow.FixedSizeListArray.from_arrays(flat, type=schema.field("tokens").type),
            pyarrow.array(np.full(count * views, height, dtype=np.uint16)),
            pyarrow.array(np.full(count * views, width, dtype=np.uint16)),
            pyarrow.array([label for label in rows.labels for _ in range(views)], type=pyarrow.int64()),
            pyarrow.array([name for name in rows.sources for _ in range(views)], type=pyarrow.string()),
            pyarrow.array(np.repeat(np.asarray(rows.indices, dtype=np.int64), views)),
            pyarrow.array(np.tile(np.arange(views, dtype=np.uint8), count)),
        ]
        about = {"made": self.made, "skipped": rows.skipped}
        schema = schema.with_metadata({**schema.metadata, _METADATA: json.dumps(about).encode()})
        file = BytesIO()
        table = pyarrow.Table.from_arrays(columns, schema=schema)
        with parquet.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
            if len(table):  # `datasets` cannot read a row group of no rows
                writer.write_table(table)
        return file.getvalue()

    def check(self, path: Path, images: Sequence[int]) -> list[Skip]:
        """What a shard of these images left out; raises `DamagedShardError` for one that is not whole.

        Raises `DataError` for a file that was made in another way.
        """
        table = read_shard(path, ["index", "view"])
        made, skipped = _about(table.schema, path)
        if made != self.made:
            raise DataError(f"{path}: no shard of these tokens; move it away")
        left_out = {skip.image for skip in skipped}
        rows = [(index, view) for index in images if index not in left_out for view in range(self.views)]
        if rows != list(zip(table["index"].to_pylist(), table["view"].to_pylist(), strict=True)):
            raise DamagedShardError(f"{path}: damaged (its rows are not those of its images)")
        return skipped


class DamagedShardError(DataError):
    """A shard that is not whole."""


def token_dtype(codebook_size: int) -> str:
    """Type of the tokens in a file."""
    return "uint16" if codebook_size <= _UINT16_CODES else "int32"


def read_shard(path: Path, columns: list[str]) -> Any:
    """Some columns of a shard as a `pyarrow.Table`, all checksums of the file compared.

    Raises `DamagedShardError` for a file that cannot be read, or has not all of these columns.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(BytesIO(path.read_bytes()), page_checksum_verification=True)
        return table.select(columns).replace_schema_metadata(table.schema.metadata)
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        raise DamagedShardError(f"{path}: damaged ({one_line(error)})") from None


class ShardSummary(NamedTuple):
    """What the end of a shard's file tells of it."""

    rows: int
    made: str
    skipped: list[Skip]


def summary(path: Path) -> ShardSummary:
    """Number of rows of a shard and what it left out; raises `DamagedShardError`."""
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DamagedShardError(f"{path}: damaged ({one_line(error)})") from None
    return ShardSummary(file.metadata.num_rows, *_about(file.schema_arrow, path))


def _about(schema: Any, path: Path) -> tuple[str, list[Skip]]:
    """How a shard was made, and what it left out; raises `DataError` for a file that does not say."""
    try:
        about = json.loads((schema.metadata or {})[_METADATA])
        return str(about["made"]), [Skip(int(image), str(problem)) for image, problem in about["skipped"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{path}: not written by vqhit tokenize") from None
