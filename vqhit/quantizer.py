"""The codebook: nearest code in float32, straight-through gradient, codebook and commitment loss; usage counts."""

import math
from types import ModuleType
from typing import Annotated, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, Strict, model_validator
from torch import Tensor, nn

from vqhit.config import Config, Count, Decay, Flag, NonNegative

_MAX_CODES = 2**24  # float32 counts exactly up to here, and FSQ counts in it


class QuantizerConfig(Config):
    """The kind and size of a codebook, and how it is trained.

    `vq` is a learned codebook. `fsq` (finite scalar quantization, Mentzer et al. 2023) rounds each of `dim` channels to
    one of `levels[i]` values; `lfq` (lookup-free, Yu et al. 2023) takes the signs of `dim` channels; `sim_vq` (Zhu et
    al. 2024) learns one linear layer over a frozen codebook. These three come from vector-quantize-pytorch.
    """

    kind: Literal["vq", "fsq", "lfq", "sim_vq"] = "vq"
    codebook_size: Count = 1024
    dim: Count = 256
    commitment: NonNegative = 0.25
    """Weight of the commitment term (beta of VQ-VAE); fsq has none."""
    update: Literal["gradient", "ema"] = "gradient"
    """vq: codes follow the optimizer, or are running means of the latents that chose them."""
    ema_decay: Decay = 0.99
    normalize: Flag = False
    """vq: latents and codes have length 1, as LlamaGen's (16384 codes of dimension 8)."""
    gradient: Literal["straight_through", "rotation_trick"] = "straight_through"
    """vq, sim_vq: how gradients pass to the latents; the rotation trick is Fifty et al. 2024."""
    levels: tuple[Annotated[int, Strict(), Field(ge=3)], ...] | None = None
    """fsq: values of each channel; their product is the codebook size."""
    entropy: NonNegative = 0.1
    """lfq: weight of its entropy terms."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind != "vq" and (self.update != "gradient" or self.normalize):
            raise ValueError(f"update and normalize are options of kind vq; this is {self.kind}")
        if self.kind in ("fsq", "lfq") and self.gradient != "straight_through":
            raise ValueError(f"gradient {self.gradient} is an option of kinds vq and sim_vq; this is {self.kind}")
        if (self.kind == "fsq") != (self.levels is not None):
            raise ValueError("kind fsq needs levels, one for each channel; other kinds have none")
        if self.levels is not None and (len(self.levels), math.prod(self.levels)) != (self.dim, self.codebook_size):
            raise ValueError(
                f"levels {list(self.levels)} make {math.prod(self.levels)} codes of dim {len(self.levels)}; "
                f"codebook_size is {self.codebook_size} and dim {self.dim}"
            )
        if self.codebook_size > _MAX_CODES:
            raise ValueError(f"codebook_size {self.codebook_size}; allowed: up to 2^24")
        if self.kind == "lfq" and self.codebook_size != 2**self.dim:
            raise ValueError(f"codebook_size {self.codebook_size}: lfq with dim {self.dim} has 2^{self.dim} codes")
        return self

    @property
    def code_std(self) -> float:
        """About the standard deviation of the codes that a fresh VQGAN encoder's latents, of 0.2, are replaced by."""
        if self.normalize:
            return 1 / math.sqrt(self.dim)
        return {"lfq": 1.0, "sim_vq": 1 / math.sqrt(3 * self.dim)}.get(self.kind, 0.2)


class Quantized(NamedTuple):
    """What `Quantizer` returns."""

    latents: Tensor
    """Codebook vectors, with the straight-through gradient, (B, C, h, w)."""
    tokens: Tensor
    """Index of the nearest code, (B, h, w) int64."""
    loss: Tensor
    """Codebook loss, a scalar."""


class Quantizer(nn.Module):
    """Replace each latent by its nearest code: (B, C, h, w) -> Quantized. A learned codebook, kind `vq`.

    The loss is ‖sg(z) - e‖² + β ‖z - sg(e)‖², means over elements (VQ-VAE, van den Oord et al. 2017, eq. 3), its first
    term left out if the codebook is a running mean. taming's legacy quantizer puts β on the first term; this one does
    not. Distances, argmin and loss are float32, or float64 if the latents are, also under autocast.

    Departure: codes start as wide as a fresh encoder's latents; taming's U(±1/K) is hundreds of times narrower, so that
    for a while all latents are as near to one code as to another.
    """

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        codebook = torch.empty(config.codebook_size, config.dim).normal_(std=config.code_std)
        self.codebook = nn.Parameter(codebook, requires_grad=config.update == "gradient")

    def forward(self, latents: Tensor) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            exact = torch.promote_types(latents.dtype, torch.float32)
            z, codebook = self._unit(latents.to(exact), 1), self._unit(self.codebook.to(exact), 1)
            tokens = self._nearest(z.detach(), codebook.detach())
            codes = F.embedding(tokens, codebook).permute(0, 3, 1, 2)
            loss = self.config.commitment * F.mse_loss(z, codes.detach())
            if self.config.update == "gradient":
                loss = loss + F.mse_loss(codes, z.detach())
            if self.config.gradient == "rotation_trick" and z.requires_grad:
                passed = _rotate(z, codes.detach())
            else:
                passed = z + (codes - z).detach()
        return Quantized(passed.to(latents.dtype), tokens, loss)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Return the codes of tokens: (B, h, w) int64 -> (B, C, h, w)."""
        return self._unit(F.embedding(tokens, self.codebook), -1).permute(0, 3, 1, 2)

    def vectors(self, latents: Tensor) -> Tensor:
        """Return latents (B, C, h, w) as rows to compare with codes: (B * h * w, C), detached, float32 or more."""
        exact = latents.detach().to(torch.promote_types(latents.dtype, torch.float32))
        return self._unit(exact.movedim(1, -1).flatten(0, 2), -1)

    def _unit(self, vectors: Tensor, axis: int) -> Tensor:
        return F.normalize(vectors, dim=axis) if self.config.normalize else vectors

    @staticmethod
    def _nearest(z: Tensor, codebook: Tensor) -> Tensor:
        """Index of the code with the least ‖z - e‖² = ‖z‖² - 2 z·e + ‖e‖²; ‖z‖² decides nothing."""
        scores = torch.einsum("bchw,kc->bhwk", z, codebook).mul_(-2).add_(codebook.square().sum(1))
        return scores.argmin(-1)


def _rotate(z: Tensor, codes: Tensor) -> Tensor:
    """The codes, as z rotated and stretched onto them by a constant: gradients turn with z (rotation trick)."""
    rotate_to = import_vector_quantize().vector_quantize_pytorch.rotate_to
    return rotate_to(z.movedim(1, -1), codes.movedim(1, -1)).movedim(-1, 1)


def import_vector_quantize() -> ModuleType:
    """Import vector-quantize-pytorch; raises `ValueError` with the way to install it."""
    try:
        import vector_quantize_pytorch
    except ImportError:
        raise ValueError("this codebook needs another package: pip install vector-quantize-pytorch") from None
    return vector_quantize_pytorch
