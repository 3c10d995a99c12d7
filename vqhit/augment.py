"""Differentiable augmentations (DiffAugment, Zhao et al. 2020), as the official HiT-GAN code has them.

Drawing and applying are apart: `draw` needs a generator, `augment` is a function of images and draws. Every draw is one
number an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Augmentation = Literal["color", "translation", "cutout"]
ALL: tuple[Augmentation, ...] = get_args(Augmentation)
_SHIFT_SHARE = 0.125
_CUTOUT_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Random numbers of one call, each (B,); None for an augmentation that is left out."""

    brightness: Tensor | None = None
    saturation: Tensor | None = None
    contrast: Tensor | None = None
    """These three in [0, 1)."""
    shift_y: Tensor | None = None
    shift_x: Tensor | None = None
    """Pixels; positive moves the content up or left."""
    cutout_y: Tensor | None = None
    cutout_x: Tensor | None = None
    """Centre of the square, in pixels."""

    def part(self, images: slice) -> "Draws":
        """Draws of some of the images."""
        return Draws(**{name: value if value is None else value[images] for name, value in vars(self).items()})


def draw(
    batch: int, height: int, width: int, kinds: Sequence[Augmentation] = ALL, *, generator: torch.Generator
) -> Draws:
    """Draw for a batch of images; the same generator state gives the same draws on every machine (CPU generator)."""

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (batch,), generator=generator)

    drawn: dict[str, Tensor] = {}
    if "color" in kinds:
        drawn |= {name: torch.rand(batch, generator=generator) for name in ("brightness", "saturation", "contrast")}
    if "translation" in kinds:
        for name, size in (("shift_y", height), ("shift_x", width)):
            drawn[name] = integers(-_shift(size), _shift(size) + 1)
    if "cutout" in kinds:
        for name, size in (("cutout_y", height), ("cutout_x", width)):
            drawn[name] = integers(0, size + 1 - _cutout(size) % 2)
    return Draws(**drawn)


def augment(images: Tensor, draws: Draws) -> Tensor:
    """Colour, translation and cutout, in this order, as far as drawn: (B, 3, H, W) -> the same, not clamped."""
    if draws.brightness is not None:
        images = images + (_each(draws.brightness, images) - 0.5)
    if draws.saturation is not None:
        grey = images.mean(1, keepdim=True)
        images = (images - grey) * (2 * _each(draws.saturation, images)) + grey
    if draws.contrast is not None:
        mean = images.mean((1, 2, 3), keepdim=True)
        images = (images - mean) * (_each(draws.contrast, images) + 0.5) + mean
    if draws.shift_y is not None and draws.shift_x is not None:
        images = _translate(images, draws.shift_y, draws.shift_x)
    if draws.cutout_y is not None and draws.cutout_x is not None:
        rows, columns = (
            _inside_cutout(centre.to(images.device), size)
            for centre, size in ((draws.cutout_y, images.shape[2]), (draws.cutout_x, images.shape[3]))
        )
        images = images * ~(rows[:, None, :, None] & columns[:, None, None, :])
    return images


def _each(draw: Tensor, images: Tensor) -> Tensor:
    return draw.to(images).view(-1, 1, 1, 1)


def _shift(size: int) -> int:
    return int(size * _SHIFT_SHARE + 0.5)


def _cutout(size: int) -> int:
    return int(size * _CUTOUT_SHARE + 0.5)


def _translate(images: Tensor, shift_y: Tensor, shift_x: Tensor) -> Tensor:
    """out[i, j] = in[i + y, j + x], zero outside."""
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device) + shift_y.to(images.device)[:, None]
    columns = torch.arange(width, device=images.device) + shift_x.to(images.device)[:, None]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    index = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    moved = images.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, images.shape[1], -1))
    return moved.view_as(images) * inside[:, None]


def _inside_cutout(centre: Tensor, size: int) -> Tensor:
    """Positions that the square covers along one axis: (B,) -> (B, size) bool."""
    position = torch.arange(size, device=centre.device)
    start = centre[:, None] - _cutout(size) // 2
    return (position >= start) & (position < start + _cutout(size))
