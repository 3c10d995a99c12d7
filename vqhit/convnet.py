"""ConvNet-R1, the paper's convolutional baseline (section 4.3, Table 1): SAGAN's residual generator.

Unconditional, and trained as HiT is. The paper names the architecture and nothing more; taken from SAGAN (Zhang et al.
2019) and its official code: widths, blocks, the self-attention at 32x32, Glorot initialisation, batch norm's epsilon,
tanh. Left out: class conditioning and the spectral norm, for which R1 stands.
"""

from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from vqhit.config import Config, Count
from vqhit.discriminator import Conv, Dense
from vqhit.execution import checkpointed
from vqhit.generator import Generator, generator_kind
from vqhit.norms import BatchNorm

_FIRST_SIZE = 4
_EPSILON = 1e-5


class ConvNetGeneratorConfig(Config):
    """Sizes of a SAGAN generator; the defaults are its own at 128 px."""

    kind: Literal["convnet_generator"] = "convnet_generator"
    latent_dim: Count = 128
    resolution: Count = 128
    channels: Count = 64
    """Of the last block; each block before has twice as many as the next, and the first map as the first block."""
    attention_size: Count | None = 32
    """Side of the map after which self-attention comes; None leaves it out."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        sizes = [_FIRST_SIZE << level for level in range(1, 9)]
        if self.resolution not in sizes:
            raise ValueError(f"resolution {self.resolution}; allowed: {', '.join(map(str, sizes))}")
        maps = [size for size in sizes if size <= self.resolution]
        if self.attention_size is not None:
            if self.attention_size not in maps:
                raise ValueError(
                    f"attention_size {self.attention_size}; a generator of {self.resolution} px has maps of "
                    f"{', '.join(map(str, maps))}"
                )
            if (width := self.widths[maps.index(self.attention_size)]) % 8:
                raise ValueError(f"attention needs a multiple of 8 channels; its map has {width}")
        return self

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels."""
        return self.resolution

    @property
    def widths(self) -> list[int]:
        """Channels of each block."""
        levels = (self.resolution // _FIRST_SIZE).bit_length() - 1
        return [self.channels << (levels - 1 - level) for level in range(levels)]


class _MapNorm(BatchNorm):
    """Batch normalisation of a channels-first map: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Block(nn.Module):
    """Residual block that doubles the map: (B, C, H, W) -> (B, C', 2H, 2W)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm0, self.norm1 = _MapNorm(channels), _MapNorm(out_channels)
        self.conv0 = Conv(channels, out_channels, equalized=False)
        self.conv1 = Conv(out_channels, out_channels, equalized=False)
        self.skip = Conv(channels, out_channels, 1, equalized=False)

    def forward(self, x: Tensor) -> Tensor:
        main = self.conv0(F.interpolate(F.relu(self.norm0(x)), scale_factor=2.0))
        main = self.conv1(F.relu(self.norm1(main)))
        return main + F.interpolate(self.skip(x), scale_factor=2.0)  # 1x1: the same before enlarging as after


class _Attention(nn.Module):
    """SAGAN's self-attention: x + σ · attention(x), keys and values max-pooled by two, σ starting at 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query, self.key = (Conv(channels, channels // 8, 1, bias=False, equalized=False) for _ in range(2))
        self.value = Conv(channels, channels // 2, 1, bias=False, equalized=False)
        self.output = Conv(channels // 2, channels, 1, bias=False, equalized=False)
        self.sigma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        keys, values = (F.max_pool2d(project(x), 2) for project in (self.key, self.value))
        queries, keys, values = (part.flatten(2).transpose(1, 2) for part in (self.query(x), keys, values))
        attended = F.scaled_dot_product_attention(queries, keys, values, scale=1.0)
        return x + self.sigma * self.output(attended.transpose(1, 2).unflatten(2, x.shape[2:]))


class ConvNetGenerator(Generator):
    """SAGAN's generator without classes: noise (B, D) -> image (B, 3, H, W) in [-1, 1]."""

    recompute = False
    """Activation checkpointing, block by block."""
    config_class = ConvNetGeneratorConfig
    config: ConvNetGeneratorConfig
    model_kind = generator_kind(
        "ConvNetGenerator",
        "vqhit.convnet",
        "An unconditional image generator: SAGAN's residual convolutions, the baseline ConvNet-R1 of the HiT paper.",
    )

    def __init__(self, config: ConvNetGeneratorConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.widths[0], *config.widths]
        self.first_map = Dense(config.latent_dim, _FIRST_SIZE**2 * widths[0], equalized=False)
        self.blocks = nn.ModuleList()
        for level, width in enumerate(config.widths):
            self.blocks.append(_Block(widths[level], width))
            if _FIRST_SIZE << (level + 1) == config.attention_size:
                self.blocks.append(_Attention(width))
        self.norm = _MapNorm(widths[-1])
        self.to_rgb = Conv(widths[-1], 3, equalized=False)

    def _images(self, z: Tensor) -> Tensor:
        x = self.first_map(z).unflatten(1, (-1, _FIRST_SIZE, _FIRST_SIZE))
        for block in self.blocks:
            x = checkpointed(self.recompute, block, x)
        return self.to_rgb(F.relu(self.norm(x))).tanh()
