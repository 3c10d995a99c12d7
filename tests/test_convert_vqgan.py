"""Tokenizers of taming and LlamaGen give the same tokens, latents and images here as there."""

import argparse
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from taming.modules.diffusionmodules import model as taming

from tests.vqgans import (
    F16,
    LLAMAGEN,
    SMALL,
    Original,
    as_llamagen,
    llamagen_images,
    llamagen_keys,
    llamagen_value,
    small_original,
    taming_yaml,
)
from vqhit.config import ConfigError
from vqhit.convert_vqgan import llamagen_vq, taming_vqgan


@pytest.fixture(scope="module")
def small():
    return small_original()


@pytest.fixture
def config(tmp_path):
    return taming_yaml(tmp_path / "model.yaml", SMALL, 64, 16)


@pytest.fixture
def state(small):
    """A copy, to be spoilt."""
    return {name: tensor.clone() for name, tensor in small[0].state_dict().items()}


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


def changed(config, key, value):
    """The YAML file with one dotted key under `model` set."""
    values = yaml.safe_load(config.read_text())
    *parents, last = ["model", *key.split(".")]
    inner = values
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    config.write_text(yaml.safe_dump(values))
    return config


def assert_equal(model, original, images, latents=None):
    """`latents`: the original's, if they are there already."""
    latents = original.latents(images) if latents is None else latents
    tokens, pictures = original.tokens_and_pictures(latents)
    with torch.no_grad():
        found = model.encode_latents(images)
        decoded = model.decode_latents(model.lookup(tokens))
    print(f"latents {(found - latents).abs().max():.1e}, images {(decoded - pictures).abs().max():.1e}")
    assert tokens.unique().numel() > tokens.numel() / 2
    assert torch.equal(model.quantize(found).tokens, tokens)
    torch.testing.assert_close(found, latents, atol=1e-4, rtol=0)
    torch.testing.assert_close(decoded, pictures, atol=1e-4, rtol=0)


def test_a_small_taming_vqgan_gives_the_same_numbers(small, config, tmp_path):
    original, images = small
    checkpoint = saved(tmp_path / "last.ckpt", {"state_dict": original.state_dict(), "epoch": 3})
    model = taming_vqgan(checkpoint, str(config))
    assert not model.training
    assert (model.token_grid, model.codebook_size, model.config.quantizer.normalize) == ((8, 8), 64, False)
    assert_equal(model, original, images)
    assert torch.equal(model.encode(images), original.tokens_and_pictures(original.latents(images))[0])


def test_the_f16_vqgan_of_imagenet_gives_the_same_numbers(tmp_path):
    original = Original(F16, codes=1024, dim=256)
    images = F.interpolate(torch.rand(1, 3, 32, 32) * 2 - 1, size=256) + 0.1 * torch.randn(1, 3, 256, 256)
    images = images.clamp(-1, 1)
    latents = original.latents(images)
    original.give_codes_near(latents)
    state = original.state_dict()
    assert len(state) == len(llamagen_keys("vq16")) - 1  # VQ-16 has the same layers, and a log
    for name, shape in (
        ("encoder.down.4.attn.1.proj_out.weight", (512, 512, 1, 1)),
        ("encoder.down.3.downsample.conv.weight", (256, 256, 3, 3)),
        ("decoder.up.4.attn.2.q.weight", (512, 512, 1, 1)),
        ("decoder.up.1.upsample.conv.weight", (128, 128, 3, 3)),
        ("quantize.embedding.weight", (1024, 256)),
        ("post_quant_conv.weight", (256, 256, 1, 1)),
    ):
        assert state[name].shape == shape
    state["loss.discriminator.main.0.weight"] = torch.ones(2)
    checkpoint = saved(tmp_path / "last.ckpt", {"state_dict": state, "options": argparse.Namespace(lr=1.0)})
    model = taming_vqgan(checkpoint, taming_yaml(tmp_path / "model.yaml", F16, 1024, 256))
    checkpoint.unlink()
    assert_equal(model, original, images, latents)


def test_a_bare_state_dict_the_older_format_and_half_precision_are_read(small, state, config, tmp_path):
    original, images = small
    legacy = saved(tmp_path / "a.ckpt", {"state_dict": state}, _use_new_zipfile_serialization=False)
    for path in (saved(tmp_path / "b.ckpt", state), legacy):
        assert_equal(taming_vqgan(path, config), original, images)
    for dtype in (torch.float16, torch.bfloat16):
        converted = taming_vqgan(saved(tmp_path / "c.ckpt", {n: t.to(dtype) for n, t in state.items()}), config)
        assert {tensor.dtype for tensor in converted.state_dict().values()} == {torch.float32}
        assert torch.equal(converted.encoder.conv_in.weight, state["encoder.conv_in.weight"].to(dtype).float())


