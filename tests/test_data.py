"""The order of training images is a function of seed and sample index alone."""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from vqhit.data import DataConfig, TrainingCrops, list_images, random_crop, training_batches
from vqhit.images import ImageError


def crops(folder, **changes):
    config = DataConfig(path=str(folder), **changes)
    return TrainingCrops(list_images(folder), config, size=16, seed=3)


def test_images_are_found_in_all_subfolders_and_sorted(photo_folder):
    (photo_folder / "notes.txt").write_text("no image")
    paths = list_images(photo_folder)
    assert [path.name for path in paths] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.JPEG", "5.JPEG"]
    assert paths == sorted(paths)


def test_links_between_folders_are_followed_once(photo_folder):
    (photo_folder / "more" / "up").symlink_to(photo_folder, target_is_directory=True)
    assert len(list_images(photo_folder)) == 6
    (photo_folder.parent / "link").symlink_to(photo_folder, target_is_directory=True)
    assert len(list_images(photo_folder.parent / "link")) == 6


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(ValueError, match="no images in it or below"):
        list_images(tmp_path)
    with pytest.raises(ValueError, match="absent: no such folder of images"):
        list_images(tmp_path / "absent")


def test_every_epoch_visits_every_image_once_in_another_order(photo_folder):
    dataset = crops(photo_folder)
    visited = []
    dataset._load = lambda path: visited.append(path) or Image.new("RGB", (20, 20))
    for sample in range(18):
        dataset[sample]
    epochs = [visited[start : start + 6] for start in (0, 6, 12)]
    assert all(Counter(epoch) == Counter(list_images(photo_folder)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_another_seed_gives_another_order_and_other_crops(photo_folder):
    config, paths = DataConfig(path=str(photo_folder)), list_images(photo_folder)
    one, two = (TrainingCrops(paths, config, size=16, seed=seed) for seed in (1, 2))
    assert [one._order(0).tolist(), one._order(1).tolist()] != [two._order(0).tolist(), two._order(1).tolist()]
    assert not torch.equal(torch.stack([one[n] for n in range(6)]), torch.stack([two[n] for n in range(6)]))


def test_a_dataset_can_be_sent_to_a_loader_process_that_does_not_inherit_it(photo_folder):
    dataset = crops(photo_folder, cache_images=2)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[7], dataset[7])


def test_a_sample_is_the_same_whenever_and_by_whomever_it_is_loaded(photo_folder):
    plain = torch.cat(list(training_batches(crops(photo_folder), 4, 0, 6, workers=0)))
    workers = torch.cat(list(training_batches(crops(photo_folder), 4, 0, 6, workers=2)))
    later = torch.cat(list(training_batches(crops(photo_folder, cache_images=3), 4, 4, 6, workers=0)))
    assert plain.shape == (24, 3, 16, 16)
    assert torch.equal(plain, workers)
    assert torch.equal(plain[16:], later)
    assert len({tuple(image.flatten().tolist()) for image in plain}) == 24  # crops and flips differ from epoch to epoch


def test_crops_are_squares_of_the_asked_share_inside_the_image():
    wide = Image.fromarray(np.tile(np.linspace(0, 255, 400).astype(np.uint8), (100, 1))).convert("RGB")
    rng = np.random.default_rng(0)
    for _ in range(50):
        row = np.asarray(random_crop(wide, 32, (0.25, 0.5), rng), float)[16, :, 0]
        width_px = (row[-1] - row[0]) / 255 * 400 * 32 / 31
        assert 22 < width_px < 53
    full = np.asarray(random_crop(wide.crop((0, 0, 100, 100)), 100, (1.0, 1.0), rng))
    np.testing.assert_array_equal(full, np.asarray(wide.crop((0, 0, 100, 100))))


def test_flips_are_drawn_for_half_of_the_samples_and_can_be_switched_off(tmp_path):
    half = Image.new("RGB", (20, 20), "black")
    half.paste("white", (0, 0, 10, 20))
    half.save(tmp_path / "half.png")
    left = [int(crops(tmp_path, crop_proportion=1.0)[sample][0, 8, 2] > 128) for sample in range(200)]
    assert 70 < sum(left) < 130
    unflipped = crops(tmp_path, crop_proportion=1.0, flip=False)
    assert all(unflipped[sample][0, 8, 2] > 128 for sample in range(20))


def test_an_unreadable_image_is_named(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        crops(tmp_path)[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_one_line_from_a_loader_process_too(tmp_path, workers):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError) as caught:
        list(training_batches(crops(tmp_path), 1, 0, 1, workers))
    assert str(caught.value).startswith(str(tmp_path / "broken.jpg"))
    assert "\n" not in str(caught.value)
