"""HiT, the transformer decoder of "Improved Transformer for High-Resolution GANs" (Zhao et al., NeurIPS 2021).

`HiTBackbone` is Algorithm 1 from the first 8x8 feature map to the image; a stem feeds it (stems.py). Where the paper
and its official TensorFlow code part, the code decides.
"""

import math
from itertools import pairwise, product
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from vqhit.config import Config, Count, Depth, Flag
from vqhit.execution import Compilable, checkpointed, works_in_cache
from vqhit.layers import (
    MLP,
    Axis,
    CrossAttentionBlock,
    Linear,
    Memory,
    SelfAttentionBlock,
    block,
    depth_to_space,
    truncated_normal_,
    unblock,
)
from vqhit.norms import Norm, build_norm, exact, fold_norm

_BAND_PIXELS = 4096
"""Pixels of the image that pass through the last stages at a time, on the CPU."""
FIRST_SIZE = 8
"""Height and width of the first feature map, in every HiT."""

# Name: widths, depths, block sizes per stage. Table 9's widths for hit-s-256 give 34.73 million parameters where
# Table 4 says 38.01 (which 512 256 128 128 64 64 would give): the paper disagrees with itself.
_PRESETS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "hit-s-256": ((512, 256, 128, 64, 32, 32), (2, 2, 1, 1, 1, 1), (4, 4, 8, 8)),
    "hit-b-256": ((512, 512, 256, 128, 64, 64), (2, 2, 2, 2, 1, 1), (4, 4, 8, 8)),
    "hit-l-256": ((1024, 512, 256, 128, 128, 128), (2, 2, 2, 2, 2, 2), (4, 4, 8, 8)),
    "hit-b-1024": ((512, 512, 256, 128, 64, 64, 32, 32), (2, 2, 2, 2, 1, 1, 1, 1), (4, 4, 8, 8)),
    "hit-b-128": ((512, 512, 256, 128, 128), (2, 2, 2, 2, 2), (4, 4, 8, 8)),
    "hit-l-128": ((1024, 512, 256, 128, 128), (2, 2, 2, 2, 2), (4, 4, 8, 8)),
}
_MAX_STAGES = 10  # 4096 px
_HEADS = (16, 8, 4, 4, 4, 4, 4, 4)

Attention = Literal["multi_axis", "blocked", "axial", "interleaved", "full"]
# The axes of the self-attention blocks of a stage, in turn.
_AXES: dict[Attention, tuple[tuple[Axis, ...], ...]] = {
    "multi_axis": (("regional", "dilated"),),
    "blocked": (("regional",),),
    "axial": (("regional", "dilated"),),
    "interleaved": (("regional",), ("dilated",)),
    "full": (("regional",),),
}
_UNBLOCKED: tuple[Attention, ...] = ("axial", "full")


