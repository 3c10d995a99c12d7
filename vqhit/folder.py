"""A folder of image files, with all its subfolders, as a numbered list.

The list holds no Python object per image, so that loader processes share its memory.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vqhit import images

_INDEX_HEADER = re.compile(rb"vqhit images 1 (\d+) ([0-9a-f]{64})\n")


class DataError(ValueError):
    """Images that cannot be had; the message says which and why."""


class Encoded(NamedTuple):
    """An image as it is stored."""

    data: bytes
    name: str
    """What to call it in a message."""
    origin: str | None
    """Its file name, relative to the folder that was read; None if a row of a data set has none."""


class FolderSource:
    """Image files below a folder, in the order of their names.

    `index` holds the names, relative to the folder, as `scan` returns them: a run keeps it, so that its order of images
    stays what it was when files come or go, and a million of them need not be listed again.
    """

    def __init__(self, folder: Path | str, index: bytes) -> None:
        self.folder, self.index = str(folder), index
        header = _INDEX_HEADER.match(index)
        names = index[header.end() :] if header else b""
        self.names_sha256 = hashlib.sha256(names).hexdigest()
        """Of the list of files."""
        if header is None or self.names_sha256 != header[2].decode():
            raise DataError(f"the index of {folder} is damaged; the file is only a list: remove it to list anew")
        self._names = np.frombuffer(names, dtype=np.uint8)
        self._ends = np.flatnonzero(self._names == 0)

    @classmethod
    def scan(cls, folder: Path | str) -> "FolderSource":
        """List a folder; raises `DataError` if there is no folder or no image."""
        names = b"".join(os.fsencode(name) + b"\0" for name in list_images(folder))
        header = f"vqhit images 1 {names.count(0)} {hashlib.sha256(names).hexdigest()}\n"
        return cls(folder, header.encode() + names)

    def __len__(self) -> int:
        return len(self._ends)

    def __reduce__(self) -> tuple[Any, ...]:  # without the arrays, which are made of the index
        return FolderSource, (self.folder, self.index)

    def origin(self, index: int) -> str:
        """Name of an image file, relative to the folder."""
        start = self._ends[index - 1] + 1 if index else 0
        return os.fsdecode(self._names[start : self._ends[index]].tobytes())

    def name(self, index: int) -> str:
        """Path of an image file."""
        return os.path.join(self.folder, self.origin(index))  # noqa: PTH118

    def stem(self, index: int) -> str:
        """Name of an image file relative to the folder, without its suffix."""
        return os.path.splitext(self.origin(index))[0]  # noqa: PTH122

    def read(self, index: int) -> Image.Image:
        """Decode an image to RGB; raises `ImageError` naming a file that cannot be."""
        return images.load_image(self.name(index))

    def encoded(self, index: int) -> Encoded:
        """The bytes of a file; raises `ImageError` naming one that cannot be read."""
        name = self.name(index)
        return Encoded(file_bytes(name), name, self.origin(index))


def list_images(folder: Path | str) -> list[str]:
    """Return the names of all image files below a folder, relative to it and sorted.

    Raises `DataError` if there is no such folder or no image in it.
    """
    root = str(folder)
    if not Path(root).is_dir():
        raise DataError(f"{folder}: no such folder of images")
    found: list[str] = []
    pending, seen = [""], set()
    while pending:
        directory = pending.pop()
        path = os.path.join(root, directory)  # noqa: PTH118  (a million files)
        if (real := os.path.realpath(path)) in seen:  # a link back up, or two links to one folder
            continue
        seen.add(real)
        prefix = directory + os.sep if directory else ""
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if _is_folder(entry):
                    pending.append(prefix + entry.name)
                elif os.path.splitext(entry.name)[1].lower() in images.SUFFIXES and (  # noqa: PTH122
                    entry.is_symlink() or entry.is_file()  # no pipe; a link that leads nowhere is a bad image
                ):
                    found.append(prefix + entry.name)
    if not found:
        raise DataError(f"{folder}: no images in it or below ({', '.join(sorted(images.SUFFIXES))})")
    return sorted(found)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def file_bytes(path: str) -> bytes:
    """Content of a file, here or on the Hub (hf://); raises `ImageError` naming one that cannot be read."""
    try:
        if "://" not in path:
            if not Path(path).is_file():
                raise OSError("No such file")
            return Path(path).read_bytes()
        if not path.split("::")[-1].startswith("hf://"):  # a row must not make us ask any server
            raise OSError("neither a file nor on the Hub")
        import fsspec

        with fsspec.open(path, "rb") as file:  # a stream of a data set that is kept as image files
            return bytes(file.read())
    except Exception as error:  # of the file system or the network
        raise images.ImageError(f"{path}: cannot be read ({one_line(error)})") from None


def one_line(error: Exception) -> str:
    """Text of an error on one line; its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
