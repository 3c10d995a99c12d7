"""Sampling: a seed's images do not depend on the company they come in; interpolation; what is refused."""

import numpy as np
import pytest
import torch

from vqhit.convnet import ConvNetGenerator, ConvNetGeneratorConfig
from vqhit.generator import Purpose, draw_noise
from vqhit.images import to_uint8
from vqhit.models import HiTGenerator, load_model
from vqhit.norms import BatchNorm

CONVNET = ConvNetGeneratorConfig(latent_dim=4, resolution=16, channels=8, attention_size=8)


@pytest.fixture(params=["hit", "convnet"])
def generator(request, tiny_generator_config):
    torch.manual_seed(0)
    model = HiTGenerator(tiny_generator_config) if request.param == "hit" else ConvNetGenerator(CONVNET)
    for module in model.modules():  # statistics that matter
        if isinstance(module, BatchNorm):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model


def test_an_image_of_a_seed_is_the_same_bits_however_many_are_drawn(generator):
    nine = generator.sample(9, seed=3)
    assert nine.shape == (9, 3, 16, 16)
    assert torch.equal(generator.sample(4, seed=3), nine[:4])
    assert torch.equal(torch.cat(list(generator.samples([7, 2], seed=3))), nine[[7, 2]])
    assert not torch.allclose(generator.sample(4, seed=4), nine[:4])


@pytest.mark.parametrize("batch_size", [2, 4, 9])
def test_the_size_of_batches_moves_images_by_rounding_alone(generator, batch_size):
    assert torch.equal(generator.noise(range(9), seed=3)[5:], generator.noise(range(5, 9), seed=3))
    torch.testing.assert_close(
        generator.sample(9, seed=3, batch_size=batch_size), generator.sample(9, seed=3), rtol=0, atol=1e-5
    )


def test_pictures_of_batches_differ_by_one_level_at_most(generator):
    alone, together = (to_uint8(generator.sample(9, seed=3, batch_size=size)).int() for size in (1, 9))
    assert (alone - together).abs().max() <= 1


def test_samples_are_drawn_in_eval_mode_and_the_mode_stays(generator):
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    drawn = generator.train().sample(3)
    assert generator.training
    assert torch.equal(drawn, generator.eval().sample(3))
    assert not drawn.requires_grad
    for name, tensor in generator.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_part_that_is_in_eval_mode_stays_in_it(generator):
    norm = next(module for module in generator.modules() if isinstance(module, BatchNorm))
    generator.train()
    norm.eval()
    generator.sample(1)
    assert generator.training
    assert not norm.training


def test_samples_are_clamped_and_calls_are_not(tiny_generator_config):
    torch.manual_seed(0)
    generator = HiTGenerator(tiny_generator_config).eval()
    generator.backbone.last_layer.weight.data.mul_(1000)
    with torch.no_grad():
        images = torch.cat([generator(generator.noise([n])) for n in range(4)])
    assert images.abs().max() > 1
    assert torch.equal(generator.sample(4), images.clamp(-1, 1))


def test_noise_is_standard_normal_and_another_for_every_key():
    noise = draw_noise(5, Purpose.SAMPLE, 7, 500, 64)
    assert noise.mean().item() == pytest.approx(0, abs=0.03)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    keys = [(5, 0, 8), (7, 0, 5), (6, 0, 7), (5, 1, 7), (5, 2, 7), (5, 7, 0), (5 + 2**32, 0, 7), (5, 0, 7 + 2**32)]
    for key in keys:
        other = draw_noise(*key, 500, 64)
        assert abs(np.corrcoef(noise.flatten(), other.flatten())[0, 1]) < 0.03, key


def test_interpolation_goes_straight_from_one_noise_vector_to_the_other(generator):
    z0, z1 = generator.noise([0, 1])
    line = generator.interpolate(z0, z1, steps=5)
    assert line.shape == (5, 3, 16, 16)
    for step in range(5):
        z = z0 + step / 4 * (z1 - z0)
        expected = generator.eval()(z.unsqueeze(0))[0].clamp(-1, 1)
        torch.testing.assert_close(line[step], expected.detach(), rtol=0, atol=1e-6)
    assert torch.equal(line[[0, 4]], generator.sample(2))
    many = generator.interpolate(torch.stack([z0, z1]), torch.stack([z1, z0]), steps=5, batch_size=1)
    assert many.shape == (2, 5, 3, 16, 16)
    assert torch.equal(many[0], line)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: g.sample(0), "n is 0; allowed: 1 or more"),
        (lambda g: g.sample(2, seed=-1), "seed is -1; allowed: 0 or more"),
        (lambda g: g.sample(2, batch_size=0), "batch_size is 0; allowed: 1 or more"),
        (lambda g: g.interpolate(torch.zeros(4), torch.zeros(4), steps=1), "steps is 1; allowed: 2 or more"),
        (
            lambda g: g.interpolate(torch.zeros(4), torch.zeros(3)),
            r"z0 is \(4,\) and z1 \(3,\); both must be",
        ),
        (lambda g: g.interpolate(torch.zeros(4), torch.zeros(1, 4)), r"z0 is \(4,\) and z1 \(1, 4\); both must be"),
        (lambda g: g(torch.zeros(2, 8)), r"z is \(2, 8\); this model takes \(B, 4\)"),
    ],
)
def test_impossible_requests_are_refused(generator, call, message):
    with pytest.raises(ValueError, match=message):
        call(generator)


def test_a_saved_generator_is_loaded_as_what_it_is(generator, tmp_path):
    generator.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(generator)
    assert loaded.config == generator.config
    assert torch.equal(loaded.sample(2), generator.sample(2))
    other = ConvNetGenerator if isinstance(generator, HiTGenerator) else HiTGenerator
    with pytest.raises(ValueError, match=f"{type(generator).__name__}"):
        other.from_pretrained(tmp_path)
