"""Losses: tensors to scalars, means over elements or images. Networks and weights of terms live elsewhere."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

GANLoss = Literal["non_saturating", "hinge"]


def reconstruction_loss(reconstruction: Tensor, images: Tensor) -> Tensor:
    """‖x - x̂‖² of eq. 5, the mean over all elements: two (B, 3, H, W) in [-1, 1] -> scalar."""
    return F.mse_loss(reconstruction, images)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, kind: GANLoss = "non_saturating") -> Tensor:
    """Adversarial loss of the discriminator (eq. 2 and 4 without the penalty): two (B, 1) -> scalar."""
    if kind == "hinge":
        return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits: Tensor, kind: GANLoss = "non_saturating") -> Tensor:
    """Adversarial loss of the generator or autoencoder (eq. 3, last term of eq. 5): (B, 1) -> scalar."""
    return -fake_logits.mean() if kind == "hinge" else F.softplus(-fake_logits).mean()


def r1_penalty(real_logits: Tensor, images: Tensor) -> Tensor:
    """R1 without its weight γ: the mean over images of ‖∇D(x)‖², no factor 1/2 (eq. 2 and 4).

    `real_logits` (B, 1) must come from `images` (B, 3, H, W) that require a gradient. The result can be differentiated
    once more, for the discriminator's weights.
    """
    (gradient,) = torch.autograd.grad(real_logits.sum(), images, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


def consistency_loss(
    real_logits: Tensor, fake_logits: Tensor, real_augmented: Tensor, fake_augmented: Tensor
) -> Tensor:
    """bCR without its weight: the logits of augmented images agree with those of clean ones: four (B, 1) -> scalar.

    Departure: Zhao et al. 2021 compare two augmentations of an image; the official code compares with the clean one.
    """
    return F.mse_loss(real_augmented, real_logits) + F.mse_loss(fake_augmented, fake_logits)


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor, maximum: float) -> Tensor:
    """VQGAN's adaptive λ (Esser et al. 2021, eq. 7): ‖∇ rec‖ / (‖∇ adv‖ + 1e-4), at most `maximum`, no gradient.

    Both gradients are with respect to the weight of the decoder's last layer. At least float32: in half precision the
    quotient overflows.
    """
    exact = torch.promote_types(reconstruction_gradient.dtype, torch.float32)
    ratio = reconstruction_gradient.to(exact).norm() / (adversarial_gradient.to(exact).norm() + 1e-4)
    return ratio.clamp(0, maximum).detach()
