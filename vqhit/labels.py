"""Class labels of the images of a source, by number, with their names where there are any."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vqhit.folder import FolderSource
from vqhit.sources import DatasetSource, ImageSource


class Labels(NamedTuple):
    """What class each image of a source is of."""

    names: tuple[str, ...] | None
    """Of the classes, by number; None if they have none."""
    of: Callable[[Sequence[int]], list[int | None]]
    """Class numbers of some images, None for one without."""


def labels_of(source: ImageSource) -> Labels:
    """Labels of a data set's integer column `label`, or its only one of class labels; of a folder, its subfolders.

    If all images lie in subfolders, the first folder of an image's path is its class, numbered in the order of their
    names, as torchvision's ImageFolder does. Any other source has none.
    """
    if isinstance(source, DatasetSource) and source.labels is not None:
        return _column_labels(source.labels)
    if isinstance(source, FolderSource):
        return _folder_labels(source)
    return _none()


def readable(name: str) -> str:
    """A file name as text that every file can hold: bytes that are no UTF-8 are spelt out."""
    return name.encode(errors="backslashreplace").decode()


def _none() -> Labels:
    return Labels(None, lambda indices: [None] * len(indices))


def _column_labels(labels: Any) -> Labels:
    import datasets

    (feature,) = labels.features.values()
    names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    if names is None and not (isinstance(feature, datasets.Value) and "int" in feature.dtype):
        return _none()
    return Labels(names, lambda indices: next(iter(labels[list(indices)].values())) if indices else [])


def _folder_labels(source: FolderSource) -> Labels:
    folders: dict[str, int] = {}
    for index in range(len(source)):
        first, below, _ = source.origin(index).partition("/")
        if not below:
            return _none()
        folders[first] = 0
    numbers = {folder: number for number, folder in enumerate(sorted(folders))}
    return Labels(
        tuple(map(readable, numbers)),
        lambda indices: [numbers[source.origin(index).partition("/")[0]] for index in indices],
    )
