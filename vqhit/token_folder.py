"""The folder that `vqhit tokenize` writes: manifest.json, README.md for `datasets`, data/*.parquet, skipped.jsonl.

The manifest says how the tokens were made. It is written first, with `complete` false, and with `complete` true last;
in between the same command goes on where another one was interrupted.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from vqhit.config import differences, flat
from vqhit.files import InUseError, lock, read_json, write_atomic
from vqhit.folder import DataError
from vqhit.progress import say
from vqhit.token_shards import DamagedShardError, Partition, ShardFormat, Skip, shard_name, summary

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SKIPPED = "skipped.jsonl"
_CARD = "README.md"
_LOCK = ".lock"
_NEEDED = {"complete": bool, "model": dict, "codebook_size": int, "token_grid": list, "source": dict, "shards": int}
_COUNTS = ("images", "rows", "skipped")
"""Of a complete folder."""
_NOT_COMPARED = ("complete", *_COUNTS, "model.id", "model.revision", "source.path", "source.revision")
"""What may be another when a folder is gone on with: counts, and names of what is known by its content or list."""


class TokenFolder:
    """A folder of tokens, complete or not."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.data = self.path / "data"

    def manifest(self) -> dict[str, Any] | None:
        """What manifest.json says, None if there is none; raises `DataError` for one that cannot be read."""
        path = self.path / MANIFEST
        try:
            found = read_json(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise DataError(f"{path}: {error}") from None
        version = found.get("format_version") if isinstance(found, dict) else None
        if version != FORMAT_VERSION:
            raise DataError(f"{path}: format_version: found {version!r}; this vqhit reads {FORMAT_VERSION}")
        counts = dict.fromkeys(_COUNTS, int) if found.get("complete") is True else {}
        for key, kind in {**_NEEDED, **counts}.items():
            if type(found.get(key)) is not kind:
                raise DataError(f"{path}: {key}: found {found.get(key)!r}; expected {kind.__name__}")
        if found["shards"] < 1:
            raise DataError(f"{path}: shards: found {found['shards']}; expected 1 or more")
        grid = found["token_grid"]
        if len(grid) != 2 or not all(type(side) is int and side > 0 for side in grid):
            raise DataError(f"{path}: token_grid: found {grid}; expected height and width")
        return found

    def shard(self, number: int, shards: int) -> Path:
        """File of a shard."""
        return self.data / shard_name(number, shards)

    def claim(
        self, made: dict[str, Any], shard_format: ShardFormat, partition: Partition
    ) -> tuple[list[int], list[Skip]] | None:
        """Make the folder, or take up one that was `made` in the same way, for this process alone.

        Returns the shards that are still to be written and what the others have skipped; None if the folder is complete
        and all of them are whole: it stays as it is then. Otherwise what a killed process left half-written is removed.
        Raises `DataError` for a folder that is in use, holds anything else, or was made otherwise, naming what differs.
        """
        self._compare(made)
        if self._is_complete(shard_format, partition):
            return None
        self.data.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = lock(self.path / _LOCK)
        except InUseError as holder:
            raise DataError(f"{self.path}: {holder} is writing it now") from None
        self._compare(made)  # another may have done all of it meanwhile
        if self._is_complete(shard_format, partition):
            self._release()
            return None
        for name in (MANIFEST, _CARD, SKIPPED):
            _remove_temporary(self.path, name)
        _remove_temporary(self.data, "train-")
        names = {shard_name(number, made["shards"]) for number in range(made["shards"])}
        if others := sorted({path.name for path in self.data.iterdir()} - names):
            raise DataError(f"{self.data / others[0]}: no shard of these tokens; move it away")
        self._write(MANIFEST, _text(made | {"complete": False}))
        self._write(_CARD, _card(made))
        return self._missing(shard_format, partition)

    def _is_complete(self, shard_format: ShardFormat, partition: Partition) -> bool:
        """Whether the manifest says so, and every shard is there and whole."""
        manifest = self.manifest()
        if manifest is None or not manifest["complete"]:
            return False
        try:
            for number in range(len(partition)):
                shard_format.check(self.shard(number, len(partition)), partition.images(number))
        except DamagedShardError:
            return False
        return True

    def _compare(self, made: dict[str, Any]) -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise DataError(f"{self.path}: a file; the tokens go into a folder, new or empty")
        there = self.manifest()
        if there is None:
            if others := [path.name for path in self.path.iterdir() if not _is_of_a_start(path)]:
                raise DataError(f"{self.path}: holds other files ({min(others)}); give a new or empty folder")
            return
        changed = {key: text for key, text in differences(there, made).items() if key not in _NOT_COMPARED}
        if changed:
            raise DataError(
                f"{self.path}: holds other tokens ({', '.join(list(changed.values())[:3])}); give a new folder"
            )

    def _missing(self, shard_format: ShardFormat, partition: Partition) -> tuple[list[int], list[Skip]]:
        """Shards still to be written, and what the others have skipped.

        A damaged one is removed, to be written again; raises `DataError` for one that was made in another way.
        """
        missing: list[int] = []
        skipped: list[Skip] = []
        for number in range(len(partition)):
            path = self.shard(number, len(partition))
            try:
                if path.exists():
                    skipped += shard_format.check(path, partition.images(number))
                    continue
            except DamagedShardError as error:
                say(f"{error}; written again", sys.stderr)
                path.unlink()
            missing.append(number)
        return missing, skipped

    def finish(self, made: dict[str, Any], views: int) -> dict[str, Any]:
        """All shards are written: list what was skipped, count, and give the folder up; returns the manifest."""
        paths = [self.shard(number, made["shards"]) for number in range(made["shards"])]
        found = [summary(path) for path in paths]
        for path, each in zip(paths, found, strict=True):
            if each.made != digest(made):
                raise DataError(f"{path}: no shard of these tokens; move it away")
        rows, skipped = sum(each.rows for each in found), [skip for each in found for skip in each.skipped]
        if not rows:
            raise DataError(f"{made['source']['path']}: none of its images can be read; {skipped[0].problem}")
        if skipped:
            records = [{"index": skip.image, "problem": skip.problem} for skip in skipped]
            self._write(SKIPPED, "".join(json.dumps(record) + "\n" for record in records))
        else:
            (self.path / SKIPPED).unlink(missing_ok=True)  # of images that can be read now
        counts = {"images": rows // views, "rows": rows, "skipped": len(skipped)}
        manifest = made | {"complete": True} | counts
        self._write(MANIFEST, _text(manifest))
        self._release()
        return manifest

    def _write(self, name: str, text: str) -> None:
        write_atomic(self.path / name, text.encode())

    def _release(self) -> None:
        (self.path / _LOCK).unlink(missing_ok=True)
        self._lock.close()


def digest(made: dict[str, Any]) -> str:
    """A hash of how tokens were made, by which a shard is known."""
    compared = {key: value for key, value in flat(made).items() if key not in _NOT_COMPARED}
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()


def _is_of_a_start(path: Path) -> bool:
    """Whether a start that was cut off before it wrote a manifest may have left this."""
    return path.name == _LOCK or path.name.startswith(f".{MANIFEST}.") or (path.name == "data" and _is_empty(path))


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _remove_temporary(folder: Path, name: str) -> None:
    """Remove what a killed `write_atomic` has left of files whose names begin so."""
    for path in folder.glob(f".{name}*"):
        path.unlink()


def _text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=2) + "\n"


def _card(made: dict[str, Any]) -> str:
    """A data set card, without `configs`: with those in it, `datasets` 5.2 reads an older folder's rows from its cache.

    It finds the Parquet files by their names, here and on the Hub.
    """
    height, width = made["token_grid"]
    model, source = made["model"], made["source"]
    count = min(source["images"], source["limit"] or source["images"])
    tokenizer = f"{model['id']}@{model['revision']}" if model["revision"] else Path(model["id"]).name
    return f"""---
tags:
- image-tokens
- vqhit
---
# Image tokens

Images as grids of {height}x{width} integers below {made["codebook_size"]}, made by `vqhit tokenize` with the tokenizer
`{tokenizer}` from {count} images of {made["image_size"]} px. `manifest.json` says exactly how.

```python
import datasets
import torch
from vqhit import VQHiT

row = datasets.load_dataset("THIS_FOLDER", split="train")[0]
tokens = torch.tensor(row["tokens"]).view(1, row["height"], row["width"])
images = VQHiT.from_pretrained({tokenizer!r}).decode(tokens)  # (1, 3, {made["image_size"]}, {made["image_size"]})
```

| column | |
|---|---|
| `tokens` | the grid, row by row |
| `height`, `width` | its size |
| `label` | class of the image, or null |
| `source` | file name of the image, or empty |
| `index` | number of the image in its source |
| `view` | which crop of it: {made["preprocessing"]["views"]} |
"""
