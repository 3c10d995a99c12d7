"""The tokenizer's objective: a whole training step, replayed in float64 from the formulas."""

import copy
import math

import pytest
import torch
from torch import nn

from vqhit.augment import augment
from vqhit.config import ConfigError
from vqhit.convnet import ConvNetGeneratorConfig
from vqhit.discriminator import Discriminator, DiscriminatorConfig
from vqhit.models import VQHiT
from vqhit.objective import LossConfig, TokenizerObjective
from vqhit.train import RunConfig, Trainer

SMALL_D = DiscriminatorConfig(resolution=16, channel_multiplier=1, max_channels=8)


class SmallFeatures(nn.Module):
    """Stands in for a perceptual network: two (B, 3, H, W) -> scalar."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv2d(3, 6, 3, stride=2).requires_grad_(False)

    def forward(self, reconstruction, images):
        ours, theirs = (self.conv(x).relu().to(images.dtype) for x in (reconstruction, images))
        return (ours - theirs).square().mean()


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
        for module in (
            trainer.state.model,
            trainer.state.discriminator,
            trainer.state.ema.model,
            trainer.objective.perceptual,
        ):
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
    passed = latents + (codes - latents).detach()
    if model.config.decoder.kind == "conv":
        reconstruction, last = model.decoder(model.post_quant_conv(passed)), model.decoder.conv_out.weight
    else:
        reconstruction, last = model.backbone(*model.stem(passed)), model.backbone.stages[-1].to_rgb.linear.weight

    values = {
        "reconstruction": ((images - reconstruction) ** 2).mean(),
        "perceptual": loss.perceptual * perceptual(reconstruction, images),
        "codebook": codebook_loss,
    }
    weight = loss.adversarial
    adversarial = -log_sigmoid(discriminator(reconstruction)).mean()
    if loss.adaptive:
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


def gradients_of(trainer):
    return {
        f"{name} of {kind}": parameter.grad.clone()
        for kind, module in (("model", trainer.state.model), ("D", trainer.state.discriminator))
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize(("decoder", "adaptive"), [("hit", False), ("hit", True), ("conv", True)])
def test_two_whole_steps_equal_the_formulas_in_float64(make_trainer, tiny_config, conv_config, decoder, adaptive):
    model = {"hit": tiny_config, "conv": conv_config}[decoder]
    trainer = make_trainer({"adaptive": adaptive}, model=model.to_dict())
    loss = trainer.config.loss
    model, discriminator = copy.deepcopy(trainer.state.model), copy.deepcopy(trainer.state.discriminator)
    start = copy.deepcopy(model), copy.deepcopy(discriminator)
    average = dict(trainer.state.ema.model.state_dict())
    average = {name: tensor.clone() for name, tensor in average.items()}
    history = [[], []]
    for step in range(2):
        images = batch(seed=step)
        values, *gradients = replay(model, discriminator, trainer.objective.perceptual, images, loss)

        found = trainer.train_step(images)

        for name, value in values.items():
            assert found[name] == pytest.approx(value, rel=1e-9), name
        networks = (
            (trainer.state.model, model, 1e-3, 0.0, 0.99),
            (trainer.state.discriminator, discriminator, 2e-3, 0.5, 0.9),
        )
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
        for name, tensor in trainer.state.model.state_dict().items():
            if tensor.is_floating_point():
                average[name] = decay * average[name] + (1 - decay) * tensor
                assert_close(trainer.state.ema.model.state_dict()[name], average[name], f"average of {name}")
            else:
                assert torch.equal(trainer.state.ema.model.state_dict()[name], tensor)


@pytest.fixture
def make_gan_trainer(photo_folder, tmp_path):
    """A trainer in float64 with every term of the recipe."""

    def make(model, **train):
        config = RunConfig.from_dict(
            {
                "run_dir": str(tmp_path / "run"),
                "device": "cpu",
                "model": model.to_dict(),
                "discriminator": SMALL_D.to_dict(),
                "data": {"path": str(photo_folder)},
                "loss": {"consistency": 10.0},
                "optimizer": {"learning_rate": 1e-3},
                "ema": {"decay": 0.999, "start_step": 1},
                "train": {"steps": 9, "batch_size": 4, **train},
            }
        )
        trainer = Trainer(config)
        for module in (trainer.state.model, trainer.state.discriminator, trainer.state.ema.model):
            module.double()
        return trainer

    return make


def replay_gan(model, discriminator, images, noise, augmentations):
    """Eq. 2, eq. 3 and bCR written out, each network's forward pass once a term; (values, G's and D's gradients)."""
    fakes = model(noise)
    values = {"generator": -log_sigmoid(discriminator(fakes)).mean()}
    values["loss"] = values["generator"]
    model_gradients = torch.autograd.grad(values["generator"], list(model.parameters()))

    fakes, real = fakes.detach(), images.clone().requires_grad_()
    real_logits, fake_logits = discriminator(real), discriminator(fakes)
    by_image = [torch.autograd.grad(logit, real, create_graph=True)[0][n] for n, logit in enumerate(real_logits[:, 0])]
    values["r1"] = torch.stack([(gradient**2).sum() for gradient in by_image]).mean()
    values["discriminator"] = -log_sigmoid(real_logits).mean() - log_sigmoid(-fake_logits).mean()
    values["real_logits"], values["fake_logits"] = real_logits.mean(), fake_logits.mean()
    values["consistency"] = sum(
        ((discriminator(augment(clean, draws)) - discriminator(clean)) ** 2).mean()
        for clean, draws in zip((images, fakes), augmentations, strict=True)
    )
    total = values["discriminator"] + 10 * values["r1"] + 10 * values["consistency"]
    found = torch.autograd.grad(total, list(discriminator.parameters()), allow_unused=True)
    discriminator_gradients = [
        torch.zeros_like(p) if g is None else g for p, g in zip(discriminator.parameters(), found, strict=True)
    ]
    return {name: float(value.detach()) for name, value in values.items()}, model_gradients, discriminator_gradients


