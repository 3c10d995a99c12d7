"""`VQHiT`, an image tokenizer: VQGAN encoder, codebook, HiT decoder; composition and shapes, training is elsewhere.

Images are (B, 3, H, W) floats in [-1, 1].
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from vqhit import images as image_files
from vqhit.card import ModelKind
from vqhit.hit import HiTBackbone
from vqhit.hub import Pretrained
from vqhit.quantizer import Quantized
from vqhit.sizes import Sizes
from vqhit.stems import CodeStem
from vqhit.tokenizer_config import VQHiTConfig as VQHiTConfig
from vqhit.vector_quantize import build_quantizer
from vqhit.vqgan import ConvDecoder, ConvDecoderConfig, Encoder

_PIXELS_AT_A_TIME = 256 * 256
"""Of the images that are decoded at a time on the CPU."""


def _at_a_time(micro_batch: int | None, default: int) -> int:
    if micro_batch is not None and (type(micro_batch) is not int or micro_batch < 1):
        raise ValueError(f"micro_batch is {micro_batch!r}; allowed: a whole number, 1 or more")
    return micro_batch or default


class VQHiTOutput(NamedTuple):
    """What a training forward pass returns."""

    reconstruction: Tensor
    """(B, 3, H, W), unclamped."""
    tokens: Tensor
    """(B, h, w) int64."""
    codebook_loss: Tensor
    """Scalar; 0 where tokens are frozen."""
    latents: Tensor
    """The encoder's output before quantization, (B, C, h, w)."""


