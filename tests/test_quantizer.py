"""Nearest code, straight-through gradient, codebook and commitment loss, usage counts, restarts."""

import math

import pytest
import torch
from taming.modules.vqvae.quantize import VectorQuantizer

from vqhit.quantizer import CodebookUsage, DeadCodes, Quantizer, QuantizerConfig


def quantizer(size=8, dim=4, commitment=0.25):
    torch.manual_seed(0)
    module = Quantizer(QuantizerConfig(codebook_size=size, dim=dim, commitment=commitment)).double()
    module.codebook.data.normal_()
    return module


def test_each_latent_gets_its_nearest_code():
    module = quantizer()
    latents = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    quantized = module(latents)
    distances = torch.cdist(latents.permute(0, 2, 3, 1).reshape(-1, 4), module.codebook)
    assert quantized.tokens.dtype == torch.int64
    assert torch.equal(quantized.tokens, distances.argmin(1).view(2, 3, 5))
    torch.testing.assert_close(quantized.latents, module.lookup(quantized.tokens))


def test_codes_are_found_again():
    module = quantizer()
    tokens = torch.arange(8).view(1, 2, 4)
    assert torch.equal(module(module.lookup(tokens)).tokens, tokens)


def test_loss_and_gradients_equal_tamings_with_the_two_weights_in_their_right_places():
    """taming puts beta on the codebook term: with beta = 4 its loss is four times ours with commitment 1/4."""
    ours = quantizer(commitment=0.25)
    theirs = VectorQuantizer(8, 4, beta=4.0).double()
    theirs.embedding.weight.data.copy_(ours.codebook.data)
    weights = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    gradients = []
    first = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    for run in ("ours", "theirs"):
        latents = first.clone().requires_grad_()
        if run == "ours":
            quantized, tokens, loss = ours(latents)
            codebook = ours.codebook
        else:
            quantized, loss, (_, _, tokens) = theirs(latents)
            loss = 0.25 * loss
            codebook = theirs.embedding.weight
        ((quantized * weights).sum() + loss).backward()
        gradients.append((quantized, tokens.flatten(), loss, latents.grad, codebook.grad))
    for ours_value, theirs_value in zip(*gradients, strict=True):
        torch.testing.assert_close(ours_value, theirs_value, rtol=1e-12, atol=1e-12)


def test_loss_is_the_formula():
    module = quantizer(commitment=0.5)
    latents = torch.randn(1, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    quantized = module(latents)
    codes = module.lookup(quantized.tokens).detach()
    error = (latents - codes).detach()
    assert quantized.loss.item() == pytest.approx(1.5 * error.square().mean().item(), rel=1e-12)
    quantized.loss.backward()
    torch.testing.assert_close(latents.grad, 0.5 * 2 * error / error.numel())  # the commitment term alone
    pulled = torch.zeros_like(module.codebook)
    pulled.index_add_(0, quantized.tokens.flatten(), -2 * error.permute(0, 2, 3, 1).reshape(-1, 4) / error.numel())
    torch.testing.assert_close(module.codebook.grad, pulled)  # the codebook term alone


def test_gradient_passes_straight_through():
    module = quantizer()
    latents = torch.randn(1, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    (module(latents).latents * weights).sum().backward()
    torch.testing.assert_close(latents.grad, weights)


def test_distances_are_float32_under_autocast():
    module = Quantizer(QuantizerConfig(codebook_size=512, dim=16))
    module.codebook.data.normal_()
    latents = torch.randn(2, 16, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantized = module(latents)
    assert torch.equal(quantized.tokens, module(latents).tokens)
    assert quantized.loss.dtype == torch.float32


def test_usage_and_perplexity_are_counted_over_all_updates():
    usage = CodebookUsage(8)
    assert (usage.codes_used, usage.usage) == (0, 0.0)
    usage.update(torch.tensor([[0, 0], [1, 1]]))
    usage.update(torch.tensor([[[2, 3]]]))
    usage.update(torch.tensor([2, 3]))
    assert (usage.codes_used, usage.usage) == (4, 0.5)
    assert usage.perplexity == pytest.approx(4.0)
    usage.update(torch.zeros(8, dtype=torch.int64))
    probabilities = [10 / 16, 2 / 16, 2 / 16, 2 / 16]
    assert usage.perplexity == pytest.approx(math.exp(-sum(p * math.log(p) for p in probabilities)))


def test_dead_codes_move_onto_latents_of_the_batch():
    codebook = torch.full((4, 2), 100.0)
    latents = torch.arange(8.0).view(1, 2, 2, 2)
    vectors = latents.permute(0, 2, 3, 1).reshape(-1, 2)
    dead_codes = DeadCodes(4, after=2)
    tokens = torch.zeros(1, 2, 2, dtype=torch.int64)

    moved = dead_codes.restart(codebook, latents, tokens, torch.Generator().manual_seed(0))
    assert moved.tolist() == [1, 2, 3]  # at first every code that is not chosen counts as dead
    assert codebook[0].tolist() == [100, 100]
    for row in codebook[1:]:
        assert (vectors == row).all(1).any()
    assert len({tuple(row) for row in codebook.tolist()}) == 4  # on different latents

    still = codebook.clone()
    for _ in range(2):
        assert dead_codes.restart(codebook, latents, tokens, torch.Generator()).tolist() == []
    assert torch.equal(codebook, still)
    assert dead_codes.restart(codebook, latents, tokens, torch.Generator()).tolist() == [1, 2, 3]


def test_no_more_codes_move_than_there_are_latents():
    codebook = torch.zeros(10, 2)
    dead_codes = DeadCodes(10, after=1)
    latents, tokens = torch.randn(1, 2, 1, 3), torch.zeros(1, 1, 3, dtype=torch.int64)
    assert dead_codes.restart(codebook, latents, tokens, torch.Generator()).tolist() == [1, 2, 3]
    assert dead_codes.restart(codebook, latents, tokens, torch.Generator()).tolist() == [4, 5, 6]
