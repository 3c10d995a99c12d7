"""The discriminator against the official code: logits, R1 and its gradients, parameter counts, input checks."""

import copy

import numpy as np
import pytest
import torch

from tests.parity import golden, rule
from vqhit.config import ConfigError
from vqhit.convert import hit_gan_discriminator
from vqhit.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    _blur_kernel,
    average_pool,
    blur_pool,
    minibatch_stddev,
)
from vqhit.losses import r1_penalty

VARIANTS = {
    "blur": {},
    "avg": {"pool": "average"},
    "equalized": {"equalized_lr": True},
    "stddev": {"minibatch_stddev": True},
}


def nchw(array):
    return torch.tensor(array).permute(0, 3, 1, 2)


@pytest.fixture(scope="module", params=VARIANTS)
def case(request):
    """(golden numbers of a variant, our discriminator with the official weights, images that require a gradient)."""
    variant = request.param
    specs = rule.discriminator_specs(32, 1, equalized=variant == "equalized", stddev=variant == "stddev")
    variables = {name: rule.value(name, shape, kind, rule.d_gain(name)) for name, shape, kind in specs}
    discriminator = Discriminator(DiscriminatorConfig(resolution=32, channel_multiplier=1, **VARIANTS[variant]))
    discriminator.load_state_dict(hit_gan_discriminator(variables), strict=True)
    numbers = golden("discriminator_32.npz")
    found = {name.removeprefix(f"{variant}/"): array for name, array in numbers.items() if name.startswith(variant)}
    return found, discriminator, nchw(numbers["x"]).requires_grad_()


def test_logits(case):
    numbers, discriminator, images = case
    with torch.no_grad():
        np.testing.assert_allclose(discriminator(images).numpy(), numbers["logits"], atol=1e-5)


def test_the_last_map(case):
    numbers, discriminator, images = case
    maps = []
    hook = discriminator.final.conv.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0].detach()))
    discriminator(images)
    hook.remove()
    np.testing.assert_allclose(maps[0][:, :8].permute(0, 2, 3, 1), numbers["conv_blocks_out_first8"], atol=1e-5)
    assert float(maps[0].square().mean().sqrt()) == pytest.approx(float(numbers["conv_blocks_out_rms"]), rel=1e-5)


def test_r1_and_its_gradients(case):
    numbers, discriminator, images = case
    tolerance = 1e-3  # in float32 leaky ReLUs flip within rounding of zero
    if "grad_input" in numbers:  # the variant that HiT-GAN is trained with: float64, which takes a while
        discriminator, images = copy.deepcopy(discriminator).double(), images.detach().double().requires_grad_()
        tolerance = 1e-4
    logits = discriminator(images)
    penalty = 10 * r1_penalty(logits, images)
    assert penalty.item() == pytest.approx(float(numbers["r1_penalty"]), rel=5e-5)
    (at_input,) = torch.autograd.grad(logits.sum(), images, retain_graph=True)
    np.testing.assert_allclose(at_input.flatten(1).norm(dim=1), numbers["grad_input_l2"], rtol=tolerance)
    if "grad_input" in numbers:
        np.testing.assert_allclose(at_input.permute(0, 2, 3, 1), numbers["grad_input"], atol=2e-4)

    names = [name for name, _ in discriminator.named_parameters()]
    gradients = torch.autograd.grad(penalty, list(discriminator.parameters()), allow_unused=True)
    found = dict(zip(names, gradients, strict=True))
    for name, expected in zip(numbers["r1_grad_names"], numbers["r1_grad_l2"], strict=True):
        ours = name.replace("kernel", "weight").replace("dense0", "fc1").replace("dense1", "fc2")
        norm = 0.0 if found[ours] is None else float(found[ours].norm())
        assert norm == pytest.approx(float(expected), rel=tolerance, abs=1e-6), name
    if "r1_grad/from_rgb.kernel" in numbers:
        np.testing.assert_allclose(
            found["from_rgb.weight"].permute(2, 3, 1, 0), numbers["r1_grad/from_rgb.kernel"], rtol=1e-3, atol=1e-4
        )
        np.testing.assert_allclose(
            found["final.fc2.weight"].T, numbers["r1_grad/final.dense1.kernel"], rtol=1e-3, atol=1e-4
        )


def test_pooling_and_minibatch_stddev():
    numbers = golden("units.npz")
    x = nchw(numbers["blur/x"])
    np.testing.assert_allclose(blur_pool(x).permute(0, 2, 3, 1), numbers["blur/4"], atol=1e-6)
    np.testing.assert_allclose(average_pool(x).permute(0, 2, 3, 1), numbers["avg/out"], atol=1e-6)
    x = nchw(numbers["stddev/x"])
    np.testing.assert_allclose(minibatch_stddev(x).permute(0, 2, 3, 1), numbers["stddev/g4_f1"], atol=1e-6)
    np.testing.assert_allclose(minibatch_stddev(x[:2]).permute(0, 2, 3, 1), numbers["stddev/g4_f1_batch2"], atol=1e-6)


@pytest.mark.parametrize(
    ("resolution", "multiplier", "millions"), [(128, 1, 23.88), (128, 2, 28.39), (256, 1, 24.00), (256, 2, 28.86)]
)
def test_parameter_counts(resolution, multiplier, millions):
    with torch.device("meta"):
        discriminator = Discriminator(DiscriminatorConfig(resolution=resolution, channel_multiplier=multiplier))
    assert sum(p.numel() for p in discriminator.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_initial_weights_are_glorot_uniform_and_biases_zero():
    torch.manual_seed(0)
    discriminator = Discriminator(DiscriminatorConfig(resolution=16, channel_multiplier=1, max_channels=64))
    weight = discriminator.blocks[0].conv0.weight
    bound = (6 / (2 * 9 * 64)) ** 0.5
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not discriminator.blocks[0].conv0.bias.any()


@pytest.mark.parametrize("shape", [(2, 3, 32, 16), (2, 1, 16, 16), (3, 16, 16), (2, 3, 32, 32)])
def test_a_wrong_shape_is_named(shape):
    discriminator = Discriminator(DiscriminatorConfig(resolution=16, channel_multiplier=1, max_channels=8))
    with pytest.raises(ValueError, match=r"images are .*; this discriminator takes \(B, 3, 16, 16\)"):
        discriminator(torch.zeros(shape))


def test_impossible_sizes_are_named():
    with pytest.raises(ConfigError, match="resolution: found 100; allowed: 8, 16, 32, 64, 128, 256, 512, 1024"):
        DiscriminatorConfig(resolution=100)
    with pytest.raises(ValueError, match="minibatch_stddev: a batch of 6; allowed: up to 4, or a multiple of it"):
        minibatch_stddev(torch.zeros(6, 2, 4, 4))


def test_an_unknown_variable_is_named():
    with pytest.raises(ValueError, match=r"'blocks\.0\.skip\.bias' is no variable of a HiT-GAN discriminator"):
        hit_gan_discriminator({"blocks.0.skip.bias": np.zeros(3)})


def test_it_can_be_trained_after_it_was_first_used_for_inference():
    _blur_kernel.cache_clear()
    discriminator = Discriminator(DiscriminatorConfig(resolution=16, channel_multiplier=1, max_channels=4))
    with torch.inference_mode():
        discriminator(torch.zeros(1, 3, 16, 16))
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    r1_penalty(discriminator(images), images).backward()
    assert discriminator.from_rgb.weight.grad.any()
