"""`VQHiTConfig`, the sizes of an image tokenizer, checked against each other."""

import math
from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from vqhit.config import Config, ConfigError, of_kind
from vqhit.hit import FIRST_SIZE, HiTConfig
from vqhit.quantizer import QuantizerConfig
from vqhit.sizes import Sizes
from vqhit.stems import StemConfig
from vqhit.vqgan import MAX_RESOLUTION, ConvDecoderConfig, EncoderConfig


class VQHiTConfig(Config):
    """An encoder, a codebook, and a decoder, whose resolution is the image size.

    The decoder is HiT, fed by a code stem, or, of kind `conv`, VQGAN's convolutional one: the baseline, without a stem.
    """

    kind: Literal["vqhit"] = "vqhit"
    encoder: EncoderConfig
    quantizer: QuantizerConfig
    stem: StemConfig | None = None
    """Of a HiT decoder, and only of one."""
    decoder: HiTConfig | ConvDecoderConfig

    @field_validator("decoder", mode="before")
    @classmethod
    def _choose_decoder(cls, decoder: Any) -> Any:
        return of_kind(decoder, {"hit": HiTConfig, "conv": ConvDecoderConfig}, default="hit")

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            self.encoder.check_attention(self.image_size)
        except ConfigError as error:
            raise ConfigError([(("encoder", *key), text) for key, text in error.problems]) from None
        if isinstance(self.decoder, ConvDecoderConfig):
            self._check_conv(self.decoder)
        else:
            self._check_hit()
        return self

    def _check_conv(self, decoder: ConvDecoderConfig) -> None:
        if self.stem is not None:
            raise ValueError("stem: a decoder of kind conv has none; leave it out")
        if (grid := self.token_grid[0]) < 2:
            raise ValueError(f"the encoder turns {self.image_size} px into a {grid}x{grid} token grid; at least 2x2")
        if decoder.downsampling != self.encoder.downsampling:
            raise ValueError(
                f"decoder.channel_multipliers enlarge {decoder.downsampling} times; the encoder reduces "
                f"{self.encoder.downsampling} times"
            )

    def _check_hit(self) -> None:
        if self.stem is None:
            raise ConfigError([(("stem",), "missing")])
        grid = self.token_grid[0]
        if grid < FIRST_SIZE:
            raise ValueError(
                f"the encoder turns {self.image_size} px into a {grid}x{grid} token grid; HiT needs at least "
                f"{FIRST_SIZE}x{FIRST_SIZE}"
            )
        if grid % self.stem.latent_grid:
            raise ValueError(f"stem.latent_grid {self.stem.latent_grid} does not divide the {grid}x{grid} token grid")
        if self.stem.skip and grid != 2 * FIRST_SIZE:
            raise ValueError(
                f"stem.skip needs a token grid of 16x16, the second stage's map; this one is {grid}x{grid}"
            )

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels."""
        return self.decoder.resolution

    @property
    def sizes(self) -> Sizes:
        """Heights and widths of images that the model takes, in pixels; its own are among them.

        With a HiT decoder the maps of all stages divide into the blocks of attention, and the codes into latent tokens.
        """
        unit = smallest = self.encoder.downsampling
        if self.stem is None or isinstance(self.decoder, ConvDecoderConfig):
            smallest *= 2
        else:
            unit = self.decoder.first_map_unit * self.image_size // FIRST_SIZE
            if self.decoder.cross_attention:
                unit = math.lcm(unit, self.image_size // self.stem.latent_grid)
            smallest = unit
        return Sizes(unit, smallest, MAX_RESOLUTION // unit * unit)

    @property
    def normalises_one_token(self) -> bool:
        """Whether batch norm's statistics of one image would be those of a single latent token."""
        decoder = self.decoder
        if self.stem is None or isinstance(decoder, ConvDecoderConfig):
            return False
        return self.stem.latent_grid == 1 and decoder.norm == "batch" and decoder.cross_attention

    @property
    def token_grid(self) -> tuple[int, int]:
        """Height and width of the grid of tokens."""
        side = self.image_size // self.encoder.downsampling
        return side, side

    @classmethod
    def preset(cls, name: str) -> Self:
        """Return `vqhit-{s,b,l}-256`: the VQGAN f16 encoder, 1024 codes, and the HiT of that size (appendix A.5)."""
        if name not in (presets := [f"vqhit-{size}-256" for size in "sbl"]):
            raise ValueError(f"no preset {name!r}; there are: {', '.join(presets)}")
        return cls(
            encoder=EncoderConfig(),
            quantizer=QuantizerConfig(),
            stem=StemConfig(skip=True),
            decoder=HiTConfig.preset(name.removeprefix("vq")),
        )
