"""Encoder and decoder as files: what they compute, what they refuse, and that nothing wrong is left."""

import json
import os
import subprocess
import sys

import onnx
import pytest
import torch

from vqhit import export as exporting
from vqhit import models
from vqhit.export import export, load_runner, sample_inputs
from vqhit.hit import HiTConfig
from vqhit.models import HiTGenerator, VQHiT
from vqhit.quantizer import QuantizerConfig

FILES = {
    "torch": ["decoder.pt2", "encoder.pt2", "export.json"],
    "onnx": ["decoder.onnx", "encoder.onnx", "export.json"],
}


def lively(config):
    """A model whose every tensor matters: fresh ones have norms of 0 and 1, and biases of 0."""
    torch.manual_seed(0)
    model = VQHiT(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and "frozen_codebook" not in name:
                noise = 0.2 * torch.randn_like(tensor)
                tensor.mul_(1 + noise.abs()).add_(0 if tensor.ndim > 1 or "var" in name else noise)
    return model


def encoded_and_decoded(model, folder, suffix, batches=(1, 2, 7)):
    """Share of equal tokens, and the largest difference of images, over batches of several sizes."""
    equal, largest = [], []
    for count in batches:
        images, tokens = (sample_inputs(model, part, count, seed=99) for part in ("encoder", "decoder"))
        found, expected = load_runner(folder / f"encoder{suffix}")(images), model.encode(images)
        assert found.dtype == torch.int64
        assert found.shape == expected.shape == (count, *model.token_grid)
        assert len(expected.unique()) > 3
        equal.append(float((found == expected).float().mean()))
        found, expected = load_runner(folder / f"decoder{suffix}")(tokens), model.decode(tokens)
        assert found.dtype == torch.float32
        assert found.shape == expected.shape
        assert found.std() > 0.01
        largest.append(float((found - expected).abs().max()))
    return equal, largest


@pytest.fixture(scope="module")
def exported(tiny_config, tmp_path_factory):
    """A model, and what export returns of it, in a folder for each format."""
    model, folder = lively(tiny_config), tmp_path_factory.mktemp("exported")
    return model, folder, {format: export(model, folder / format, format=format) for format in FILES}


@pytest.mark.parametrize("format", FILES)
def test_files_compute_what_the_model_does_on_any_batch(exported, format):
    model, folder, reports = exported
    folder, report, suffix = folder / format, reports[format], exporting.SUFFIXES[format]
    assert sorted(path.name for path in folder.iterdir()) == FILES[format]
    equal, largest = encoded_and_decoded(model, folder, suffix)
    assert equal == [1, 1, 1]
    assert max(largest) < 1e-5
    assert report == json.loads((folder / "export.json").read_text())
    encoder = report["parts"]["encoder"]
    assert encoder["files"] == {f"encoder{suffix}": (folder / f"encoder{suffix}").stat().st_size}
    assert encoder["input"] == {"name": "images", "shape": ["batch", 3, 16, 16], "dtype": "float32", "range": [-1, 1]}
    assert encoder["output"] == {"name": "tokens", "shape": ["batch", 8, 8], "dtype": "int64", "range": [0, 31]}
    assert (encoder["check"]["tokens"], encoder["check"]["tokens_differing"]) == (4 * 64, 0)
    assert report["parts"]["decoder"]["check"]["largest_difference"] < 1e-5


@pytest.mark.parametrize("format", FILES)
def test_the_convolutional_decoder_is_exported(conv_config, tmp_path, format):
    model, suffix = lively(conv_config), exporting.SUFFIXES[format]
    export(model, tmp_path / "out", format=format, part="decoder")
    for count in (1, 2, 7):
        tokens = sample_inputs(model, "decoder", count)
        found = load_runner(tmp_path / "out" / f"decoder{suffix}")(tokens)
        torch.testing.assert_close(found, model.decode(tokens), atol=1e-5, rtol=0)


OPTIONS = {  # of the codebook, and of HiT
    "normalize; layer norm, own keys, axial": (
        {"codebook_size": 32, "dim": 8, "normalize": True},
        {"norm": "layer", "multi_query": False, "attention": "axial", "block_sizes": (None,)},
    ),
    "fsq; full": (
        {"kind": "fsq", "levels": (8, 5, 5), "dim": 3, "codebook_size": 200},
        {"attention": "full", "block_sizes": (None,)},
    ),
    "lfq; blocks in turns": (
        {"kind": "lfq", "dim": 5, "codebook_size": 32},
        {"attention": "interleaved", "depths": (2, 1)},
    ),
    "sim_vq; no attention at all": (
        {"kind": "sim_vq", "dim": 8, "codebook_size": 32, "gradient": "rotation_trick"},
        {"cross_attention": False, "block_sizes": ()},
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_kind_of_codebook_and_every_option_of_hit_is_exported(tiny_config, tmp_path, name):
    codebook, changes = OPTIONS[name]
    decoder = HiTConfig(**{**tiny_config.decoder.to_dict(), **changes})
    config = tiny_config.model_copy(update={"quantizer": QuantizerConfig(**codebook), "decoder": decoder})
    model = lively(config)
    format = "onnx" if "sim_vq" in name else "torch"  # the quicker
    export(model, tmp_path / "out", format=format)
    equal, largest = encoded_and_decoded(model, tmp_path / "out", exporting.SUFFIXES[format], batches=(7,))
    assert equal == [1]
    assert max(largest) < 1e-5


def test_a_tokenizer_with_the_skip_is_exported(tiny_config, tmp_path):
    """The packaged one; also that a name is enough, and goes into export.json."""
    model = VQHiT.from_pretrained("vqhit-tiny-64")
    assert model.config.stem.skip
    report = export("vqhit-tiny-64", tmp_path / "out", part="decoder")
    assert (report["model"]["id"], report["model"]["revision"]) == ("vqhit-tiny-64", None)
    tokens = sample_inputs(model, "decoder", 3)
    found = load_runner(tmp_path / "out" / "decoder.pt2")(tokens)
    torch.testing.assert_close(found, model.decode(tokens), atol=1e-5, rtol=0)


def test_programs_run_with_torch_alone(exported, tmp_path):
    model, folder, _ = exported
    images, tokens = (sample_inputs(model, part, 5) for part in ("encoder", "decoder"))
    torch.save([images, model.encode(images), tokens, model.decode(tokens)], tmp_path / "expected.pt")
    code = """
import json, sys
class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("vqhit", "taming", "einops", "vector_quantize_pytorch"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch
images, tokens, codes, pictures = torch.load(sys.argv[1])
about = {"export.json": ""}
encode = torch.export.load("torch/encoder.pt2", extra_files=about).module()
decode = torch.export.load("torch/decoder.pt2").module()
assert torch.equal(encode(images), tokens)
assert (decode(codes) - pictures).abs().max() < 1e-5
assert not decode(codes).requires_grad
print(json.loads(about["export.json"])["part"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "expected.pt"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "encoder\n"), done.stderr


def test_an_onnx_file_says_what_it_is(exported):
    file = onnx.load(exported[1] / "onnx" / "decoder.onnx")
    shapes = [
        (value.name, [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim])
        for value in (*file.graph.input, *file.graph.output)
    ]
    assert shapes == [("tokens", ["batch", 8, 8]), ("images", ["batch", 3, 16, 16])]
    (about,) = (json.loads(entry.value) for entry in file.metadata_props if entry.key == "vqhit")
    assert (about["part"], about["codebook_size"], about["output"]["range"]) == ("decoder", 32, [-1, 1])


def test_an_onnx_file_too_large_for_one_has_its_weights_beside_it(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_ONE_FILE_BYTES", 1000)
    model = lively(tiny_config)
    report = export(model, tmp_path / "out", format="onnx", part="decoder")
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir() if path.suffix != ".json"}
    assert report["parts"]["decoder"]["files"] == files
    assert files.keys() == {"decoder.onnx", "decoder.onnx.data"}
    tokens = sample_inputs(model, "decoder", 2)
    found = load_runner(tmp_path / "out" / "decoder.onnx")(tokens)
    torch.testing.assert_close(found, model.decode(tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_files_refuse_other_shapes_and_types(exported, format):
    suffix = exporting.SUFFIXES[format]
    encode, decode = (load_runner(exported[1] / format / f"{part}{suffix}") for part in exporting.PARTS)
    message = "Guard failed|dtype|should be the same|Expected tensor|INVALID_ARGUMENT|out of range"
    for images in (torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 16, 8), torch.zeros(3, 16, 16)):
        with pytest.raises(Exception, match=message):
            encode(images)
    with pytest.raises(Exception, match=message):
        encode(torch.zeros(2, 3, 16, 16).double())
    for tokens in (torch.zeros(2, 4, 4), torch.zeros(2, 64), torch.full((2, 8, 8), 32)):
        with pytest.raises(Exception, match=message):
            decode(tokens.long())
    with pytest.raises(Exception, match=message):
        decode(torch.zeros(2, 8, 8))


def test_the_model_itself_is_left_as_it_is(tiny_config, tmp_path):
    model = VQHiT(tiny_config).double()
    export(model, tmp_path / "out", part="decoder")
    assert model.training
    assert all(parameter.requires_grad and parameter.dtype == torch.float64 for parameter in model.parameters())


def corrupt(monkeypatch, part):
    """Files of a part that are not the model's."""
    real = exporting._trace

    def trace(model, name):
        if name == part:
            other = models.VQHiT(model.config).eval().requires_grad_(False)
            return real(other, name)
        return real(model, name)

    monkeypatch.setattr(exporting, "_trace", trace)


@pytest.mark.parametrize(
    ("part", "format", "message"),
    [
        ("encoder", "torch", r"encoder.pt2: wrong: run by torch, \d+ of 256 tokens are not the model's"),
        ("decoder", "onnx", "decoder.onnx: wrong: run by onnxruntime, images differ"),
    ],
)
def test_a_wrong_file_is_found_and_nothing_is_left(tiny_config, tmp_path, monkeypatch, part, format, message):
    corrupt(monkeypatch, part)
    with pytest.raises(ValueError, match=message):
        export(lively(tiny_config), tmp_path / "new", format=format, part=part)
    assert list(tmp_path.iterdir()) == []


def test_files_that_give_nan_are_wrong(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(
        exporting, "load_runner", lambda path: lambda tokens: torch.full((len(tokens), 3, 16, 16), torch.nan)
    )
    with pytest.raises(ValueError, match="images differ from the model's by up to inf"):
        export(lively(tiny_config), tmp_path / "new", part="decoder")


def test_what_cannot_be_traced_is_one_line(tiny_config, tmp_path, monkeypatch):
    class Stubborn(exporting.DecoderPart):
        def forward(self, tokens):
            return super().forward(tokens) * int(tokens.max())

    monkeypatch.setattr(exporting, "DecoderPart", Stubborn)
    with pytest.raises(ValueError, match=r"decoder: cannot be exported to torch [(]") as caught:
        export(lively(tiny_config), tmp_path / "new", part="decoder")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_said_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"the onnx format needs other packages: pip install 'vqhit\[onnx\]'"):
        export("nowhere", tmp_path / "out", format="onnx")


def test_without_onnxruntime_the_files_are_not_checked_and_that_is_said(inside, tiny_model, tmp_path, monkeypatch):
    tiny_model.save_pretrained(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    given = ("export", "--model", "model", "--out", "out", "--format", "onnx", "--part", "decoder")
    result = inside(*given, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "out/decoder.onnx: 0." in result.stdout
    assert "not checked: onnxruntime is not installed" in result.stdout
    assert json.loads((tmp_path / "out" / "export.json").read_text())["parts"]["decoder"]["check"] is None


def test_the_command_writes_checks_and_says_so(inside, tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    result = inside("export", "--model", "model", "--out", "deep/out", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    encoder, decoder = result.stdout.splitlines()
    assert encoder.startswith("deep/out/encoder.pt2: ")
    assert "MB; 0 of 256 tokens differ from the model's, run by torch 2." in encoder
    assert "images differ from the model's by at most " in decoder
    assert sorted(path.name for path in (tmp_path / "deep" / "out").iterdir()) == FILES["torch"]
    tokens = sample_inputs(tiny_model, "decoder", 2)
    found = load_runner(tmp_path / "deep" / "out" / "decoder.pt2")(tokens)
    torch.testing.assert_close(found, tiny_model.decode(tokens), atol=1e-5, rtol=0)


def test_mistakes_are_one_line_each_and_write_nothing(inside, tiny_model, tiny_generator_config, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    HiTGenerator(tiny_generator_config).save_pretrained(tmp_path / "generator")
    before = sorted(tmp_path.rglob("*"))
    for model, out, options, message in (
        ("nowhere", "model", (), "model: not empty; give a new or empty folder"),
        ("nowhere", "model/config.json", (), "model/config.json: a file; give a new or empty folder"),
        ("nowhere", "model/config.json/new", (), "config.json is a file"),
        ("nowhere", "new", ("--format", "tflite"), "format: found 'tflite'; allowed: torch, onnx"),
        ("nowhere", "new", ("--part", "codebook"), "part: found 'codebook'; allowed: encoder, decoder, both"),
        ("nowhere", "new", (), "nowhere: no such folder"),
        ("generator", "new", (), "holds a HiTGenerator, not a VQHiT"),
    ):
        result = inside("export", "--model", model, "--out", out, *options, cwd=tmp_path)
        assert (result.returncode, result.stdout) == (2, "")
        (line,) = result.stderr.splitlines()
        assert message in line
    assert sorted(tmp_path.rglob("*")) == before
