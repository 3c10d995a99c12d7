"""Images come from folders, `datasets` folders, Parquet and Arrow files and the Hub, and are decoded only by us."""

import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from vqhit.folder import DataError, FolderSource, list_images
from vqhit.images import ImageError
from vqhit.sources import DatasetSource, SourceConfig, evenly_spaced, is_image_folder, open_source, open_stream

ROWS = 24


def grey(level):
    """A PNG of one grey level, by which it is known again."""
    file = BytesIO()
    Image.new("RGB", (10, 10), (level,) * 3).save(file, "PNG")
    return file.getvalue()


def level(image):
    return image.getpixel((5, 5))[0]


def dataset(rows=ROWS, column="image"):
    features = datasets.Features({"caption": datasets.Value("string"), column: datasets.Image()})
    cells = [{"bytes": grey(number), "path": f"{number}.png"} for number in range(rows)]
    return datasets.Dataset.from_dict({"caption": ["x"] * rows, column: cells}, features=features)


def config(path, **values):
    return SourceConfig(path=str(path), **values)


@pytest.fixture(autouse=True)
def datasets_apart(tmp_path, monkeypatch):
    """What `datasets` caches goes to the test's folder; its pause of 5 s at the end of a Parquet stream is left out."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture
def parquet(tmp_path):
    """A folder as the Hub has them: four Parquet files of six rows."""
    folder = tmp_path / "parquet"
    (folder / "data").mkdir(parents=True)
    for shard in range(4):
        rows = dataset().select(range(6 * shard, 6 * shard + 6))
        rows.to_parquet(folder / "data" / f"train-{shard:05d}-of-00004.parquet")
    return folder


# Folders of image files.


@pytest.mark.parametrize("option", ["split", "revision", "image_column"])
def test_options_of_data_sets_are_refused_for_a_folder_of_files(tmp_path, option):
    (tmp_path / "1.png").write_bytes(grey(1))
    with pytest.raises(DataError, match=f"{option} 'x': .* is a folder of image files, which has none"):
        open_source(SourceConfig(path=str(tmp_path), **{option: "x"}))


def test_a_file_that_is_no_table_is_named(tmp_path):
    (tmp_path / "1.png").write_bytes(grey(1))
    with pytest.raises(DataError, match=r"1\.png: a file; allowed: a Parquet or Arrow file, a folder"):
        open_source(SourceConfig(path=str(tmp_path / "1.png")))


def test_a_pipe_is_not_listed_and_a_link_that_leads_nowhere_is(tmp_path):
    (tmp_path / "1.png").write_bytes(grey(1))
    os.mkfifo(tmp_path / "pipe.png")  # reading it would wait for ever
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert list_images(tmp_path) == ["1.png", "gone.png"]


def test_images_are_found_in_all_subfolders_and_sorted(photo_folder):
    (photo_folder / "notes.txt").write_text("no image")
    assert list_images(photo_folder) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "more/4.JPEG", "more/5.JPEG"]


def test_links_between_folders_are_followed_once(photo_folder):
    (photo_folder / "more" / "up").symlink_to(photo_folder, target_is_directory=True)
    assert len(list_images(photo_folder)) == 6
    (photo_folder.parent / "link").symlink_to(photo_folder, target_is_directory=True)
    assert len(list_images(photo_folder.parent / "link")) == 6


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(DataError, match="no images in it or below"):
        list_images(tmp_path)
    with pytest.raises(DataError, match="absent: no such folder of images"):
        list_images(tmp_path / "absent")


def test_the_images_of_a_folder_are_read_by_number(photo_folder):
    source = open_source(config(photo_folder))
    assert isinstance(source, FolderSource)
    names = [source.name(number) for number in range(len(source))]
    assert names == [str(photo_folder / name) for name in list_images(photo_folder)]
    assert [source.read(number).width for number in range(6)] == [40, 48, 56, 64, 72, 80]
    assert source.encoded(4) == ((photo_folder / "more/4.JPEG").read_bytes(), names[4], "more/4.JPEG")


def test_an_index_that_was_kept_keeps_the_order_when_files_come_and_go(photo_folder, picture):
    before = open_source(config(photo_folder))
    picture(40, 40).save(photo_folder / "!.png")
    (photo_folder / "1.jpg").unlink()
    after = open_source(config(photo_folder), index=before.index)
    assert [after.name(number) for number in range(6)] == [before.name(number) for number in range(6)]
    with pytest.raises(ImageError, match=r"1\.jpg: no such file"):
        after.read(1)
    with pytest.raises(ImageError, match=r"1\.jpg: cannot be read \(.*No such file"):
        after.encoded(1)
    assert open_source(config(photo_folder)).name(0).endswith("!.png")


@pytest.mark.parametrize(
    "damage",
    [lambda index: index[:-1], lambda index: index.replace(b"3.jpg", b"9.jpg"), lambda index: b"", lambda index: b"x"],
)
def test_a_damaged_index_is_named(photo_folder, damage):
    index = FolderSource.scan(photo_folder).index
    with pytest.raises(DataError, match=r"the index of .*photos is damaged"):
        FolderSource(photo_folder, damage(index))


def test_file_names_of_any_bytes_are_found_and_read(tmp_path, picture):
    names = [b"caf\xe9.png", b"new\nline.png", "雪.png".encode(), b"sp ace.png"]
    picture(20, 20).save(tmp_path / "a.png")
    for name in names:
        shutil.copy(tmp_path / "a.png", os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    source = pickle.loads(pickle.dumps(FolderSource.scan(tmp_path)))
    assert {os.fsencode(Path(source.name(number)).name) for number in range(len(source))} == {b"a.png", *names}
    assert all(source.read(number).size == (20, 20) for number in range(len(source)))


def test_a_source_holds_no_object_per_image():
    names = b"".join(b"n%05d/%07d.jpg\0" % (number % 1000, number) for number in range(100_000))
    source = FolderSource("photos", _index(names))
    assert source.name(99_999) == "photos/n00999/0099999.jpg"
    assert {type(value) for value in vars(source).values()} == {str, bytes, np.ndarray}
    assert len(pickle.dumps(source)) < len(names) + 1000


def _index(names):
    import hashlib

    return f"vqhit images 1 {names.count(0)} {hashlib.sha256(names).hexdigest()}\n".encode() + names


def test_an_image_folder_is_opened_without_the_datasets_library(photo_folder):
    code = (
        "import sys, vqhit; from vqhit.sources import *; s = open_source(SourceConfig(path=sys.argv[1])); s.read(0); "
        "import vqhit.data; sys.exit('datasets' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(photo_folder)], check=False).returncode == 0


def test_an_image_folder_is_not_streamed(photo_folder):
    with pytest.raises(DataError, match="is not read as a stream; leave streaming off"):
        open_stream(config(photo_folder))


# Data sets.


@pytest.fixture(params=["saved", "split", "parquet folder", "parquet file", "arrow file", "arrow folder"])
def stored(request, tmp_path, parquet):
    """The same rows, in each way that data sets are stored."""
    path = tmp_path / "stored"
    if request.param == "saved":
        dataset().save_to_disk(path, num_shards=3)
    if request.param == "split":
        datasets.DatasetDict(test=dataset(2), train=dataset()).save_to_disk(path)
    if request.param == "parquet folder":
        return parquet
    if request.param == "parquet file":
        path = tmp_path / "rows.parquet"
        dataset().to_parquet(path)
    if request.param.startswith("arrow"):
        dataset().save_to_disk(tmp_path / "saved")
        path.mkdir()
        shutil.copy(tmp_path / "saved" / "data-00000-of-00001.arrow", path / "rows.arrow")
        return path / "rows.arrow" if request.param == "arrow file" else path
    return path


def test_a_data_set_is_read_by_row(stored):
    assert not is_image_folder(stored)
    source = open_source(config(stored))
    assert isinstance(source, DatasetSource)
    assert [level(source.read(number)) for number in range(len(source))] == list(range(ROWS))
    assert source.name(7) == f"{stored} row 7 (7.png)"
    assert source.encoded(7) == (grey(7), f"{stored} row 7 (7.png)", "7.png")


def test_a_data_set_is_read_as_a_stream(stored):
    stream = open_stream(config(stored))
    assert [level(image) for image, _ in stream.read(seed=0, buffer=0)] == list(range(ROWS))
    shuffled = [level(image) for image, _ in stream.read(seed=0, buffer=10)]
    assert sorted(shuffled) == list(range(ROWS)) != shuffled


def test_a_data_set_can_be_sent_to_a_loader_process_that_does_not_inherit_it(stored):
    assert level(pickle.loads(pickle.dumps(open_source(config(stored)))).read(5)) == 5


def test_the_column_of_images_is_found_by_its_feature_then_by_its_name(tmp_path):
    dataset(column="photo").save_to_disk(tmp_path / "feature")
    assert open_source(config(tmp_path / "feature")).column == "photo"
    datasets.Dataset.from_dict({"text": ["x"], "jpg": [grey(3)]}).save_to_disk(tmp_path / "name")
    source = open_source(config(tmp_path / "name"))
    assert (source.column, level(source.read(0)), source.name(0)) == ("jpg", 3, f"{tmp_path / 'name'} row 0")


def test_the_column_of_images_can_be_named(tmp_path):
    both = datasets.Dataset.from_dict({"image": [grey(1)], "other": [grey(2)]})
    both.save_to_disk(tmp_path / "both")
    assert level(open_source(config(tmp_path / "both", image_column="other")).read(0)) == 2


def test_a_missing_column_lists_those_there_are(tmp_path):
    datasets.Dataset.from_dict({"text": ["x"], "number": [1]}).save_to_disk(tmp_path / "text")
    with pytest.raises(DataError, match="no column of images; image_column names one of: text, number"):
        open_source(config(tmp_path / "text"))
    with pytest.raises(DataError, match="no column 'photo'; there are: text, number"):
        open_stream(config(tmp_path / "text", image_column="photo"))


def save_cells(cells, folder):
    """Save a column of what an image column holds; as one, `save_to_disk` would put the files' bytes into it."""
    features = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    datasets.Dataset.from_dict({"image": cells}, features=features).save_to_disk(folder)


