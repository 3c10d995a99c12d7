"""What models are trained for, and the gradients of it in one pass.

A tokenizer: eq. 4 and 5 of the paper (appendix A.5); a generator: eq. 2 and 3 (appendix A.4) and bCR (section 4.2).
Both networks are updated simultaneously, as in the official HiT-GAN trainer: one reconstruction or sample and one set
of fake logits serve both losses, and both gradients are of the weights before the step.
"""

from contextlib import AbstractContextManager
from typing import Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from vqhit import distributed
from vqhit.augment import Draws, augment
from vqhit.config import Config, Count, Flag, NonNegative, NonNegativeInt, Positive, Text
from vqhit.discriminator import Discriminator
from vqhit.generator import Generator
from vqhit.losses import (
    GANLoss,
    adaptive_weight,
    consistency_loss,
    discriminator_loss,
    generator_loss,
    r1_penalty,
    reconstruction_loss,
)
from vqhit.models import VQHiT, VQHiTOutput
from vqhit.perceptual import FeaturesConfig, PerceptualKind


class AdversarialConfig(Config):
    """The loss of the discriminator."""

    gan: GANLoss = "non_saturating"
    r1: NonNegative = 10.0
    """γ of eq. 2 and 4."""
    r1_every: Count = 1
    """Penalise every so many steps only, with as many times the weight (lazy R1)."""
    consistency: NonNegative = 0.0
    """bCR (section 4.2): the discriminator's logits of augmented and of clean images agree; the paper has 10 for its
    GANs on faces at 256 px, 0 for all else. Departure: the paper flips images too; the official code does not."""


class GANLossConfig(AdversarialConfig):
    """The losses of a generator and its discriminator (eq. 2 and 3, bCR)."""


class LossConfig(AdversarialConfig):
    """Weights and options of the tokenizer's losses; a weight of 0 switches a term off, its networks too."""

    reconstruction: NonNegative = 1.0
    codebook: NonNegative = 1.0
    perceptual: NonNegative = 0.0
    """λ1 of eq. 5; the paper has 5e-5 for vgg16, LPIPS is used with 1."""
    perceptual_network: PerceptualKind = "vgg16"
    perceptual_weights: Text | None = None
    """File of the network's weights; by default torchvision's cache, or a download into it. For vgg16 and lpips it must
    be the published file."""
    perceptual_features: FeaturesConfig | None = None
    adversarial: NonNegative = 0.0
    """λ2 of eq. 5; the paper has 0.1."""
    adaptive: Flag = False
    """Multiply λ2 by VQGAN's ratio of gradients at the weight of the last layer to RGB, for each micro-batch (those of
    all processes together)."""
    adaptive_max: Positive = 1e4
    adversarial_warmup_steps: NonNegativeInt = 0
    """Steps over which λ2 grows linearly from the discriminator's start."""
    discriminator_start_step: NonNegativeInt = 0
    """First step of the discriminator; before it there is no adversarial term either."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.adversarial and self.adaptive and not (self.reconstruction or self.perceptual):
            raise ValueError("adaptive compares with the reconstruction and perceptual terms; both have weight 0")
        if self.perceptual and self.perceptual_network == "features":
            if self.perceptual_features is None:
                raise ValueError("perceptual_network features needs perceptual_features: network, layers, ...")
            if self.perceptual_weights is None:
                raise ValueError("perceptual_network features needs perceptual_weights: a file")
        return self

    def adversarial_weight(self, step: int) -> float:
        """λ2 of the update after `step` steps."""
        since = step - self.discriminator_start_step
        if since < 0:
            return 0.0
        warmup = self.adversarial_warmup_steps
        return self.adversarial * min(1.0, (since + 1) / warmup) if warmup else self.adversarial


Augmentations = tuple[Draws, Draws]
"""Of the images, and of what the model made."""


class DiscriminatorObjective:
    """Gradients of the discriminator's loss: eq. 2, which is eq. 4, with bCR."""

    def __init__(self, config: AdversarialConfig, discriminator: Discriminator) -> None:
        self.config, self.discriminator = config, discriminator

    def backward(
        self,
        images: Tensor,
        fakes: Tensor,
        fake_logits: Tensor,
        step: int,
        share: float = 1.0,
        augmentations: Augmentations | None = None,
    ) -> dict[str, Tensor]:
        """Add `share` times the gradients to the discriminator's; returns its terms and mean logits by name.

        The clean logits serve its loss, R1 and consistency; `fake_logits` are those of `fakes`.
        """
        penalise = self.config.r1 > 0 and step % self.config.r1_every == 0
        real = images.detach().requires_grad_(penalise)
        real_logits = self.discriminator(real)
        loss = adversarial = discriminator_loss(real_logits, fake_logits, self.config.gan)
        found = {}
        if penalise:
            penalty = r1_penalty(real_logits, real)
            loss = adversarial + self.config.r1 * self.config.r1_every * penalty
            found["r1"] = penalty.detach()
        if self.config.consistency:
            assert augmentations is not None
            real_augmented, fake_augmented = (
                self.discriminator(augment(clean.detach(), draws))
                for clean, draws in zip((images, fakes), augmentations, strict=True)
            )
            consistency = consistency_loss(real_logits, fake_logits, real_augmented, fake_augmented)
            loss = loss + self.config.consistency * consistency
            found["consistency"] = consistency.detach()
        (share * loss).backward(inputs=list(self.discriminator.parameters()))
        return found | {
            "discriminator": adversarial.detach(),
            "real_logits": real_logits.detach().mean(),
            "fake_logits": fake_logits.detach().mean(),
        }


