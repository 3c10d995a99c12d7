"""A prepared folder: images resized once, in the order of their source, whole or not there at all."""

import json
import os
import signal
import subprocess
import sys
import time
from io import BytesIO

import datasets
import numpy as np
import pytest
from PIL import Image

from vqhit.config import ConfigError
from vqhit.data import DataConfig, TrainingCrops, random_crop, training_batches
from vqhit.folder import DataError
from vqhit.images import decode_image
from vqhit.prepare import PrepareConfig, prepare, prepared
from vqhit.sources import DatasetSource, SourceConfig, open_source


def run(source, destination, **changes):
    return prepare(PrepareConfig(path=str(source), **{"size": 32, **changes}), destination)


def rows(folder):
    """The encoded images of a prepared folder: [{"bytes", "path"}]."""
    dataset = datasets.load_from_disk(folder).cast_column("image", datasets.Image(decode=False))
    return [row["image"] for row in dataset]


def encoded(image, kind="JPEG", **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_every_image_gets_exactly_the_short_side_that_crops_are_cut_from(tmp_path, picture):
    for width, height in ((40, 200), (300, 50), (20, 20), (8, 9), (37, 37), (60, 37), (500, 499)):
        picture(width, height).save(tmp_path / f"{width}x{height}.png")
    report = run(tmp_path, tmp_path.with_suffix(".prepared"))
    sizes = {row["path"]: decode_image(row["bytes"], "row").size for row in rows(tmp_path.with_suffix(".prepared"))}
    assert report["short_side_px"] == 37  # round(32 / 0.875)
    assert {min(size) for size in sizes.values()} == {37}
    assert sizes["40x200.png"] == (37, 185)
    assert sizes["300x50.png"] == (222, 37)
    assert sizes["20x20.png"] == (37, 37)


@pytest.mark.parametrize(("size", "proportion", "side"), [(256, 0.875, 293), (256, 1.0, 256), (224, 0.8, 280)])
def test_the_short_side_is_the_crop_size_over_the_proportion(size, proportion, side):
    assert PrepareConfig(path="x", size=size, crop_proportion=proportion).short_side_px == side


def test_a_short_side_that_no_format_holds_is_refused():
    with pytest.raises(ConfigError, match="makes a short side of 40960 px; allowed: up to 16000"):
        PrepareConfig(path="x", size=4096, crop_proportion=0.1)


def test_another_format_is_refused():
    with pytest.raises(ConfigError, match="format: found 'gif'; input should be 'jpeg', 'png' or 'webp'"):
        PrepareConfig(path="x", format="gif")


def test_of_a_long_strip_the_middle_is_kept(picture):
    strip = picture(30000, 8)
    config = PrepareConfig(path="x", size=28, format="png")
    image = decode_image(prepared(encoded(strip, "PNG"), "strip", config), "row")
    assert image.size == (16000, 32)
    middle = strip.crop((13000, 0, 17000, 8)).resize((16000, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(image)[:, 100:-100], np.asarray(middle)[:, 100:-100])


def test_images_are_resized_with_the_antialiased_bicubic_filter(picture):
    large = picture(400, 300)
    image = decode_image(prepared(encoded(large, "PNG"), "x", PrepareConfig(path="x", size=32, format="png")), "row")
    np.testing.assert_array_equal(image, large.resize((49, 37), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_images_are_stored_in_the_format_asked_for(photo_folder, tmp_path, kind):
    run(photo_folder, tmp_path / "out", format=kind)
    kinds = {Image.open(BytesIO(row["bytes"])).format for row in rows(tmp_path / "out")}
    assert kinds == {kind.upper()}


def test_jpegs_have_full_colour_resolution_and_the_quality_asked_for(photo_folder, tmp_path):
    run(photo_folder, tmp_path / "fine")
    run(photo_folder, tmp_path / "coarse", quality=50)
    fine, coarse = rows(tmp_path / "fine")[0]["bytes"], rows(tmp_path / "coarse")[0]["bytes"]
    with Image.open(BytesIO(fine)) as image:
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3  # 4:4:4
    assert len(coarse) < 0.7 * len(fine)


def test_a_jpeg_of_the_right_size_keeps_its_bytes(picture):
    config = PrepareConfig(path="x", size=32)
    plain = encoded(picture(50, 37), quality=70)
    assert prepared(plain, "x", config) == plain
    exif = Image.Exif()
    exif[0x0112] = 6
    others = {
        "turned by its EXIF tag": encoded(picture(37, 50), exif=exif),
        "grey": encoded(picture(50, 37).convert("L")),
        "PNG": encoded(picture(50, 37), "PNG"),
        "larger": encoded(picture(50, 38)),
    }
    for name, data in others.items():
        again = prepared(data, name, config)
        assert again != data, name
        with Image.open(BytesIO(again)) as image:
            assert (image.format, image.mode, image.size[1]) == ("JPEG", "RGB", 37), name
    assert Image.open(BytesIO(prepared(plain, "x", PrepareConfig(path="x", size=32, format="png")))).format == "PNG"


def test_rows_keep_the_order_and_the_names_of_the_source_over_several_shards(photo_folder, tmp_path):
    report = run(photo_folder, tmp_path / "out", shard_mb=0.002)
    assert len(list((tmp_path / "out").glob("data-0000?-of-0000?.arrow"))) > 2
    names = ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "more/4.JPEG", "more/5.JPEG"]
    assert [row["path"] for row in rows(tmp_path / "out")] == names
    dataset = datasets.load_from_disk(tmp_path / "out")
    assert len(dataset) == report["images"] == 6
    assert dataset.features == datasets.Features({"image": datasets.Image()})
    assert [image.size for image in dataset["image"]] == [
        (round(37 * (40 + 8 * number) / min(48, 40 + 8 * number)), 37 if number else 44) for number in range(6)
    ]


def test_the_folder_holds_nothing_but_what_it_says(photo_folder, tmp_path):
    run(photo_folder, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "data-00000-of-00001.arrow",
        "dataset_info.json",
        "prepare.json",
        "state.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]


def test_prepare_json_says_how_the_folder_was_made(photo_folder, tmp_path):
    report = run(photo_folder, tmp_path / "out", quality=90)
    assert json.loads((tmp_path / "out" / "prepare.json").read_text()) == report
    wanted = {"source": str(photo_folder), "size": 32, "crop_proportion": 0.875, "short_side_px": 37, "format": "jpeg"}
    wanted |= {"quality": 90, "images": 6, "skipped": 0, "vqhit_version": "0.1.0"}
    assert wanted.items() <= report.items()


def test_training_crops_of_a_prepared_folder_are_its_pixels(photo_folder, tmp_path):
    run(photo_folder, tmp_path / "out", format="png")
    source = open_source(SourceConfig(path=str(tmp_path / "out")))
    assert isinstance(source, DatasetSource)
    rng = np.random.default_rng(0)
    for index in range(len(source)):
        image = source.read(index)
        crop = np.asarray(random_crop(image, 32, (0.875, 0.875), rng))
        windows = np.lib.stride_tricks.sliding_window_view(np.asarray(image), (32, 32, 3))[:, :, 0]
        assert (windows == crop).all(axis=(2, 3, 4)).any()


def test_a_prepared_folder_is_trained_on_like_any_other(photo_folder, tmp_path):
    run(photo_folder, tmp_path / "out")
    config = DataConfig(path=str(tmp_path / "out"))
    (batch,) = training_batches(TrainingCrops(open_source(config), config, 32, seed=0), 6, 0, 1, workers=0)
    assert batch.images.shape == (6, 3, 32, 32)
    assert not batch.skipped


def test_two_workers_write_the_same_rows_as_none(photo_folder, tmp_path, picture):
    for number in range(40):  # more than one batch for each
        picture(30, 40, seed=number).save(photo_folder / f"{number:03d}.png")
    run(photo_folder, tmp_path / "none")
    run(photo_folder, tmp_path / "two", workers=2)
    assert rows(tmp_path / "none") == rows(tmp_path / "two")


def test_the_labels_of_a_data_set_are_kept(tmp_path, picture):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    cells = [{"bytes": encoded(picture(40, 40, seed), "PNG"), "path": None} for seed in range(4)]
    cells[1] = {"bytes": b"broken", "path": None}
    dataset = datasets.Dataset.from_dict({"img": cells, "label": [0, 1, 1, 0]}, features=features)
    dataset.save_to_disk(tmp_path / "labelled")
    run(tmp_path / "labelled", tmp_path / "out", max_bad=0.5)
    out = datasets.load_from_disk(tmp_path / "out")
    assert out.features["label"] == features["label"]
    assert out["label"][:] == [0, 1, 0]  # the label of the image left out is left out


def test_a_split_and_a_column_can_be_named(tmp_path, picture):
    def dataset(seed):
        cells = {name: [encoded(picture(40, 40, seed + extra), "PNG")] for extra, name in enumerate(("small", "big"))}
        return datasets.Dataset.from_dict(cells)

    datasets.DatasetDict(train=dataset(0), test=dataset(5)).save_to_disk(tmp_path / "splits")
    run(tmp_path / "splits", tmp_path / "out", split="test", image_column="big", format="png", size=35)
    (row,) = rows(tmp_path / "out")
    np.testing.assert_array_equal(decode_image(row["bytes"], "row"), picture(40, 40, 6))


def test_images_that_cannot_be_read_are_named_once_listed_and_left_out(photo_folder, tmp_path, picture, capsys):
    (photo_folder / "1.jpg").write_bytes(b"no image")
    picture(4, 40).save(photo_folder / "narrow.png")
    report = run(photo_folder, tmp_path / "out", max_bad=0.5)
    assert (report["images"], report["skipped"]) == (5, 2)
    assert [row["path"] for row in rows(tmp_path / "out")] == ["0.jpg", "2.jpg", "3.jpg", "more/4.JPEG", "more/5.JPEG"]
    listed = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert [line.partition(": ")[0] for line in listed] == [
        str(photo_folder / "1.jpg"),
        str(photo_folder / "narrow.png"),
    ]
    assert capsys.readouterr().err.splitlines() == [f"left out: {line}" for line in listed]


def test_too_many_bad_images_stop_it_and_leave_nothing(photo_folder, tmp_path):
    (photo_folder / "5.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1 of 7 images cannot be read, more than max_bad 0.01 allows; .*5\.jpg"):
        run(photo_folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_folder_without_one_good_image_leaves_nothing(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="none of its 1 images can be read"):
        run(tmp_path / "photos", tmp_path / "out", max_bad=1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_folder_is_prepared_from_inside_too(photo_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(photo_folder)  # where each name is that of a file
    run(".", tmp_path / "out")
    assert all(decode_image(row["bytes"], row["path"]) for row in rows(tmp_path / "out"))


def test_file_names_that_are_no_utf8_are_written_with_a_question_mark(tmp_path, picture):
    (tmp_path / "photos").mkdir()
    picture(40, 40).save(tmp_path / "odd.png")
    (tmp_path / "odd.png").rename(tmp_path / "photos" / os.fsdecode(b"caf\xe9.png"))
    run(tmp_path / "photos", tmp_path / "out")
    assert rows(tmp_path / "out")[0]["path"] == "caf?.png"


def test_a_destination_that_is_there_is_refused_and_left_alone(photo_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("out", "file", "link"):
        with pytest.raises(ValueError, match=f"{name}: is there already"):
            run(photo_folder, tmp_path / name)
    assert not list((tmp_path / "out").iterdir())
    assert (tmp_path / "file").read_text() == "mine"


def test_the_destination_cannot_be_the_source_nor_lie_around_or_in_it(photo_folder):
    for target in (photo_folder, photo_folder.parent, photo_folder / "out", photo_folder / "more" / ".." / "data"):
        with pytest.raises(ValueError, match="cannot be, hold or lie in the one that is read"):
            run(photo_folder, target)


def test_two_at_once_do_not_write_the_same_folder(photo_folder, tmp_path):
    folder = tmp_path / ".out.unfinished"
    folder.mkdir()
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    command = [sys.executable, "-c", code, str(folder / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="out: another process is writing it now"):
            run(photo_folder, tmp_path / "out")
        other.kill()
    run(photo_folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_one_leaves_no_destination_and_the_next_one_works(photo_folder, tmp_path, picture, workers):
    picture(300, 300).save(tmp_path / "photo.png")
    for number in range(1000):
        (photo_folder / f"{number:03d}.png").symlink_to(tmp_path / "photo.png")
    command = [sys.executable, "-m", "vqhit", "prepare", str(photo_folder), str(tmp_path / "out"), "--workers"]
    process = subprocess.Popen([*command, str(workers)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.unfinished/*.arrow")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.unfinished", "photo.png", "photos"]
    for path in photo_folder.glob("*.png"):
        path.unlink()
    assert run(photo_folder, tmp_path / "out")["images"] == 6
    assert len(rows(tmp_path / "out")) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photo.png", "photos"]


def test_the_command_prepares_a_folder_and_says_what_it_did(photo_folder, tmp_path):
    command = [sys.executable, "-m", "vqhit", "prepare", "photos", "out", "--size", "16", "--format", "png"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1] == "out: 6 images of short side 18 px"
    help_text = subprocess.run([*command[:4], "--help"], capture_output=True, text=True, check=False).stdout
    assert "Example: vqhit prepare" in " ".join(help_text.split())
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == "vqhit: out: is there already; name a new folder, or remove that one\n"
    assert len(rows(tmp_path / "out")) == 6
