"""Class labels: of a data set's column, or the first folder of an image's path."""

import datasets
import pytest

from vqhit.folder import FolderSource
from vqhit.labels import labels_of, readable
from vqhit.sources import SourceConfig, open_source


def rows(folder, labels, feature, picture):
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    images = [picture(20, 20, seed=number) for number in range(len(labels))]
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).save_to_disk(folder)
    return open_source(SourceConfig(path=str(folder)))


def test_folders_are_classes_in_the_order_of_their_names(tmp_path, picture):
    for name in ("dog/1.png", "cat/2.png", "dog/deep/0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(20, 20).save(tmp_path / name)
    labels = labels_of(FolderSource.scan(tmp_path))
    assert labels.names == ("cat", "dog")
    assert labels.of([0, 1, 2]) == [0, 1, 1]
    assert labels.of([2]) == [1]


def test_a_folder_with_images_outside_of_subfolders_has_no_classes(photo_folder):
    labels = labels_of(FolderSource.scan(photo_folder))
    assert labels.names is None
    assert labels.of([0, 5]) == [None, None]


def test_a_data_set_keeps_its_classes_and_their_names(tmp_path, picture):
    labels = labels_of(rows(tmp_path / "rows", [1, 0, -1], datasets.ClassLabel(names=["cat", "dog"]), picture))
    assert labels.names == ("cat", "dog")
    assert labels.of([0, 2]) == [1, -1]
    assert labels.of(range(3)) == [1, 0, -1]
    assert labels.of([]) == []


@pytest.mark.parametrize(
    ("feature", "values", "expected"), [("int32", [7, None, 9], [7, None, 9]), ("string", ["a", "b", "c"], [None] * 3)]
)
def test_numbers_without_names_are_kept_and_other_labels_are_not(tmp_path, picture, feature, values, expected):
    labels = labels_of(rows(tmp_path / "rows", values, datasets.Value(feature), picture))
    assert labels.names is None
    assert labels.of(range(3)) == expected


def test_a_file_name_that_is_no_utf8_becomes_text():
    assert readable("é\udcff.jpg") == "é\\udcff.jpg"