class VQHiT(Pretrained):
    """An image tokenizer: VQGAN encoder, codebook, HiT decoder (paper section 4.3 and appendix A.5).

    VQGAN's own convolutional decoder may take HiT's place, as the baseline to compare with.

    `encode` and `decode` are for use and take no gradient; call `eval()` first on a model that was not loaded, since
    HiT's batch normalisation differs in training mode. Calling the model is the training pass.
    """

    config_class = VQHiTConfig
    config: VQHiTConfig
    model_kind = ModelKind(
        "image-to-image",
        ("image-tokenizer", "vq-vae", "vqgan", "arxiv:2012.09841"),
        "An image tokenizer: it turns an image into a small grid of integers, and the grid back into the image.",
        """\
from vqhit import VQHiT

model = VQHiT.from_pretrained(SOURCE)
images = model.preprocess("photo.jpg")  # any size: the middle square, (1, 3, H, W) in [-1, 1]
tokens = model.encode(images)  # (1, h, w) int64
pictures = model.postprocess(model.decode(tokens))
pictures[0].save("reconstruction.png")""",
    )

    def __init__(self, config: VQHiTConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder, config.image_size)
        self.quant_conv = nn.Conv2d(config.encoder.z_channels, config.quantizer.dim, kernel_size=1)
        self.quantizer = build_quantizer(config.quantizer)
        dim = config.quantizer.dim
        if isinstance(config.decoder, ConvDecoderConfig):
            self.post_quant_conv = nn.Conv2d(dim, config.decoder.z_channels, kernel_size=1)
            self.decoder = ConvDecoder(config.decoder)
        else:
            assert config.stem is not None
            code_std = config.quantizer.code_std
            self.stem = CodeStem(config.stem, config.decoder, config.token_grid[0], dim, code_std)
            self.backbone = HiTBackbone(config.decoder)
        self.tokens_frozen = False

    def _optimize(self) -> None:
        self.encoder.to(memory_format=torch.channels_last)
        if isinstance(self.config.decoder, ConvDecoderConfig):
            self.decoder.to(memory_format=torch.channels_last)
        else:
            self.stem.fold()
            self.backbone.fold()

    def freeze_tokens(self) -> None:
        """Make training leave all that tokens come from as it is, `token_parts`: only the decoder trains.

        The training pass then finds tokens as `encode` does, also under autocast, and decodes their codes as `decode`.
        """
        self.tokens_frozen = True
        for part in self.token_parts:
            part.requires_grad_(False)

    def summary(self) -> dict[str, str]:
        """What the model is, for its card."""
        side, (height, width) = self.config.image_size, self.token_grid
        millions = {
            name: sum(parameter.numel() for part in parts for parameter in part.parameters()) / 1e6
            for name, parts in (("encoder", (self.encoder, self.quant_conv)), ("decoder", self.decoder_parts))
        }
        decoder = "HiT" if self.config.stem else "VQGAN's convolutions"
        return {
            "Images": f"{side}x{side} px, in [-1, 1]",
            "Tokens": f"{height}x{width}, of {self.codebook_size:,} codes ({self.num_tokens} per image)",
            "Encoder": f"VQGAN's, {millions['encoder']:.2f} million parameters",
            "Codebook": f"{self.config.quantizer.kind}, {self.config.quantizer.dim} dimensions",
            "Decoder": f"{decoder}, {millions['decoder']:.2f} million parameters",
        }

    @property
    def codebook_size(self) -> int:
        """Number of codes; tokens lie in [0, codebook_size)."""
        return self.config.quantizer.codebook_size

    @property
    def token_grid(self) -> tuple[int, int]:
        """Height and width of the native grid of tokens."""
        return self.config.token_grid

    token_part_names: ClassVar = ("encoder.", "quant_conv.", "quantizer.")
    """How names of their tensors begin."""

    @property
    def token_parts(self) -> tuple[nn.Module, ...]:
        """What an image's tokens come from: encoder, `quant_conv` and codebook."""
        return self.encoder, self.quant_conv, self.quantizer

    @property
    def decoder_parts(self) -> "tuple[CodeStem, HiTBackbone] | tuple[nn.Conv2d, ConvDecoder]":
        """What codebook vectors pass through: stem and HiT backbone, or VQGAN's `post_quant_conv` and decoder."""
        if isinstance(self.config.decoder, ConvDecoderConfig):
            return self.post_quant_conv, self.decoder
        return self.stem, self.backbone

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """What `torch.compile` gets, each by itself: all but the codebook, and an encoder whose tokens are frozen."""
        return [*self.decoder_parts] if self.tokens_frozen else [self.encoder, *self.decoder_parts]

    @property
    def last_layer(self) -> nn.Linear | nn.Conv2d:
        """The layer to RGB, against whose weight VQGAN's adaptive loss weight is taken."""
        return self.decoder_parts[1].last_layer

    @property
    def num_tokens(self) -> int:
        """Tokens per image."""
        return self.token_grid[0] * self.token_grid[1]

    def forward(self, images: Tensor) -> VQHiTOutput:
        """Training pass: encode, quantize with straight-through gradient, decode. (B, 3, H, W) in [-1, 1]."""
        if not self.tokens_frozen:
            latents = self.encode_latents(images)
            quantized = self.quantize(latents)
            return VQHiTOutput(self.decode_latents(quantized.latents), quantized.tokens, quantized.loss, latents)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            latents = self.encode_latents(images)
            tokens = self.quantize(latents).tokens
        return VQHiTOutput(self.decode_latents(self._codes(tokens)), tokens, latents.new_zeros(()), latents)

    @torch.no_grad()
    def encode(self, images: Tensor, micro_batch: int | None = None) -> Tensor:
        """Image to tokens: (B, 3, H, W) float in [-1, 1] -> (B, H/f, W/f) int64.

        `micro_batch` is how many images are encoded at a time: it bounds memory, and with 1 an image's tokens do not
        depend on the batch it comes in. By default that is 1 on the CPU, where it costs no time at 256 px and a
        little at 64 (and the encoder never takes more), and all of them elsewhere. Raises `ValueError` for a wrong
        shape, size, dtype or range of values.
        """
        self._check_images(images)
        low, high = (float(bound) for bound in images.aminmax()) if images.numel() else (0.0, 0.0)
        if not (low >= -1.05 and high <= 1.05):  # also false for NaN; the margin is for resampling overshoot
            raise ValueError(f"images range from {low:g} to {high:g}; allowed: -1 to 1 (see vqhit.images.from_uint8)")
        parts = images.split(_at_a_time(micro_batch, 1 if images.device.type == "cpu" else max(len(images), 1)))
        return torch.cat([self.quantize(self.encode_latents(part)).tokens for part in parts])

    @torch.no_grad()
    def decode(self, tokens: Tensor, micro_batch: int | None = None) -> Tensor:
        """Tokens to image: (B, h, w) int64, or (B, h*w) of the native grid -> (B, 3, H, W) float, clamped to [-1, 1].

        `micro_batch` is how many images are decoded at a time: it bounds memory, and moves values by rounding alone. By
        default that is on the CPU as many as have 256x256 pixels together, one at least, which takes no longer than all
        of them; elsewhere all. Raises `ValueError` for a wrong shape, size or dtype, or a token outside
        [0, codebook_size).
        """
        tokens = self._checked_tokens(tokens)
        on_cpu = tokens.device.type == "cpu"
        pixels = math.prod(tokens.shape[1:]) * self.config.encoder.downsampling**2
        parts = tokens.split(_at_a_time(micro_batch, max(1, _PIXELS_AT_A_TIME // pixels if on_cpu else len(tokens))))
        return torch.cat([self.decode_latents(self._codes(part)).clamp(-1, 1) for part in parts])

    @torch.no_grad()
    def reconstruct(self, images: Tensor, micro_batch: int | None = None) -> Tensor:
        """Encode and decode: (B, 3, H, W) in [-1, 1] -> the same shape, clamped; `micro_batch` as for both."""
        return self.decode(self.encode(images, micro_batch), micro_batch)

    def encode_latents(self, images: Tensor) -> Tensor:
        """Image to latents before quantization: (B, 3, H, W) in [-1, 1] -> (B, C, H/f, W/f)."""
        self._check_images(images)
        return self.quant_conv(self.encoder(images))

    def quantize(self, latents: Tensor) -> Quantized:
        """Latents (B, C, h, w) to codebook vectors, tokens and codebook loss."""
        self._check_latents(latents)
        return self.quantizer(latents)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Tokens (B, h, w) int64, or (B, h*w) of the native grid, to codebook vectors (B, C, h, w)."""
        return self._codes(self._checked_tokens(tokens))

    def decode_latents(self, quantized: Tensor) -> Tensor:
        """Codebook vectors (B, C, h, w) to image (B, 3, H, W): differentiable, unclamped."""
        self._check_latents(quantized)
        first, second = self.decoder_parts
        entering = first(quantized)
        return second(*entering) if isinstance(entering, tuple) else second(entering)

    def preprocess(
        self, photos: "Image.Image | Path | str | Iterable[Image.Image | Path | str]", size: int | None = None
    ) -> Tensor:
        """Photographs, as PIL images or paths, to (B, 3, H, W) in [-1, 1] on the model's device: ADM center crop.

        `size` is the side of the crop in px, the model's own by default. Raises `ValueError` for one that the model
        does not take, and `ImageError` (a `ValueError`) naming a file that is no image.
        """
        size = self.config.image_size if size is None else size
        if type(size) is not int or not self.config.sizes.allow(size):
            raise ValueError(
                f"size is {size!r}; this model takes {self.config.sizes.allowed(*[size] * (type(size) is int))}"
            )
        many = [photos] if isinstance(photos, Image.Image | Path | str) else list(photos)
        for photo in many:
            if not isinstance(photo, Image.Image | Path | str):
                raise ValueError(f"found a {type(photo).__name__}; a photograph is a PIL image or a path")
        pil = [image_files.to_rgb(p) if isinstance(p, Image.Image) else image_files.load_image(p) for p in many]
        if not pil:
            raise ValueError("no photographs given")
        crops = [image_files.pil_to_uint8(image_files.center_crop(image, size)) for image in pil]
        return image_files.from_uint8(torch.stack(crops)).to(self.quant_conv.weight)

    def postprocess(self, images: Tensor) -> list[Image.Image]:
        """(B, 3, H, W) floats in [-1, 1] to PIL images, rounded to 8 bits; raises `ValueError` for anything else."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are {tuple(images.shape)}; allowed: (B, 3, H, W)")
        return [image_files.uint8_to_pil(image) for image in image_files.to_uint8(images)]

    def _codes(self, tokens: Tensor) -> Tensor:
        return self.quantizer.lookup(tokens).to(self.quant_conv.weight.dtype)

    def _check_images(self, images: Tensor) -> None:
        self._check_shape("images", images, 3, self.config.sizes)

    def _check_latents(self, latents: Tensor) -> None:
        sizes = self.config.sizes.per(self.config.encoder.downsampling)
        self._check_shape("latents", latents, self.config.quantizer.dim, sizes)

    def _check_shape(self, name: str, tensor: Tensor, channels: int, sizes: Sizes) -> None:
        given = f"{name} are {tuple(tensor.shape)}; this model takes (B, {channels}, H, W), "
        if tensor.ndim != 4 or tensor.shape[1] != channels:
            raise ValueError(given + sizes.allowed())
        if not sizes.allow(*tensor.shape[2:]):
            raise ValueError(given + sizes.allowed(*tensor.shape[2:]))
        self._check_dtype(name, tensor)

    def _check_dtype(self, name: str, tensor: Tensor) -> None:
        expected = self.quant_conv.weight.dtype
        if tensor.dtype == expected:
            return
        if not (tensor.is_floating_point() and torch.is_autocast_enabled(tensor.device.type)):
            raise ValueError(f"{name} are {tensor.dtype}; this model's weights are {expected}, and so must they be")

    def _checked_tokens(self, tokens: Tensor) -> Tensor:
        height, width = self.token_grid
        if tokens.dtype != torch.int64:
            raise ValueError(f"tokens are {tokens.dtype}; allowed: torch.int64")
        sizes = self.config.sizes.per(self.config.encoder.downsampling)
        native = tokens.ndim == 2 and tokens.shape[1] == height * width
        if not native and not (tokens.ndim == 3 and sizes.allow(*tokens.shape[1:])):
            sides = tokens.shape[1:] if tokens.ndim == 3 else ()
            raise ValueError(
                f"tokens are {tuple(tokens.shape)}; this model takes (B, {height * width}), or (B, H, W), "
                f"{sizes.allowed(*sides)}"
            )
        if tokens.numel():
            low, high = (int(bound) for bound in tokens.aminmax())
            if low < 0 or high >= self.codebook_size:
                raise ValueError(f"tokens range from {low} to {high}; allowed: 0 to {self.codebook_size - 1}")
        return tokens.reshape(-1, height, width) if native else tokens
