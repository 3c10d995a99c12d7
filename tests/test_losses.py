"""Adversarial losses against the official code; R1 and the adaptive weight against their formulas."""

import pytest
import torch

from tests.parity import golden
from vqhit.losses import adaptive_weight, consistency_loss, discriminator_loss, generator_loss, r1_penalty


@pytest.fixture(scope="module")
def numbers():
    return {name: torch.tensor(array) for name, array in golden("losses.npz").items()}


@pytest.mark.parametrize("kind", ["non_saturating", "hinge"])
def test_adversarial_losses(numbers, kind):
    official = kind.replace("_", "-")
    found = discriminator_loss(numbers["real"], numbers["fake"], kind)
    torch.testing.assert_close(found, numbers[f"d/{official}"], rtol=1e-6, atol=0)
    torch.testing.assert_close(generator_loss(numbers["fake"], kind), numbers[f"g/{official}"], rtol=1e-6, atol=0)


def test_consistency(numbers):
    found = consistency_loss(numbers["real"], numbers["fake"], numbers["real_aug"], numbers["fake_aug"])
    torch.testing.assert_close(10 * found, numbers["consistency_cost10"], rtol=1e-6, atol=0)


def test_consistency_has_a_gradient_through_every_logit():
    logits = [torch.randn(3, 1, requires_grad=True) for _ in range(4)]
    consistency_loss(*logits).backward()
    assert all(each.grad.abs().min() > 0 for each in logits)


def test_large_logits_stay_finite():
    huge = torch.tensor([[1e4], [-1e4]])
    assert torch.isfinite(discriminator_loss(huge, huge))
    assert torch.isfinite(generator_loss(huge))


def test_r1_of_a_known_function():
    images = torch.randn(3, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    logits = scale * images.square().sum((1, 2, 3), keepdim=True).flatten(1)  # gradient 2 * scale * x
    penalty = r1_penalty(logits, images)
    expected = (2 * scale * images).square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(penalty, expected)
    (gradient,) = torch.autograd.grad(penalty, scale)
    torch.testing.assert_close(gradient, 2 * expected / scale)


def test_adaptive_weight_is_the_clamped_ratio_of_norms():
    first, second = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.5])
    assert adaptive_weight(first, second, 1e4).item() == pytest.approx(5 / 0.5001)
    assert adaptive_weight(first, torch.zeros(2), 1e4).item() == pytest.approx(1e4)  # 5 / 1e-4 without the bound
    assert adaptive_weight(first, second, 7.0).item() == 7.0


def test_adaptive_weight_of_half_precision_gradients_is_float32():
    tiny = torch.full((100,), 1e-7, dtype=torch.float16)
    large = torch.full((100,), 60000.0, dtype=torch.float16)  # its norm overflows half precision
    weight = adaptive_weight(large, tiny, 1e10)
    assert weight.dtype == torch.float32
    assert weight.item() == pytest.approx(6e5 / (float(tiny.float().norm()) + 1e-4), rel=1e-3)