def test_rows_without_a_readable_image_are_named(tmp_path):
    cells = [
        {"bytes": grey(0)[:40], "path": "cut.png"},
        {"bytes": None, "path": str(tmp_path / "gone.png")},
        None,
        {"bytes": grey(3), "path": None},
    ]
    save_cells(cells, tmp_path / "rows")
    source = open_source(config(tmp_path / "rows"))
    with pytest.raises(ImageError, match=r"rows row 0 \(cut\.png\): not an image in a format"):
        source.read(0)
    with pytest.raises(ImageError, match=r"gone\.png: cannot be read \(.*No such file"):
        source.read(1)
    with pytest.raises(ImageError, match="rows row 2: holds NoneType, not the bytes of an image file"):
        source.read(2)
    assert level(source.read(3)) == 3
    problems = [name for image, name in open_stream(config(tmp_path / "rows")).read(0, 0) if image is None]
    assert len(problems) == 3
    assert "cut.png" in problems[0]


def test_rows_that_name_a_file_are_read_from_it_and_no_other_address_is_asked(tmp_path):
    (tmp_path / "1.png").write_bytes(grey(1))
    paths = [str(tmp_path / "1.png"), f"file://{tmp_path}/1.png", "simplecache::http://127.0.0.1:9/1.png", "/dev/zero"]
    save_cells([{"bytes": None, "path": path} for path in paths], tmp_path / "rows")
    source = open_source(config(tmp_path / "rows"))
    assert level(source.read(0)) == 1
    for number in (1, 2):
        with pytest.raises(ImageError, match=r"1\.png: cannot be read \(neither a file nor on the Hub\)"):
            source.read(number)
    with pytest.raises(ImageError, match=r"/dev/zero: cannot be read \(No such file\)"):
        source.read(3)


