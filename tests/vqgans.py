"""Tokenizers of taming and LlamaGen as their projects compose and save them."""

import json
import re
import zlib
from pathlib import Path

import numpy as np
import torch
import yaml
from taming.modules.diffusionmodules import model as taming
from taming.modules.vqvae.quantize import VectorQuantizer
from torch import nn

LLAMAGEN = Path(__file__).parent / "fixtures" / "llamagen"

SMALL = {
    "double_z": False,
    "z_channels": 16,
    "resolution": 32,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "dropout": 0.0,
}
F16 = SMALL | {
    "z_channels": 256,
    "resolution": 256,
    "ch": 128,
    "ch_mult": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [16],
}


class Original(nn.Module):
    """What taming's VQModel composes; every weight is random, so that no two can be mistaken for each other."""

    def __init__(self, sizes, codes, dim):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = taming.Encoder(**sizes)
        self.decoder = taming.Decoder(**sizes)
        self.quantize = VectorQuantizer(codes, dim, beta=0.25)
        self.quant_conv = nn.Conv2d(sizes["z_channels"], dim, 1)
        self.post_quant_conv = nn.Conv2d(dim, sizes["z_channels"], 1)
        with torch.no_grad():
            for tensor in self.parameters():
                if tensor.ndim > 1:
                    tensor.normal_(std=tensor[0].numel() ** -0.5)
                else:
                    tensor.normal_(std=0.2)
            for name, tensor in self.named_parameters():
                if re.search(r"norm\w*\.weight$", name):
                    tensor.add_(1)
        self.eval()

    @torch.no_grad()
    def latents(self, images):
        return self.quant_conv(self.encoder(images))

    @torch.no_grad()
    def give_codes_near(self, latents):
        """Of the latents, each in another place, as far as there are codes; tokens are then many and clear."""
        vectors = latents.movedim(1, -1).flatten(0, 2)
        codes = self.quantize.embedding.weight
        places = torch.randperm(len(codes))[: len(vectors)]
        codes[places] = vectors[: len(places)] + 0.1 * vectors.std() * torch.randn(len(places), vectors.shape[1])

    @torch.no_grad()
    def tokens_and_pictures(self, latents):
        quantized, _, (_, _, tokens) = self.quantize(latents)
        return tokens.reshape(latents[:, 0].shape), self.decoder(self.post_quant_conv(quantized))


def small_original():
    """32 px, 8x8 tokens of 64 codes; and an image."""
    model = Original(SMALL, codes=64, dim=16)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    model.give_codes_near(model.latents(images))
    return model, images


def taming_yaml(path, sizes, codes, dim, **model):
    params = {"embed_dim": dim, "n_embed": codes, "ddconfig": sizes, "lossconfig": {"target": "taming.Loss"}}
    values = {"base_learning_rate": 4.5e-6, "target": "taming.models.vqgan.VQModel", "params": params} | model
    path.write_text(yaml.safe_dump({"model": values, "data": {"target": "main.DataModuleFromConfig"}}))
    return path


def llamagen_keys(name):
    return json.loads((LLAMAGEN / f"llamagen_{name}_keys.json").read_text())["state_dict"]


def llamagen_value(name, shape):
    """A weight by the rule of the fixtures."""
    if name == "quantize.codebook_used":
        return torch.zeros(shape)
    normal = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape)
    if name.endswith(".bias"):
        normal *= 0.02
    elif len(shape) == 1:
        normal = 1 + 0.1 * normal
    elif name != "quantize.embedding.weight":
        normal /= np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(normal.astype(np.float32))


def llamagen_images():
    random = np.random.RandomState(0)
    low = random.uniform(-1, 1, (2, 8, 8, 3)).repeat(16, axis=1).repeat(16, axis=2)
    images = (low + 0.1 * random.uniform(-1, 1, (2, 128, 128, 3))).astype(np.float32)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().clamp(-1, 1)


def as_llamagen(state):
    """taming's names, of three levels -> LlamaGen's."""
    names = {}
    for name in state:
        new = re.sub(r"^encoder\.down\.", "encoder.conv_blocks.", name)
        new = re.sub(r"^decoder\.up\.([012])\.", lambda up: f"decoder.conv_blocks.{'210'[int(up[1])]}.", new)
        new = re.sub(r"\.block\.(\d)", r".res.\1", new)
        new = new.replace("mid.block_1", "mid.0").replace("mid.attn_1", "mid.1").replace("mid.block_2", "mid.2")
        names[name] = new
    return {names[name]: tensor for name, tensor in state.items()}
