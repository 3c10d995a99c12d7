"""FSQ, LFQ and SimVQ behind the interface of `Quantizer`, and in a model that is saved and loaded."""

import sys

import pytest
import torch

from vqhit import VQHiT, VQHiTConfig
from vqhit.codebook import CodebookTraining
from vqhit.quantizer import QuantizerConfig
from vqhit.vector_quantize import build_quantizer

KINDS = {
    "fsq": {"kind": "fsq", "levels": [8, 5, 4], "dim": 3, "codebook_size": 160},
    "lfq": {"kind": "lfq", "dim": 6, "codebook_size": 64},
    "sim_vq": {"kind": "sim_vq", "dim": 5, "codebook_size": 40},
    "sim_vq, rotation": {"kind": "sim_vq", "dim": 5, "codebook_size": 40, "gradient": "rotation_trick"},
    "vq, rotation": {"kind": "vq", "dim": 5, "codebook_size": 40, "gradient": "rotation_trick"},
    "vq, normalised": {"kind": "vq", "dim": 5, "codebook_size": 40, "normalize": True, "update": "ema"},
}


@pytest.fixture(params=KINDS)
def config(request):
    return QuantizerConfig(**KINDS[request.param])


@pytest.fixture
def quantizer(config):
    torch.manual_seed(0)
    return build_quantizer(config)


def latents_for(config, count=4):
    return torch.randn(count, config.dim, 6, 7, generator=torch.Generator().manual_seed(1))


def test_tokens_are_int64_in_range_and_lookup_gives_what_is_decoded(config, quantizer):
    quantized = quantizer(latents_for(config))
    assert quantized.tokens.dtype == torch.int64
    assert quantized.tokens.shape == (4, 6, 7)
    assert 0 <= quantized.tokens.min() <= quantized.tokens.max() < config.codebook_size
    assert len(quantized.tokens.unique()) > 10
    torch.testing.assert_close(quantizer.lookup(quantized.tokens), quantized.latents)
    assert quantized.loss.shape == ()


def test_every_token_is_a_different_code_and_is_found_again(config, quantizer):
    tokens = torch.arange(config.codebook_size).view(1, 1, -1)
    codes = quantizer.lookup(tokens)
    assert codes.shape == (1, config.dim, 1, config.codebook_size)
    assert len(codes[0, :, 0].T.unique(dim=0)) == config.codebook_size
    if config.kind != "fsq":  # FSQ bounds its input by tanh: its codes are not where they came from
        assert torch.equal(quantizer(codes).tokens, tokens)


def test_gradients_reach_the_latents_and_what_is_learned(config, quantizer):
    latents = latents_for(config).requires_grad_()
    quantized = quantizer.train()(latents)
    (quantized.latents.square().sum() + quantized.loss).backward()
    assert latents.grad.abs().sum() > 0
    for name, parameter in quantizer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_tokens_are_those_of_float32_under_autocast(config, quantizer):
    latents = latents_for(config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantized = quantizer(latents)
    assert torch.equal(quantized.tokens, quantizer(latents).tokens)
    assert quantized.loss.dtype == torch.float32


def test_lookup_is_exact_under_autocast(config, quantizer):
    tokens = torch.arange(config.codebook_size).view(1, 1, -1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.lookup(tokens), quantizer.lookup(tokens).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_precision_works_with_it(tiny_config, config, tmp_path, dtype):
    VQHiT(VQHiTConfig(**{**dict(tiny_config), "quantizer": config})).save_pretrained(tmp_path)
    model = VQHiT.from_pretrained(tmp_path, dtype=dtype)
    images = (torch.rand(2, 3, 16, 16) * 2 - 1).to(dtype)
    assert model.decode(model.encode(images)).dtype == dtype
    assert model(images).reconstruction.dtype == dtype


def test_what_is_decoded_at_first_has_about_the_stated_deviation(config, quantizer):
    codes = quantizer(0.2 * latents_for(config, 50)).latents
    assert codes.std().item() == pytest.approx(config.code_std, rel=0.5)


def test_the_rotation_trick_needs_its_library_for_gradients_only(monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    quantizer = build_quantizer(QuantizerConfig(**KINDS["vq, rotation"]))
    quantizer(torch.randn(1, 5, 2, 2))  # as in encode
    with pytest.raises(ValueError, match="this codebook needs another package: pip install vector-quantize-pytorch"):
        CodebookTraining(quantizer, 0, 0)


def test_a_model_is_saved_and_loaded_with_it(tiny_config, config, tmp_path):
    torch.manual_seed(0)
    model = VQHiT(VQHiTConfig(**{**dict(tiny_config), "quantizer": config})).eval()
    model.save_pretrained(tmp_path)
    loaded = VQHiT.from_pretrained(tmp_path)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    tokens = model.encode(images)
    assert torch.equal(loaded.encode(images), tokens)
    torch.testing.assert_close(loaded.decode(tokens), model.decode(tokens))
    assert loaded.encode(images[:1]).equal(tokens[:1])


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with pytest.raises(ValueError, match="this codebook needs another package: pip install vector-quantize-pytorch"):
        build_quantizer(QuantizerConfig(**KINDS["fsq"]))