class HiTConfig(Config):
    """The sizes of a HiT, one entry a stage; the map doubles in size from stage to stage, starting at 8x8.

    `block_sizes` has an entry for each low-resolution stage, the side of its attention blocks; later stages are
    high-resolution ones, without self-attention and with an RGB head (paper section 3.1). The other options are those
    of the paper's ablations. With no entry and without cross-attention, HiT is an implicit function (INR) of its input.
    """

    kind: Literal["hit"] = "hit"
    widths: tuple[Count, ...]
    depths: tuple[Depth, ...]
    heads: tuple[Count, ...]
    block_sizes: tuple[Count | None, ...]
    """None, for each stage, where `attention` does not work in blocks (axial, full)."""
    attention: Attention = "multi_axis"
    """Tables 5 and 10. multi_axis: half the heads inside blocks, half across; blocked: all inside; interleaved: inside
    and across in alternate blocks; axial: half the heads along the rows of the map, half along its columns; full: every
    pixel to every other."""
    multi_query: Flag = True
    """All heads share one head of keys and values (Table 8); else each has its own."""
    norm: Norm = "batch"
    """batch or layer (Table 8)."""
    cross_attention: Flag = True
    """Without it, the latent tokens go too (Tables 5 and 10)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        stages = len(self.widths)
        if stages > _MAX_STAGES:
            raise ValueError(f"{stages} stages make images of {self.resolution} px; allowed: {_MAX_STAGES} stages")
        for name in ("depths", "heads"):
            if (found := len(getattr(self, name))) != stages:
                raise ValueError(f"{name} has {found} entries and widths has {stages}; one each per stage")
        if not len(self.block_sizes) < stages:
            raise ValueError(
                f"block_sizes has {len(self.block_sizes)} entries for {stages} stages; the last stage makes the image "
                "and has no self-attention, so at most one entry less"
            )
        if self.attention != "multi_axis" and not self.block_sizes:
            raise ValueError(f"attention {self.attention}: block_sizes is empty, so no stage has self-attention")
        if not (self.multi_query or self.block_sizes or self.cross_attention):
            raise ValueError("multi_query false: block_sizes is empty and cross_attention false, so there are no heads")
        for stage, (width, heads) in enumerate(zip(self.widths, self.heads, strict=True)):
            if width % 4 or width % heads:
                raise ValueError(f"stage {stage}: width {width} must be divisible by 4 and by its {heads} heads")
        for stage in range(len(self.block_sizes)):
            self._check_attention(stage)
        return self

    def _check_attention(self, stage: int) -> None:
        """Raise for a low-resolution stage that cannot be."""
        heads, depth, block_size = self.heads[stage], self.depths[stage], self.block_sizes[stage]
        size = FIRST_SIZE << stage
        if heads % len(_AXES[self.attention][0]):
            raise ValueError(
                f"stage {stage}: {heads} heads; {self.attention} attention shares them out among two axes: an even "
                "number"
            )
        if depth % len(_AXES[self.attention]):
            raise ValueError(
                f"stage {stage}: depth {depth}; interleaved attention takes its two kinds in turn: an even number"
            )
        if self.attention in _UNBLOCKED:
            if block_size is not None:
                raise ValueError(
                    f"stage {stage}: block size {block_size}; {self.attention} attention has no blocks: null"
                )
        elif block_size is None:
            raise ValueError(f"stage {stage}: block size null; {self.attention} attention needs a number")
        elif size % block_size:
            raise ValueError(f"stage {stage}: a {size}x{size} map does not divide into blocks of {block_size}")

    @property
    def first_map_unit(self) -> int:
        """What height and width of the first map are multiples of: then all maps divide into their blocks."""
        blocks = enumerate(self.block_sizes)
        return math.lcm(*(size // math.gcd(size, 1 << stage) for stage, size in blocks if size is not None))

    @property
    def resolution(self) -> int:
        """Height and width of the image in pixels."""
        return FIRST_SIZE << (len(self.widths) - 1)

    @classmethod
    def preset(cls, name: str) -> Self:
        """Return the sizes of `hit-{s,b,l}-256`, `hit-b-1024` or `hit-{b,l}-128` (paper Tables 4 and 9)."""
        if name not in _PRESETS:
            raise ValueError(f"no preset {name!r}; there are: {', '.join(_PRESETS)}")
        widths, depths, block_sizes = _PRESETS[name]
        return cls(widths=widths, depths=depths, heads=_HEADS[: len(widths)], block_sizes=block_sizes)


class MLPToRGB(nn.Module):
    """The last MLP and the RGB head after it, which alone reads it, multiplied: (B, H, W, C) -> (B, 3, H, W).

    W_rgb (x + W2 h + b2) + b_rgb = W_rgb x + (W_rgb W2) h + b: three rows of products in place of C. Both are folded.
    """

    def __init__(self, mlp: MLP, to_rgb: "ToRGB") -> None:
        super().__init__()
        self.mlp, self.to_rgb = mlp, to_rgb
        rgb, fc2 = to_rgb.linear, mlp.fc2
        weight = exact(rgb.weight)
        self.linear = nn.Linear(fc2.in_features, 3, device=rgb.weight.device, dtype=rgb.weight.dtype)
        self.linear.weight.copy_(weight @ exact(fc2.weight))
        self.linear.bias.copy_(weight @ exact(fc2.bias))
        del mlp.fc2

    def forward(self, x: Tensor, image: Tensor | None) -> Tensor:
        return self.to_rgb(x, image) + _to_planes(self.linear, self.mlp.hidden(x))


class ToRGB(nn.Module):
    """Norm and linear to RGB, plus the image of the stage before, doubled (nearest): (B, H, W, C) -> (B, 3, H, W)."""

    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__()
        self.norm = build_norm(norm, width)
        self.linear = Linear(width, 3)

    def fold(self) -> None:
        """Move the norm into the linear layer."""
        self.norm = fold_norm(self.norm, [self.linear])

    def forward(self, x: Tensor, image: Tensor | None) -> Tensor:
        rgb = _to_planes(self.linear, self.norm(x))
        return rgb if image is None else rgb + F.interpolate(image, scale_factor=2)


def _to_planes(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer whose outputs lie in planes: (B, H, W, C) -> (B, K, H, W)."""
    planes = torch.matmul(layer.weight, x.flatten(1, 2).transpose(1, 2)) + layer.bias.unsqueeze(1)
    return planes.unflatten(2, x.shape[1:3])


