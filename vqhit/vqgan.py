"""The VQGAN encoder and convolutional decoder (Esser et al., CVPR 2021): taming-transformers' modules, run lean.

taming's own encoder keeps every intermediate feature map alive, and both write attention out by hand. The same layers
run here without that, in place where nothing else reads the map, and with fused attention: the same state-dict keys and
the same numbers in less memory.
"""

from contextlib import redirect_stdout
from io import StringIO
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import model_validator
from taming.modules.diffusionmodules import model as taming
from torch import Tensor, nn

from vqhit.config import Config, ConfigError, Count, Layers
from vqhit.execution import Compilable, checkpointed

_GROUPS = 32
MAX_RESOLUTION = 4096  # as HiT's


class _Convolutions(Config):
    """The sizes that encoder and decoder share; the defaults are those of VQGAN f16."""

    channels: Count = 128
    channel_multipliers: tuple[Count, ...] = (1, 1, 2, 2, 4)
    """Of each level, from the image's resolution downwards; each level has half the height and width of the last."""
    num_res_blocks: Layers = 2
    attention_resolutions: tuple[Count, ...] = (16,)
    z_channels: Count = 256

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.channels % _GROUPS:
            raise ValueError(f"channels {self.channels}: group normalisation needs a multiple of {_GROUPS}")
        if not self.channel_multipliers:
            raise ValueError("channel_multipliers is empty; at least one level")
        return self

    @property
    def downsampling(self) -> int:
        """Image pixels per latent, along each axis: f."""
        return 1 << (len(self.channel_multipliers) - 1)

    def check_attention(self, resolution: int) -> None:
        """Raise `ConfigError` if there is no map of a size in `attention_resolutions` for images of `resolution` px."""
        levels = [resolution >> level for level in range(len(self.channel_multipliers))]
        if unknown := set(self.attention_resolutions) - set(levels):
            text = f"found {sorted(unknown)}; the maps are {', '.join(map(str, levels))} px"
            raise ConfigError([(("attention_resolutions",), text)])


class EncoderConfig(_Convolutions):
    """The sizes of a VQGAN encoder; the defaults are the f16 encoder of VQGAN, which VQ-HiT keeps (appendix A.5)."""


class ConvDecoderConfig(_Convolutions):
    """The sizes of VQGAN's decoder, the baseline of the paper's Table 2; the defaults are those of VQGAN f16.

    It has one residual block per level more than `num_res_blocks`, as taming's.
    """

    kind: Literal["conv"] = "conv"
    resolution: Count = 256
    """Height and width of the image in pixels."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.resolution > MAX_RESOLUTION:
            raise ValueError(f"resolution {self.resolution}; allowed: up to {MAX_RESOLUTION}")
        if self.resolution % self.downsampling:
            raise ValueError(f"resolution {self.resolution}: not a multiple of {self.downsampling}, its upsampling")
        self.check_attention(self.resolution)
        return self


def taming_arguments(config: _Convolutions, resolution: int) -> dict[str, object]:
    """Sizes as the arguments of taming's own encoder and decoder."""
    return {
        "ch": config.channels,
        "out_ch": 3,
        "ch_mult": config.channel_multipliers,
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": config.attention_resolutions,
        "in_channels": 3,
        "resolution": resolution,
        "z_channels": config.z_channels,
    }


class Encoder(Compilable, taming.Encoder):
    """Image to latents: (B, 3, H, W) -> (B, z_channels, H/f, W/f)."""

    recompute = False
    """Activation checkpointing, layer by layer of each level."""

    def __init__(self, config: EncoderConfig, resolution: int) -> None:
        super().__init__(**taming_arguments(config, resolution), double_z=False)

    def forward(self, x: Tensor) -> Tensor:
        eager = not torch.compiler.is_compiling()  # which is also true while a model is exported
        if eager and x.device.type == "cpu" and not torch.is_grad_enabled() and len(x):
            # As fast at 256 px, in a fraction of the memory, and no image's latents depend on the others in its batch.
            # Never compiled: Inductor's convolutions are the same, and its group norm of channels-last maps is slower.
            return torch.cat([Encoder._run(self, image) for image in x.split(1)])
        self.batched(x)
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = _level(level, x, self.recompute)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(_norm_swish(self.norm_out, _middle(self.mid, x)))


class ConvDecoder(Compilable, taming.Decoder):
    """Latents to image: (B, z_channels, H/f, W/f) -> (B, 3, H, W), unclamped."""

    recompute = False
    """Activation checkpointing, layer by layer of each level."""

    def __init__(self, config: ConvDecoderConfig) -> None:
        with redirect_stdout(StringIO()):  # taming prints the shape of its latents
            super().__init__(**taming_arguments(config, config.resolution))

    @property
    def last_layer(self) -> nn.Conv2d:
        """The layer to RGB, against whose weight VQGAN's adaptive loss weight is taken."""
        return self.conv_out

    def forward(self, z: Tensor) -> Tensor:
        self.batched(z)
        return self._run(z)

    def _run(self, z: Tensor) -> Tensor:
        x = _middle(self.mid, self.conv_in(z))
        for level in reversed(self.up):
            x = _level(level, x, self.recompute)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(_norm_swish(self.norm_out, x))


def _level(level: Any, x: Tensor, recompute: bool) -> Tensor:
    for index, res_block in enumerate(level.block):
        x = checkpointed(recompute, _res_block, res_block, x)
        if level.attn:
            x = checkpointed(recompute, _attention, level.attn[index], x)
    return x


def _middle(middle: Any, x: Tensor) -> Tensor:
    x = _res_block(middle.block_1, x)
    x = _attention(middle.attn_1, x)
    return _res_block(middle.block_2, x)


def _norm_swish(norm: nn.Module, x: Tensor) -> Tensor:
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


def _add(x: Tensor, update: Tensor) -> Tensor:
    return x + update if torch.is_grad_enabled() else update.add_(x)


def _res_block(module: taming.ResnetBlock, x: Tensor) -> Tensor:
    update = module.conv1(_norm_swish(module.norm1, x))
    update = module.conv2(module.dropout(_norm_swish(module.norm2, update)))
    if module.in_channels != module.out_channels:
        x = module.nin_shortcut(x)
    return _add(x, update)


def _attention(module: taming.AttnBlock, x: Tensor) -> Tensor:
    normed = module.norm(x)
    queries, keys, values = (
        layer(normed).flatten(2).transpose(1, 2).contiguous() for layer in (module.q, module.k, module.v)
    )
    if torch.compiler.is_exporting():  # ONNX has it in four dimensions only
        queries, keys, values = queries.unsqueeze(1), keys.unsqueeze(1), values.unsqueeze(1)
    out = F.scaled_dot_product_attention(queries, keys, values)
    return _add(x, module.proj_out(out.transpose(-1, -2).reshape(x.shape)))
