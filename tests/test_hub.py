"""Model folders: bit-equal round trips, and an error naming whatever does not fit."""

import json
import re
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity import TINY64
from vqhit import ConfigError, HiTGenerator, VQHiT


@pytest.fixture
def folder(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, change):
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_round_trips_are_bit_equal(tiny_model, folder, tmp_path):
    loaded = VQHiT.from_pretrained(folder)
    assert loaded.config == tiny_model.config
    assert not loaded.training
    state = tiny_model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(loaded.reconstruct(images), tiny_model.reconstruct(images))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_loaded_model_can_be_trained(folder):
    model = VQHiT.from_pretrained(folder).train()
    model(torch.zeros(1, 3, 16, 16)).reconstruction.sum().backward()
    assert model.quant_conv.weight.grad is not None


def test_a_generator_round_trip(tmp_path):
    torch.manual_seed(0)
    generator = HiTGenerator(TINY64).eval()
    generator.save_pretrained(tmp_path)
    z = torch.randn(2, 16)
    assert torch.equal(HiTGenerator.from_pretrained(tmp_path)(z), generator(z))


def test_half_precision_on_disk_is_read_as_float32(folder, tmp_path):
    VQHiT.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    size = (folder / "model.safetensors").stat().st_size
    assert (tmp_path / "half" / "model.safetensors").stat().st_size < 0.6 * size
    loaded = VQHiT.from_pretrained(tmp_path / "half")
    for name, tensor in VQHiT.from_pretrained(folder).state_dict().items():
        expected = tensor.bfloat16().float() if tensor.is_floating_point() else tensor
        assert torch.equal(loaded.state_dict()[name], expected), name
    VQHiT.from_pretrained(folder, dtype=torch.float64).save_pretrained(tmp_path / "double")
    assert VQHiT.from_pretrained(tmp_path / "double").quantizer.codebook.dtype == torch.float64
    edit_weights(tmp_path / "double", lambda w: w.update({"quantizer.codebook": w["quantizer.codebook"].float()}))
    assert {tensor.dtype for tensor in VQHiT.from_pretrained(tmp_path / "double").parameters()} == {torch.float32}
    assert VQHiT.from_pretrained(tmp_path / "half", dtype=torch.bfloat16).quantizer.codebook.dtype == torch.bfloat16


def test_a_packaged_model_is_found_by_name_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("a socket was opened"))
    monkeypatch.chdir(tmp_path)
    model = VQHiT.from_pretrained("vqhit-tiny-64")
    assert (model.config.image_size, model.quant_conv.weight.dtype) == (64, torch.float32)
    with pytest.raises(
        ValueError, match=r"vqhit-tiny-46: no such folder, .*comes hit-tiny-64, vqgan-tiny-64, vqhit-tiny-64$"
    ):
        VQHiT.from_pretrained("vqhit-tiny-46")
    for name in ("", "..", "../pretrained/vqhit-tiny-64", "vqhit-tiny-64/"):
        with pytest.raises(ValueError, match="no such f"):
            VQHiT.from_pretrained(name)


def test_a_folder_with_a_configuration_goes_before_a_packaged_model(tiny_model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vqhit-tiny-64").mkdir()
    assert VQHiT.from_pretrained("vqhit-tiny-64").config.image_size == 64
    tiny_model.save_pretrained("vqhit-tiny-64")
    assert VQHiT.from_pretrained("vqhit-tiny-64").config == tiny_model.config


def test_dtype_converts_the_floating_point_tensors(folder):
    model = VQHiT.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.quantizer.codebook.dtype == torch.bfloat16
    assert model.decode(model.encode(torch.zeros(1, 3, 16, 16, dtype=torch.bfloat16))).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("quantizer.codebook"), "missing tensor quantizer.codebook"),
        (lambda w: w.update(other=torch.zeros(1)), "extra tensor other"),
        (
            lambda w: w.update({"quantizer.codebook": torch.zeros(16, 8)}),
            "tensor quantizer.codebook is (16, 8); the configuration says (32, 8)",
        ),
        (
            lambda w: w.update({"quantizer.codebook": torch.zeros(32, 8, dtype=torch.int64)}),
            "tensor quantizer.codebook is torch.int64; expected torch.float32",
        ),
        (
            lambda w: w.update({"quantizer.codebook": torch.full((32, 8), torch.inf)}),
            "tensor quantizer.codebook holds values that are not finite",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
    edit_weights(folder, change)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        VQHiT.from_pretrained(folder)
    assert str(folder / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["config"].update(colour=1),
            "colour: unknown key; allowed: kind, encoder, quantizer, stem, decoder",
        ),
        (
            lambda c: c["config"]["stem"].update(latentgrid=4),
            "stem.latentgrid: unknown key; did you mean 'latent_grid'?",
        ),
        (lambda c: c["config"]["stem"].update(latent_grid="4"), "stem.latent_grid: found '4'; input should be"),
        (lambda c: c["config"].pop("stem"), "stem: missing"),
        (lambda c: c.update(format_version=2, vqhit_version="0.9.0"), "format_version 2 is newer than this vqhit"),
        (lambda c: c.update(format_version=2, vqhit_version="0.9.0"), "install vqhit 0.9.0 or later"),
        (lambda c: c.pop("format_version"), "format_version: found None; expected 1"),
        (lambda c: c.update(extra=1), "unknown key 'extra'"),
        (
            lambda c: c.update(model="HiTGenerator"),
            "holds a HiTGenerator, not a VQHiT",
        ),
        (lambda c: c.pop("config"), "not written by vqhit: it has no 'config' mapping"),
    ],
)
def test_configurations_that_do_not_fit_are_named(folder, change, message):
    edit_config(folder, change)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        VQHiT.from_pretrained(folder)
    assert str(caught.value).startswith(str(folder / "config.json"))


def test_missing_and_damaged_files_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"absent: no such folder, and no id .*; a model folder holds"):
        VQHiT.from_pretrained(tmp_path / "absent")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        VQHiT.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: no such file"):
        VQHiT.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: not a readable JSON file"):
        VQHiT.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        VQHiT.from_pretrained(folder)


def test_nothing_is_unpickled(folder, monkeypatch):
    import pickle

    def refuse(*args, **kwargs):
        raise AssertionError("a pickle was read")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    VQHiT.from_pretrained(folder)


def test_a_save_that_fails_leaves_the_old_file_whole(tiny_model, folder, monkeypatch):
    from pathlib import Path

    before = (folder / "model.safetensors").read_bytes()

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tiny_model.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_an_unusable_device_is_named(folder):
    for device in ("tpu9", "meta"):
        with pytest.raises(ConfigError, match=f"device '{device}' cannot be used here"):
            VQHiT.from_pretrained(folder, device=device)