class Given(NamedTuple):
    """What a stage needs besides the map."""

    positions: Tensor
    """(H, W, C): the stage's own, or interpolated (bicubic) to the size of the map."""
    memory: Memory
    """Of the latent tokens; empty without cross-attention."""

    def part(self, image: int, rows: slice) -> "Given":
        """What is needed for some rows of one image of the batch."""
        return Given(self.positions[rows], tuple(tensor[image : image + 1] for tensor in self.memory))


class Stage(nn.Module):
    """One stage: position embedding, cross-attention block, self-attention blocks or MLPs: (B, H, W, C) -> the same.

    Low-resolution stages are brought once into the layout of their attention, and back once; the others add to the
    image so far, and work on each pixel by itself.
    """

    recompute = False
    """Activation checkpointing, block by block; not of the layer to RGB, through which adaptive loss weights pass."""

    def __init__(self, config: HiTConfig, index: int) -> None:
        super().__init__()
        size, width, heads, norm = FIRST_SIZE << index, config.widths[index], config.heads[index], config.norm
        low_resolution = index < len(config.block_sizes)
        self.block_size = config.block_sizes[index] if low_resolution else None
        self.one_block = low_resolution and config.attention == "full"
        self.position_embedding = nn.Parameter(truncated_normal_(torch.empty(size, size, width)))
        self.cross: CrossAttentionBlock | None = None
        if config.cross_attention:
            self.cross = CrossAttentionBlock(width, heads, config.widths[0], config.multi_query, norm)
        axes = _AXES[config.attention]
        self.blocks = nn.ModuleList(
            SelfAttentionBlock(width, heads, axes[number % len(axes)], config.multi_query, norm)
            if low_resolution
            else MLP(width, norm)
            for number in range(config.depths[index])
        )
        self.to_rgb: ToRGB | MLPToRGB | None = None if low_resolution else ToRGB(width, norm)

    def forward(self, x: Tensor, image: Tensor | None, given: Given) -> tuple[Tensor, Tensor | None]:
        height = x.shape[1]
        x = x + given.positions
        if self.block_size is not None:
            x = block(x, self.block_size)
        elif self.one_block:
            x = x.flatten(1, 2).unsqueeze(1)
        if self.cross is not None:
            x = checkpointed(self.recompute, self.cross, x, given.memory)
        for layer in self.blocks:
            x = checkpointed(self.recompute, layer, x)
        if self.block_size is not None:
            x = unblock(x, self.block_size, height)
        elif self.one_block:
            x = x.squeeze(1).unflatten(1, (height, -1))
        return x, image if self.to_rgb is None else self.to_rgb(x, image)

    def given(self, tokens: Tensor | None, height: int, width: int) -> Given:
        """What the stage needs for maps of this size, with the latent tokens (B, T, D) of their images."""
        memory = () if self.cross is None or tokens is None else self.cross.attention.memory(tokens)
        return Given(self._positions(height, width), memory)

    def _positions(self, height: int, width: int) -> Tensor:
        positions = self.position_embedding
        if positions.shape[:2] == (height, width):
            return positions
        channels_first = positions.permute(2, 0, 1).unsqueeze(0).float()
        resized = F.interpolate(channels_first, (height, width), mode="bicubic")
        return resized.squeeze(0).permute(1, 2, 0).to(positions.dtype)


