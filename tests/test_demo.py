"""The demo, and the one that trains, shortened: files, numbers, baselines; run again, it reuses what is there."""

import json
from pathlib import Path
from signal import Signals

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from skimage.transform import resize

from vqhit import VQHiT
from vqhit.demo import (
    HELD_OUT_PHOTOS,
    TRAINING_PHOTOS,
    baselines,
    demo_config,
    print_results,
    run_demo,
    six_crops,
    thumbnail_side,
    tiles,
    train_demo,
)
from vqhit.images import from_uint8, load_image, pil_to_uint8, to_uint8
from vqhit.metrics import psnr
from vqhit.train import Trainer


def test_photographs_held_out_are_not_trained_on():
    assert len(HELD_OUT_PHOTOS) == 2
    assert not set(HELD_OUT_PHOTOS) & set(TRAINING_PHOTOS)


def test_the_demo_trains_for_at_most_five_minutes():
    assert demo_config("demo", []).train.max_minutes < 5


def table_of(results):
    console = Console(width=80, record=True)
    print_results(results, console)
    return console.export_text()


def test_a_folder_of_its_name_is_not_taken_for_the_packaged_tokenizer(tmp_path, monkeypatch):
    (tmp_path / "vqhit-tiny-64").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run_demo(tmp_path)["images"] == 48


def test_the_demo_reconstructs_held_out_photographs_with_the_packaged_tokenizer(tmp_path):
    results = run_demo(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert results["model"] == "vqhit-tiny-64"
    assert results["images"] == 2 * 24
    picture = pil_to_uint8(load_image(tmp_path / "reconstruction.png"))
    assert picture.shape == (3, 2 * 260 + 4, 2 * 388 + 4)
    originals, reconstructions = picture[:, 4:260, 4:388], picture[:, 264:520, 4:388]
    photo = load_image(tmp_path / "photos" / "held_out" / HELD_OUT_PHOTOS[0])
    assert torch.equal(originals[:, :64, :64], tiles(photo, 64)[0])
    model = VQHiT.from_pretrained("vqhit-tiny-64")
    last = to_uint8(model.reconstruct(from_uint8(tiles(photo, 64)[-1:])))[0]
    assert (reconstructions[:, -64:, -64:].int() - last.int()).abs().max() <= 1  # another batch may round otherwise
    assert "48 tiles of 2 photographs, 64 px" in table_of(results)
    assert results["psnr"] > results["psnr_thumbnail"]


def test_tiles_are_cut_from_the_middle_of_a_resized_photograph(picture):
    photo = picture(300, 100)
    cut = tiles(photo, 16)
    assert cut.shape == (4 * 12, 3, 16, 16)
    resized = pil_to_uint8(photo.resize((192, 64), Image.Resampling.BICUBIC))
    assert torch.equal(cut[13], resized[:, 16:32, 16:32])
    assert tiles(picture(70, 64), 16).shape == (4 * 4, 3, 16, 16)
    with pytest.raises(ValueError, match="10x100 px: too narrow"):
        tiles(picture(10, 100), 16)


def test_a_short_demo_writes_its_results_and_reuses_them(tmp_path, capsys):
    out = tmp_path / "my demo"
    short = ["train.steps=3", "train.batch_norm_batches=1"]
    results = train_demo(demo_config(out, short), out)
    assert json.loads((out / "results.json").read_text()) == results
    assert {"psnr", "psnr_mean_colour", "psnr_thumbnail", "ssim", "codes_used", "seconds"} <= results.keys()
    assert results["images"] == 12
    assert results["steps_this_time"] == 3
    bits = results["bits_per_pixel"] * results["image_size"] ** 2
    assert bits == pytest.approx(results["tokens_per_image"] * np.log2(results["codebook_size"]))
    assert Image.open(out / "reconstruction.png").size == (6 * 132 + 4, 4 * 132 + 4)
    assert VQHiT.from_pretrained(out / "model").num_tokens == results["tokens_per_image"]

    model = VQHiT.from_pretrained(out / "model")
    crops = torch.cat([six_crops(out / "photos" / "held_out" / name, model) for name in HELD_OUT_PHOTOS])
    reconstructions = to_uint8(model.reconstruct(from_uint8(crops)))
    assert results["psnr"] == pytest.approx(psnr(crops, reconstructions).mean().item(), rel=1e-6)

    again = train_demo(demo_config(out, short), out)
    assert again["steps_this_time"] == 0
    assert again["psnr"] == results["psnr"]
    assert again["seconds_training"] == results["seconds_training"]

    table = table_of(results)
    for heading in ("per image", "per pixel", "PSNR", "SSIM", "codes used", "seconds", "mean colour"):
        assert heading in table
    assert "…" not in table


def test_a_signal_ends_the_training_demo_without_results(tmp_path, monkeypatch):
    def stopped(trainer):
        trainer.stopped_by = Signals.SIGINT

    monkeypatch.setattr(Trainer, "run", stopped)
    assert train_demo(demo_config(tmp_path, []), tmp_path) == Signals.SIGINT
    assert not (tmp_path / "results.json").exists()


def test_a_demo_killed_while_it_copies_leaves_no_half_photograph(tmp_path, monkeypatch):
    def fail(self, target):
        raise OSError("killed")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="killed"):
        train_demo(demo_config(tmp_path, []), tmp_path)
    assert list((tmp_path / "photos" / "train").iterdir()) == []


def test_a_minute_of_training_is_already_far_above_the_mean_colour(tmp_path):
    config = demo_config(tmp_path, ["train.steps=200"])
    results = train_demo(config, tmp_path)
    assert results["psnr"] > results["psnr_mean_colour"] + 2
    assert results["codes_used"] > 100


def test_the_thumbnail_has_the_number_of_bits_that_comes_nearest():
    assert thumbnail_side(640) == 5
    assert thumbnail_side(2560) == 10
    assert thumbnail_side(1) == 1


def test_baselines_are_the_mean_and_an_area_averaged_thumbnail_enlarged_bilinearly():
    crops = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean_colour, thumbnails = baselines(crops, bits=24 * 16)
    np.testing.assert_allclose(mean_colour[1, :, 5, 9], crops[1].double().mean((1, 2)), atol=0.5)
    small = crops[0].double().reshape(3, 4, 16, 4, 16).mean((2, 4)).round()
    enlarged = resize(small.permute(1, 2, 0).numpy(), (64, 64), order=1, mode="edge", preserve_range=True)
    np.testing.assert_allclose(thumbnails[0].permute(1, 2, 0), enlarged, atol=1)
