"""Codebooks of vector-quantize-pytorch behind the interface of `Quantizer`: FSQ, LFQ, SimVQ. Imported when asked for.

Each returns `Quantized` with int64 tokens, and `lookup` gives exactly what its forward pass decodes. All run in
float32, or float64 if the latents are, also under autocast. Buffers that are no part of the state dict are made on the
CPU even while a model is being put together without weights.
"""

import torch
from torch import Tensor, nn

from vqhit.quantizer import Quantized, Quantizer, QuantizerConfig, import_vector_quantize


class FSQ(nn.Module):
    """Finite scalar quantization (Mentzer et al. 2023), no loss: (B, C, h, w) -> Quantized, values in [-1, 1]."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        assert config.levels is not None
        with torch.device("cpu"):
            self.inner = import_vector_quantize().FSQ(list(config.levels))

    def forward(self, latents: Tensor) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            codes, tokens = self.inner(latents.to(torch.promote_types(latents.dtype, torch.float32)))
        return Quantized(codes.to(latents.dtype), tokens.long(), codes.new_zeros(()))

    def lookup(self, tokens: Tensor) -> Tensor:
        """Return the codes of tokens: (B, h, w) int64 -> (B, C, h, w)."""
        return self.inner.indices_to_codes(tokens)


class LFQ(nn.Module):
    """Lookup-free quantization (Yu et al. 2023): (B, C, h, w) -> Quantized, codes of -1 and 1.

    The loss is entropy * (mean entropy of a latent's code - entropy of the mean) + commitment; 0 in eval mode.
    """

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        with torch.device("cpu"):
            self.inner = import_vector_quantize().LFQ(
                dim=config.dim,
                codebook_size=config.codebook_size,
                entropy_loss_weight=config.entropy,
                commitment_loss_weight=config.commitment,
            )

    def forward(self, latents: Tensor) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            codes, tokens, loss = self.inner(latents.to(torch.promote_types(latents.dtype, torch.float32)))
        return Quantized(codes.to(latents.dtype), tokens.long(), loss)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Return the codes of tokens: (B, h, w) int64 -> (B, C, h, w)."""
        return self.inner.indices_to_codes(tokens)


class SimVQ(nn.Module):
    """SimVQ (Zhu et al. 2024): a frozen random codebook behind one learned linear layer: (B, C, h, w) -> Quantized."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.inner = import_vector_quantize().SimVQ(
            config.dim,
            config.codebook_size,
            channel_first=True,
            rotation_trick=config.gradient == "rotation_trick",
            input_to_quantize_commit_loss_weight=config.commitment,
        )

    def forward(self, latents: Tensor) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            codes, tokens, loss = self.inner(latents.to(torch.promote_types(latents.dtype, torch.float32)))
        return Quantized(codes.to(latents.dtype), tokens, loss)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Return the codes of tokens: (B, h, w) int64 -> (B, C, h, w)."""
        return nn.functional.embedding(tokens, self.inner.codebook).movedim(-1, 1)


_KINDS: dict[str, type[Quantizer | FSQ | LFQ | SimVQ]] = {"vq": Quantizer, "fsq": FSQ, "lfq": LFQ, "sim_vq": SimVQ}


def build_quantizer(config: QuantizerConfig) -> Quantizer | FSQ | LFQ | SimVQ:
    """Return the quantizer that a configuration describes; raises `ValueError` if its library is missing."""
    return _KINDS[config.kind](config)
