"""The command `vqhit bench`: its file, its picture, its table; mistakes are one line each."""

import copy
import json
from functools import partial

import pytest
from PIL import Image

from vqhit.bench_generators import paper_generators
from vqhit.discriminator import DiscriminatorConfig
from vqhit.models import VQHiTConfig

SPEED = {"relative": 1.0, "relative_lowest": 1.0, "relative_highest": 1.0}
SPEED |= {"images_per_s": 2.0, "images_per_s_lowest": 1.0, "images_per_s_highest": 3.0}
ROW = {"contender": "taming eager", **SPEED, "gflops": 4.0, "gflops_per_s": 8.0, "peak_mib": 5.0}
PART = {"part": "encoder", "seconds": 2.0, "seconds_lowest": 1.0, "seconds_highest": 3.0, "share": 1.0}
TRAINED = {"autoencoder": [ROW], "steps": [{**ROW, "r1_every": every} for every in (1, 16)], "parts": [PART]}


@pytest.fixture(autouse=True)
def small_generators(monkeypatch, tiny_generator_config):
    monkeypatch.setattr("vqhit.bench_generators._BASES", {16: "hit-l-128"})
    shrunk = {name: (tiny_generator_config, paper_generators()[name][1]) for name in ("hit-l-128", "INR")}
    monkeypatch.setattr("vqhit.bench_generators.paper_generators", lambda: shrunk)


@pytest.fixture
def small_preset(monkeypatch, tiny_config):
    """Training steps are those of a small preset, and are not timed."""
    monkeypatch.setattr(VQHiTConfig, "preset", classmethod(lambda cls, name: tiny_config))
    small = partial(DiscriminatorConfig, widths=(8, 8, 8))
    monkeypatch.setattr("vqhit.bench_train.DiscriminatorConfig", small)
    monkeypatch.setattr("vqhit.bench_train._CONV4_3", 3)
    monkeypatch.setattr("vqhit.bench_train._compare", lambda *_, **__: copy.deepcopy(TRAINED))


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


@pytest.mark.usefixtures("small_preset")
def test_training_steps_are_written_drawn_and_shown(inside, tmp_path):
    given = ("--rounds", "1", "--batch-size", "1", "--device", "cpu", "--preset", "vqhit-s-256")
    result = inside("bench", "train", *given, "--precision", "bfloat16", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "bench.json").read_text())
    assert list(results) == ["train", "protocol"]
    assert results["protocol"]["model"] == "vqhit-s-256, random weights"
    assert {row["precision"] for rows in results["train"].values() for row in rows} == {"bfloat16"}
    with Image.open(tmp_path / "bench.png") as picture:
        assert picture.format == "PNG"
    lines = result.stdout.splitlines()
    assert sum("taming eager" in line for line in lines) == 3
    assert sum("encoder" in line for line in lines) == 2  # the autoencoder, too


@pytest.mark.usefixtures("small_preset")
def test_all_subjects_are_in_one_file_and_one_picture_with_the_protocols(inside, given, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("vqhit.plots.speed_bars", lambda panels, path, title: drawn.append((panels, path, title)))
    result = inside("bench", "all", *given, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "bench.json").read_text())
    assert list(results) == ["decode", "encode", "reconstruct", "train", "generators", "protocol"]
    assert results["protocol"].keys() == {"tokenizer", "train", "generators"}
    for subject in ("decode", "encode", "reconstruct"):
        assert [row["precision"] for row in results[subject]] == ["float32"] * 3
    assert "hit-l-128" in result.stdout
    ((panels, _, title),) = drawn
    assert list(panels) == [
        "decode, float32",
        "encode, float32",
        "reconstruct, float32",
        "training: autoencoder, float32",
        "training: step, R1 every step, float32",
        "training: step, R1 every 16, float32",
    ]
    assert [rows[0]["contender"] for rows in panels.values()] == ["taming eager"] * 6
    assert [line.partition(";")[0] for line in title.splitlines()] == ["model", "vqhit-b-256, random weights"]


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
        (["decoders"], "found 'decoders'; allowed: decode, encode, reconstruct, train, generators, all"),
        (["decode", "--preset", "vqhit-xl"], "no preset 'vqhit-xl'; there are: vqhit-s-256, "),
        (["decode", "--preset", "vqhit-s-256", "--model", "model"], "give one of them"),
        (["decode", "--precision", "float16"], "--precision is 'float16'; allowed: float32, bfloat16"),
        (["decode", "--out", "bench.png"], "bench.png: the name of the picture beside it"),
        (["decode", "--out", "folder/taken.json"], "taken.png: a folder"),
        (["encode", "--model", "none"], "none: no such folder"),
        (["encode", "--device", "quantum"], "device 'quantum' cannot be used here"),
        (
            ["generators", "--precision", "float32"],
            "--precision is of decode, encode, reconstruct, train; leave",
        ),
        (["generators", "--no-compile"], "--compile/--no-compile is of decode, encode, reconstruct; leave it out"),
        (["train", "--compile"], "--compile/--no-compile is of decode, encode, reconstruct; leave it out for train"),
        (["train", "--model", "model"], "--model is of decode, encode, reconstruct; leave it out for train"),
        (["train", "--precision", "float16"], "--precision is 'float16'; allowed: float32, bfloat16"),
        (["train", "--preset", "vqhit-xl"], "no preset 'vqhit-xl'; there are: vqhit-s-256, "),
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
