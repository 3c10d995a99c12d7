"""The models on HiT, `VQHiT` and `HiTGenerator`; and any model by its configuration or its name."""

from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn

from vqhit.config import Config, Count
from vqhit.convnet import ConvNetGenerator, ConvNetGeneratorConfig
from vqhit.generator import Generator, generator_kind
from vqhit.hit import HiTBackbone, HiTConfig
from vqhit.hub import locate, saved_class
from vqhit.stems import NoiseStem
from vqhit.tokenizer import VQHiT as VQHiT
from vqhit.tokenizer import VQHiTConfig as VQHiTConfig
from vqhit.tokenizer import VQHiTOutput as VQHiTOutput


class HiTGeneratorConfig(Config):
    """Length of the noise vector and the sizes of the HiT that it feeds."""

    kind: Literal["hit_generator"] = "hit_generator"
    latent_dim: Count = 512
    backbone: HiTConfig

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels."""
        return self.backbone.resolution

    @classmethod
    def preset(cls, name: str) -> Self:
        """Return `hit-{s,b,l}-256`, `hit-b-1024` or `hit-{b,l}-128`."""
        backbone = HiTConfig.preset(name)
        return cls(latent_dim=256 if backbone.resolution == 128 else 512, backbone=backbone)


class HiTGenerator(Generator):
    """HiT as a GAN generator (paper section 3, Algorithm 1): noise (B, D) -> image (B, 3, H, W), unclamped."""

    config_class = HiTGeneratorConfig
    config: HiTGeneratorConfig
    model_kind = generator_kind(
        "HiTGenerator",
        "vqhit",
        "An unconditional image generator: HiT, a GAN whose generator is a transformer up to its last pixel.",
    )

    def __init__(self, config: HiTGeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = NoiseStem(config.latent_dim, config.backbone)
        self.backbone = HiTBackbone(config.backbone)

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """What `torch.compile` gets: all but a linear layer or two."""
        return [self.backbone]

    def _optimize(self) -> None:
        self.stem.fold()
        self.backbone.fold()

    def _images(self, z: Tensor) -> Tensor:
        return self.backbone(*self.stem(z))


def build_model(config: VQHiTConfig | HiTGeneratorConfig | ConvNetGeneratorConfig) -> VQHiT | Generator:
    """The model of a configuration, freshly initialised."""
    if isinstance(config, VQHiTConfig):
        return VQHiT(config)
    return HiTGenerator(config) if isinstance(config, HiTGeneratorConfig) else ConvNetGenerator(config)


def load_model(
    path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> VQHiT | Generator:
    """Load a model of whatever class is there; otherwise as `from_pretrained`."""
    folder = locate(path).folder
    name = saved_class(folder)
    for model_class in (HiTGenerator, ConvNetGenerator):
        if name == model_class.__name__:
            return model_class.from_pretrained(folder, device=device, dtype=dtype)
    return VQHiT.from_pretrained(folder, device=device, dtype=dtype)  # which refuses any other
