"""taming-transformers' VQGAN as a peer of a tokenizer: its own modules, with the same encoder and the same codebook."""

from contextlib import redirect_stdout
from io import StringIO
from typing import cast

import torch
from taming.modules.diffusionmodules import model as taming
from taming.modules.vqvae.quantize import VectorQuantizer
from torch import Tensor, nn

from vqhit.models import VQHiT, VQHiTOutput
from vqhit.vqgan import ConvDecoderConfig, taming_arguments


class TamingVQGAN(nn.Module):
    """taming's own modules as its VQModel composes them, with the encoder and codebook of a model: the same tokens.

    The decoder has that encoder's sizes and random weights; if the model's own is VQGAN's, its sizes and its weights.
    Device and precision are the model's; it is in eval mode. Raises `ValueError` for a codebook that taming has not.
    """

    tokens_frozen = False

    def __init__(self, model: VQHiT) -> None:
        super().__init__()
        config = model.config
        if config.quantizer.kind != "vq" or config.quantizer.normalize:
            kind = config.quantizer.kind + ", normalised" * config.quantizer.normalize
            raise ValueError(f"the model's codebook is {kind}; taming's, to compare with, is vq, not normalised")
        self.same_decoder = isinstance(config.decoder, ConvDecoderConfig)
        decoder = config.decoder if isinstance(config.decoder, ConvDecoderConfig) else config.encoder
        codes, dim = config.quantizer.codebook_size, config.quantizer.dim
        self.encoder = taming.Encoder(**taming_arguments(config.encoder, config.image_size), double_z=False)
        self.quant_conv = nn.Conv2d(config.encoder.z_channels, dim, kernel_size=1)
        self.quantize = VectorQuantizer(codes, dim, beta=config.quantizer.commitment)
        self.post_quant_conv = nn.Conv2d(dim, decoder.z_channels, kernel_size=1)
        with redirect_stdout(StringIO()):  # taming prints the shape of its latents
            self.decoder = taming.Decoder(**taming_arguments(decoder, config.image_size))
        names = {"quantizer.codebook": "quantize.embedding.weight"}
        own = self.state_dict()
        shared = {names.get(name, name): tensor for name, tensor in model.state_dict().items()}
        self.load_state_dict(own | {name: tensor for name, tensor in shared.items() if name in own})
        self.to(model.quant_conv.weight).eval()

    @property
    def last_layer(self) -> nn.Conv2d:
        """The layer to RGB."""
        return cast(nn.Conv2d, self.decoder.conv_out)

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """As those of `VQHiT`."""
        return [self.encoder, self.post_quant_conv, self.decoder]

    def forward(self, images: Tensor) -> VQHiTOutput:
        """(B, 3, H, W) in [-1, 1], as VQHiT's; the β of its codebook loss is on the codebook's term."""
        latents = self.quant_conv(self.encoder(images))
        codes, loss, (_, _, tokens) = self.quantize(latents)
        return VQHiTOutput(self._decode(codes), tokens.view(latents[:, 0].shape), loss, latents)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h, w) int64; its quantizer also makes the codes."""
        latents = self.quant_conv(self.encoder(images))
        _, _, (_, _, tokens) = self.quantize(latents)
        return tokens.view(latents[:, 0].shape)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """(B, h, w) int64 -> (B, 3, H, W), not clamped."""
        return self._decode(self.quantize.embedding(tokens).movedim(-1, 1).contiguous())

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3, H, W), not clamped: the quantizer's codes go on to the decoder."""
        return self(images).reconstruction

    def _decode(self, codes: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(codes))
