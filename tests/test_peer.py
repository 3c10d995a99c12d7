"""taming's VQGAN with the encoder and codebook of a model: taming's numbers, the same tokens."""

import pytest
import torch

from tests.vqgans import SMALL, Original
from vqhit.bench import count_gflops
from vqhit.export import sample_inputs
from vqhit.models import VQHiT, VQHiTConfig
from vqhit.peer import TamingVQGAN
from vqhit.quantizer import QuantizerConfig
from vqhit.vqgan import ConvDecoderConfig, EncoderConfig


@pytest.fixture
def conv_model(conv_config):
    torch.manual_seed(0)
    return VQHiT(conv_config).eval()


def test_tamings_autoencoder_gives_tamings_numbers():
    sizes = {
        "channels": SMALL["ch"],
        "channel_multipliers": tuple(SMALL["ch_mult"]),
        "num_res_blocks": SMALL["num_res_blocks"],
        "attention_resolutions": tuple(SMALL["attn_resolutions"]),
        "z_channels": SMALL["z_channels"],
    }
    config = VQHiTConfig(
        encoder=EncoderConfig(**sizes),
        quantizer=QuantizerConfig(codebook_size=64, dim=16),
        decoder=ConvDecoderConfig(resolution=32, **sizes),
    )
    original, images = Original(SMALL, codes=64, dim=16), torch.rand(2, 3, 32, 32) * 2 - 1
    original.give_codes_near(original.latents(images))
    model = TamingVQGAN(VQHiT(config))
    model.load_state_dict(original.state_dict())
    output = model(images)
    latents = original.latents(images)
    tokens, pictures = original.tokens_and_pictures(latents)
    assert torch.equal(output.tokens, tokens)
    assert torch.equal(output.reconstruction, pictures)
    assert torch.equal(output.codebook_loss, original.quantize(latents)[1])
    ours = VQHiT(config)  # whose convolutional decoder is taming's, run lean
    ours.load_state_dict(
        {name.replace("quantize.embedding.weight", "quantizer.codebook"): t for name, t in model.state_dict().items()}
    )
    torch.testing.assert_close(ours(images).reconstruction, output.reconstruction, rtol=1e-4, atol=1e-4)


def test_taming_finds_the_same_tokens(tiny_model, capsys):
    theirs, images = TamingVQGAN(tiny_model), sample_inputs(tiny_model, "encoder", 3)
    tokens = theirs.encode(images)
    assert tokens.unique().numel() > 3
    assert torch.equal(tokens, tiny_model.encode(images))
    torch.testing.assert_close(theirs.reconstruct(images), theirs.decode(tokens), rtol=0, atol=1e-5)
    assert capsys.readouterr().out == ""


def test_taming_makes_the_same_pictures_with_the_same_decoder(conv_model):
    theirs, tokens = TamingVQGAN(conv_model), sample_inputs(conv_model, "decoder", 3)
    expected = conv_model.decode(tokens)
    assert expected.std() > 0.05
    torch.testing.assert_close(theirs.decode(tokens).clamp(-1, 1), expected, rtol=0, atol=1e-5)
    assert count_gflops(lambda: theirs.decode(tokens)) == count_gflops(lambda: conv_model.decode(tokens))


def test_it_has_its_models_precision_and_mode(tiny_model):
    theirs = TamingVQGAN(tiny_model.to(torch.bfloat16))
    assert {tensor.dtype for tensor in theirs.state_dict().values()} == {torch.bfloat16}
    assert not theirs.training


def test_its_last_layer_gives_the_picture(tiny_model):
    theirs = TamingVQGAN(tiny_model)
    theirs.last_layer.weight.data.zero_()
    theirs.last_layer.bias.data.fill_(0.5)
    assert (theirs(torch.zeros(1, 3, 16, 16)).reconstruction == 0.5).all()
