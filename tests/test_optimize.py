"""`optimize_for_inference`, and the ways in which inference computes what training does: the same numbers, faster."""

import copy
import re

import pytest
import torch
from torch import nn

from tests.test_sizes import config as slim_256
from vqhit import HiTGenerator, VQHiT, VQHiTConfig, hit, layers
from vqhit.hit import HiTConfig, ToRGB
from vqhit.layers import MLP, CrossAttention
from vqhit.models import HiTGeneratorConfig
from vqhit.norms import BatchNorm
from vqhit.quantizer import QuantizerConfig
from vqhit.stems import StemConfig
from vqhit.vqgan import EncoderConfig

HIT = {"widths": (32, 16, 16, 8), "depths": (2, 2, 1, 1), "heads": (4, 4, 2, 2), "block_sizes": (4, 4)}
OPTIONS = {
    "plain": {},
    "layer norm": {"norm": "layer"},
    "multi-head": {"multi_query": False},
    "layer norm, multi-head": {"norm": "layer", "multi_query": False},
    "blocked": {"attention": "blocked"},
    "axial": {"attention": "axial", "block_sizes": (None, None)},
    "interleaved": {"attention": "interleaved"},
    "full": {"attention": "full", "block_sizes": (None, None)},
    "no cross-attention": {"cross_attention": False},
    "no blocks in the last stage": {"depths": (2, 2, 1, 0)},
    "two in the last stage": {"depths": (2, 2, 0, 2)},
    "no self-attention": {"block_sizes": ()},
    "implicit function": {"block_sizes": (), "cross_attention": False},
    "self-attention but in the last stage": {"block_sizes": (4, 4, 8)},
}
STEMS = {"no skip": {}, "skip": {"skip": True}, "3x3 skip": {"skip": True, "skip_kernel": 3}, "8x8": {"latent_grid": 8}}


def tokenizer_config(stem=None, **changes):
    """64 px, 16x16 tokens, four stages."""
    return VQHiTConfig(
        encoder=EncoderConfig(
            channels=32, channel_multipliers=(1, 1, 1), num_res_blocks=1, attention_resolutions=(16,), z_channels=8
        ),
        quantizer=QuantizerConfig(codebook_size=64, dim=8),
        stem=StemConfig(**(stem or {})),
        decoder=HiTConfig(**{**HIT, **changes}),
    )


def generator_config(**changes):
    return HiTGeneratorConfig(latent_dim=8, backbone=HiTConfig(**{**HIT, **changes}))