def test_the_weights_are_no_longer_the_files(state, config, tmp_path):
    """Contiguous and of their own memory, whatever is written into the file."""
    weight = state["encoder.conv_in.weight"]
    state["encoder.conv_in.weight"] = weight.to(memory_format=torch.channels_last)
    path = saved(tmp_path / "last.ckpt", {"state_dict": state})
    model = taming_vqgan(path, config)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    for tensor in model.state_dict().values():
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 4
    assert torch.equal(model.encoder.conv_in.weight, weight)


def test_tamings_models_and_losses_are_not_imported(state, config, tmp_path):
    taming_vqgan(saved(tmp_path / "last.ckpt", {"state_dict": state}), config)
    assert not {"taming.models.vqgan", "taming.modules.losses", "main", "omegaconf"} & sys.modules.keys()


def test_attention_resolutions_that_no_map_has_are_no_attention(tmp_path):
    """As in taming: of 24 px nothing is said."""
    original = Original(SMALL | {"attn_resolutions": [24]}, codes=64, dim=16)
    config = taming_yaml(tmp_path / "model.yaml", SMALL | {"attn_resolutions": [24]}, 64, 16)
    model = taming_vqgan(saved(tmp_path / "last.ckpt", original.state_dict()), config)
    assert model.config.encoder.attention_resolutions == ()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("target", "taming.models.vqgan.GumbelVQ", "model.target: found 'taming.models.vqgan.GumbelVQ'.*VQModel"),
        ("params.ddconfig.double_z", True, "model.params.ddconfig.double_z: found True; .*False"),
        ("params.ddconfig.in_channels", 1, "in_channels: found 1; .*3"),
        ("params.ddconfig.out_ch", 4, "out_ch: found 4; .*3"),
        ("params.ddconfig.ch", "128", "ch: found '128'; .*integer"),
        ("params.ddconfig.ch", 33, "channels 33: group normalisation needs a multiple of 32"),
        ("params.ddconfig.ch_mult", 2, "ch_mult: found 2"),
        ("params.ddconfig.ch_mult", [], "channel_multipliers is empty"),
        ("params.ddconfig.resolution", 30, "resolution 30: not a multiple of 4"),
        ("params.ddconfig.attn_type", "none", "attn_type: unknown key"),
        ("params.ddconfig", {1: 2}, "key 1 .* is no text"),
        ("params.remap", "used.npy", "remap: found 'used.npy'"),
        ("params.n_embed", "${codes}", r"n_embed: found '\$\{codes\}'"),
        ("params", None, "model.params: found None"),
        ("ckpt", 1, "model.ckpt: unknown key"),
    ],
)
def test_what_is_no_vqmodel_of_taming_is_refused_by_its_configuration(config, tmp_path, key, value, message):
    with pytest.raises(ConfigError, match=f"model.yaml: .*{message}"):
        taming_vqgan(tmp_path / "not_read.ckpt", changed(config, key, value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "model.yaml: "),
        ("data: 1", "model: missing"),
        ("model: {params: {embed_dim: 4}}", "model.params.n_embed: missing; model.params.ddconfig: missing"),
        ("model: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text, message):
    (tmp_path / "model.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        taming_vqgan(tmp_path / "not_read.ckpt", tmp_path / "model.yaml")
    assert "\n" not in str(error.value)


def test_a_missing_target_is_a_vqmodel(state, config, tmp_path):
    values = yaml.safe_load(config.read_text())
    del values["model"]["target"]
    config.write_text(yaml.safe_dump(values))
    taming_vqgan(saved(tmp_path / "last.ckpt", state), config)


SPOILT = {
    "missing tensor encoder.mid.block_1.norm1.weight": lambda s: s.pop("encoder.mid.block_1.norm1.weight"),
    "missing tensor quantize.embedding.weight": lambda s: s.pop("quantize.embedding.weight"),
    "extra tensor model_ema.decay": lambda s: s.update({"model_ema.decay": torch.ones(1)}),
    r"tensor quantize.embedding.weight is \(4, 16\); the configuration says \(64, 16\)": lambda s: s.update(
        {"quantize.embedding.weight": torch.ones(4, 16)}
    ),
    "tensor quantize.embedding.weight is torch.int64": lambda s: s.update(
        {"quantize.embedding.weight": torch.ones(64, 16, dtype=torch.int64)}
    ),
    "tensor encoder.conv_in.bias holds values that are not finite": lambda s: s["encoder.conv_in.bias"][:1].fill_(
        torch.inf
    ),
    "decoder.conv_out.bias holds values that are not finite": lambda s: s.update(
        {"decoder.conv_out.bias": torch.full((3,), 1e300, dtype=torch.float64)}
    ),
    "over a first-stage VQGAN; give that VQGAN's own checkpoint": lambda s: s.update(
        {f"first_stage_model.{name}": tensor for name, tensor in s.items()}
    ),
}


@pytest.mark.parametrize("message", SPOILT)
def test_tensors_that_do_not_fit_are_named_as_in_their_file(state, config, tmp_path, message):
    SPOILT[message](state)
    with pytest.raises(ValueError, match=f"last.ckpt: .*{message}"):
        taming_vqgan(saved(tmp_path / "last.ckpt", {"state_dict": state}), config)


@pytest.fixture(scope="module")
def vq16(tmp_path_factory):
    weights = {name: llamagen_value(name, shape) for name, shape in llamagen_keys("vq16").items()}
    content = {"model": weights, "steps": 7, "args": argparse.Namespace(lr=1e-4)}
    path = tmp_path_factory.mktemp("llamagen") / "vq_ds16_c2i.pt"
    model = llamagen_vq(saved(path, content), image_size=128)
    path.unlink()
    return model


def test_llamagens_vq16_gives_the_same_numbers(vq16):
    with np.load(LLAMAGEN / "llamagen_vq16.npz") as arrays:
        golden = {name: torch.from_numpy(arrays[name]) for name in ("z", "indices", "quant", "recon_crop", "recon_f16")}
    images = llamagen_images()
    tokens = vq16.encode(images)
    assert torch.equal(tokens, golden["indices"])
    with torch.no_grad():
        latents, codes = vq16.encode_latents(images), vq16.lookup(tokens)
        decoded = vq16.decode_latents(codes)
    torch.testing.assert_close(latents, golden["z"], atol=1e-5, rtol=0)
    torch.testing.assert_close(codes, golden["quant"], atol=1e-6, rtol=0)
    torch.testing.assert_close(decoded[:, :, 40:56, 72:88], golden["recon_crop"], atol=1e-4, rtol=0)
    torch.testing.assert_close(decoded, golden["recon_f16"].float(), atol=2e-3, rtol=0)


def test_llamagens_codebook_stays_as_it_is(vq16):
    expected = llamagen_value("quantize.embedding.weight", (16384, 8))
    assert torch.equal(vq16.quantizer.codebook, expected)
    assert expected.norm(dim=1).max() > 5


def test_llamagens_vq8_equals_tamings_layers_with_unit_codes(tmp_path):
    """Reference: taming's own encoder and decoder, the keys renamed here, and cosines of unit vectors."""
    theirs = {name: llamagen_value(name, shape) for name, shape in llamagen_keys("vq8").items()}
    path = saved(tmp_path / "vq_ds8_c2i.pt", {"model": theirs})
    model = llamagen_vq(path, image_size=64)
    path.unlink()
    sizes = F16 | {"resolution": 64, "ch_mult": [1, 2, 2, 4], "attn_resolutions": [8]}
    reference = {"encoder": taming.Encoder(**sizes), "decoder": taming.Decoder(**sizes)}
    middle = {"0": "block_1", "1": "attn_1", "2": "block_2"}
    for part, module in reference.items():
        renamed = {}
        for name, tensor in theirs.items():
            match name.split("."):
                case [found, "conv_blocks", level, *rest] if found == part:
                    rest = ["block" if word == "res" else word for word in rest]
                    place = ["down", level] if part == "encoder" else ["up", str(3 - int(level))]
                    renamed[".".join([*place, *rest])] = tensor
                case [found, "mid", number, *rest] if found == part:
                    renamed[".".join(["mid", middle[number], *rest])] = tensor
                case [found, *rest] if found == part:
                    renamed[".".join(rest)] = tensor
        module.load_state_dict(renamed, strict=True)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = F.conv2d(reference["encoder"](images), theirs["quant_conv.weight"], theirs["quant_conv.bias"])
        unit = F.normalize(theirs["quantize.embedding.weight"], dim=1)
        tokens = torch.einsum("bchw,kc->bhwk", F.normalize(latents, dim=1), unit).argmax(-1)
        codes = unit[tokens].permute(0, 3, 1, 2)
        entering = F.conv2d(codes, theirs["post_quant_conv.weight"], theirs["post_quant_conv.bias"])
        expected = reference["decoder"](entering)
        found = model.encode_latents(images)
        torch.testing.assert_close(found, latents, atol=1e-5, rtol=0)
        assert torch.equal(model.quantize(found).tokens, tokens)
        assert tokens.unique().numel() > 50
        decoded = model.decode_latents(model.lookup(tokens))
    print(f"latents {(found - latents).abs().max():.1e}, images {(decoded - expected).abs().max():.1e}")
    torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=0)


@pytest.fixture
def llamagen(state):
    return as_llamagen(state) | {"quantize.codebook_used": torch.zeros(65536)}


def test_ema_weights_are_taken_where_they_are_asked_for(llamagen, tmp_path):
    running = {name: 2 * tensor for name, tensor in llamagen.items()}
    path = saved(tmp_path / "vq.pt", {"ema": running, "model": llamagen})
    for kind, expected in (("model", llamagen), ("ema", running)):
        model = llamagen_vq(path, weights=kind, image_size=32)
        assert torch.equal(model.quantizer.codebook, expected["quantize.embedding.weight"])
    assert torch.equal(llamagen_vq(path, image_size=32).quantizer.codebook, llamagen["quantize.embedding.weight"])
    path = saved(tmp_path / "vq.pt", {"model": llamagen, "steps": 1})
    with pytest.raises(ValueError, match=r"vq.pt: no state dict under 'ema'; there is: 'model', 'steps'"):
        llamagen_vq(path, weights="ema")
    with pytest.raises(ValueError, match="weights 'both'; allowed: model, ema"):
        llamagen_vq(path, weights="both")


def test_attention_is_in_the_lowest_level_at_any_image_size(llamagen, tmp_path):
    path = saved(tmp_path / "vq.pt", {"model": llamagen})
    for size, grid in ((256, 64), (32, 8), (20, 5), (8, 2)):
        model = llamagen_vq(path, image_size=size)
        assert model.token_grid == (grid, grid)
        assert len(model.encoder.down[2].attn) == 1
        assert len(model.decoder.up[2].attn) == 2
        assert model.encode(torch.zeros(1, 3, size, size)).shape == (1, grid, grid)
    for size in (30, 4, 0, -4):
        with pytest.raises(ValueError, match=f"vq.pt: image size {size}; .* multiple of 4"):
            llamagen_vq(path, image_size=size)
    with pytest.raises(ConfigError, match="resolution 8192; allowed: up to 4096"):
        llamagen_vq(path, image_size=8192)


LLAMAGEN_SPOILT = {
    "missing tensor encoder.conv_in.weight": lambda s: s.pop("encoder.conv_in.weight"),
    "missing tensor decoder.mid.1.q.bias": lambda s: s.pop("decoder.mid.1.q.bias"),
    "missing tensor decoder.conv_blocks.1.res.1.conv2.weight": lambda s: s.pop(
        "decoder.conv_blocks.1.res.1.conv2.weight"
    ),
    "extra tensor head.weight": lambda s: s.update({"head.weight": torch.ones(1)}),
    "extra tensor encoder.conv_blocks.0.attn.0.x": lambda s: s.update(
        {"encoder.conv_blocks.0.attn.0.x": torch.ones(1)}
    ),
    r"tensor decoder.conv_blocks.2.res.0.conv1.bias is \(1,\); the configuration says \(32,\)": lambda s: s.update(
        {"decoder.conv_blocks.2.res.0.conv1.bias": torch.ones(1)}
    ),
    r"tensor quantize.embedding.weight is \(4,\); no such layer": lambda s: s.update(
        {"quantize.embedding.weight": torch.ones(4)}
    ),
    r"tensor encoder.conv_in.weight is \(0, 3, 3, 3\); no such layer": lambda s: s.update(
        {"encoder.conv_in.weight": torch.ones(0, 3, 3, 3)}
    ),
    "encoder.conv_blocks.1.res.0.conv1.weight makes 48 channels; expected a multiple of 32": lambda s: s.update(
        {"encoder.conv_blocks.1.res.0.conv1.weight": torch.ones(48, 32, 3, 3)}
    ),
    "quant_conv.bias holds values that are not finite": lambda s: s["quant_conv.bias"].fill_(torch.nan),
    "missing tensor encoder.conv_blocks.3.res.0.conv1.weight": lambda s: s.update(
        {"encoder.conv_blocks.9.norm.weight": torch.ones(1)}
    ),
}


@pytest.mark.parametrize("message", LLAMAGEN_SPOILT)
def test_what_is_no_tokenizer_of_llamagen_is_refused(llamagen, tmp_path, message):
    LLAMAGEN_SPOILT[message](llamagen)
    with pytest.raises(ValueError, match=f"vq.pt: .*{message}"):
        llamagen_vq(saved(tmp_path / "vq.pt", {"model": llamagen}), image_size=32)


def test_a_checkpoint_of_the_other_project_is_refused(state, llamagen, config, tmp_path):
    with pytest.raises(ValueError, match=r"missing tensor encoder.conv_blocks.0.res.0.conv1.weight"):
        llamagen_vq(saved(tmp_path / "vq.pt", {"model": state}))
    with pytest.raises(ValueError, match="no state dict under 'state_dict'; there is: 'model'"):
        taming_vqgan(saved(tmp_path / "vq.pt", {"model": llamagen}), config)
