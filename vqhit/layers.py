"""The layers of HiT: self- and cross-attention, MLP, normalisation, blocking, pixel shuffle, initialisation.

Feature maps are channels-last, (B, H, W, C) or blocked: (B, G, P, C) holds G blocks of P pixels each, both row-major.
Conventions and numbers follow the official TensorFlow code (google-research/hit-gan) wherever the paper leaves a gap.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqhit.execution import works_in_cache
from vqhit.norms import Norm, build_norm, fold_norm


def block(x: Tensor, size: int) -> Tensor:
    """Cut a map into `size` x `size` blocks: (B, H, W, C) -> (B, H/size * W/size, size², C) (paper section 3.2)."""
    return rearrange(x, "b (gh ph) (gw pw) c -> b (gh gw) (ph pw) c", ph=size, pw=size)


def unblock(x: Tensor, size: int, height: int) -> Tensor:
    """Undo `block`: (B, G, size², C) -> (B, height, W, C)."""
    return rearrange(x, "b (gh gw) (ph pw) c -> b (gh ph) (gw pw) c", ph=size, pw=size, gh=height // size)


def space_to_depth(x: Tensor, factor: int) -> Tensor:
    """Move `factor` x `factor` pixels into channels: (B, H, W, C) -> (B, H/factor, W/factor, factor² C)."""
    return rearrange(x, "b (h dy) (w dx) c -> b h w (dy dx c)", dy=factor, dx=factor)


def depth_to_space(x: Tensor, factor: int = 2) -> Tensor:
    """Pixel shuffle, channel (dy * factor + dx) * C + c: (B, H, W, factor² C) -> (B, factor H, factor W, C).

    This is TensorFlow's channel order; `torch.nn.functional.pixel_shuffle` has c * factor² + dy * factor + dx.
    """
    return rearrange(x, "b h w (dy dx c) -> b (h dy) (w dx) c", dy=factor, dx=factor)


def truncated_normal_(weight: Tensor) -> Tensor:
    """Fill with N(0, 0.02²) cut at two standard deviations: the start of every HiT kernel and position embedding."""
    return nn.init.trunc_normal_(weight, std=0.02, a=-0.04, b=0.04)


class Linear(nn.Linear):
    """`nn.Linear` with HiT's initialisation: truncated normal weight, zero bias."""

    def reset_parameters(self) -> None:
        truncated_normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


_CACHED_VALUES = 1 << 19
"""What a pass over pixels may hold of them between its layers: 2 MiB in float32, of the size of processors' caches."""


def add_linear(x: Tensor, update: Tensor, layer: nn.Linear) -> Tensor:
    """x + layer(update), without gradients in one product that adds to its result: (..., C), (..., K) -> (..., C)."""
    if torch.is_autocast_enabled(x.device.type):
        return x + layer(update)
    out = (x + layer.bias).flatten(0, -2)
    return out.addmm_(update.flatten(0, -2), layer.weight.t()).view(x.shape)


