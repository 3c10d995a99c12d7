"""The crops of an image that are made into tokens: its center crop, that and its mirror image, or ten crops."""

from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vqhit import images
from vqhit.data import Sample, read_image
from vqhit.sources import ImageSource

Views = Literal["none", "flip", "ten-crop"]
VIEW_COUNTS: dict[Views, int] = {"none": 1, "flip": 2, "ten-crop": 10}
DESCRIPTIONS: dict[Views, str] = {
    "none": "the crop",
    "flip": "the crop, its mirror image",
    "ten-crop": "top left, top right, bottom left, bottom right, middle of the crop; the same of its mirror image",
}


def crop_size(size: int, views: Views) -> int:
    """Side in px of ADM's center crop that views of `size` px are cut from: for ten crops LlamaGen's."""
    return size * 11 // 10 if views == "ten-crop" else size


def views_of(image: Image.Image, size: int, views: Views) -> Tensor:
    """Crops of an RGB image, uint8: (views, 3, size, size).

    Ten crops are torchvision's `TenCrop`, in its order, of the center crop of 1.1 * size px, rounded down.
    """
    crop = images.pil_to_uint8(images.center_crop(image, crop_size(size, views)))
    if views == "none":
        return crop[None]
    mirrored = crop.flip(-1)
    if views == "flip":
        return torch.stack([crop, mirrored])
    return torch.stack([*_five_crops(crop, size), *_five_crops(mirrored, size)])


def _five_crops(image: Tensor, size: int) -> list[Tensor]:
    far = image.shape[-1] - size
    middle = round(far / 2)
    places = ((0, 0), (0, far), (far, 0), (far, far), (middle, middle))
    return [image[:, top : top + size, left : left + size] for top, left in places]


class ImageViews(Dataset[Sample]):
    """The views of each image of a source, (views, 3, size, size); one that cannot be read gives an empty tensor."""

    def __init__(self, source: ImageSource, size: int, views: Views) -> None:
        self.source, self.size, self.views = source, size, views

    def __getitem__(self, index: int) -> Sample:
        try:
            image = read_image(self.source, index)
        except images.ImageError as error:
            return Sample(torch.empty(0, dtype=torch.uint8), (str(error),))
        return Sample(views_of(image, self.size, self.views))
