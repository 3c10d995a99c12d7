"""Codebooks of vector-quantize-pytorch behind the interface of `Quantizer`: FSQ, LFQ, SimVQ. Imported when asked for.

Each returns `Quantized` with int64 tokens, and `lookup` gives what the forward pass decodes. They run in float32, FSQ
and SimVQ in float64 if the latents are, also under autocast and in models of lower precision. Buffers that are no part
of the state dict are made on the CPU even while a model is being put together without weights.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vqhit.quantizer import Quantized, Quantizer, QuantizerConfig, import_vector_quantize


def _run(module: nn.Module, latents: Tensor) -> Any:
    """Call a module in float32 or more, its weights too."""
    exact = torch.promote_types(latents.dtype, torch.float32)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    tensors = {name: tensor.to(exact) for name, tensor in tensors.items() if tensor.is_floating_point()}
    with torch.autocast(latents.device.type, enabled=False):
        return torch.func.functional_call(module, tensors, (latents.to(exact),))


class FSQ(nn.Module):
    """Finite scalar quantization (Mentzer et al. 2023), no loss: (B, C, h, w) -> Quantized, values in [-1, 1]."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        assert config.levels is not None
        with torch.device("cpu"):
            self.inner = import_vector_quantize().FSQ(list(config.levels))

    def forward(self, latents: Tensor) -> Quantized:
        codes, tokens = _run(self.inner, latents)
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
        codes, tokens, loss = _run(self.inner, latents)
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
        codes, tokens, loss = _run(self.inner, latents)
        return Quantized(codes.to(latents.dtype), tokens, loss)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Return the codes of tokens: (B, h, w) int64 -> (B, C, h, w)."""
        with torch.autocast(tokens.device.type, enabled=False):
            return nn.functional.embedding(tokens, self.inner.codebook).movedim(-1, 1)


def build_quantizer(config: QuantizerConfig) -> Quantizer | FSQ | LFQ | SimVQ:
    """Return the quantizer that a configuration describes; raises `ValueError` if its library is missing."""
    match config.kind:
        case "fsq":
            return FSQ(config)
        case "lfq":
            return LFQ(config)
        case "sim_vq":
            return SimVQ(config)
        case "vq":
            return Quantizer(config)