def _attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention: (B, N, L, heads, d) queries, (B, N, S, kv, d) keys and values -> (B, N, L, heads, d).

    With one head of keys and values (kv = 1, multi-query) the heads fold into the query length: one fused call, no
    repeated keys. Otherwise each head has its own. Logits are divided by √d. Departure: Algorithm 2 shows no scale, but
    the official code has it.
    """
    if keys.shape[3] == 1:
        length = queries.shape[2]
        queries = rearrange(queries, "b n l h d -> b n (l h) d")
        out = F.scaled_dot_product_attention(queries, keys.squeeze(3), values.squeeze(3))
        return rearrange(out, "b n (l h) d -> b n l h d", l=length)
    batch = queries.shape[0]
    queries, keys, values = (rearrange(heads, "b n l h d -> (b n) h l d") for heads in (queries, keys, values))
    out = F.scaled_dot_product_attention(queries, keys, values)  # in 4 dimensions: only these have fused kernels
    return rearrange(out, "(b n) h l d -> b n l h d", b=batch)


Axis = Literal["regional", "dilated"]


class SelfAttention(nn.Module):
    """Self-attention along one or more axes of a blocked map: (B, G, P, C) -> (B, G, P, C) (section 3.2, Algorithm 2).

    The heads are shared out evenly among `axes`, in their order. `regional` attends inside each block, `dilated` across
    blocks, among pixels at the same position; the paper's multi-axis attention has both. Departure: Algorithm 2 gives
    the first half of the heads the dilated one; this is the official code's order. One output projection joins them.
    With `multi_query`, all heads share one head of keys and values (appendix A.1).
    """

    def __init__(
        self, width: int, heads: int, axes: tuple[Axis, ...] = ("regional", "dilated"), multi_query: bool = True
    ) -> None:
        super().__init__()
        self.head_width = width // heads
        self.axes = axes
        shared = self.head_width if multi_query else width
        self.query = Linear(width, width)
        self.key = Linear(width, shared)
        self.value = Linear(width, shared)
        self.output = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (self._heads(project(x)) for project in (self.query, self.key, self.value))
        parts = []
        for number, axis in enumerate(self.axes):
            part = tuple(self._share(heads, number) for heads in (queries, keys, values))
            if axis == "regional":
                parts.append(_attend(*part))
            else:
                parts.append(_attend(*(heads.transpose(1, 2) for heads in part)).transpose(1, 2))
        return self.output(torch.cat(parts, dim=3).flatten(3))

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b g p (h d) -> b g p h d", d=self.head_width)

    def _share(self, heads: Tensor, number: int) -> Tensor:
        """The heads of one axis; a single head of keys or values serves all of them."""
        return heads if heads.shape[3] == 1 else heads.chunk(len(self.axes), dim=3)[number]


Memory = tuple[Tensor, ...]
"""What a cross-attention reads of the latent tokens, each (B, ...)."""


class CrossAttention(nn.Module):
    """Cross-attention of every pixel to the latent tokens (section 3.3): (B, ..., C), (B, T, D) -> (B, ..., C).

    All pixels of an image read the same few tokens. Where these are few enough, query and key layer are multiplied
    before a pixel is touched, and value and output layer too: a pixel passes two matrices of C x heads T instead of two
    of C x C and its attention.
    """

    def __init__(self, width: int, heads: int, token_width: int, multi_query: bool = True) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        shared = self.head_width if multi_query else width
        self.query = Linear(width, width)
        self.key = Linear(token_width, shared)
        self.value = Linear(token_width, shared)
        self.output = Linear(width, width)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """Attention of (B, ..., C), given what `memory` returned of the tokens."""
        if len(memory) == 2:
            queries = self._heads(self.query(x).flatten(1, -2)).unsqueeze(1)
            return self.output(_attend(queries, *memory).reshape(x.shape))
        to_logits, logits_bias, from_weights = memory
        logits = torch.baddbmm(logits_bias, x.flatten(1, -2), to_logits)
        weights = logits.unflatten(-1, (self.heads, -1)).softmax(-1).flatten(-2)
        return torch.baddbmm(self.output.bias, weights, from_weights).view(x.shape)

    def memory(self, tokens: Tensor) -> Memory:
        """What pixels read of the tokens (B, T, D): matrices to and from their weights, or else keys and values."""
        keys, values = (self._heads(project(tokens)) for project in (self.key, self.value))
        if tokens.shape[1] * (self.heads - 1) > self.heads * self.head_width:
            return keys.unsqueeze(1), values.unsqueeze(1)
        keys, values = (heads.expand(-1, -1, self.heads, -1) for heads in (keys, values))
        query = self.query.weight.unflatten(0, (self.heads, -1)) * self.head_width**-0.5
        query_bias = self.query.bias.unflatten(0, (self.heads, -1)) * self.head_width**-0.5
        to_logits = torch.einsum("bthd,hdc->bcht", keys, query).flatten(2)
        logits_bias = torch.einsum("bthd,hd->bht", keys, query_bias).flatten(1).unsqueeze(1)
        from_weights = torch.einsum("bthd,chd->bhtc", values, self.output.weight.unflatten(1, (self.heads, -1)))
        return to_logits, logits_bias, from_weights.flatten(1, 2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_width))


class MLP(nn.Module):
    """x + fc2(GELU(fc1(norm(x)))), four times as wide inside: (..., C) -> (..., C).

    Departure: the paper says ReLU (appendix A.1); the official code uses the exact GELU.
    """

    def __init__(self, width: int, norm: Norm = "batch") -> None:
        super().__init__()
        self.norm = build_norm(norm, width)
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        if not works_in_cache(self, x):
            return x + self.fc2(self.hidden(x))
        parts = x.flatten(0, -2).split(max(1, _CACHED_VALUES // self.fc1.out_features))
        return torch.cat([add_linear(part, self.hidden(part), self.fc2) for part in parts]).view(x.shape)

    def hidden(self, x: Tensor) -> Tensor:
        """GELU(fc1(norm(x))): (..., C) -> (..., 4C)."""
        hidden = self.fc1(self.norm(x))
        return F.gelu(hidden) if torch.is_grad_enabled() else torch.ops.aten.gelu_(hidden)

    def fold(self) -> None:
        """Move the norm into `fc1`."""
        self.norm = fold_norm(self.norm, [self.fc1])


class SelfAttentionBlock(nn.Module):
    """x + attention(norm(x)), then the MLP: (B, G, P, C) -> (B, G, P, C)."""

    def __init__(
        self,
        width: int,
        heads: int,
        axes: tuple[Axis, ...] = ("regional", "dilated"),
        multi_query: bool = True,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        self.norm = build_norm(norm, width)
        self.attention = SelfAttention(width, heads, axes, multi_query)
        self.mlp = MLP(width, norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x + self.attention(self.norm(x)))

    def fold(self) -> None:
        """Move the norm into the attention's input layers."""
        self.norm = fold_norm(self.norm, [self.attention.query, self.attention.key, self.attention.value])


class CrossAttentionBlock(nn.Module):
    """x + attention(norm(x), tokens), then the MLP: (B, ..., C) and what `attention.memory` gives -> (B, ..., C)."""

    def __init__(
        self, width: int, heads: int, token_width: int, multi_query: bool = True, norm: Norm = "batch"
    ) -> None:
        super().__init__()
        self.norm = build_norm(norm, width)
        self.attention = CrossAttention(width, heads, token_width, multi_query)
        self.mlp = MLP(width, norm)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        return self.mlp(x + self.attention(self.norm(x), memory))

    def fold(self) -> None:
        """Move the norm into the attention's query layer."""
        self.norm = fold_norm(self.norm, [self.attention.query])