class HiTBackbone(Compilable, nn.Module):
    """Algorithm 1 after its stem: map (B, 8, 8, C0), latent tokens (B, T, C0) -> image (B, 3, H, W), unclamped.

    Maps of other sizes, multiples of `HiTConfig.first_map_unit`, give images of other sizes.
    """

    def __init__(self, config: HiTConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        self.stages = nn.ModuleList(Stage(config, index) for index in range(len(widths)))
        self.upsamplings = nn.ModuleList(  # after each pixel shuffle; nothing to do where the widths already agree
            nn.Identity() if before // 4 == after else Linear(before // 4, after) for before, after in pairwise(widths)
        )

    @torch.no_grad()
    def fold(self) -> None:
        """Move all norms into the linear layers that read them, and the last MLP into the RGB head: for inference.

        Not that MLP where layer norm, of which a part stays, is between the two.
        """
        for module in self.modules():
            if isinstance(module, MLP | SelfAttentionBlock | CrossAttentionBlock | ToRGB):
                module.fold()
        last = self.stages[-1]
        assert isinstance(last, Stage)
        blocks = list(last.blocks)
        if not (blocks and isinstance(blocks[-1], MLP) and isinstance(last.to_rgb, ToRGB)):
            return
        if isinstance(last.to_rgb.norm, nn.Identity):
            last.blocks, last.to_rgb = nn.ModuleList(blocks[:-1]), MLPToRGB(blocks[-1], last.to_rgb)

    @property
    def last_layer(self) -> Linear:
        """The last stage's layer to RGB, against whose weight VQGAN's adaptive loss weight is taken."""
        last = self.stages[-1].to_rgb
        if isinstance(last, MLPToRGB):
            raise ValueError("the model is optimized for inference: its layer to RGB is merged with the one before")
        assert isinstance(last, ToRGB)
        return last.linear

    def forward(self, x: Tensor, tokens: Tensor | None, skip: Tensor | None = None) -> Tensor:
        """Tokens are None where there is no cross-attention.

        `skip` (B, 16, 16, C1), if any, is added to the map that enters the second stage (`stem.skip`).
        """
        height, width = x.shape[1:3]
        given = []
        for index, stage in enumerate(self.stages):
            assert isinstance(stage, Stage)
            given.append(stage.given(tokens, height << index, width << index))
        whole = max(2, len(self.config.block_sizes)) if works_in_cache(self, x) else len(self.stages)
        self.batched(x, *(() if skip is None else (skip,)), *(tensor for each in given for tensor in each.memory))
        x, image = self._run(x, None, given[:whole], skip=skip)
        if len(given) > whole:
            return self._in_bands(x, image, given[whole:])
        assert image is not None  # HiTConfig: the last stage always has an RGB head
        return image

    def _run(
        self, x: Tensor, image: Tensor | None, given: list[Given], first: int = 0, skip: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Some stages in a row, those of `given`, from the one of number `first` on."""
        for index, own in enumerate(given, first):
            if index > 0:
                x = self.upsamplings[index - 1](depth_to_space(x))
            if index == 1 and skip is not None:
                x = x + skip
            x, image = self.stages[index](x, image, own)
        return x, image

    def _in_bands(self, x: Tensor, image: Tensor | None, given: list[Given]) -> Tensor:
        """The last stages, those of `given`, on a few rows at a time: -> (B, 3, H, W).

        They work on each pixel by itself. What passes between their layers then stays in a processor's cache.
        """
        factor, first = 1 << len(given), len(self.stages) - len(given)
        batch, height, width = x.shape[:3]
        out = x.new_empty(batch, 3, height * factor, width * factor)
        rows = max(1, _BAND_PIXELS // (width * factor**2))
        for number, top in product(range(batch), range(0, height, rows)):
            band = (slice(number, number + 1), slice(top, top + rows))
            parts = [own.part(number, slice(top << shift, top + rows << shift)) for shift, own in enumerate(given, 1)]
            _, made = self._run(x[band], None if image is None else image[number, None, :, band[1]], parts, first)
            assert made is not None
            out[number, :, top * factor : (top + rows) * factor] = made
        return out
