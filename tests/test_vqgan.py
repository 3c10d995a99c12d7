"""The lean encoder gives taming's numbers with less memory."""

import subprocess
import sys

import pytest
import torch
from taming.modules.diffusionmodules import model as taming

from vqhit.config import ConfigError
from vqhit.models import VQHiTConfig
from vqhit.vqgan import Encoder, EncoderConfig


def both(config, resolution):
    torch.manual_seed(0)
    ours = Encoder(config, resolution).eval()
    theirs = taming.Encoder(
        ch=config.channels,
        out_ch=3,
        ch_mult=config.channel_multipliers,
        num_res_blocks=config.num_res_blocks,
        attn_resolutions=config.attention_resolutions,
        in_channels=3,
        resolution=resolution,
        z_channels=config.z_channels,
        double_z=False,
    ).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


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
