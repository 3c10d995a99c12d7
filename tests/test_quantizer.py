"""Nearest code, gradients, codebook and commitment loss, and the options of a learned codebook."""

import pytest
import torch
from taming.modules.vqvae.quantize import VectorQuantizer

from vqhit.config import ConfigError
from vqhit.quantizer import Quantizer, QuantizerConfig


def quantizer(size=8, dim=4, commitment=0.25, **options):
    torch.manual_seed(0)
    module = Quantizer(QuantizerConfig(codebook_size=size, dim=dim, commitment=commitment, **options)).double()
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


def test_normalised_codes_and_latents_have_length_one():
    module = quantizer(normalize=True)
    latents = 3 * torch.randn(2, 4, 3, 5, dtype=torch.float64)
    quantized = module(latents)
    z = latents.permute(0, 2, 3, 1).reshape(-1, 4)
    cosine = torch.nn.functional.cosine_similarity(z[:, None], module.codebook[None], dim=-1)
    assert torch.equal(quantized.tokens.flatten(), cosine.argmax(1))
    torch.testing.assert_close(quantized.latents.norm(dim=1), torch.ones(2, 3, 5, dtype=torch.float64))
    torch.testing.assert_close(quantized.latents, module.lookup(quantized.tokens))
    torch.testing.assert_close(module.vectors(latents), z / z.norm(dim=1, keepdim=True))
    distance = 2 - 2 * cosine.amax(1)  # of unit vectors
    torch.testing.assert_close(quantized.loss, 1.25 * distance.mean() / 4)


def test_a_codebook_of_running_means_has_the_commitment_term_only():
    module = quantizer(update="ema")
    latents = torch.randn(1, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    quantized = module(latents)
    codes = module.lookup(quantized.tokens)
    torch.testing.assert_close(quantized.loss, 0.25 * (latents - codes).square().mean())
    assert not module.codebook.requires_grad
    assert list(module.state_dict()) == ["codebook"]


def test_the_rotation_trick_turns_gradients_with_the_latents():
    module = quantizer(gradient="rotation_trick")
    latents = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    quantized = module(latents)
    torch.testing.assert_close(quantized.latents, module.lookup(quantized.tokens))
    weights = torch.randn_like(latents)
    (quantized.latents * weights).sum().backward()
    z, codes, w, found = (
        t.detach().permute(0, 2, 3, 1).reshape(-1, 4) for t in (latents, quantized.latents, weights, latents.grad)
    )
    for row in range(len(z)):  # the rotation by Householder reflections that takes z / |z| to e / |e| (eq. 4 there)
        u, q = z[row] / z[row].norm(), codes[row] / codes[row].norm()
        r = (u + q) / (u + q).norm()
        rotation = torch.eye(4, dtype=torch.float64) - 2 * torch.outer(r, r) + 2 * torch.outer(q, u)
        torch.testing.assert_close(rotation @ u, q)
        torch.testing.assert_close(found[row], codes[row].norm() / z[row].norm() * rotation.T @ w[row])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "fsq"}, "kind fsq needs levels"),
        ({"levels": [8, 8]}, "kind fsq needs levels, one for each channel; other kinds have none"),
        ({"kind": "fsq", "levels": [8, 8], "dim": 3}, r"levels \[8, 8\] make 64 codes of dim 2; codebook_size is 1024"),
        ({"kind": "lfq", "dim": 9}, r"codebook_size 1024: lfq with dim 9 has 2\^9 codes"),
        ({"kind": "lfq", "dim": 10, "normalize": True}, "update and normalize are options of kind vq; this is lfq"),
        ({"kind": "sim_vq", "update": "ema"}, "update and normalize are options of kind vq; this is sim_vq"),
        ({"kind": "fsq", "levels": [32, 32], "dim": 2, "gradient": "rotation_trick"}, "gradient rotation_trick is an"),
        (
            {"kind": "fsq", "levels": [2, 512], "dim": 2},
            "levels.0: found 2; input should be greater than or equal to 3",
        ),
        ({"kind": "vqq"}, "kind"),
        ({"kind": "lfq", "dim": 30, "codebook_size": 2**30}, "codebook_size 1073741824; allowed: up to 2.24"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        QuantizerConfig(**options)