def test_a_column_of_text_is_not_decoded(tmp_path):
    datasets.Dataset.from_dict({"image": ["x"]}).save_to_disk(tmp_path / "text")
    with pytest.raises(ImageError, match="row 0: holds str, not the bytes of an image file"):
        open_source(config(tmp_path / "text")).read(0)


def test_the_file_that_a_row_was_made_from_is_told_without_folders_of_this_machine(tmp_path):
    cells = [{"bytes": grey(1), "path": name} for name in ("a/1.png", "/cache/2.png", "hf://x/3.png", None)]
    save_cells(cells, tmp_path / "rows")
    rows = open_source(config(tmp_path / "rows"))
    assert [rows.origin(row) for row in range(4)] == ["a/1.png", "2.png", "3.png", None]
    chosen = DatasetSource(datasets.load_from_disk(tmp_path / "rows").select([2, 0]), config(tmp_path))
    assert [chosen.origin(row) for row in range(2)] == ["3.png", "a/1.png"]
    plain = datasets.Dataset.from_dict({"image": [grey(1)]})
    assert DatasetSource(plain, config(tmp_path)).origin(0) is None


def test_only_a_data_set_with_labels_has_them(tmp_path):
    dataset().save_to_disk(tmp_path / "none")
    dataset().add_column("label", list(range(ROWS))).save_to_disk(tmp_path / "labels")
    assert open_source(config(tmp_path / "none")).labels is None
    assert open_source(config(tmp_path / "labels")).labels[3] == {"label": 3}


