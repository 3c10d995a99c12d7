"""The tokenizer's objective: a whole training step, replayed in float64 from the formulas."""

import copy
import math

import pytest
import torch
from torch import nn

from vqhit.discriminator import DiscriminatorConfig
from vqhit.train import RunConfig, Trainer

SMALL_D = DiscriminatorConfig(resolution=16, channel_multiplier=1, max_channels=8)


class SmallFeatures(nn.Module):
    """Stands in for a perceptual network: two (B, 3, H, W) -> scalar."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv2d(3, 6, 3, stride=2).requires_grad_(False)

    def forward(self, reconstruction, images):
        return (self.conv(reconstruction).relu() - self.conv(images).relu()).square().mean()


@pytest.fixture
def make_trainer(tiny_config, photo_folder, tmp_path, monkeypatch):
    """A trainer in float64 with every term of the recipe."""
    monkeypatch.setattr("vqhit.train.perceptual_network", lambda *_: SmallFeatures())

    def make(loss=None, **top):
        train = {"steps": 9, "batch_size": 4, **top.pop("train", {})}
        config = RunConfig.from_dict(
            {
                "run_dir": str(tmp_path / "run"),
                "device": "cpu",
                "model": tiny_config.to_dict(),
                "discriminator": SMALL_D.to_dict(),
                "data": {"path": str(photo_folder)},
                "loss": {"perceptual": 0.5, "adversarial": 0.1, **(loss or {})},
                "optimizer": {"learning_rate": 1e-3},
                "discriminator_optimizer": {"learning_rate": 2e-3, "beta1": 0.5, "beta2": 0.9},
                "ema": {"decay": 0.999, "start_step": 0, "warmup": True},
                "train": train,
                **top,
            }
        )
        trainer = Trainer(config)
        for module in (trainer.model, trainer.discriminator, trainer.ema.model, trainer.objective.perceptual):
            module.double()
        return trainer

    return make


def batch(count=4, seed=0):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def adam(weight, gradients, rate, beta1, beta2):
    """Kingma and Ba 2015, algorithm 1, over several steps."""
    first = second = torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, start=1):
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        weight = weight - rate * (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + 1e-8)
    return weight


def log_sigmoid(x):
    return -torch.log1p(torch.exp(-x))


def replay(model, discriminator, perceptual, images, loss):
    """Eq. 4 and 5 written out, with two forward passes of D and one loss each; (values, G's and D's gradients)."""
    latents = model.encode_latents(images)
    codebook = model.quantizer.codebook
    flat = latents.permute(0, 2, 3, 1).reshape(-1, codebook.shape[1])
    tokens = torch.cdist(flat.detach(), codebook.detach()).argmin(1)
    codes = codebook[tokens].view(latents.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
    codebook_loss = ((latents.detach() - codes) ** 2).mean() + 0.25 * ((latents - codes.detach()) ** 2).mean()
    reconstruction = model.backbone(*model.stem(latents + (codes - latents).detach()))

    values = {
        "reconstruction": ((images - reconstruction) ** 2).mean(),
        "perceptual": loss.perceptual * perceptual(reconstruction, images),
        "codebook": codebook_loss,
    }
    weight = loss.adversarial
    adversarial = -log_sigmoid(discriminator(reconstruction)).mean()
    if loss.adaptive:
        last = model.backbone.stages[-1].to_rgb.linear.weight
        of_image, of_logits = (
            torch.autograd.grad(term, last, retain_graph=True)[0]
            for term in (values["reconstruction"] + values["perceptual"], adversarial)
        )
        weight = weight * min(of_image.norm() / (of_logits.norm() + 1e-4), loss.adaptive_max)
    values["adversarial"] = weight * adversarial
    values["loss"] = torch.stack(list(values.values())).sum()
    model_gradients = torch.autograd.grad(values["loss"], list(model.parameters()))

    real = images.clone().requires_grad_()
    real_logits, fake_logits = discriminator(real), discriminator(reconstruction.detach())
    by_image = [torch.autograd.grad(logit, real, create_graph=True)[0][n] for n, logit in enumerate(real_logits[:, 0])]
    values["r1"] = torch.stack([(gradient**2).sum() for gradient in by_image]).mean()
    values["discriminator"] = -log_sigmoid(real_logits).mean() - log_sigmoid(-fake_logits).mean()
    values["real_logits"], values["fake_logits"] = real_logits.mean(), fake_logits.mean()
    total = values["discriminator"] + loss.r1 * values["r1"]
    found = torch.autograd.grad(total, list(discriminator.parameters()), allow_unused=True)
    discriminator_gradients = [
        torch.zeros_like(p) if g is None else g for p, g in zip(discriminator.parameters(), found, strict=True)
    ]
    return {name: float(value.detach()) for name, value in values.items()}, model_gradients, discriminator_gradients


def assert_close(found, expected, what, atol=1e-12):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=atol, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("adaptive", [False, True])
def test_two_whole_steps_equal_the_formulas_in_float64(make_trainer, adaptive):
    trainer = make_trainer({"adaptive": adaptive})
    loss = trainer.config.loss
    model, discriminator = copy.deepcopy(trainer.model), copy.deepcopy(trainer.discriminator)
    start = copy.deepcopy(model), copy.deepcopy(discriminator)
    average = dict(trainer.ema.model.state_dict())
    average = {name: tensor.clone() for name, tensor in average.items()}
    history = [[], []]
    for step in range(2):
        images = batch(seed=step)
        values, *gradients = replay(model, discriminator, trainer.objective.perceptual, images, loss)

        found = trainer.train_step(images)

        for name, value in values.items():
            assert found[name] == pytest.approx(value, rel=1e-9), name
        networks = ((trainer.model, model, 1e-3, 0.0, 0.99), (trainer.discriminator, discriminator, 2e-3, 0.5, 0.9))
        for index, (ours, theirs, rate, beta1, beta2) in enumerate(networks):
            history[index].append(gradients[index])
            norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients[index]))
            name = ("model", "discriminator")[index]
            assert found[f"{name}_gradient_norm"] == pytest.approx(norm, rel=1e-9)
            for n, (name, parameter) in enumerate(ours.named_parameters()):
                if parameter.grad is not None:
                    assert_close(parameter.grad, gradients[index][n], f"gradient of {name}")
                else:
                    assert not gradients[index][n].any(), name
                first = start[index].get_parameter(name).detach()
                expected = adam(first, [step_gradients[n] for step_gradients in history[index]], rate, beta1, beta2)
                assert_close(parameter.detach(), expected, name, atol=1e-10)  # some gradients are 0 but for rounding
                theirs.get_parameter(name).data.copy_(expected)
        decay = (1 + step + 1) / (10 + step + 1)
        for name, tensor in trainer.model.state_dict().items():
            if tensor.is_floating_point():
                average[name] = decay * average[name] + (1 - decay) * tensor
                assert_close(trainer.ema.model.state_dict()[name], average[name], f"average of {name}")
            else:
                assert torch.equal(trainer.ema.model.state_dict()[name], tensor)
