"""VQGAN tokenizers of other projects, read from their checkpoints: taming-transformers' and LlamaGen's.

Sizes come from their configuration or from the weights themselves; then every tensor has to be there, fit and be
finite, and the messages name it as their file does.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor

from vqhit.config import Config, ConfigError, Count, Decay, Layers
from vqhit.hub import check_tensors
from vqhit.models import VQHiT, VQHiTConfig
from vqhit.pickles import read_state_dict
from vqhit.quantizer import QuantizerConfig
from vqhit.vqgan import ConvDecoderConfig, EncoderConfig


class _TamingSizes(Config):
    """taming's `ddconfig`: the sizes of encoder and decoder."""

    double_z: Literal[False]
    z_channels: Count
    resolution: Count
    in_channels: Literal[3]
    out_ch: Literal[3]
    ch: Count
    ch_mult: tuple[Count, ...]
    num_res_blocks: Layers
    attn_resolutions: tuple[Count, ...]
    dropout: Decay = 0.0
    """Of training."""
    resamp_with_conv: Literal[True] = True


class _TamingParams(Config):
    """Arguments of taming's VQModel; what changes no tensor may be anything."""

    embed_dim: Count
    n_embed: Count
    ddconfig: _TamingSizes
    remap: None = None
    colorize_nlabels: None = None
    lossconfig: Any = None
    ckpt_path: Any = None
    ignore_keys: Any = None
    image_key: Any = None
    monitor: Any = None
    sane_index_shape: Any = None


class _TamingModel(Config):
    target: Literal["taming.models.vqgan.VQModel"] = "taming.models.vqgan.VQModel"
    params: _TamingParams
    base_learning_rate: Any = None


class _TamingFile(Config):
    """A YAML file of taming's; its data and its trainer are left out."""

    model_config = ConfigDict(extra="ignore")
    model: _TamingModel


def taming_vqgan(checkpoint: Path | str, config: Path | str) -> VQHiT:
    """Read a VQGAN of taming-transformers, a `VQModel`: its Lightning checkpoint, or state dict, and its YAML file.

    The model is in eval mode, in float32. Its loss is left out. Raises `ValueError` for a file that cannot be read, is
    unsafe, or does not fit, and `ConfigError` for a configuration of anything else.
    """
    checkpoint = Path(checkpoint)
    params = _TamingFile.from_yaml(config).model.params
    sizes = params.ddconfig
    maps = [sizes.resolution >> level for level in range(len(sizes.ch_mult))]
    shared: dict[str, Any] = {
        "channels": sizes.ch,
        "channel_multipliers": sizes.ch_mult,
        "num_res_blocks": sizes.num_res_blocks,
        "attention_resolutions": tuple(size for size in sizes.attn_resolutions if size in maps),  # as taming: no error
        "z_channels": sizes.z_channels,
    }
    try:
        ours = VQHiTConfig(
            encoder=EncoderConfig(**shared),
            quantizer=QuantizerConfig(codebook_size=params.n_embed, dim=params.embed_dim),
            decoder=ConvDecoderConfig(resolution=sizes.resolution, **shared),
        )
    except ConfigError as error:
        raise ConfigError(error.problems, f"{config}: no such model can be had") from None
    weights = read_state_dict(checkpoint, "state_dict", bare=True)
    if any(name.startswith("first_stage_model.") for name in weights):
        raise ValueError(
            f"{checkpoint}: a transformer or diffusion model over a first-stage VQGAN; give that VQGAN's own checkpoint"
        )
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("loss.")}
    return _load(ours, kept, _taming_name, checkpoint)


def llamagen_vq(checkpoint: Path | str, *, weights: str = "model", image_size: int = 256) -> VQHiT:
    """Read a VQ tokenizer of LlamaGen (VQ-16, VQ-8): the weights say its sizes, `image_size` those of the images.

    `weights` chooses among those of the file: `ema` are running means, where there are any; LlamaGen's own tokens are
    of `model`. The codebook is kept as it is and normalised at each use. The model is in eval mode, in float32. Raises
    `ValueError` for a file that cannot be read, is unsafe, or does not fit, and `ConfigError` for sizes that make no
    model.
    """
    checkpoint = Path(checkpoint)
    if weights not in ("model", "ema"):
        raise ValueError(f"weights {weights!r}; allowed: model, ema")
    found = read_state_dict(checkpoint, weights)
    found.pop("quantize.codebook_used", None)  # a log of training
    try:
        config = _llamagen_config(found, image_size)
    except ConfigError as error:
        raise ConfigError(error.problems, f"{checkpoint}: no such model can be had") from None
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from None
    levels = len(config.encoder.channel_multipliers)
    return _load(config, found, lambda name: _llamagen_name(name, levels), checkpoint)