@pytest.mark.parametrize("kind", ["hit", "convnet"])
def test_two_whole_steps_of_a_generator_equal_the_formulas_in_float64(make_gan_trainer, tiny_generator_config, kind):
    convnet = ConvNetGeneratorConfig(latent_dim=4, resolution=16, channels=8, attention_size=8)
    trainer = make_gan_trainer({"hit": tiny_generator_config, "convnet": convnet}[kind])
    state = trainer.state
    model, discriminator = copy.deepcopy(state.model), copy.deepcopy(state.discriminator)
    start = copy.deepcopy(model), copy.deepcopy(discriminator)
    history = [[], []]
    for step in range(2):
        images, everything = batch(seed=step), trainer._place(slice(0, 4), 4)
        noise = trainer._noise(4, step, everything).double()
        trainer._noise = lambda *_, noise=noise: noise
        values, *gradients = replay_gan(model, discriminator, images, noise, trainer._augmentations(everything))

        found = trainer.train_step(images)
        del trainer._noise

        for name, value in values.items():
            assert found[name] == pytest.approx(value, rel=1e-9), name
        for index, (ours, theirs) in enumerate(((state.model, model), (state.discriminator, discriminator))):
            history[index].append(gradients[index])
            for n, (name, parameter) in enumerate(ours.named_parameters()):
                if parameter.grad is not None:
                    assert_close(parameter.grad, gradients[index][n], f"gradient of {name}")
                else:
                    assert not gradients[index][n].any(), name
                first = start[index].get_parameter(name).detach()
                expected = adam(first, [step_gradients[n] for step_gradients in history[index]], 1e-3, 0.0, 0.99)
                assert_close(parameter.detach(), expected, name, atol=1e-10)
                theirs.get_parameter(name).data.copy_(expected)
        now = state.model.state_dict()
        if step == 0:
            average = {name: tensor.clone() for name, tensor in now.items()}  # up to start_step a copy
        else:
            average = {name: 0.999 * average[name] + 0.001 * now[name] for name in now if now[name].is_floating_point()}
        for name, tensor in average.items():
            assert_close(state.ema.model.state_dict()[name], tensor, f"average of {name}")


def test_a_generators_gradients_accumulate_to_those_of_the_whole_batch(make_gan_trainer, tiny_generator_config):
    found = []
    for size in (4, 3):
        trainer = make_gan_trainer(tiny_generator_config, micro_batch_size=size)
        trainer.folder._lock.close()
        trainer.state.model.eval()  # batch norm: in training its statistics are those of each part
        draw = trainer._noise
        trainer._noise = lambda *place, draw=draw: draw(*place).double()
        found.append((trainer.train_step(batch()), gradients_of(trainer)))
    (whole, gradients), (parts, others) = found
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-9), name
    for name, gradient in gradients.items():
        assert_close(others[name], gradient, name)


def test_before_its_start_there_is_no_discriminator_and_then_its_weight_grows(make_trainer):
    trainer = make_trainer({"discriminator_start_step": 2, "adversarial_warmup_steps": 4})
    before = copy.deepcopy(trainer.state.discriminator.state_dict())
    found = [trainer.train_step(batch(seed=step)) for step in range(2)]
    for values in found:
        assert not {"adversarial", "discriminator", "r1", "real_logits", "adversarial_weight"} & values.keys()
        assert values["loss"] == pytest.approx(values["reconstruction"] + values["perceptual"] + values["codebook"])
    for name, tensor in trainer.state.discriminator.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    found = [trainer.train_step(batch(seed=step)) for step in range(2, 8)]
    expected = [0.025, 0.05, 0.075, 0.1, 0.1, 0.1]
    assert [values["adversarial_weight"] for values in found] == pytest.approx(expected)
    assert not torch.equal(trainer.state.discriminator.from_rgb.weight, before["from_rgb.weight"])


