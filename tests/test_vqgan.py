"""The lean encoder and decoder give taming's numbers, the encoder with less memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from taming.modules.diffusionmodules import model as taming

from vqhit.config import ConfigError
from vqhit.models import VQHiTConfig
from vqhit.recipe import RunConfig
from vqhit.vqgan import ConvDecoder, ConvDecoderConfig, Encoder, EncoderConfig

CONFIGS = Path(__file__).parent.parent / "configs"


def tamings(config, resolution):
    """Our sizes as the arguments of taming's modules."""
    return {
        "ch": config.channels,
        "out_ch": 3,
        "ch_mult": config.channel_multipliers,
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": config.attention_resolutions,
        "in_channels": 3,
        "resolution": resolution,
        "z_channels": config.z_channels,
    }


def with_the_same_weights(ours, theirs):
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours.eval(), theirs.eval()


def both(config, resolution):
    torch.manual_seed(0)
    return with_the_same_weights(
        Encoder(config, resolution), taming.Encoder(**tamings(config, resolution), double_z=False)
    )


def both_decoders(config):
    torch.manual_seed(0)
    return with_the_same_weights(ConvDecoder(config), taming.Decoder(**tamings(config, config.resolution)))


def test_a_decoder_is_built_without_a_word(capsys):
    ConvDecoder(ConvDecoderConfig(resolution=16, channels=32, channel_multipliers=(1,), attention_resolutions=()))
    assert capsys.readouterr().out == ""


def test_the_256_decoder_equals_tamings():
    """To rounding: in float32 taming's own is 2e-5 to 4e-5 from the exact values, of about 3; ours is no further."""
    ours, theirs = both_decoders(RunConfig.from_yaml(CONFIGS / "vqgan_imagenet256.yaml").model.decoder)
    codes = torch.randn(1, 256, 16, 16)
    with torch.no_grad():
        found, expected = ours(codes), theirs(codes)
        assert found.shape == (1, 3, 256, 256)
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)
        codes = codes[..., :8, :8].double()
        torch.testing.assert_close(ours.double()(codes), theirs.double()(codes), rtol=0, atol=1e-12)


def test_the_decoders_gradients_equal_tamings():
    config = ConvDecoderConfig(
        resolution=16, channels=32, channel_multipliers=(1, 2), attention_resolutions=(8,), z_channels=8
    )
    ours, theirs = both_decoders(config)
    codes = torch.randn(2, 8, 8, 8)
    for decoder in (ours, theirs):
        decoder(codes).square().mean().backward()
    for (name, parameter), reference in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_256_encoder_equals_tamings():
    ours, theirs = both(VQHiTConfig.preset("vqhit-b-256").encoder, 256)
    images = torch.rand(1, 3, 256, 256) * 2 - 1
    with torch.no_grad():
        found, expected = ours(images), theirs(images)
    assert found.shape == (1, 256, 16, 16)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


def test_latents_do_not_depend_on_the_batch():
    ours, _ = both(VQHiTConfig.preset("vqhit-b-256").encoder, 256)
    images = torch.rand(3, 3, 256, 256) * 2 - 1
    with torch.no_grad():
        assert torch.equal(ours(images), torch.cat([ours(image[None]) for image in images]))


def test_gradients_equal_tamings():
    config = EncoderConfig(channels=32, channel_multipliers=(1, 2), num_res_blocks=2, attention_resolutions=(8,))
    ours, theirs = both(config, 16)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    for encoder in (ours, theirs):
        encoder(images).square().mean().backward()
    for (name, parameter), reference in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-4, atol=1e-7, msg=name)


MEASURE = """
import sys, torch
from pathlib import Path
from vqhit.vqgan import Encoder, EncoderConfig
from taming.modules.diffusionmodules import model as taming

def mebibytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024

encoder = Encoder(EncoderConfig(), 256).eval()
forward = taming.Encoder.forward if sys.argv[1] == "taming" else Encoder.forward
images = torch.rand(8, 3, 256, 256)
with torch.no_grad():
    forward(encoder, images[:1, :, :64, :64])  # libraries are loaded, threads are there
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = mebibytes("VmRSS")
    forward(encoder, images)
    print(mebibytes("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_peak_memory_is_at_most_four_fifths_of_tamings():
    """Peak resident memory above the loaded model in MiB, batch 8 at 256 px, each in a process of its own."""
    peaks = {
        which: float(
            subprocess.run([sys.executable, "-c", MEASURE, which], capture_output=True, text=True, check=True).stdout
        )
        for which in ("ours", "taming")
    }
    print(f"encoder peak memory above the loaded model, MiB: {peaks}")
    assert peaks["ours"] <= 0.8 * peaks["taming"]


def test_widths_must_divide_into_groups():
    with pytest.raises(ConfigError, match="channels 100: group normalisation needs a multiple of 32"):
        EncoderConfig(channels=100)
