"""The convolutional baseline is SAGAN's generator: sizes, and its layers written out."""

import pytest
import torch
import torch.nn.functional as F

from vqhit.config import ConfigError
from vqhit.convnet import ConvNetGenerator, ConvNetGeneratorConfig

SMALL = ConvNetGeneratorConfig(latent_dim=4, resolution=16, channels=8, attention_size=8)


def test_sizes_are_sagans_at_128_px():
    config = ConvNetGeneratorConfig()
    assert (config.latent_dim, config.resolution, config.attention_size) == (128, 128, 32)
    assert config.widths == [1024, 512, 256, 128, 64]
    with torch.device("meta"):
        model = ConvNetGenerator(config)

    def block(c, o):
        return 9 * c * o + o + 9 * o * o + o + c * o + o + 2 * c + 2 * o

    widths = [1024, *config.widths]
    expected = 128 * 16 * 1024 + 16 * 1024 + sum(block(*widths[n : n + 2]) for n in range(5))
    expected += 2 * 256 * 32 + 2 * 256 * 128 + 1  # attention after the third block
    expected += 2 * 64 + 9 * 64 * 3 + 3
    assert sum(p.numel() for p in model.parameters()) == expected
    assert model(torch.empty(1, 128, device="meta")).shape == (1, 3, 128, 128)


def norm(x, layer):
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)


def enlarged(x):
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def block_by_hand(block, x):
    """The official TensorFlow code's block: norm, ReLU, enlarge, convolve, norm, ReLU, convolve; 1x1 beside it."""
    main = F.conv2d(enlarged(norm(x, block.norm0).relu()), block.conv0.weight, block.conv0.bias, padding=1)
    main = F.conv2d(norm(main, block.norm1).relu(), block.conv1.weight, block.conv1.bias, padding=1)
    return main + F.conv2d(enlarged(x), block.skip.weight, block.skip.bias)


def attention_by_hand(attention, x):
    """Its `non_local_block_sim`: keys and values halved by max pooling, logits not scaled."""
    size = x.shape[2:]
    theta, phi, g = (F.conv2d(x, layer.weight) for layer in (attention.query, attention.key, attention.value))
    phi, g = F.max_pool2d(phi, 2).flatten(2), F.max_pool2d(g, 2).flatten(2)
    weights = (theta.flatten(2).transpose(1, 2) @ phi).softmax(-1)
    attended = (weights @ g.transpose(1, 2)).transpose(1, 2).unflatten(2, size)
    return x + attention.sigma * F.conv2d(attended, attention.output.weight)


def test_a_generator_equals_its_layers_written_out():
    torch.manual_seed(0)
    model = ConvNetGenerator(SMALL).double().train()
    for name, parameter in model.named_parameters():
        if "norm" in name or parameter.ndim < 2:
            parameter.data.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.3)
    z = torch.randn(3, 4, dtype=torch.float64)
    x = F.linear(z, model.first_map.weight, model.first_map.bias).view(3, 16, 4, 4)
    first, attention, second = model.blocks
    x = block_by_hand(second, attention_by_hand(attention, block_by_hand(first, x)))
    expected = F.conv2d(norm(x, model.norm).relu(), model.to_rgb.weight, model.to_rgb.bias, padding=1).tanh()
    torch.testing.assert_close(model(z), expected, rtol=1e-10, atol=1e-12)


def test_it_starts_without_attention_and_with_glorots_weights():
    torch.manual_seed(0)
    model = ConvNetGenerator(SMALL)
    assert model.blocks[1].sigma.item() == 0
    weight = model.blocks[0].conv0.weight
    bound = (6 / (9 * sum(weight.shape[:2]))) ** 0.5
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    without = ConvNetGenerator(SMALL.model_copy(update={"attention_size": None}))
    assert [type(block).__name__ for block in without.blocks] == ["_Block", "_Block"]
    assert without(torch.zeros(2, 4)).shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"resolution": 96}, "resolution 96; allowed: 8, 16, 32, 64, 128, 256, 512, 1024"),
        ({"resolution": 16}, "attention_size 32; a generator of 16 px has maps of 8, 16"),
        ({"attention_size": 128, "channels": 4}, "attention needs a multiple of 8 channels; its map has 4"),
        ({"latent_dim": 0}, "latent_dim: found 0"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        ConvNetGeneratorConfig(**sizes)