def _taming_name(name: str) -> str:
    return "quantize.embedding.weight" if name == "quantizer.codebook" else name


def _llamagen_name(name: str, levels: int) -> str:
    """LlamaGen's name of one of our tensors; its decoder counts levels from the lowest resolution."""
    name = re.sub(r"^decoder\.up\.(\d+)", lambda up: f"decoder.conv_blocks.{levels - 1 - int(up[1])}", name)
    name = name.replace("encoder.down.", "encoder.conv_blocks.").replace(".block.", ".res.")
    for ours, theirs in (("block_1", "0"), ("attn_1", "1"), ("block_2", "2")):
        name = name.replace(f".mid.{ours}.", f".mid.{theirs}.")
    return _taming_name(name)


def _llamagen_config(weights: dict[str, Tensor], image_size: int) -> VQHiTConfig:
    """The sizes that shapes and names say; whether all tensors fit them is checked later."""

    def size(name: str, axis: int) -> int:
        if name not in weights:
            raise ValueError(f"missing tensor {name}, which every VQ tokenizer of LlamaGen has")
        if weights[name].ndim <= axis or not weights[name].shape[axis]:
            raise ValueError(f"tensor {name} is {tuple(weights[name].shape)}; no such layer")
        return weights[name].shape[axis]

    def count(before: str) -> int:
        return len({match[1] for name in weights if (match := re.match(re.escape(before) + r"(\d+)\.", name))})

    channels = size("encoder.conv_in.weight", 0)

    def multipliers(part: str) -> list[int]:
        blocks = [
            f"{part}.conv_blocks.{level}.res.0.conv1.weight" for level in range(count(f"{part}.conv_blocks.") or 1)
        ]
        for block in blocks:
            if size(block, 0) % channels:
                raise ValueError(f"tensor {block} makes {size(block, 0)} channels; expected a multiple of {channels}")
        return [size(block, 0) // channels for block in blocks]

    encoder, decoder = multipliers("encoder"), multipliers("decoder")[::-1]
    downsampling = 1 << (len(encoder) - 1)
    if image_size < 2 * downsampling or image_size % downsampling:
        raise ValueError(f"image size {image_size}; of this tokenizer it is a multiple of {downsampling}, two at least")
    lowest = (image_size // downsampling,)  # attention is in the lowest level, whatever its resolution
    return VQHiTConfig(
        encoder=EncoderConfig(
            channels=channels,
            channel_multipliers=tuple(encoder),
            num_res_blocks=count("encoder.conv_blocks.0.res."),
            attention_resolutions=lowest,
            z_channels=size("encoder.conv_out.weight", 0),
        ),
        quantizer=QuantizerConfig(
            codebook_size=size("quantize.embedding.weight", 0), dim=size("quantize.embedding.weight", 1), normalize=True
        ),
        decoder=ConvDecoderConfig(
            resolution=image_size,
            channels=channels,
            channel_multipliers=tuple(decoder),
            num_res_blocks=count("decoder.conv_blocks.0.res.") - 1,
            attention_resolutions=lowest,
            z_channels=size("decoder.conv_in.weight", 1),
        ),
    )


def _load(config: VQHiTConfig, weights: dict[str, Tensor], their_name: Callable[[str], str], path: Path) -> VQHiT:
    """A model of exactly these weights, copied out of the file."""
    try:
        with torch.device("meta"):
            model = VQHiT(config)
    except RuntimeError as error:
        raise ConfigError(f"no such model can be built ({error})", str(path)) from None
    own = {name: _own(tensor) for name, tensor in weights.items()}
    state = model.state_dict()
    check_tensors({their_name(name): tensor for name, tensor in state.items()}, own, path)
    model.load_state_dict({name: own[their_name(name)] for name in state}, strict=True, assign=True)
    return model.eval()


def _own(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():  # refused by the check
        return tensor
    return torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor)
