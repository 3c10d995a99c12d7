"""The command `vqhit bench`: its file, its picture, its table; mistakes are one line each."""

import json

import pytest
from PIL import Image

from vqhit.bench_generators import paper_generators
from vqhit.models import VQHiT


@pytest.fixture(autouse=True)
def optimizable(monkeypatch):
    monkeypatch.setattr(VQHiT, "optimize_for_inference", lambda self: self, raising=False)


@pytest.fixture(autouse=True)
def small_generators(monkeypatch, tiny_generator_config):
    monkeypatch.setattr("vqhit.bench_generators._BASES", {16: "hit-l-128"})
    shrunk = {name: (tiny_generator_config, paper_generators()[name][1]) for name in ("hit-l-128", "INR")}
    monkeypatch.setattr("vqhit.bench_generators.paper_generators", lambda: shrunk)


@pytest.fixture
def given(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    return ("--model", "model", "--no-compile", "--rounds", "1", "--batch-size", "2", "--device", "cpu")


def test_one_subject_is_written_drawn_and_shown(inside, given, tmp_path):
    result = inside("bench", "decode", *given, "--precision", "bfloat16", "--out", "new/times.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "new" / "times.json").read_text())
    assert list(results) == ["decode", "protocol"]
    assert results["protocol"]["model"] == "model"
    assert {row["precision"] for row in results["decode"]} == {"bfloat16"}
    with Image.open(tmp_path / "new" / "times.png") as picture:
        assert picture.format == "PNG"
    assert "new/times.png: images/s" in result.stdout
    assert "new/times.json: the same" in result.stdout
    assert sum("bfloat16" in line for line in result.stdout.splitlines()) == 3


def test_all_subjects_are_in_one_file_with_the_protocols(inside, given, tmp_path):
    result = inside("bench", "all", *given, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "bench.json").read_text())
    assert list(results) == ["decode", "encode", "reconstruct", "generators", "protocol"]
    assert results["protocol"].keys() == {"tokenizer", "generators"}
    for subject in ("decode", "encode", "reconstruct"):
        assert [row["precision"] for row in results[subject]] == ["float32"] * 3
    assert "hit-l-128" in result.stdout


def test_generators_have_no_picture(inside, tmp_path):
    (tmp_path / "bench.png").mkdir()
    result = inside("bench", "generators", "--rounds", "1", "--batch-size", "1", "--device", "cpu", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "bench.json").read_text())
    assert list(results) == ["generators", "protocol"]
    assert results["protocol"]["paper"] == "one V100; batch size and precision not stated"
    assert [row["name"] for row in results["generators"]] == ["hit-l-128", "INR"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decoders"], "found 'decoders'; allowed: decode, encode, reconstruct, generators, all"),
        (["decode", "--preset", "vqhit-xl"], "no preset 'vqhit-xl'; there are: vqhit-s-256, "),
        (["decode", "--preset", "vqhit-s-256", "--model", "model"], "give one of them"),
        (["decode", "--precision", "float16"], "--precision is 'float16'; allowed: float32, bfloat16"),
        (["decode", "--out", "bench.png"], "bench.png: the name of the picture beside it"),
        (["decode", "--out", "folder/taken.json"], "taken.png: a folder"),
        (["encode", "--model", "none"], "none: no such folder"),
        (["encode", "--device", "quantum"], "device 'quantum' cannot be used here"),
        (["generators", "--precision", "float32"], "--precision is of a tokenizer; leave it out for generators"),
        (["generators", "--no-compile"], "--compile is of a tokenizer; leave it out"),
    ],
)
def test_mistakes_are_one_line_each(inside, tmp_path, arguments, message):
    (tmp_path / "folder" / "taken.png").mkdir(parents=True)
    result = inside("bench", *arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("vqhit: ")
    assert message in line
    assert not list(tmp_path.glob("*.json"))
