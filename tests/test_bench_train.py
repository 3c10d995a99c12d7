"""The benchmark of training steps: what is compared, that it is what it says; no time is asserted."""

import copy
import json

import pytest
import torch
from torch import nn

from vqhit.bench_train import (
    LAZY_R1,
    OURS,
    RECOMPUTED,
    TAMING,
    _shares,
    _Step,
    compare_training,
    lazy,
    random_vgg16,
)
from vqhit.cli_bench import _show_train
from vqhit.discriminator import Discriminator, DiscriminatorConfig
from vqhit.models import VQHiT
from vqhit.peer import TamingVQGAN

CPU = torch.device("cpu")
DISCRIMINATOR = DiscriminatorConfig(resolution=16, widths=(8, 8, 8))


@pytest.fixture(scope="module")
def results(tiny_config):
    given = {"device": CPU, "precisions": ["float32"], "batch_size": 2, "rounds": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vqhit.bench_train._CONV4_3", 3)
        return compare_training(tiny_config, DISCRIMINATOR, **given)


def test_the_result_has_its_rows_and_a_protocol(results):
    assert json.loads(json.dumps(results)) == results
    assert list(results) == ["train", "protocol"]
    train, names = results["train"], [TAMING, OURS, RECOMPUTED]
    assert list(train) == ["autoencoder", "steps", "parts", "sums"]
    assert [row["contender"] for row in train["autoencoder"]] == names
    assert [(row["r1_every"], row["contender"]) for row in train["steps"]] == [
        (every, name) for every in (1, LAZY_R1) for name in names
    ]
    assert {row["precision"] for rows in train.values() for row in rows} == {"float32"}
    for row in (*train["autoencoder"], *train["steps"]):
        for key in ("images_per_s", "relative"):
            assert 0 < row[f"{key}_lowest"] <= row[key] <= row[f"{key}_highest"]
        assert (row["relative"] == 1) == (row["contender"] == TAMING)
        assert row["gflops_per_s"] == row["gflops"] * row["images_per_s"]
    protocol = results["protocol"]
    assert {"device", "threads", "batch_size", "rounds", "losses", "lazy_r1", "mode"} <= protocol.keys()
    assert (protocol["precisions"], protocol["resolution"]) == (["float32"], 16)


def test_the_rows_are_what_the_command_shows(results, capsys):
    protocol = {**results["protocol"], "model": "tiny"}
    panels = _show_train({"train": results["train"]}, protocol)
    assert list(panels) == [
        "training: autoencoder, float32",
        "training: step, R1 every step, float32",
        "training: step, R1 every 16, float32",
    ]
    assert [[row["contender"] for row in rows] for rows in panels.values()] == [[TAMING, OURS, RECOMPUTED]] * 3
    lines = capsys.readouterr().out.splitlines()
    assert sum(RECOMPUTED in line for line in lines) == 3
    assert sum("D on photographs" in line for line in lines) == 1


def test_arithmetic_and_memory_are_those_of_each_step(results):
    alone, steps = results["train"]["autoencoder"], results["train"]["steps"]
    taming, ours, recomputed = alone
    assert recomputed["gflops"] > ours["gflops"]
    assert recomputed["peak_mib"] < ours["peak_mib"]
    assert taming["peak_mib"] > 0
    for one, other, autoencoder in zip(steps[:3], steps[3:], alone, strict=True):
        assert one["gflops"] > other["gflops"] > autoencoder["gflops"]


def test_a_precision_is_that_of_the_passes_of_all_contenders(tiny_config, monkeypatch):
    monkeypatch.setattr("vqhit.bench_train._CONV4_3", 3)
    found = []

    def compare(trained, images, rounds, on_done):
        for step in trained.values():
            with torch.no_grad(), step.autocast:
                found.append(step.model(images).latents.dtype)
        for run in trained[OURS].parts(images).values():
            run()
        return {"autoencoder": [{"contender": TAMING}]}

    monkeypatch.setattr("vqhit.bench_train._compare", compare)
    given = {"device": CPU, "precisions": ["float32", "bfloat16", "float32"], "batch_size": 2, "rounds": 1}
    rows = compare_training(tiny_config, DISCRIMINATOR, **given)["train"]["autoencoder"]
    assert found == [torch.float32] * 3 + [torch.bfloat16] * 3
    assert [row["precision"] for row in rows] == ["float32", "bfloat16"]


def test_the_parts_are_those_of_our_step(results):
    rows = results["train"]["parts"]
    assert {row["part"] for row in rows} == {
        "encoder",
        "codebook",
        "decoder",
        "D on reconstructions",
        "D on photographs",
        "R1",
        "perceptual",
        "Adam",
    }
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert results["train"]["sums"][0]["sum_of_parts_seconds"] == pytest.approx(sum(row["seconds"] for row in rows))


def test_the_perceptual_network_is_the_papers():
    network = random_vgg16()
    assert [layer.out_channels for layer in network.features if isinstance(layer, nn.Conv2d)][-1] == 512
    assert sum(isinstance(layer, nn.Conv2d) for layer in network.features) == 10  # 2 + 2 + 3 + 3: conv4_3 is the last
    assert all(parameter.isfinite().all() for parameter in network.parameters())


def test_r1_is_what_a_pass_with_it_takes_more():
    found = _shares({"whole step": [5.0], "D on photographs": [1.0], "R1": [4.0], "Adam": [4.0]})
    assert {row["part"]: row["seconds"] for row in found["parts"]} == {"D on photographs": 1, "R1": 3, "Adam": 4}
    assert {row["part"]: row["share"] for row in found["parts"]}["R1"] == 3 / 8
    assert found["sums"] == [{"whole_step_seconds": 5, "sum_of_parts_seconds": 8}]


def test_a_lazy_step_is_one_with_r1_and_fifteen_without():
    assert lazy([17.0, 33.0], [1.0, 1.0], 16) == [2.0, 3.0]
    assert lazy([17.0, 33.0], [1.0, 1.0], 1) == [17.0, 33.0]


@pytest.mark.parametrize("name", [OURS, TAMING])
def test_a_step_trains_both_networks_and_penalises_where_it_should(tiny_config, name, monkeypatch):
    torch.manual_seed(0)
    ours = VQHiT(tiny_config)
    model = ours if name == OURS else TamingVQGAN(ours)
    monkeypatch.setattr("vqhit.bench_train._CONV4_3", 3)
    step = _Step(model.train(), Discriminator(DISCRIMINATOR), random_vgg16(), "bfloat16")
    before = copy.deepcopy([*model.parameters(), *step.discriminator.parameters()])
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    found, backward = [], step.objective.backward
    monkeypatch.setattr(step.objective, "backward", lambda *given, **named: found.append(backward(*given, **named)[1]))
    step.whole(images, r1=True)
    step.whole(images, r1=False)
    assert ["r1" in terms for terms in found] == [True, False]
    assert found[0].keys() >= {"reconstruction", "codebook", "perceptual", "adversarial", "discriminator"}
    after = [*model.parameters(), *step.discriminator.parameters()]
    moved = [not torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    assert sum(moved) > 0.9 * len(moved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; allowed: 1 or more"),
        ({"rounds": 0}, "rounds is 0; allowed: 1 or more"),
        ({"precisions": ["float16"]}, "precision is 'float16'; allowed: float32, bfloat16"),
    ],
)
def test_impossible_requests_are_refused(tiny_config, change, message):
    given = {"device": CPU, "precisions": ["float32"], "batch_size": 2, "rounds": 1, **change}
    with pytest.raises(ValueError, match=message):
        compare_training(tiny_config, DISCRIMINATOR, **given)