def test_lazy_r1_comes_every_few_steps_with_as_many_times_the_weight(make_trainer):
    trainer = make_trainer({"r1_every": 3, "r1": 2.0, "adversarial": 1e-9})
    images = batch()
    trainer.objective.backward(images, step=3)
    with_r1 = gradients_of(trainer)
    trainer.state.discriminator.zero_grad()
    trainer.objective.backward(images, step=4)
    without = gradients_of(trainer)
    trainer.state.discriminator.zero_grad()
    trainer.objective.adversary.config = trainer.config.loss.model_copy(update={"r1_every": 1, "r1": 6.0})
    trainer.objective.backward(images, step=4)
    for name, gradient in gradients_of(trainer).items():
        if name.endswith("of D"):
            torch.testing.assert_close(with_r1[name], gradient)
    assert not torch.equal(with_r1["from_rgb.weight of D"], without["from_rgb.weight of D"])


def test_the_steps_of_lazy_r1(make_trainer, tmp_path):
    trainer = make_trainer({"r1_every": 3})
    assert ["r1" in trainer.train_step(batch(seed=step)) for step in range(5)] == [True, False, False, True, False]
    trainer = make_trainer({"r1": 0.0}, run_dir=str(tmp_path / "other"))
    assert "r1" not in trainer.train_step(batch())


def test_gradients_accumulate_to_those_of_the_whole_batch(make_trainer, tmp_path):
    whole = make_trainer(run_dir=str(tmp_path / "whole"))
    parts = make_trainer(run_dir=str(tmp_path / "parts"), train={"micro_batch_size": 3})
    for trainer in (whole, parts):
        trainer.state.model.eval()  # batch norm: in training its statistics are those of each part
    first, second = (trainer.train_step(batch()) for trainer in (whole, parts))
    for name, value in first.items():
        assert second[name] == pytest.approx(value, rel=1e-9), name
    for name, gradient in gradients_of(whole).items():
        assert_close(gradients_of(parts)[name], gradient, name)
    # weights move by Adam, which amplifies rounding where the gradient is zero but for rounding
    for (name, ours), theirs in zip(parts.state.model.named_parameters(), whole.state.model.parameters(), strict=True):
        assert_close(ours.detach(), theirs.detach(), name, atol=1e-8)


def test_bfloat16_covers_the_networks_and_nothing_else(tiny_config):
    torch.manual_seed(0)
    model, discriminator = VQHiT(tiny_config).train(), Discriminator(SMALL_D)
    seen = {}

    def watch(name):
        def hook(_, inputs, output):
            first = output[0] if isinstance(output, tuple) else output
            seen[name] = (inputs[0].dtype, first.dtype)

        return hook

    perceptual = SmallFeatures()
    parts = {
        "encoder": model.encoder,
        "codebook": model.quantizer,
        "decoder": model.backbone.stages[0].blocks[0].mlp.fc1,
        "features": perceptual.conv,
        "D": discriminator.blocks[0].conv0,
    }
    for name, module in parts.items():
        module.register_forward_hook(watch(name))
    losses = []
    model.quantizer.register_forward_hook(lambda *args: losses.append(args[2].loss.dtype))
    autocast = torch.autocast("cpu", torch.bfloat16)
    config = LossConfig(perceptual=0.5, adversarial=0.1, adaptive=True)
    objective = TokenizerObjective(config, model, discriminator, perceptual, autocast)
    output, values = objective.backward(batch().float(), step=0)
    half, full = torch.bfloat16, torch.float32
    assert seen["encoder"][1] == half
    assert seen["decoder"][1] == half
    assert seen["features"][1] == half
    assert seen["D"] == (full, full)
    assert losses == [full]
    assert {values[name].dtype for name in values} == {full}
    for module in (model, discriminator):
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                assert parameter.grad.dtype == full, name
                assert torch.isfinite(parameter.grad).all(), name
    # the tokens are the float32 nearest codes of the half-precision latents
    latents = output.latents.float()
    assert torch.equal(model.quantizer(latents).tokens, output.tokens)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            {"perceptual": 1.0, "perceptual_network": "features"},
            "perceptual_network features needs perceptual_features",
        ),
        ({"adversarial": -1}, "adversarial"),
        (
            {"adversarial": 1.0, "adaptive": True, "reconstruction": 0.0},
            "adaptive compares with the reconstruction and",
        ),
        ({"r1_every": 0}, "r1_every"),
        ({"gan": "wasserstein"}, "gan"),
        ({"perceptual_weight": 1.0}, "perceptual_weight: unknown key; did you mean 'perceptual_weights'"),
    ],
)
def test_impossible_options_are_named(loss, message):
    with pytest.raises(ConfigError, match=message):
        LossConfig(**loss)
