"""Small models and small pictures."""

import os
import subprocess
import sys
import warnings

if "PYTEST_XDIST_WORKER" in os.environ:  # several at a time: one thread each, in the processes that they start too
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

from tests.inception import known_as_published, write_random_inception
from vqhit import extractors
from vqhit.cli import main
from vqhit.hit import HiTConfig
from vqhit.models import HiTGeneratorConfig, VQHiT, VQHiTConfig
from vqhit.quantizer import QuantizerConfig
from vqhit.stems import StemConfig
from vqhit.vqgan import ConvDecoderConfig, EncoderConfig

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(scope="session")
def tiny_config():
    """16 px, 8x8 tokens of 32 codes."""
    return VQHiTConfig(
        encoder=EncoderConfig(
            channels=32, channel_multipliers=(1, 1), num_res_blocks=1, attention_resolutions=(8,), z_channels=8
        ),
        quantizer=QuantizerConfig(codebook_size=32, dim=8),
        stem=StemConfig(),
        decoder=HiTConfig(widths=(32, 16), depths=(1, 1), heads=(4, 2), block_sizes=(4,)),
    )


@pytest.fixture(scope="session")
def conv_config(tiny_config):
    """The same with VQGAN's decoder."""
    decoder = ConvDecoderConfig(
        resolution=16,
        channels=32,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(8,),
        z_channels=16,
    )
    return VQHiTConfig(encoder=tiny_config.encoder, quantizer=tiny_config.quantizer, decoder=decoder)


@pytest.fixture(scope="session")
def tiny_generator_config():
    """16 px, noise of four numbers."""
    return HiTGeneratorConfig(
        latent_dim=4, backbone=HiTConfig(widths=(32, 16), depths=(1, 1), heads=(4, 2), block_sizes=(4,))
    )


@pytest.fixture
def tiny_model(tiny_config):
    torch.manual_seed(0)
    return VQHiT(tiny_config).eval()


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """The weights of a randomly initialised Inception."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    write_random_inception(path)
    return path


@pytest.fixture
def inception(inception_file, monkeypatch):
    """The same, taken for the published one."""
    monkeypatch.setattr(extractors, "INCEPTION", known_as_published(inception_file))
    return inception_file


@pytest.fixture
def no_downloads(tmp_path, monkeypatch):
    """An empty cache of torchvision's, and no network: returns the cache's folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)

    def refuse(url, *_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def picture():
    """Makes smooth colour pictures of any size."""

    def make(width, height, seed=0):
        rng = np.random.default_rng(seed)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        return coarse.resize((width, height), Image.Resampling.BICUBIC)

    return make


@pytest.fixture
def photo_folder(tmp_path, picture):
    """A folder of six JPEG files, two of them in a subfolder."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for index in range(6):
        name = f"more/{index}.JPEG" if index > 3 else f"{index}.jpg"
        picture(40 + 8 * index, 48, seed=index).save(folder / name, quality=95)
    return folder


@pytest.fixture
def inside(capsys, monkeypatch):
    """`vqhit` in this process, where torch is loaded already."""

    def run(*arguments, cwd):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["vqhit", *map(str, arguments)])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return subprocess.CompletedProcess(arguments, ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def traced(monkeypatch):
    """`torch.compile` traces and differentiates as always, and generates no code, which takes minutes.

    Returns the classes whose modules it was given.
    """
    compile_it, given = torch.compile, []

    def trace(function, **options):
        given.append(type(function.__self__).__name__)
        return compile_it(function, **{**options, "backend": "aot_eager"})

    monkeypatch.setattr(torch, "compile", trace)
    return given
