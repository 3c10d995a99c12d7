"""Images to a folder of tokens: what is in it, and that neither kills nor other processes change a byte of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torchvision.transforms import TenCrop

from vqhit.config import ConfigError
from vqhit.folder import DataError
from vqhit.images import center_crop, from_uint8, pil_to_uint8
from vqhit.token_shards import Partition, ShardFormat, ShardRows
from vqhit.tokenize import ModelIdentity, TokenizeConfig, load_identified, tokenize

IDENTITY = ModelIdentity("model", None, "0" * 64)


def run(model, source, destination, identity=IDENTITY, **changes):
    config = TokenizeConfig(path=str(source), **{"images_per_shard": 4, "batch_size": 3, **changes})
    return tokenize(model, config, destination, identity=identity)


def rows(folder):
    return parquet.read_table(folder / "data").to_pylist()


def contents(folder):
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def shards(folder):
    return {path.name: path.read_bytes() for path in (folder / "data").iterdir()}


def test_tokens_are_those_that_the_model_gives_each_image_alone(tiny_model, photo_folder, tmp_path):
    manifest = run(tiny_model.train(), photo_folder, tmp_path / "out")
    assert tiny_model.training
    assert (manifest["images"], manifest["rows"], manifest["skipped"], manifest["complete"]) == (6, 6, 0, True)
    tiny_model.eval()
    names = ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "more/4.JPEG", "more/5.JPEG"]
    found = rows(tmp_path / "out")
    assert [row["source"] for row in found] == names
    assert [row["index"] for row in found] == list(range(6))
    for row, name in zip(found, names, strict=True):
        expected = tiny_model.encode(tiny_model.preprocess(photo_folder / name))
        assert row["tokens"] == expected.flatten().tolist()
        assert (row["height"], row["width"], row["label"], row["view"]) == (8, 8, None, 0)


@pytest.mark.parametrize("changes", [{"batch_size": 1}, {"batch_size": 64}, {"workers": 2}])
def test_neither_the_batch_nor_loader_processes_change_a_byte(tiny_model, photo_folder, tmp_path, changes):
    for name, given in (("one", {}), ("other", changes)):
        run(tiny_model, photo_folder, tmp_path / name, **given)
    assert shards(tmp_path / "one") == shards(tmp_path / "other")
    assert sorted(shards(tmp_path / "one")) == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]


def test_datasets_opens_the_folder_with_its_types_and_class_names(tiny_model, tmp_path, picture):
    for name in ("dog/b.png", "cat/a.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True)
        picture(20, 20).save(tmp_path / "photos" / name)
    run(tiny_model, tmp_path / "photos", tmp_path / "out")
    loaded = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.features == datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("uint16"), length=64),
            "height": datasets.Value("uint16"),
            "width": datasets.Value("uint16"),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "source": datasets.Value("string"),
            "index": datasets.Value("int64"),
            "view": datasets.Value("uint8"),
        }
    )
    assert [(row["source"], row["label"]) for row in loaded] == [("cat/a.png", 0), ("dog/b.png", 1)]
    expected = tiny_model.encode(tiny_model.preprocess(tmp_path / "photos" / "dog" / "b.png"))[0]
    row = loaded.with_format("torch")[1]
    assert torch.equal(row["tokens"].long().view(row["height"], row["width"]), expected)


def test_datasets_never_takes_the_rows_of_a_folder_for_those_of_one_that_took_its_place(
    tiny_model, photo_folder, tmp_path
):
    for limit in (4, 2):
        run(tiny_model, photo_folder, tmp_path / "out", limit=limit)
        loaded = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
        assert len(loaded) == limit
        shutil.rmtree(tmp_path / "out")


def test_of_a_data_set_labels_file_names_and_row_numbers_are_kept(tiny_model, tmp_path, photo_folder):
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    files = [str(photo_folder / f"{number}.jpg") for number in range(4)]
    dataset = datasets.Dataset.from_dict({"picture": files, "label": [1, 0, 1, 1]}, features=features)
    dataset.save_to_disk(tmp_path / "rows")
    manifest = run(tiny_model, tmp_path / "rows", tmp_path / "out", limit=2)
    assert manifest["label_names"] == ["cat", "dog"]
    assert manifest["source"]["images"] == 4
    found = [(row["source"], row["index"], row["label"]) for row in rows(tmp_path / "out")]
    assert found == [("0.jpg", 0, 1), ("2.jpg", 2, 1)]  # evenly spaced


@pytest.mark.parametrize(("codes", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.int32)])
def test_tokens_are_as_wide_as_the_codebook_needs(tmp_path, codes, dtype):
    shard_format = ShardFormat(token_grid=(1, 2), codebook_size=codes, views=1, label_names=None, made="x")
    tokens = np.array([[0, codes - 1], [5, 6]])
    (tmp_path / "shard").write_bytes(shard_format.file(ShardRows(tokens, [3, 4], [None, 7], ["a", ""], [])))
    column = parquet.read_table(tmp_path / "shard")["tokens"].combine_chunks()
    assert column.type.list_size == 2
    found = column.flatten().to_numpy()
    assert found.dtype == dtype
    assert found.tolist() == [0, codes - 1, 5, 6]


@pytest.mark.parametrize("views", ["flip", "ten-crop"])
def test_each_view_is_a_row_of_its_own(tiny_model, photo_folder, tmp_path, views):
    manifest = run(tiny_model, photo_folder, tmp_path / "out", views=views, batch_size=20)
    count = {"flip": 2, "ten-crop": 10}[views]
    assert (manifest["images"], manifest["rows"]) == (6, 6 * count)
    found = [row for row in rows(tmp_path / "out") if row["index"] == 1]
    assert [row["view"] for row in found] == list(range(count))
    photo = Image.open(photo_folder / "1.jpg")
    if views == "flip":
        crop = center_crop(photo, 16)
        crops = [crop, crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    else:
        crops = TenCrop(16)(center_crop(photo, 17))
    expected = tiny_model.encode(from_uint8(torch.stack([pil_to_uint8(crop) for crop in crops])))
    assert [row["tokens"] for row in found] == expected.flatten(1).tolist()


def test_bfloat16_encodes_under_autocast(tiny_model, photo_folder, tmp_path):
    manifest = run(tiny_model, photo_folder, tmp_path / "out", precision="bfloat16")
    assert manifest["precision"] == "bfloat16"
    with torch.autocast("cpu", torch.bfloat16):
        expected = tiny_model.encode(tiny_model.preprocess(photo_folder / "0.jpg"))
    assert rows(tmp_path / "out")[0]["tokens"] == expected.flatten().tolist()


def test_the_manifest_says_how_the_tokens_were_made(tiny_model, photo_folder, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    _, identity = load_identified(str(tmp_path / "model"), device="cpu")
    returned = run(tiny_model, photo_folder, tmp_path / "out", identity)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest == returned
    assert manifest["model"] == {
        "id": str(tmp_path / "model"),
        "revision": None,
        "class": "VQHiT",
        "weights_sha256": identity.weights_sha256,
        "tokens_sha256": identity.tokens_sha256,
        "config": tiny_model.config.to_dict(),
    }
    assert (manifest["codebook_size"], manifest["token_grid"], manifest["image_size"]) == (32, [8, 8], 16)
    assert (manifest["images_per_shard"], manifest["shards"], manifest["label_names"]) == (4, 2, None)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "data", "manifest.json"]


def spoil(photo_folder):
    for name in ("1.jpg", "more/5.JPEG"):
        (photo_folder / name).write_text("<html>")


def test_bad_images_are_left_out_named_once_and_listed(tiny_model, photo_folder, tmp_path, capsys):
    spoil(photo_folder)
    manifest = run(tiny_model, photo_folder, tmp_path / "out", max_bad=0.5)
    assert (manifest["images"], manifest["rows"], manifest["skipped"]) == (4, 4, 2)
    assert [row["index"] for row in rows(tmp_path / "out")] == [0, 2, 3, 4]
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["index"] for record in records] == [1, 5]
    assert records[1]["problem"].startswith("more/5.JPEG: not an image")
    errors = capsys.readouterr().err.splitlines()
    assert errors == [f"skipped: {photo_folder}/{record['problem']}" for record in records]
    assert str(tmp_path).encode() not in b"".join(shards(tmp_path / "out").values())  # nobody's business


def test_what_was_skipped_before_an_interruption_is_listed_too(tiny_model, photo_folder, tmp_path):
    spoil(photo_folder)
    whole, part = tmp_path / "whole", tmp_path / "part"
    run(tiny_model, photo_folder, whole, max_bad=0.5)
    run(tiny_model, photo_folder, part, max_bad=0.5)
    interrupt(part, missing=1)
    run(tiny_model, photo_folder, part, max_bad=0.5)
    assert {name: data for name, (data, _) in contents(part).items()} == {
        name: data for name, (data, _) in contents(whole).items()
    }


def interrupt(folder, missing):
    """Leave a folder as a kill would that came before a shard was written."""
    next((folder / "data").glob(f"train-{missing:05d}-*")).unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    for key in ("images", "rows", "skipped"):
        del manifest[key]
    (folder / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    (folder / "skipped.jsonl").unlink(missing_ok=True)


def test_too_many_bad_images_stop_it_also_when_it_is_continued(tiny_model, photo_folder, tmp_path):
    spoil(photo_folder)
    for _ in range(2):
        with pytest.raises(DataError, match=r"2 of 6 images cannot be read, more than max_bad 0.2 allows"):
            run(tiny_model, photo_folder, tmp_path / "out", max_bad=0.2, images_per_shard=1)
    assert not json.loads((tmp_path / "out" / "manifest.json").read_text())["complete"]
    assert run(tiny_model, photo_folder, tmp_path / "out", max_bad=0.5, images_per_shard=1)["skipped"] == 2


def test_if_no_image_can_be_read_it_says_so(tiny_model, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("<html>")
    with pytest.raises(DataError, match=r"none of its images can be read; .*a.jpg: not an image"):
        run(tiny_model, tmp_path / "photos", tmp_path / "out", max_bad=1.0)


def test_a_complete_folder_stays_as_it_is(tiny_model, photo_folder, tmp_path):
    first = run(tiny_model, photo_folder, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert run(tiny_model, photo_folder, tmp_path / "out") == first
    assert contents(tmp_path / "out") == before


def test_a_damaged_or_swapped_shard_of_a_complete_folder_is_written_again(tiny_model, photo_folder, tmp_path):
    run(tiny_model, photo_folder, tmp_path / "out", images_per_shard=3)
    before = shards(tmp_path / "out")
    first, second = (tmp_path / "out" / "data" / name for name in sorted(before))
    second.write_bytes(b"")
    run(tiny_model, photo_folder, tmp_path / "out", images_per_shard=3)
    assert shards(tmp_path / "out") == before
    first.write_bytes(before[second.name])
    second.write_bytes(before[first.name])
    run(tiny_model, photo_folder, tmp_path / "out", images_per_shard=3)
    assert shards(tmp_path / "out") == before


@pytest.mark.parametrize("bad", [(0, 1), (2, 3), (4, 5)])
def test_datasets_opens_a_folder_of_which_a_whole_shard_is_skipped(tiny_model, photo_folder, tmp_path, bad):
    names = ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "more/4.JPEG", "more/5.JPEG"]
    for number in bad:
        (photo_folder / names[number]).write_text("no image")
    manifest = run(tiny_model, photo_folder, tmp_path / "out", images_per_shard=2, max_bad=1.0)
    assert (manifest["shards"], manifest["rows"], manifest["skipped"]) == (3, 4, 2)
    loaded = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["index"][:] == [number for number in range(6) if number not in bad]


def test_the_list_of_skipped_images_goes_when_they_can_be_read(tiny_model, photo_folder, tmp_path, picture):
    (photo_folder / "more" / "5.JPEG").write_text("no image")
    run(tiny_model, photo_folder, tmp_path / "out", max_bad=1.0)
    assert (tmp_path / "out" / "skipped.jsonl").exists()
    picture(40, 48).save(photo_folder / "more" / "5.JPEG")
    (tmp_path / "out" / "data" / "train-00001-of-00002.parquet").unlink()
    assert run(tiny_model, photo_folder, tmp_path / "out", max_bad=1.0)["skipped"] == 0
    assert not (tmp_path / "out" / "skipped.jsonl").exists()


def test_a_shard_that_is_gone_from_a_complete_folder_is_written_again(tiny_model, photo_folder, tmp_path):
    run(tiny_model, photo_folder, tmp_path / "out")
    before = shards(tmp_path / "out")
    (tmp_path / "out" / "data" / "train-00001-of-00002.parquet").unlink()
    assert run(tiny_model, photo_folder, tmp_path / "out")["rows"] == 6
    assert shards(tmp_path / "out") == before


def test_one_that_was_interrupted_after_its_last_shard_is_only_closed(tiny_model, photo_folder, tmp_path):
    first = run(tiny_model, photo_folder, tmp_path / "out")
    before = shards(tmp_path / "out")
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(json.dumps(first | {"complete": False}))
    assert run(tiny_model, photo_folder, tmp_path / "out", workers=1) == first
    assert shards(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": "flip"}, r"preprocessing.views: the crop there, the crop, its mirror image now"),
        ({"precision": "bfloat16"}, r"precision: float32 there, bfloat16 now"),
        ({"images_per_shard": 3}, r"images_per_shard: 4 there, 3 now"),
        ({"limit": 5}, r"source.limit: None there, 5 now"),
        ({"identity": IDENTITY._replace(weights_sha256="1" * 64)}, r"model.weights_sha256: 000.* there, 111.* now"),
    ],
)
def test_nothing_is_continued_in_another_way(tiny_model, photo_folder, tmp_path, changes, message):
    run(tiny_model, photo_folder, tmp_path / "out")
    interrupt(tmp_path / "out", missing=1)
    with pytest.raises(DataError, match=rf"out: holds other tokens \({message}"):
        run(tiny_model, photo_folder, tmp_path / "out", **changes)


def test_names_of_the_same_weights_and_images_may_change(tiny_model, photo_folder, tmp_path):
    run(tiny_model, photo_folder, tmp_path / "out")
    before = shards(tmp_path / "out")
    interrupt(tmp_path / "out", missing=1)
    photo_folder.rename(tmp_path / "moved")
    identity = ModelIdentity("someone/tiny", "abc", IDENTITY.weights_sha256)
    manifest = run(tiny_model, tmp_path / "moved", tmp_path / "out", identity=identity)
    assert (manifest["model"]["revision"], manifest["source"]["path"]) == ("abc", str(tmp_path / "moved"))
    assert shards(tmp_path / "out") == before


def test_nothing_is_continued_with_other_rows_of_a_data_set(tiny_model, photo_folder, tmp_path):
    def save(numbers):
        files = [str(photo_folder / f"{number}.jpg") for number in numbers]
        features = datasets.Features({"image": datasets.Image()})
        shutil.rmtree(tmp_path / "rows", ignore_errors=True)
        datasets.Dataset.from_dict({"image": files}, features=features).save_to_disk(tmp_path / "rows")

    save([0, 1, 2])
    run(tiny_model, tmp_path / "rows", tmp_path / "out", images_per_shard=2)
    before = shards(tmp_path / "out")
    interrupt(tmp_path / "out", missing=1)
    run(tiny_model, tmp_path / "rows", tmp_path / "out", images_per_shard=2)
    assert shards(tmp_path / "out") == before
    save([1, 2, 3])
    with pytest.raises(DataError, match=r"holds other tokens \(source.fingerprint: "):
        run(tiny_model, tmp_path / "rows", tmp_path / "out", images_per_shard=2)


def test_nothing_is_continued_with_other_images(tiny_model, photo_folder, tmp_path):
    run(tiny_model, photo_folder, tmp_path / "out")
    (photo_folder / "3.jpg").rename(photo_folder / "3b.jpg")
    with pytest.raises(DataError, match=r"holds other tokens \(source.sha256: "):
        run(tiny_model, photo_folder, tmp_path / "out")


def test_a_damaged_shard_is_named_and_written_again(tiny_model, photo_folder, tmp_path, capsys):
    run(tiny_model, photo_folder, tmp_path / "out")
    before = shards(tmp_path / "out")
    interrupt(tmp_path / "out", missing=1)
    path = tmp_path / "out" / "data" / "train-00000-of-00002.parquet"
    whole = path.read_bytes()
    middle = len(whole) // 8
    for damage in (whole[:-20], b"", whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]):
        path.write_bytes(damage)
        run(tiny_model, photo_folder, tmp_path / "out")
        assert "train-00000-of-00002.parquet: damaged (" in capsys.readouterr().err
        assert shards(tmp_path / "out") == before
        interrupt(tmp_path / "out", missing=1)


def test_a_shard_of_other_tokens_and_other_files_are_refused(tiny_model, photo_folder, tmp_path):
    for name, views in (("out", "none"), ("other", "flip")):
        run(tiny_model, photo_folder, tmp_path / name, views=views)
    interrupt(tmp_path / "out", missing=1)
    name = "train-00001-of-00002.parquet"
    shutil.copy(tmp_path / "other" / "data" / name, tmp_path / "out" / "data" / name)
    with pytest.raises(DataError, match=f"{name}: no shard of these tokens; move it away"):
        run(tiny_model, photo_folder, tmp_path / "out")
    (tmp_path / "out" / "data" / name).rename(tmp_path / "out" / "data" / "more.parquet")
    with pytest.raises(DataError, match=r"more.parquet: no shard of these tokens; move it away"):
        run(tiny_model, photo_folder, tmp_path / "out")


def test_only_a_new_or_empty_folder_apart_from_the_images_is_written(tiny_model, photo_folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match=r"full: holds other files \(thesis.tex\); give a new or empty folder"):
        run(tiny_model, photo_folder, tmp_path / "full")
    with pytest.raises(DataError, match="file: a file; the tokens go into a folder"):
        run(tiny_model, photo_folder, tmp_path / "file")
    for target in (photo_folder, photo_folder / "more" / "out", tmp_path):
        with pytest.raises(ValueError, match="cannot be, hold or lie in the one that is read"):
            run(tiny_model, photo_folder, target)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".jpg") == [
        "4.JPEG",
        "5.JPEG",
        "file",
        "thesis.tex",
    ]
    (tmp_path / "empty").mkdir()
    assert run(tiny_model, photo_folder, tmp_path / "empty")["rows"] == 6


def test_two_at_once_do_not_write_the_same_folder(tiny_model, photo_folder, tmp_path):
    (tmp_path / "out").mkdir()
    code = "import pathlib, vqhit.files as files; f = files.lock(pathlib.Path('.lock')); print(1, flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=tmp_path / "out", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(DataError, match=f"out: process {other.pid} on .* is writing it now"):
            run(tiny_model, photo_folder, tmp_path / "out")
        other.kill()
    assert run(tiny_model, photo_folder, tmp_path / "out")["rows"] == 6
    assert not (tmp_path / "out" / ".lock").exists()


def test_settings_that_cannot_be_are_refused():
    for changes, message in (
        ({"views": "five-crop"}, "views: found 'five-crop'; input should be 'none', 'flip' or 'ten-crop'"),
        ({"precision": "float16"}, "precision: found 'float16'"),
        ({"batch_size": 0}, "batch_size: found 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            TokenizeConfig(path="x", **changes)


def test_a_partition_holds_each_image_once():
    partition = Partition(indices=range(0, 14, 2), per_shard=3)
    assert [list(partition.images(shard)) for shard in range(len(partition))] == [[0, 2, 4], [6, 8, 10], [12]]


@pytest.fixture
def many_photos(tmp_path, picture):
    """160 small photographs of two classes, two of them damaged."""
    picture(24, 20).save(tmp_path / "photo.png")
    for number in range(160):
        path = tmp_path / "photos" / f"class{number // 80}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(tmp_path / "photo.png")
    for name in ("class0/002.png", "class1/150.png"):
        (tmp_path / "photos" / name).unlink()
        (tmp_path / "photos" / name).write_text("<html>")
    return tmp_path / "photos"


def start(*arguments, cwd, processes=1):
    module = (
        ["torch.distributed.run", "--nproc-per-node", str(processes), "-m", "vqhit"] if processes > 1 else ["vqhit"]
    )
    command = [sys.executable, "-m", *module, "tokenize", "--model", "model", "--data", "photos", *arguments]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for_shards(folder, process):
    deadline = time.monotonic() + 120
    while not list(folder.glob("data/*.parquet")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()


def test_killed_and_continued_by_two_processes_it_gives_the_same_bytes(tiny_model, many_photos, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    arguments = ("--out", "out", "--images-per-shard", "16", "--max-bad", "0.05")
    killed = start(*arguments, cwd=tmp_path)
    wait_for_shards(tmp_path / "out", killed)
    killed.kill()
    killed.wait()
    kept = contents(tmp_path / "out")
    written = [name for name in kept if name.endswith(".parquet")]
    assert 1 <= len(written) < 10
    assert not json.loads((tmp_path / "out" / "manifest.json").read_text())["complete"]
    for name in ("data/.train-00009-of-00010.parquet.abc", ".manifest.json.abc"):
        (tmp_path / "out" / name).write_text("half")

    both = start(*arguments, "--workers", "1", cwd=tmp_path, processes=2)
    output, errors = both.communicate(timeout=200)
    assert both.returncode == 0, errors
    assert output.splitlines()[-1] == (
        "out: 158 rows of 8x8 tokens from 158 images; 2 left out, listed in skipped.jsonl"
    )
    assert errors.count("class1/150.png: not an image") == 1
    after = contents(tmp_path / "out")
    assert {name: after[name] for name in written} == {name: kept[name] for name in written}

    config = TokenizeConfig(path="photos", images_per_shard=16, max_bad=0.05)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        tokenize(tiny_model, config, "whole", identity=load_identified("model", device="cpu")[1])
    whole = contents(tmp_path / "whole")
    assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in whole.items()}
    assert [row["index"] for row in rows(tmp_path / "out")] == [n for n in range(160) if n not in (2, 150)]


def test_sigterm_keeps_whole_shards_alone_and_ends_it_as_a_signal(tiny_model, many_photos, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    process = start("--out", "out", "--images-per-shard", "16", "--max-bad", "0.05", cwd=tmp_path)
    wait_for_shards(tmp_path / "out", process)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert output.splitlines()[-1] == ("SIGTERM: stopped; the files that are complete stay, the same command continues")
    assert 1 <= len(list((tmp_path / "out" / "data").iterdir())) < 10
    for path in (tmp_path / "out" / "data").iterdir():
        assert parquet.read_table(path).num_rows in (15, 16)


def test_the_command_says_what_it_did_and_leaves_a_complete_folder_alone(inside, tiny_model, photo_folder, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    arguments = ("tokenize", "--model", "model", "--data", photo_folder, "--out", "out", "--images-per-shard", 4)
    first = inside(*arguments, cwd=tmp_path)
    assert (first.returncode, first.stderr) == (0, "")
    *progress, last = first.stdout.splitlines()
    assert progress[-1].startswith("tokenize 6/6: ")  # images, not batches
    assert last == "out: 6 rows of 8x8 tokens from 6 images"
    before = contents(tmp_path / "out")
    again = inside(*arguments, cwd=tmp_path)
    assert (again.returncode, again.stdout) == (0, "out: 6 rows of 8x8 tokens from 6 images\n")
    assert contents(tmp_path / "out") == before
    changed = inside(*arguments, "--views", "flip", cwd=tmp_path)
    assert changed.returncode == 2
    assert changed.stderr.startswith("vqhit: out: holds other tokens (preprocessing.views: ")
    assert len(changed.stderr.splitlines()) == 1
    generator = inside(*arguments[:1], "--model", "hit-tiny-64", *arguments[3:], cwd=tmp_path)
    assert generator.returncode == 2
    assert "holds a HiTGenerator, not a VQHiT" in generator.stderr
