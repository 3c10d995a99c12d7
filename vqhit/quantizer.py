"""The codebook: nearest code in float32, straight-through gradient, codebook and commitment loss; usage counts."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqhit.config import Config, Count, NonNegative


class QuantizerConfig(Config):
    """Size of the codebook and weight of the commitment term (beta of VQ-VAE)."""

    codebook_size: Count = 1024
    dim: Count = 256
    commitment: NonNegative = 0.25


class Quantized(NamedTuple):
    """What `Quantizer` returns."""

    latents: Tensor
    """Codebook vectors, with the straight-through gradient, (B, C, h, w)."""
    tokens: Tensor
    """Index of the nearest code, (B, h, w) int64."""
    loss: Tensor
    """Codebook loss, a scalar."""


class Quantizer(nn.Module):
    """Replace each latent by its nearest code: (B, C, h, w) -> Quantized.

    The loss is ‖sg(z) - e‖² + β ‖z - sg(e)‖², means over elements (VQ-VAE, van den Oord et al. 2017, eq. 3). taming's
    legacy quantizer puts β on the first term; this one does not. Distances, argmin and loss are float32, or float64 if
    the latents are, also under autocast.
    """

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.commitment = config.commitment
        bound = 1 / config.codebook_size
        self.codebook = nn.Parameter(torch.empty(config.codebook_size, config.dim).uniform_(-bound, bound))

    def forward(self, latents: Tensor) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            exact = torch.promote_types(latents.dtype, torch.float32)
            z, codebook = latents.to(exact), self.codebook.to(exact)
            tokens = self._nearest(z.detach(), codebook.detach())
            codes = F.embedding(tokens, codebook).permute(0, 3, 1, 2)
            loss = F.mse_loss(codes, z.detach()) + self.commitment * F.mse_loss(z, codes.detach())
            straight_through = z + (codes - z).detach()
        return Quantized(straight_through.to(latents.dtype), tokens, loss)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Return the codes of tokens: (B, h, w) int64 -> (B, C, h, w)."""
        return F.embedding(tokens, self.codebook).permute(0, 3, 1, 2)

    @staticmethod
    def _nearest(z: Tensor, codebook: Tensor) -> Tensor:
        """Index of the code with the least ‖z - e‖² = ‖z‖² - 2 z·e + ‖e‖²; ‖z‖² decides nothing."""
        scores = torch.einsum("bchw,kc->bhwk", z, codebook).mul_(-2).add_(codebook.square().sum(1))
        return scores.argmin(-1)


class CodebookUsage:
    """Counts how often each code is chosen over an epoch or an evaluation set."""

    def __init__(self, codebook_size: int) -> None:
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)

    def update(self, tokens: Tensor) -> None:
        """Add tokens of any shape."""
        self.counts += torch.bincount(tokens.flatten().cpu(), minlength=len(self.counts))

    @property
    def codes_used(self) -> int:
        """Number of codes chosen at least once."""
        return int((self.counts > 0).sum())

    @property
    def usage(self) -> float:
        """Share of the codebook chosen at least once, 0 to 1."""
        return self.codes_used / len(self.counts)

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the code distribution: 1 (one code) to the codebook size (all equally often)."""
        probabilities = self.counts.double() / self.counts.sum().clamp(min=1)
        return float(torch.special.entr(probabilities).sum().exp())


class DeadCodes:
    """Finds codes that no latent has chosen for `after` steps, and moves them onto latents that are there.

    Every code starts out dead, so that the first steps place the codebook among the latents.
    """

    def __init__(self, codebook_size: int, after: int) -> None:
        self.after = after
        self.unused_steps = torch.full((codebook_size,), after, dtype=torch.int64)

    @torch.no_grad()
    def restart(self, codebook: Tensor, latents: Tensor, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """Count one step with its latents (B, C, h, w) and tokens (B, h, w); returns the rows that were moved, (M,)."""
        used = torch.bincount(tokens.flatten(), minlength=len(codebook)).cpu() > 0
        self.unused_steps = torch.where(used, 0, self.unused_steps + 1)
        vectors = latents.detach().movedim(1, -1).flatten(0, 2)
        dead = (self.unused_steps > self.after).nonzero().flatten()[: len(vectors)]
        chosen = torch.randperm(len(vectors), generator=generator)[: len(dead)]
        codebook[dead.to(codebook.device)] = vectors[chosen.to(vectors.device)].to(codebook.dtype)
        self.unused_steps[dead] = 0
        return dead
