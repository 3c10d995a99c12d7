"""The residual convolutional discriminator of HiT-GAN: StyleGAN2's (Karras et al. 2020), without its tricks."""

import functools
import math
from itertools import pairwise
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import field_validator, model_validator
from torch import Tensor, nn

from vqhit.config import Config, Count, Flag

_LAST_SIZE = 4
_SLOPE = 0.2


class DiscriminatorConfig(Config):
    """Sizes of a discriminator; the paper's multiplier is 1 at 128 px and 2 from 256 px.

    A map of n px has min(max_channels, 512) channels up to 32 px and `channel_multiplier` * 16384 / n above, at most
    `max_channels`; or else `widths` says how many, from `resolution` down to 4 px. `equalized_lr` and
    `minibatch_stddev` are StyleGAN2's; HiT-GAN is trained without them.
    """

    resolution: Count = 256
    channel_multiplier: Count = 2
    max_channels: Count = 512
    widths: tuple[Count, ...] | None = None
    pool: Literal["blur", "average"] = "blur"
    equalized_lr: Flag = False
    minibatch_stddev: Flag = False

    @field_validator("resolution")
    @classmethod
    def _check_resolution(cls, resolution: int) -> int:
        if resolution not in (sizes := [8 << power for power in range(8)]):
            raise ValueError(f"found {resolution}; allowed: {', '.join(map(str, sizes))}")
        return resolution

    @model_validator(mode="after")
    def _check_widths(self) -> Self:
        maps = self.resolution.bit_length() - 2
        rule = ("channel_multiplier", "max_channels")
        if self.widths is not None and any(getattr(self, key) != type(self).model_fields[key].default for key in rule):
            raise ValueError(f"widths stands in place of {' and '.join(rule)}: leave these out")
        if self.widths is not None and len(self.widths) != maps:
            raise ValueError(
                f"widths has {len(self.widths)} entries; {self.resolution} px down to {_LAST_SIZE} are {maps} maps"
            )
        return self

    def channels(self, size: int) -> int:
        """Channels of the map that is `size` px wide."""
        if self.widths is not None:
            return self.widths[(self.resolution // size).bit_length() - 1]
        return min(self.max_channels, 512 if size <= 32 else self.channel_multiplier * 16384 // size)


class Conv(nn.Conv2d):
    """A convolution of stride 1 that keeps the size, with Keras' initialisation: Glorot uniform, zero bias."""

    def __init__(self, channels: int, out_channels: int, size: int = 3, *, bias: bool = True, equalized: bool) -> None:
        self.equalized = equalized
        super().__init__(channels, out_channels, size, padding=size // 2, bias=bias)

    def reset_parameters(self) -> None:
        _initialise(self.weight, self.bias, self.equalized)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, _effective(self.weight, self.equalized), self.bias, padding=self.padding)


class Dense(nn.Linear):
    """A linear layer with the same initialisation."""

    def __init__(self, width: int, out_width: int, *, equalized: bool) -> None:
        self.equalized = equalized
        super().__init__(width, out_width)

    def reset_parameters(self) -> None:
        _initialise(self.weight, self.bias, self.equalized)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _effective(self.weight, self.equalized), self.bias)


def _initialise(weight: Tensor, bias: Tensor | None, equalized: bool) -> None:
    if equalized:
        nn.init.normal_(weight)
    else:
        nn.init.xavier_uniform_(weight)
    if bias is not None:
        nn.init.zeros_(bias)


def _effective(weight: Tensor, equalized: bool) -> Tensor:
    """Equalised learning rate: the weight is scaled by 1/√fan-in when it is used, not when it is drawn."""
    return weight / math.sqrt(weight[0].numel()) if equalized else weight


def blur_pool(x: Tensor) -> Tensor:
    """Halve a map after smoothing it with [1 3 3 1] along both axes, zeros outside: (B, C, H, W), H and W even."""
    kernel = _blur_kernel(x.dtype, x.device).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1])


