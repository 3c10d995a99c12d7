"""The order of training images is a function of seed and sample index alone; bad ones are skipped and counted."""

import pickle
import re
import struct
import time
import zlib
from collections import Counter
from io import BytesIO
from itertools import chain

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from vqhit import distributed
from vqhit.config import ConfigError
from vqhit.data import (
    CenterCrops,
    DataConfig,
    Skipped,
    TrainingCrops,
    TrainingStream,
    load_batches,
    random_crop,
    training_batches,
)
from vqhit.folder import DataError, FolderSource
from vqhit.images import center_crop, pil_to_uint8
from vqhit.sources import SourceConfig, open_stream


def crops(folder, seed=3, **changes):
    config = DataConfig(path=str(folder), **changes)
    return TrainingCrops(FolderSource.scan(folder), config, size=16, seed=seed)


def loaded(batches):
    """All images (N,3,S,S) and all problems of some batches."""
    batches = list(batches)
    return torch.cat([batch.images for batch in batches]), [problem for batch in batches for problem in batch.skipped]


def encoded(image, kind, **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def processes(monkeypatch):
    """Runs a function as each of some processes would; returns their results."""

    def run(count, function):
        monkeypatch.setattr(distributed, "world_size", lambda: count)
        results = []
        for number in range(count):
            monkeypatch.setattr(distributed, "rank", lambda number=number: number)
            results.append(function())
        return results

    return run


# Order.


@pytest.fixture
def levels(tmp_path):
    """24 images of one grey level each, by which they are known again."""
    for level in range(24):
        Image.new("RGB", (20, 20), (level,) * 3).save(tmp_path / f"{level:02d}.png")
    return tmp_path


def seen(batches):
    return loaded(batches)[0][:, 0, 8, 8].tolist()


def test_every_epoch_visits_every_image_once_in_another_order(levels):
    visited = seen(training_batches(crops(levels), 6, 0, 12, workers=0))
    epochs = [visited[start : start + 24] for start in (0, 24)]
    assert all(Counter(epoch) == Counter(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_another_seed_gives_another_order_and_other_crops(photo_folder):
    one, two = crops(photo_folder, seed=1), crops(photo_folder, seed=2)
    assert [one._order(0).tolist(), one._order(1).tolist()] != [two._order(0).tolist(), two._order(1).tolist()]
    assert not torch.equal(*(torch.stack([dataset[n].image for n in range(6)]) for dataset in (one, two)))


def test_a_dataset_can_be_sent_to_a_loader_process_that_does_not_inherit_it(photo_folder):
    dataset = crops(photo_folder, cache_images=2)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[7].image, dataset[7].image)


def test_a_sample_is_the_same_whenever_and_by_whomever_it_is_loaded(photo_folder):
    plain, _ = loaded(training_batches(crops(photo_folder), 4, 0, 6, workers=0))
    workers, _ = loaded(training_batches(crops(photo_folder), 4, 0, 6, workers=2))
    later, _ = loaded(training_batches(crops(photo_folder, cache_images=3), 4, 4, 6, workers=0))
    assert plain.shape == (24, 3, 16, 16)
    assert torch.equal(plain, workers)
    assert torch.equal(plain[16:], later)
    assert len({tuple(image.flatten().tolist()) for image in plain}) == 24  # crops and flips differ from epoch to epoch


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("first_step", [0, 1, 2])
def test_processes_share_out_every_epoch_wherever_they_start(levels, processes, count, first_step):
    dataset = crops(levels)  # 3 steps of 8 an epoch
    shares = processes(count, lambda: seen(training_batches(dataset, 8, first_step, 6, workers=0)))
    assert {len(share) for share in shares} == {8 * (6 - first_step) // count}
    size = 8 // count
    steps = [
        [level for share in shares for level in share[start : start + size]] for start in range(0, len(shares[0]), size)
    ]
    (alone,) = processes(1, lambda: seen(training_batches(dataset, 8, 0, 6, workers=0)))
    assert steps == [alone[8 * step : 8 * step + 8] for step in range(first_step, 6)]
    epoch = alone[:24]  # the first, of which a later start sees the rest
    assert Counter(epoch[: 8 * first_step]) + Counter(chain(*steps[: max(0, 3 - first_step)])) == Counter(range(24))


def test_the_shares_of_two_processes_are_the_batch_of_one(photo_folder, processes):
    dataset = crops(photo_folder)
    ((alone, _),) = processes(1, lambda: loaded(training_batches(dataset, 4, 2, 3, workers=0)))
    shares = processes(2, lambda: loaded(training_batches(dataset, 4, 2, 3, workers=1)))
    assert torch.equal(torch.cat([images for images, _ in shares]), alone)


# Crops.


def test_crops_are_squares_of_the_asked_share_inside_the_image():
    wide = Image.fromarray(np.tile(np.linspace(0, 255, 400).astype(np.uint8), (100, 1))).convert("RGB")
    rng = np.random.default_rng(0)
    for _ in range(50):
        row = np.asarray(random_crop(wide, 32, (0.25, 0.5), rng), float)[16, :, 0]
        width_px = (row[-1] - row[0]) / 255 * 400 * 32 / 31
        assert 22 < width_px < 53
    full = np.asarray(random_crop(wide.crop((0, 0, 100, 100)), 100, (1.0, 1.0), rng))
    np.testing.assert_array_equal(full, np.asarray(wide.crop((0, 0, 100, 100))))


def test_a_crop_that_has_the_size_already_is_cut_out_anywhere_unresampled():
    position = np.mgrid[0:37, 0:50].astype(np.uint8)  # each pixel says where it is
    image = Image.fromarray(np.stack([position[0], position[1], position[0]], axis=2))
    rng = np.random.default_rng(0)
    corners = set()
    for _ in range(2000):
        crop = np.asarray(random_crop(image, 32, (0.875, 0.875), rng))  # 0.875 * 37 = 32.4
        top, left, _ = crop[0, 0].tolist()
        np.testing.assert_array_equal(crop, np.asarray(image)[top : top + 32, left : left + 32])
        corners.add((top, left))
    assert corners == {(top, left) for top in range(6) for left in range(19)}


def test_flips_are_drawn_for_half_of_the_samples_and_can_be_switched_off(tmp_path):
    half = Image.new("RGB", (20, 20), "black")
    half.paste("white", (0, 0, 10, 20))
    half.save(tmp_path / "half.png")
    left = [int(crops(tmp_path, crop_proportion=1.0)[sample].image[0, 8, 2] > 128) for sample in range(200)]
    assert 70 < sum(left) < 130
    unflipped = crops(tmp_path, crop_proportion=1.0, flip=False)
    assert all(unflipped[sample].image[0, 8, 2] > 128 for sample in range(20))


@pytest.mark.parametrize(
    ("proportion", "problem"),
    [([0.9, 0.5], "the smaller share comes first"), (0.0, "greater than 0"), ([0.5, 1.5], "less than or equal to 1")],
)
def test_a_crop_proportion_is_a_share_or_two(proportion, problem):
    assert DataConfig(path="x", crop_proportion=0.8).crop_proportion == (0.8, 0.8)
    assert DataConfig(path="x", crop_proportion=[0.5, 1.0]).crop_proportion == (0.5, 1.0)
    with pytest.raises(ConfigError, match=f"crop_proportion.*{problem}"):
        DataConfig(path="x", crop_proportion=proportion)


# Images that cannot be read, and odd ones that can.


def short_png():
    """A PNG of 64x64 px with valid checksums and too little pixel data, on which torchvision's decoder crashes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def enormous_jpeg(picture):
    """A small JPEG whose header claims 65000x65000 px."""
    data = bytearray(encoded(picture(64, 64), "JPEG"))
    header = data.index(b"\xff\xc0")
    data[header + 5 : header + 9] = struct.pack(">HH", 65000, 65000)
    return bytes(data)


@pytest.fixture
def bad_files(picture):
    jpeg = encoded(picture(64, 64), "JPEG", quality=95)
    return {
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "empty.jpg": b"",
        "page.jpg": b"<!DOCTYPE html><html><title>404 Not Found</title></html>",
        "dot.png": encoded(picture(1, 1), "PNG"),
        "enormous.jpg": enormous_jpeg(picture),
        "short.png": short_png(),
    }


@pytest.fixture
def spoilt(levels, bad_files):
    """24 good images and 6 bad ones."""
    for name, data in bad_files.items():
        (levels / name).write_bytes(data)
    return levels


@pytest.mark.parametrize("workers", [0, 2])
def test_every_kind_of_bad_image_is_skipped_named_and_replaced(spoilt, bad_files, workers):
    images, skipped = loaded(training_batches(crops(spoilt), 6, 0, 5, workers))
    assert len(images) == 30
    assert set(images[:, 0, 8, 8].tolist()) == set(range(24))
    # A bad image may also be drawn, in vain, in place of another.
    assert {problem.partition(": ")[0] for problem in skipped} == {str(spoilt / name) for name in bad_files}
    assert all("\n" not in problem for problem in skipped)


def test_what_takes_the_place_of_a_bad_image_is_drawn_from_the_seed_and_the_sample(spoilt):
    images, skipped = loaded(training_batches(crops(spoilt), 6, 0, 10, workers=0))
    by_workers, skipped_by_workers = loaded(training_batches(crops(spoilt), 6, 0, 10, workers=2))
    later, _ = loaded(training_batches(crops(spoilt), 6, 7, 10, workers=0))
    assert torch.equal(images, by_workers)
    assert skipped == skipped_by_workers
    assert torch.equal(images[42:], later)
    other, _ = loaded(training_batches(crops(spoilt, seed=4), 6, 0, 10, workers=0))
    counts, other_counts = (Counter(found[:, 0, 8, 8].tolist()) for found in (images, other))
    assert counts != other_counts


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("truncated.jpg", "cannot be decoded"),
        ("empty.jpg", "not an image in a format that is read"),
        ("page.jpg", "not an image in a format that is read"),
        ("dot.png", "1x1 px; images need at least 8 a side"),
        ("enormous.jpg", "cannot be decoded .*65000|cannot be decoded .*exceeds limit"),
        ("short.png", "cannot be decoded"),
    ],
)
def test_what_is_wrong_with_a_bad_image_is_said(tmp_path, picture, bad_files, name, problem):
    picture(20, 20).save(tmp_path / "good.png")
    (tmp_path / name).write_bytes(bad_files[name])
    _, skipped = loaded(training_batches(crops(tmp_path), 2, 0, 1, workers=0))
    assert re.match(rf"{tmp_path / name}: .*({problem})", skipped[0])


def test_images_of_unusual_kinds_are_read(tmp_path, picture):
    image = picture(20, 20)
    Image.fromarray(np.full((20, 20), 30000, np.uint16)).save(tmp_path / "16-bit.png")
    image.quantize(16).save(tmp_path / "palette.png")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.new("RGB", (20, 20), "red").save(
        tmp_path / "animated.gif", save_all=True, append_images=[Image.new("RGB", (20, 20), "blue")]
    )
    dataset = crops(tmp_path)
    images, skipped = loaded(training_batches(dataset, 4, 0, 1, workers=0))
    assert not skipped
    first = {dataset.source.name(index).rpartition("/")[2]: dataset.source.read(index) for index in range(4)}
    assert first["animated.gif"].getpixel((9, 9)) == (255, 0, 0)
    assert first["16-bit.png"].getpixel((9, 9)) == (117, 117, 117)  # 30000 / 257
    assert images.shape == (4, 3, 16, 16)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_of_bad_images_alone_is_one_line_from_a_loader_process_too(tmp_path, workers):
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        list(training_batches(crops(tmp_path), 1, 0, 1, workers))
    assert str(caught.value).startswith(str(tmp_path))
    assert str(caught.value).endswith("and 99 others in a row cannot be read either")
    assert "\n" not in str(caught.value)


def test_skipped_images_are_counted_once_and_stop_the_run_above_the_share():
    skipped = Skipped(0.01, total=5000)
    assert skipped.add(["a: bad", "b: bad", "a: bad"]) == ["a: bad", "b: bad"]
    assert skipped.add(["b: bad", "c: bad"]) == ["c: bad"]
    assert len(skipped) == 3
    skipped.check(8)  # of the first 1000, 10 may be bad
    skipped.add(f"{number}: bad" for number in range(8))
    with pytest.raises(DataError, match=r"11 of 1000 images cannot be read, more than max_bad 0.01 allows; .*7: bad"):
        skipped.check(8)
    skipped.check(1100)
    skipped.add(f"more {number}: bad" for number in range(39))
    skipped.check(5100)
    assert skipped.add(["the last: bad"]) == ["the last: bad"]
    with pytest.raises(DataError, match=r"51 of 5000 images .*the last: bad"):
        skipped.check(10**6)  # epochs later, of the 5000 there are


def test_the_images_skipped_before_a_run_was_stopped_are_not_named_again():
    skipped = Skipped(0.01, total=5000)
    skipped.add(["a: bad"])
    assert skipped.add(["a: bad", "b: bad"]) == ["b: bad"]
    assert len(skipped) == 2


def test_center_crops_are_the_evaluations_and_a_bad_image_is_left_out(photo_folder):
    (photo_folder / "1.jpg").write_bytes(b"no image")
    dataset = CenterCrops(FolderSource.scan(photo_folder), 16)
    images, skipped = loaded(load_batches(dataset, [range(0, 4), range(4, 6)], workers=0))
    assert len(dataset) == 6
    kept = [dataset.source.read(index) for index in (0, 2, 3, 4, 5)]
    assert torch.equal(images, torch.stack([pil_to_uint8(center_crop(image, 16)) for image in kept]))
    assert [problem.partition(": ")[0] for problem in skipped] == [str(photo_folder / "1.jpg")]


def test_a_batch_of_bad_images_alone_is_empty(tmp_path):
    (tmp_path / "1.jpg").write_bytes(b"no image")
    (batch,) = load_batches(CenterCrops(FolderSource.scan(tmp_path), 16), [[0]], workers=0)
    assert len(batch.images) == 0
    assert len(batch.skipped) == 1


# Streams.


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A folder of four Parquet files, 24 images of one grey level each."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    features = datasets.Features({"image": datasets.Image()})
    cells = [encoded(Image.new("RGB", (20, 20), (level,) * 3), "PNG") for level in range(24)]
    return save_rows(tmp_path / "rows", cells, features)


def save_rows(folder, cells, features=None):
    folder.mkdir()
    features = features or datasets.Features({"image": datasets.Image()})
    for shard in range(4):
        part = [{"bytes": cell, "path": None} for cell in cells[shard::4]]
        dataset = datasets.Dataset.from_dict({"image": part}, features=features)
        dataset.to_parquet(folder / f"train-{shard:05d}-of-00004.parquet")
    return folder


def stream(folder, seed=3, first_step=0, **changes):
    config = DataConfig(path=str(folder), streaming=True, shuffle_buffer=10, **changes)
    return TrainingStream(
        open_stream(SourceConfig(path=str(folder))), config, size=16, seed=seed, first_step=first_step
    )


@pytest.mark.parametrize("workers", [0, 2, 9])
def test_a_stream_is_trained_on_epoch_after_epoch(rows, workers):
    visited = seen(training_batches(stream(rows), 6, 0, 12, workers))
    assert Counter(visited) == Counter(dict.fromkeys(range(24), 3))


@pytest.mark.parametrize("workers", [0, 2])
def test_each_process_reads_its_own_part_of_a_stream(rows, processes, workers):
    shares = processes(2, lambda: seen(training_batches(stream(rows), 6, 0, 4, workers)))
    assert [len(share) for share in shares] == [12, 12]
    assert Counter(shares[0] + shares[1]) == Counter(range(24))


def test_a_stream_has_another_order_for_another_seed_start_and_epoch(rows):
    def order(**changes):
        return seen(training_batches(stream(rows, **changes), 24, 0, 2, workers=0))

    assert order() == order()
    orders = [order()[:24], order()[24:], order(seed=4)[:24], order(first_step=7)[:24]]
    assert len(set(map(tuple, orders))) == 4


def test_crops_of_one_image_differ_between_the_readers_of_a_stream(tmp_path, rows, picture, processes):
    folder = save_rows(tmp_path / "one", [encoded(picture(60, 60), "PNG")] * 24)
    parts = processes(2, lambda: loaded(training_batches(stream(folder), 16, 0, 1, workers=2))[0])
    images = torch.cat(parts)
    assert len({tuple(image.flatten().tolist()) for image in images}) == len(images) == 16


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_of_a_stream_are_skipped_and_named(tmp_path, rows, bad_files, picture, workers):
    good = [encoded(picture(20, 20, seed), "PNG") for seed in range(18)]
    folder = save_rows(tmp_path / "spoilt", [*good, *bad_files.values()])
    images, skipped = loaded(training_batches(stream(folder), 6, 0, 6, workers))
    assert len(images) == 36
    assert len(skipped) >= 2 * len(bad_files)  # more than two passes
    assert len(set(skipped)) == len(bad_files)  # a row has the same name in each
    assert all(problem.startswith(f"{folder} row of ") for problem in skipped)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_of_bad_rows_alone_is_one_line(tmp_path, rows, workers):
    folder = save_rows(tmp_path / "bad", [b"no image"] * 24)
    with pytest.raises(DataError) as caught:
        next(training_batches(stream(folder), 4, 0, 1, workers))
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


class SlowSource:
    """Images of which one takes half a minute."""

    def __init__(self, slow):
        self.slow = slow

    def __len__(self):
        return 100

    def name(self, index):
        return str(index)

    def read(self, index):
        if index == self.slow:
            time.sleep(30)
        return Image.new("RGB", (20, 20))


def test_a_loader_process_that_is_stuck_does_not_hold_up_the_end(tmp_path):
    batches = load_batches(CenterCrops(SlowSource(5), 16), [[n] for n in range(100)], workers=2)
    assert next(batches).images.shape == (1, 3, 16, 16)
    time.sleep(0.5)
    started = time.monotonic()
    batches.close()
    assert time.monotonic() - started < 6
