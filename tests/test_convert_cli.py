"""`vqhit convert`: a folder that `from_pretrained` loads, or one line and nothing."""

import argparse

import pytest
import torch

from tests.vqgans import SMALL, as_llamagen, small_original, taming_yaml
from vqhit import VQHiT, hub
from vqhit.files import sha256
from vqhit.finetune import BegunWith
from vqhit.origin import read_origin
from vqhit.publish import package


@pytest.fixture(scope="module")
def original():
    return small_original()


@pytest.fixture
def files(original, tmp_path):
    """model.yaml, last.ckpt and vq.pt in a folder."""
    state = original[0].state_dict()
    taming_yaml(tmp_path / "model.yaml", SMALL, 64, 16)
    torch.save({"state_dict": state, "callbacks": {argparse.Namespace: 1}}, tmp_path / "last.ckpt")
    torch.save({"model": as_llamagen(state), "args": argparse.Namespace(lr=1)}, tmp_path / "vq.pt")
    return tmp_path


def fails(result, message):
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert message in line


def test_a_taming_checkpoint_becomes_a_folder(inside, original, files):
    result = inside("convert", "taming", "last.ckpt", "--config", "model.yaml", "--out", "new/vqgan", cwd=files)
    assert result.returncode == 0, result.stderr
    written, source = result.stdout.splitlines()
    assert written.startswith("new/vqgan: 32x32 px, 8x8 tokens (64 per image) of 64 codes, ")
    assert source == f"converted from taming-transformers's last.ckpt (sha256 {sha256(files / 'last.ckpt')})"
    model, images = original
    converted = VQHiT.from_pretrained(files / "new" / "vqgan")
    assert torch.equal(converted.encode(images), model.tokens_and_pictures(model.latents(images))[0])


def test_where_it_comes_from_goes_onto_the_cards_of_what_is_made_of_it(inside, files):
    given = ("convert", "llamagen", "vq.pt", "--image-size", 32, "--out", "there")
    assert inside(*given, cwd=files).returncode == 0
    source = f"LlamaGen's vq.pt, its `model` (sha256 {sha256(files / 'vq.pt')})"
    assert f"- **Converted from**: {source}" in package(files / "there", "someone/tiny").card
    begun_with = BegunWith(None, None, "1" * 64, [], read_origin(files / "there").text)
    assert begun_with.public == f"a model converted from {source}, whose weights have sha256 {'1' * 64}"


def test_a_llamagen_checkpoint_becomes_a_folder(inside, original, files):
    (files / "there").mkdir()
    result = inside("convert", "llamagen", "vq.pt", "--image-size", 32, "--out", "there", cwd=files)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("there: 32x32 px, 8x8 tokens (64 per image) of 64 codes, ")
    converted = VQHiT.from_pretrained(files / "there")
    assert converted.config.quantizer.normalize
    assert torch.equal(converted.quantizer.codebook, original[0].quantize.embedding.weight)
    assert converted.encode(original[1]).unique().numel() > 8


def test_mistakes_are_one_line_and_nothing_is_written(inside, files):
    (files / "broken.pt").write_bytes((files / "vq.pt").read_bytes()[:5000])
    taming, llamagen = ("convert", "taming"), ("convert", "llamagen")
    config = ("--config", "model.yaml", "--out", "new")
    fails(inside(*taming, "absent.ckpt", *config, cwd=files), "absent.ckpt: no such file; expected a file of")
    fails(inside(*taming, ".", *config, cwd=files), ".: a folder; expected a file of torch.save")
    fails(inside(*taming, "vq.pt", *config, cwd=files), "vq.pt: no state dict under 'state_dict'; there is: 'model'")
    fails(inside(*taming, "last.ckpt", "--config", "no.yaml", "--out", "new", cwd=files), "no.yaml: no such file")
    fails(inside(*llamagen, "broken.pt", "--out", "new", cwd=files), "broken.pt: not a file of torch.save, damaged")
    fails(inside(*llamagen, "vq.pt", "--weights", "ema", "--out", "new", cwd=files), "no state dict under 'ema'")
    fails(inside(*llamagen, "vq.pt", "--weights", "both", "--out", "new", cwd=files), "'both'; allowed: model, ema")
    fails(inside(*llamagen, "vq.pt", "--image-size", 30, "--out", "new", cwd=files), "image size 30")
    assert not (files / "new").exists()


def test_a_folder_that_is_taken_is_refused_before_anything_is_read(inside, files):
    before = sorted(files.iterdir())
    given = ("convert", "llamagen", "absent.pt", "--out")
    fails(inside(*given, ".", cwd=files), ".: not empty; give a new or empty folder")
    fails(inside(*given, "vq.pt", cwd=files), "vq.pt: a file; give a new or empty folder")
    fails(inside(*given, "vq.pt/new", cwd=files), "vq.pt is a file")
    assert sorted(files.iterdir()) == before


@pytest.mark.parametrize("there", [True, False])
def test_nothing_half_written_stays(inside, files, monkeypatch, there):
    def full(path, data, write=hub.write_atomic):
        if path.name == "config.json":
            raise OSError(f"{path}: no space left on device")
        write(path, data)

    monkeypatch.setattr(hub, "write_atomic", full)
    if there:
        (files / "new").mkdir()
    result = inside("convert", "llamagen", "vq.pt", "--image-size", 32, "--out", "new", cwd=files)
    fails(result, "config.json: no space left on device")
    assert (files / "new").exists() == there
    assert not list(files.glob("new/*"))