def test_a_split_is_chosen_by_the_configuration_then_by_the_caller(tmp_path):
    datasets.DatasetDict(train=dataset(3), validation=dataset(2), test=dataset(1)).save_to_disk(tmp_path / "dict")
    assert len(open_source(config(tmp_path / "dict"))) == 3
    assert len(open_source(config(tmp_path / "dict"), split="validation")) == 2
    assert len(open_source(config(tmp_path / "dict", split="test"), split="validation")) == 1


@pytest.mark.parametrize("opened", [open_source, open_stream])
def test_an_unknown_split_lists_those_there_are_in_one_line(tmp_path, parquet, opened):
    datasets.DatasetDict(train=dataset(3), test=dataset(1)).save_to_disk(tmp_path / "dict")
    for path, there in ((tmp_path / "dict", "train, test"), (parquet, "train")):
        with pytest.raises(DataError) as caught:
            opened(config(path, split="val"))
        assert str(caught.value).startswith(f"{path}: ")
        for part in ("val", there):
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_damaged_data_set_is_one_line(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"no parquet")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    for path in (tmp_path / "rows.parquet", tmp_path / "saved"):
        with pytest.raises(DataError, match=f"{path}: cannot be read as a data set") as caught:
            open_source(config(path))
        assert "\n" not in str(caught.value)


def test_what_is_neither_a_folder_nor_an_id_is_said(tmp_path):
    for path in ("/absent/photos", "a/b/c", "no id", str(tmp_path / "absent")):
        with pytest.raises(DataError, match="no such folder, and no id of a data set on the Hub"):
            open_source(config(path))


# Streams.


class Levels(IterableDataset):
    """The grey levels that a stream gives, as a loader process sees them."""

    def __init__(self, stream, *arguments):
        self.stream, self.arguments = stream, arguments

    def __iter__(self):
        return (level(image) for image, _ in self.stream.read(*self.arguments))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("parts", [1, 2, 3])  # 4 shards: of 2 parts each has its own, 3 parts take turns in all
def test_a_pass_gives_every_row_once_to_one_part_and_one_worker(parquet, workers, parts):
    stream = open_stream(config(parquet))
    seen = Counter()
    for part in range(parts):
        rows = list(DataLoader(Levels(stream, 7, 10, part, parts), batch_size=None, num_workers=workers))
        assert len(rows) == ROWS // parts
        seen.update(rows)
    assert seen == Counter(range(ROWS))


def test_the_order_of_a_stream_is_drawn_from_its_seed(parquet):
    def order(seed):
        return [level(image) for image, _ in open_stream(config(parquet)).read(seed, buffer=10)]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert sorted(order(2**64 - 1)) == list(range(ROWS))  # any seed of 64 bits


def test_shards_are_counted_for_each_part(parquet):
    stream = open_stream(config(parquet))
    assert (stream.shards(), stream.shards(0, 2), stream.shards(1, 3)) == (4, 2, 4)


def test_a_stream_that_breaks_off_is_one_line(parquet):
    stream = open_stream(config(parquet))
    (parquet / "data" / "train-00002-of-00004.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=f"{parquet}: the stream broke off") as caught:
        list(stream.read(0, 10))
    assert "\n" not in str(caught.value)


def test_a_limit_takes_evenly_spaced_images():
    assert list(evenly_spaced(5, None)) == list(evenly_spaced(5, 9)) == [0, 1, 2, 3, 4]
    assert list(evenly_spaced(9, 3)) == [0, 3, 6]
