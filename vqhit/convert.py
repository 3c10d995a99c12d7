"""Weights of others, renamed and transposed into ours."""

import re
from collections.abc import Mapping

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

# Canonical name of the official HiT-GAN generator -> ours, first match wins. Digits stand for themselves.
_HIT_GAN_RENAMES = [
    (r"dense_layer\.(kernel|bias)", r"stem.feature_map.\1"),
    (r"embedding_layer\.dense\.(kernel|bias)", r"stem.token_projection.\1"),
    (r"embedding_layer\.position", r"stem.tokens.position_embedding"),
    (r"embedding_layer\.norm\.(.+)", r"stem.tokens.norm.\1"),
    (r"position_embeddings\.(\d+)", r"backbone.stages.\1.position_embedding"),
    (r"blocks\.(\d+)\.cross\.(.+)", r"backbone.stages.\1.cross.\2"),
    (r"blocks\.(\d+)\.(?:self|mlp)\.(\d+)\.(.+)", r"backbone.stages.\1.blocks.\2.\3"),
    (r"to_rgb\.(\d+)\.norm\.(.+)", r"backbone.stages.\1.to_rgb.norm.\2"),
    (r"to_rgb\.(\d+)\.dense\.(.+)", r"backbone.stages.\1.to_rgb.linear.\2"),
    (r"upsamplings\.(\d+)\.dense\.(kernel|bias)", r"backbone.upsamplings.\1.\2"),
]
_HIT_GAN_LEAVES = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_DISCRIMINATOR_NAME = re.compile(
    r"(from_rgb|blocks\.\d+\.conv[01]|final\.(conv|dense[01]))\.(kernel|bias)|blocks\.\d+\.skip\.kernel"
)


def hit_gan_generator(variables: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Map the variables of an official HiT-GAN generator to the state dict of `HiTGenerator`, any preset.

    Keys are canonical names (`blocks.0.cross.attention.query.kernel`, `embedding_layer.position`, ...), values are
    arrays in TensorFlow's layout: dense [in, out], query/key/value [in, heads, width], output [heads, width, out],
    position [1, height, width, channels]. Load the result with `strict=True`. Raises `ValueError` for an unknown name.
    """
    state = {}
    for name, array in variables.items():
        ours = _rename(name)
        state[ours] = torch.tensor(np.ascontiguousarray(_transpose(name, array)))
        if ours.endswith(".running_mean"):  # torch's own counter; unused with a fixed momentum
            state[ours.removesuffix("running_mean") + "num_batches_tracked"] = torch.tensor(0)
    return state


def hit_gan_discriminator(variables: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Map the variables of an official HiT-GAN discriminator to the state dict of `Discriminator`, any size.

    Keys are canonical names (`from_rgb.kernel`, `blocks.0.skip.kernel`, `final.dense0.bias`, ...), values are arrays in
    TensorFlow's layout: convolution [height, width, in, out], dense [in, out], the first one's inputs in the order
    height, width, channel. Load the result with `strict=True`. Raises `ValueError` for an unknown name.
    """
    state = {}
    for name, array in variables.items():
        if not _DISCRIMINATOR_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no variable of a HiT-GAN discriminator")
        if name == "final.dense0.kernel":  # our inputs are in the order channel, height, width
            array = rearrange(array, "(h w c) out -> out (c h w)", h=4, w=4)
        elif name.endswith(".kernel"):
            array = np.moveaxis(array, (-1, -2), (0, 1))
        head, _, leaf = name.replace(".dense0.", ".fc1.").replace(".dense1.", ".fc2.").rpartition(".")
        state[f"{head}.{_HIT_GAN_LEAVES.get(leaf, leaf)}"] = torch.tensor(np.ascontiguousarray(array))
    return state


def _rename(name: str) -> str:
    for pattern, replacement in _HIT_GAN_RENAMES:
        if match := re.fullmatch(pattern, name):
            renamed = match.expand(replacement).replace(".dense0.", ".fc1.").replace(".dense1.", ".fc2.")
            head, _, leaf = renamed.rpartition(".")
            return f"{head}.{_HIT_GAN_LEAVES.get(leaf, leaf)}"
    raise ValueError(f"{name!r} is no variable of a HiT-GAN generator")


def _transpose(name: str, array: np.ndarray) -> np.ndarray:
    if name.endswith("attention.output.kernel"):
        return array.reshape(-1, array.shape[-1]).T
    if name.endswith(".kernel"):  # dense, and query, key, value with their heads laid out one after the other
        return array.reshape(array.shape[0], -1).T
    if name == "embedding_layer.position":
        return array.reshape(-1, array.shape[-1])
    if name.startswith("position_embeddings."):
        return array[0]
    return array.reshape(-1)