@torch.no_grad()
def far_from_its_start(model, images):
    """Norms, biases and positions at random; weights so wide that every layer counts, images with a std of 0.5."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.running_mean.normal_(std=0.5)
            module.running_var.uniform_(0.3, 3)
        if isinstance(module, BatchNorm | nn.LayerNorm):
            module.weight.uniform_(0.5, 1.5).mul_(torch.randn_like(module.weight).sign())
            module.bias.normal_(std=0.5)
        elif isinstance(module, nn.Linear):
            module.weight.normal_(std=0.5 * module.in_features**-0.5)
            module.bias.normal_(std=0.3)
    for name, parameter in model.named_parameters():
        if "position_embedding" in name:
            parameter.normal_(std=0.5)
    factor = 0.5 / images(model.eval()).std()  # the image is the sum of what the layers to RGB give
    for module in model.modules():
        if isinstance(module, ToRGB):
            module.linear.weight.mul_(factor)
            module.linear.bias.mul_(factor)
    return model


def tokenizer(config):
    return far_from_its_start(VQHiT(config), lambda model: decoded(model, random_tokens(model)))


def generator(config):
    return far_from_its_start(HiTGenerator(config), lambda model: model(model.noise(range(2))))


def random_tokens(model, batch=2, grid=None):
    torch.manual_seed(1)
    return torch.randint(model.codebook_size, (batch, *(grid or model.token_grid)))


def random_images(model, batch=2):
    torch.manual_seed(1)
    return torch.rand(batch, 3, model.config.image_size, model.config.image_size) * 2 - 1


def decoded(model, tokens):
    """Images before they are clamped, which would hide differences."""
    with torch.no_grad():
        return model.decode_latents(model.lookup(tokens))


def norms(model):
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


def equal_images(found, expected, atol):
    assert expected.std() > 0.3
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def check_tokenizer(config):
    model = tokenizer(config)
    for dtype, atol in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        model = model.to(dtype)
        optimized = copy.deepcopy(model).optimize_for_inference()
        assert not norms(optimized)
        tokens = random_tokens(model)
        equal_images(decoded(optimized, tokens), decoded(model, tokens), atol)
        images = random_images(model).to(dtype)
        assert len(model.encode(images).unique()) > 5
        assert torch.equal(optimized.encode(images), model.encode(images))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_tokenizer_makes_the_same_images_and_tokens(name):
    check_tokenizer(tokenizer_config(**OPTIONS[name]))


@pytest.mark.parametrize("name", STEMS)
def test_with_every_stem(name):
    check_tokenizer(tokenizer_config(STEMS[name]))


def test_with_the_convolutional_decoder(conv_config):
    model = VQHiT(conv_config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(1 + 0.5 * torch.rand_like(parameter))
        model.last_layer.weight.mul_(3)
    optimized = copy.deepcopy(model).optimize_for_inference()
    tokens, images = random_tokens(model), random_images(model)
    equal_images(decoded(optimized, tokens), decoded(model, tokens), 1e-4)
    assert torch.equal(optimized.encode(images), model.encode(images))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_generator_makes_the_same_images(name):
    model = generator(generator_config(**OPTIONS[name]))
    for dtype, atol in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        model = model.to(dtype)
        optimized = copy.deepcopy(model).optimize_for_inference()
        assert not norms(optimized)
        z = model.noise(range(2))
        with torch.no_grad():
            equal_images(optimized(z), model(z), atol)


def test_a_second_call_changes_nothing():
    model = tokenizer(tokenizer_config()).optimize_for_inference()
    state = copy.deepcopy(model.state_dict())
    assert model.optimize_for_inference() is model
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_an_optimized_model_is_neither_trained_nor_saved(tmp_path):
    for model in (
        tokenizer(tokenizer_config()).train().optimize_for_inference(),
        HiTGenerator(generator_config()).optimize_for_inference(),
    ):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        for refused in (model.train, lambda model=model: model.save_pretrained(tmp_path / "model")):
            with pytest.raises(
                ValueError,
                match=r"^the model is optimized for inference, its layers merged, which .*$",
            ):
                refused()
        with pytest.raises(ValueError, match=r"^the model is optimized for inference, its layers merged, which .*$"):
            model.push_to_hub("someone/model")
        assert not (tmp_path / "model").exists()
        assert model.train(False) is model
        assert model.eval() is model


def test_a_loaded_model_is_not_optimized(tmp_path):
    model = tokenizer(tokenizer_config())
    model.save_pretrained(tmp_path)
    loaded = VQHiT.from_pretrained(tmp_path)
    assert not loaded.optimized
    assert len(norms(loaded)) == len(norms(model)) > 0
    model.optimize_for_inference()
    assert not VQHiT.from_pretrained(tmp_path).optimized
    assert loaded.train().training


def test_an_optimized_model_can_be_copied():
    model = tokenizer(tokenizer_config()).optimize_for_inference()
    copied, tokens = copy.deepcopy(model), random_tokens(model)
    assert copied.optimized
    assert torch.equal(copied.decode(tokens), model.decode(tokens))
    with pytest.raises(ValueError, match=re.escape("train the model as it was loaded")):
        copied.train()


@pytest.mark.parametrize("grid", [(8, 8), (24, 24), (8, 24)], ids=str)
def test_an_optimized_model_decodes_other_sizes_and_few_at_a_time(grid):
    model = tokenizer(slim_256())
    optimized, tokens = copy.deepcopy(model).optimize_for_inference(), random_tokens(model, 2, grid)
    expected = decoded(model, tokens)
    equal_images(decoded(optimized, tokens), expected, 1e-4)
    clamped = expected.clamp(-1, 1)
    torch.testing.assert_close(optimized.decode(tokens, micro_batch=1), clamped, rtol=0, atol=1e-4)


def plain(monkeypatch):
    """From now on, all pixels pass a layer at once."""
    for module in (layers, hit):
        monkeypatch.setattr(module, "works_in_cache", lambda module, x: False)


def few_pixels_at_a_time(monkeypatch, band_pixels, values):
    """Returns the counts of bands and of pixels that an MLP takes, which the pass then adds to."""
    bands, pixels = [], []
    run, hidden = hit.HiTBackbone._run, MLP.hidden

    def counted_run(self, x, image, given, first=0, skip=None):
        bands.append((first, x.shape[1]))
        return run(self, x, image, given, first, skip)

    def counted_hidden(self, x):
        pixels.append(x.flatten(0, -2).shape[0])
        return hidden(self, x)

    monkeypatch.setattr(hit, "_BAND_PIXELS", band_pixels)
    monkeypatch.setattr(layers, "_CACHED_VALUES", values)
    monkeypatch.setattr(hit.HiTBackbone, "_run", counted_run)
    monkeypatch.setattr(MLP, "hidden", counted_hidden)
    return bands, pixels


@pytest.mark.parametrize("optimized", [False, True], ids=["as loaded", "optimized"])
@pytest.mark.parametrize(
    ("band_rows", "changes"),
    [
        (1, {}),
        (3, {}),
        (5, {}),
        (3, {"norm": "layer"}),
        (3, {"cross_attention": False}),
        (3, {"block_sizes": ()}),
    ],
    ids=str,
)
def test_bands_and_chunks_give_what_the_plain_path_gives(monkeypatch, optimized, band_rows, changes):
    """16 rows in bands of 1, 3 or 5: the last band of 3 or 5 is a short one."""
    model = tokenizer(tokenizer_config({"skip": True}, **changes)).double()
    if optimized:
        model.optimize_for_inference()
    tokens = random_tokens(model)
    with monkeypatch.context() as patched:
        plain(patched)
        expected = decoded(model, tokens)
    bands, pixels = few_pixels_at_a_time(monkeypatch, band_rows * 16 * 4**2, 1600)
    equal_images(decoded(model, tokens), expected, 1e-12)
    later = [rows for first, rows in bands if first > 0]
    assert later == 2 * ([band_rows] * (16 // band_rows) + [16 % band_rows] * (16 % band_rows > 0))
    assert {25, 12} <= set(pixels)  # the second stage: 512 pixels, each 64 values wide, by 25; 12 are left


def test_gradients_are_not_taken_in_bands(monkeypatch):
    model = tokenizer(tokenizer_config())
    bands, _ = few_pixels_at_a_time(monkeypatch, 1, 1)
    model.decode_latents(model.lookup(random_tokens(model))).sum().backward()
    assert len(bands) == 1
    assert model.last_layer.weight.grad is not None


def test_in_training_mode_batch_norm_sees_the_whole_batch(monkeypatch):
    model = tokenizer(tokenizer_config({"skip": True})).double().train()
    plainly, tokens = copy.deepcopy(model), random_tokens(model, batch=3)
    bands, pixels = few_pixels_at_a_time(monkeypatch, 1, 1)
    found = decoded(model, tokens)
    assert len(bands) == 1
    assert min(pixels) >= 3 * 8 * 8
    plain(monkeypatch)
    equal_images(found, decoded(plainly, tokens), 1e-12)
    for ours, theirs in zip(norms(model), norms(plainly), strict=True):
        assert ours.num_batches_tracked == theirs.num_batches_tracked == 1
        torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("multi_query", [True, False], ids=["multi-query", "multi-head"])
def test_both_forms_of_cross_attention_agree_in_values_and_gradients(monkeypatch, multi_query):
    """With few tokens the matrices are multiplied first; of many, keys and values are read."""
    torch.manual_seed(0)
    attention = CrossAttention(width=32, heads=4, token_width=24, multi_query=multi_query).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, tokens = torch.randn(2, 5, 3, 32).double().requires_grad_(), torch.randn(2, 9, 24).double().requires_grad_()
    weight = torch.randn(2, 5, 3, 32).double()
    inputs = [x, tokens, *attention.parameters()]
    multiplied = attention.memory(tokens)
    keys, values = (attention._heads(project(tokens)) for project in (attention.key, attention.value))
    read = keys.unsqueeze(1), values.unsqueeze(1)
    assert (len(multiplied), len(read)) == (3, 2)
    found, expected = (attention(x, memory) for memory in (multiplied, read))
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad((out * weight).sum(), inputs, retain_graph=True) for out in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    many = torch.randn(2, 11, 24).double()  # 4 heads of 11 weights are more than 32 channels and 11
    assert len(attention.memory(many[:, :10])) == 3
    assert len(attention.memory(many)) == 2