class GANObjective:
    """Gradients of the losses of a generator and its discriminator.

    `autocast` covers the generator; the losses and the discriminator run in the precision of the images.
    """

    def __init__(
        self,
        config: GANLossConfig,
        model: Generator,
        discriminator: Discriminator,
        autocast: AbstractContextManager[None] | None = None,
    ) -> None:
        self.config, self.model, self.discriminator = config, model, discriminator
        self.adversary = DiscriminatorObjective(config, discriminator)
        self.autocast = autocast or torch.autocast("cpu", enabled=False)

    def backward(
        self,
        images: Tensor,
        noise: Tensor,
        step: int,
        share: float = 1.0,
        augmentations: Augmentations | None = None,
    ) -> dict[str, Tensor]:
        """Add `share` times the gradients of a batch to those of both networks.

        Images (B, 3, H, W) in [-1, 1], noise (B, D); consistency needs the augmentations. Returns by name: the
        generator's loss, also as `loss`, the terms of the discriminator's, its logits.
        """
        with self.autocast:
            output = self.model(noise)
        fakes = output.detach().to(images.dtype).requires_grad_()
        fake_logits = self.discriminator(fakes)
        loss = generator_loss(fake_logits, self.config.gan)
        (gradient,) = torch.autograd.grad(loss, fakes, retain_graph=True)
        output.backward(share * gradient.to(output.dtype))  # frees the generator's graph before D's passes
        found = self.adversary.backward(images, fakes, fake_logits, step, share, augmentations)
        return {"generator": loss.detach(), **found, "loss": loss.detach()}


class TokenizerObjective:
    """Gradients of the losses of an autoencoder and, where there is one, its discriminator.

    `autocast` covers the autoencoder and the perceptual network; the codebook, all losses and the discriminator run in
    the precision of the images. The reconstruction is a leaf between the losses and the autoencoder: each loss's graph
    is freed before the autoencoder's backward pass, and the adaptive weight costs no second pass through the losses (in
    a compiled model, whose backward pass cannot be cut short, it costs two more of the autoencoder).
    """

    def __init__(
        self,
        config: LossConfig,
        model: VQHiT,
        discriminator: Discriminator | None = None,
        perceptual: nn.Module | None = None,
        autocast: AbstractContextManager[None] | None = None,
    ) -> None:
        self.config, self.model, self.perceptual = config, model, perceptual
        self.adversary = None if discriminator is None else DiscriminatorObjective(config, discriminator)
        self.autocast = autocast or torch.autocast("cpu", enabled=False)

    def backward(
        self, images: Tensor, step: int, share: float = 1.0, augmentations: Augmentations | None = None
    ) -> tuple[VQHiTOutput, dict[str, Tensor]]:
        """Add `share` times the gradients of a batch (B, 3, H, W) in [-1, 1] to those of both networks.

        Consistency needs the augmentations.
        Returns the output, detached, and by name: each weighted term of the autoencoder's loss, their sum `loss`, the
        terms of the discriminator's, its logits, and the weight of the adversarial term.
        """
        with self.autocast:
            output = self.model(images)
        reconstruction = output.reconstruction.detach().to(images.dtype).requires_grad_()
        terms = {"reconstruction": self.config.reconstruction * reconstruction_loss(reconstruction, images)}
        if self.perceptual is not None:
            with self.autocast:
                terms["perceptual"] = self.config.perceptual * self.perceptual(reconstruction, images)
        (gradient,) = torch.autograd.grad(torch.stack(list(terms.values())).sum(), reconstruction)
        found: dict[str, Tensor] = {}
        if self.adversary is not None and step >= self.config.discriminator_start_step:
            fake_logits = self.adversary.discriminator(reconstruction)
            terms["adversarial"], weight, adversarial_gradient = self._adversarial(
                fake_logits, reconstruction, output.reconstruction, gradient, step
            )
            gradient = gradient + adversarial_gradient
            found = self.adversary.backward(images, reconstruction, fake_logits, step, share, augmentations)
            found["adversarial_weight"] = weight
        if not self.model.tokens_frozen:
            terms["codebook"] = self.config.codebook * output.codebook_loss
        sources, gradients = [output.reconstruction], [share * gradient.to(output.reconstruction.dtype)]
        if "codebook" in terms and terms["codebook"].requires_grad:  # FSQ has no loss
            sources, gradients = [*sources, terms["codebook"]], [*gradients, torch.full_like(terms["codebook"], share)]
        torch.autograd.backward(sources, gradients)
        terms = {name: term.detach() for name, term in terms.items()}
        detached = VQHiTOutput(*(tensor.detach() for tensor in output))
        return detached, {**terms, **found, "loss": torch.stack(list(terms.values())).sum()}

    def _adversarial(
        self, fake_logits: Tensor, reconstruction: Tensor, output: Tensor, gradient: Tensor, step: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted adversarial term, its weight, and its gradient at the reconstruction."""
        term = generator_loss(fake_logits, self.config.gan)
        (at_reconstruction,) = torch.autograd.grad(term, reconstruction, retain_graph=True)
        weight = term.new_tensor(self.config.adversarial_weight(step))
        if self.config.adaptive:
            last = self.model.last_layer.weight
            of_image_terms, of_adversarial = (
                distributed.mean(torch.autograd.grad(output, last, at_output.to(output.dtype), retain_graph=True)[0])
                for at_output in (gradient, at_reconstruction)
            )
            weight = weight * adaptive_weight(of_image_terms, of_adversarial, self.config.adaptive_max)
        return weight * term.detach(), weight, weight * at_reconstruction
