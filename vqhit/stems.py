"""The stems of HiT, which make its first feature map and its latent tokens.

`NoiseStem` makes them of a noise vector (the GAN generator), `CodeStem` of a grid of codebook vectors (the VQ-HiT
decoder).
"""

import math
from collections.abc import Iterable
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from vqhit.config import Config, Count, Flag
from vqhit.execution import Compilable
from vqhit.hit import FIRST_SIZE, HiTConfig
from vqhit.layers import Linear, space_to_depth, truncated_normal_
from vqhit.norms import Norm, build_norm, fold_norm_back


class LatentTokens(nn.Module):
    """Project, add positions, normalise: the tokens that every cross-attention reads: (B, T, D) -> (B, T, C0).

    Departure: the paper has no norm here; the official code has this one, at the source.
    """

    def __init__(self, num_tokens: int, width: int, norm: Norm) -> None:
        super().__init__()
        self.position_embedding = nn.Parameter(truncated_normal_(torch.empty(num_tokens, width)))
        self.norm = build_norm(norm, width)

    def fold(self, projection: nn.Linear) -> None:
        """Move batch norm into the projection and the positions."""
        self.norm = fold_norm_back(self.norm, projection, self.position_embedding)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.position_embedding)


class NoiseStem(nn.Module):
    """Noise to first map and latent tokens, one linear layer each: (B, D) -> (B, 8, 8, C0), (B, 16, C0).

    No tokens where there is no cross-attention. Departure: Algorithm 1 has 8x8 latent tokens; the official code, and
    Table 4's parameter counts, have 4x4.
    """

    num_tokens = 16

    def __init__(self, latent_dim: int, backbone: HiTConfig) -> None:
        super().__init__()
        width = backbone.widths[0]
        self.feature_map = Linear(latent_dim, FIRST_SIZE * FIRST_SIZE * width)
        self.tokens: LatentTokens | None = None
        if backbone.cross_attention:
            self.token_projection = Linear(latent_dim, self.num_tokens * width)
            self.tokens = LatentTokens(self.num_tokens, width, backbone.norm)

    def fold(self) -> None:
        """Move the norm of the tokens into their projection."""
        if self.tokens is not None:
            self.tokens.fold(self.token_projection)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        feature_map = self.feature_map(z).unflatten(1, (FIRST_SIZE, FIRST_SIZE, -1))
        if self.tokens is None:
            return feature_map, None
        return feature_map, self.tokens(self.token_projection(z).unflatten(1, (self.num_tokens, -1)))


class StemConfig(Config):
    """How codes enter HiT: `latent_grid` ² latent tokens; `skip` adds a linear layer of the 16x16 codes at stage 2.

    The presets have 4 and the skip: of 4 and 8, with and without, the cheapest of those that reconstructed best at
    64 px (README, Results).
    """

    latent_grid: Count = 4
    skip: Flag = False
    skip_kernel: Literal[1, 3] = 1
    """3: the skip is a convolution over 3x3 codes, for an encoder that was trained with a convolutional decoder: such a
    one spreads what it says of a place over the tokens around it (measured: README, Tokenizers of others)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.skip_kernel > 1 and not self.skip:
            raise ValueError(f"skip_kernel {self.skip_kernel}: there is no skip; set skip too")
        return self


class CodeStem(Compilable, nn.Module):
    """Codebook vectors to first map, tokens and skip: (B, C, h, w) -> (B, 8, 8, C0), (B, T, C0), (B, 16, 16, C1).

    Ours: the paper (appendix A.5) does not say how a 16x16 grid of codes enters the 8x8 first stage. Each input is the
    whole grid by space-to-depth, then one linear layer; nothing is pooled away. Grids of another size than the model's
    own give a larger or smaller map, and their latent tokens are averaged, or repeated, to T.

    Its linear layers start wider than HiT's other kernels: a fresh VQGAN encoder's latents have a standard deviation of
    about 0.2, and at HiT's 0.02 the position embeddings would drown them. With `code_std`, that of the codes, map and
    tokens start near unit variance.
    """

    def __init__(self, config: StemConfig, backbone: HiTConfig, code_grid: int, code_dim: int, code_std: float) -> None:
        super().__init__()
        widths = backbone.widths
        self.feature_factor = code_grid // FIRST_SIZE
        self.token_factor = code_grid // config.latent_grid
        self.latent_grid = config.latent_grid
        self.feature_map = Linear(self.feature_factor**2 * code_dim, widths[0])
        self.token_projection = self.tokens = None
        if backbone.cross_attention:
            self.token_projection = Linear(self.token_factor**2 * code_dim, widths[0])
            self.tokens = LatentTokens(config.latent_grid**2, widths[0], backbone.norm)
        self.skip: nn.Linear | nn.Conv2d | None = None
        if config.skip_kernel > 1:
            self.skip = nn.Conv2d(code_dim, widths[1], config.skip_kernel, padding=config.skip_kernel // 2)
            self.skip.bias = nn.Parameter(torch.zeros(widths[1]))
        elif config.skip:
            self.skip = Linear(code_dim, widths[1])
        for layer in self._projections():
            nn.init.normal_(layer.weight, std=1 / (code_std * math.sqrt(layer.weight[0].numel())))

    def _projections(self) -> Iterable[nn.Linear | nn.Conv2d]:
        return filter(None, (self.feature_map, self.token_projection, self.skip))

    @torch.no_grad()
    def multiply_weights(self, factor: float) -> None:
        """Multiply the weights of the linear layers: for codes that are wider or narrower than `code_std`."""
        for layer in self._projections():
            layer.weight.mul_(factor)

    def fold(self) -> None:
        """Move the norm of the tokens into their projection."""
        if self.tokens is not None and self.token_projection is not None:
            self.tokens.fold(self.token_projection)

    def forward(self, codes: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        self.batched(codes)
        return self._run(codes)

    def _run(self, codes: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        skip = self.skip(codes).permute(0, 2, 3, 1) if isinstance(self.skip, nn.Conv2d) else None
        codes = codes.permute(0, 2, 3, 1)
        feature_map = self.feature_map(space_to_depth(codes, self.feature_factor))
        tokens = None
        if self.token_projection is not None and self.tokens is not None:
            patches = space_to_depth(codes, self.token_factor)
            if patches.shape[1:3] != (self.latent_grid, self.latent_grid):
                patches = F.adaptive_avg_pool2d(patches.permute(0, 3, 1, 2), self.latent_grid).permute(0, 2, 3, 1)
            tokens = self.tokens(self.token_projection(patches.flatten(1, 2)))
        return feature_map, tokens, self.skip(codes) if isinstance(self.skip, nn.Linear) else skip
