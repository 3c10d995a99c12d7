"""Views of an image: its center crop, a mirror image, ten crops."""

import pytest
import torch
from torchvision.transforms import TenCrop

from vqhit.data import read_image
from vqhit.folder import FolderSource
from vqhit.images import center_crop, pil_to_uint8
from vqhit.views import VIEW_COUNTS, ImageViews, views_of


def test_one_view_is_the_center_crop_and_a_flip_adds_its_mirror_image(picture):
    image = picture(50, 40)
    plain = views_of(image, 16, "none")
    assert plain.dtype == torch.uint8
    assert torch.equal(plain, pil_to_uint8(center_crop(image, 16))[None])
    assert torch.equal(views_of(image, 16, "flip"), torch.cat([plain, plain.flip(-1)]))


@pytest.mark.parametrize(("size", "larger"), [(16, 17), (32, 35), (64, 70), (256, 281)])
def test_ten_crops_are_torchvisions_of_a_larger_center_crop(picture, size, larger):
    image = picture(300, 290)
    expected = [pil_to_uint8(crop) for crop in TenCrop(size)(center_crop(image, larger))]
    assert torch.equal(views_of(image, size, "ten-crop"), torch.stack(expected))


@pytest.mark.parametrize("views", VIEW_COUNTS)
def test_an_item_holds_all_views_and_a_bad_image_its_problem(photo_folder, views):
    (photo_folder / "0.jpg").write_text("<html>")
    source = FolderSource.scan(photo_folder)
    dataset = ImageViews(source, 16, views)
    assert torch.equal(dataset[1].image, views_of(read_image(source, 1), 16, views))
    assert len(dataset[1].image) == VIEW_COUNTS[views]
    assert dataset[0].image.numel() == 0
    assert "0.jpg: not an image" in dataset[0].skipped[0]