@functools.cache
def _blur_kernel(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Made once, since every copy to a GPU would wait for it; a normal tensor also if first used for inference."""
    with torch.inference_mode(False):
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=dtype) / 8
        return torch.outer(taps, taps).to(device)


def average_pool(x: Tensor) -> Tensor:
    """Halve a map by averaging 2x2 pixels: (B, C, H, W) -> (B, C, H/2, W/2)."""
    return F.avg_pool2d(x, 2)


STDDEV_GROUP = 4


def minibatch_stddev(x: Tensor, group: int = STDDEV_GROUP) -> Tensor:
    """Append a channel with the mean standard deviation over groups of the batch: (B, C, H, W) -> (B, C + 1, H, W)."""
    batch, channels, height, width = x.shape
    if batch % (group := min(group, batch)):
        raise ValueError(f"minibatch_stddev: a batch of {batch}; allowed: up to {group}, or a multiple of it")
    spread = x.view(group, -1, channels, height, width).var(0, unbiased=False)
    stddev = (spread + 1e-8).sqrt().mean((1, 2, 3))  # one number per group
    return torch.cat([x, stddev.repeat(group).view(batch, 1, 1, 1).expand(-1, 1, height, width)], 1)


class Block(nn.Module):
    """Residual block that halves the map: (B, C, H, W) -> (B, C', H/2, W/2).

    Pooling comes before the second convolution; StyleGAN2 blurs inside a strided one.
    """

    def __init__(self, channels: int, out_channels: int, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.pool = blur_pool if config.pool == "blur" else average_pool
        equalized = config.equalized_lr
        self.conv0 = Conv(channels, channels, equalized=equalized)
        self.conv1 = Conv(channels, out_channels, equalized=equalized)
        self.skip = Conv(channels, out_channels, 1, bias=False, equalized=equalized)

    def forward(self, x: Tensor) -> Tensor:
        main = F.leaky_relu(self.conv0(x), _SLOPE)
        main = F.leaky_relu(self.conv1(self.pool(main)), _SLOPE)
        return (main + self.skip(self.pool(x))) / math.sqrt(2)


class Head(nn.Module):
    """The last 4x4 map to a logit: (B, C, 4, 4) -> (B, 1)."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        channels, equalized = config.channels(_LAST_SIZE), config.equalized_lr
        self.stddev = config.minibatch_stddev
        self.conv = Conv(channels + self.stddev, channels, equalized=equalized)
        self.fc1 = Dense(channels * _LAST_SIZE**2, channels, equalized=equalized)
        self.fc2 = Dense(channels, 1, equalized=equalized)

    def forward(self, x: Tensor) -> Tensor:
        x = minibatch_stddev(x) if self.stddev else x
        x = F.leaky_relu(self.conv(x), _SLOPE)
        return self.fc2(F.leaky_relu(self.fc1(x.flatten(1)), _SLOPE))


class Discriminator(nn.Module):
    """Image to logit: (B, 3, H, W) in [-1, 1] -> (B, 1), larger for more real (HiT-GAN's official code, equal to it).

    No normalisation and no attention: autograd can differentiate every layer twice, as R1 needs. Raises `ValueError`
    for a wrong shape.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        sizes = [config.resolution >> level for level in range(config.resolution.bit_length() - 2)]
        self.from_rgb = Conv(3, config.channels(config.resolution), equalized=config.equalized_lr)
        self.blocks = nn.ModuleList(
            Block(config.channels(size), config.channels(half), config) for size, half in pairwise(sizes)
        )
        self.final = Head(config)

    def forward(self, images: Tensor) -> Tensor:
        size = self.config.resolution
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images are {tuple(images.shape)}; this discriminator takes (B, 3, {size}, {size})")
        x = F.leaky_relu(self.from_rgb(images), _SLOPE)
        for block in self.blocks:
            x = block(x)
        return self.final(x)
