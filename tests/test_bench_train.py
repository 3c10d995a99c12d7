"""The benchmark of training steps: what is compared, that it is what it says; no time is asserted."""

import copy
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.vqgans import SMALL, Original
from vqhit.bench_train import (
    LAZY_R1,
    OURS,
    RECOMPUTED,
    TAMING,
    TamingVQGAN,
    _gflops,
    _peak_bytes,
    _shares,
    _speed,
    _Step,
    compare_training,
    lazy,
    random_vgg16,
)
from vqhit.discriminator import Discriminator, DiscriminatorConfig
from vqhit.models import VQHiT, VQHiTConfig
from vqhit.quantizer import QuantizerConfig
from vqhit.vqgan import ConvDecoderConfig, EncoderConfig

CPU = torch.device("cpu")
DISCRIMINATOR = DiscriminatorConfig(resolution=16, widths=(8, 8, 8))


@pytest.fixture(scope="module")
def results(tiny_config):
    return compare_training(tiny_config, DISCRIMINATOR, device=CPU, batch_size=2, rounds=1)


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
    model = TamingVQGAN(config)
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


def test_the_result_has_its_rows_and_a_protocol(results):
    assert json.loads(json.dumps(results)) == results
    names = [OURS, RECOMPUTED, TAMING]
    assert [row["name"] for row in results["autoencoder"]] == names
    assert [(row["name"], row["r1_every"]) for row in results["steps"]] == [
        (name, every) for name in names for every in (1, LAZY_R1)
    ]
    for row in (*results["autoencoder"], *results["steps"]):
        for key in ("images_per_s", "relative"):
            assert 0 < row[f"{key}_lowest"] <= row[key] <= row[f"{key}_highest"]
        assert (row["relative"] == 1) == (row["name"] == TAMING)
    assert {"device", "threads", "batch_size", "rounds", "losses", "lazy_r1", "mode"} <= results["protocol"].keys()
    assert "train, float32" in results["protocol"]["mode"]


def test_arithmetic_and_memory_are_those_of_each_step(results):
    ours, recomputed, taming = results["autoencoder"]
    assert recomputed["gflops"] > ours["gflops"]
    assert recomputed["peak_mib"] < ours["peak_mib"]
    assert taming["peak_mib"] > 0
    every_step, lazily = results["steps"][::2], results["steps"][1::2]
    for one, other, alone in zip(every_step, lazily, results["autoencoder"], strict=True):
        assert one["gflops"] > other["gflops"] > alone["gflops"]


def test_the_parts_are_those_of_our_step(results):
    assert {row["name"] for row in results["parts"]} == {
        "encoder",
        "codebook",
        "decoder",
        "D on reconstructions",
        "D on photographs",
        "R1",
        "perceptual",
        "Adam",
    }
    assert sum(row["share"] for row in results["parts"]) == pytest.approx(1)
    assert results["sum_of_parts_seconds"] == pytest.approx(sum(row["seconds"] for row in results["parts"]))


def test_r1_is_what_a_pass_with_it_takes_more():
    found = _shares({"whole step": [5.0], "D on photographs": [1.0], "R1": [4.0], "Adam": [4.0]})
    assert {row["name"]: row["seconds"] for row in found["parts"]} == {"D on photographs": 1, "R1": 3, "Adam": 4}
    assert {row["name"]: row["share"] for row in found["parts"]}["R1"] == 3 / 8
    assert (found["whole_step_seconds"], found["sum_of_parts_seconds"]) == (5, 8)


def test_a_lazy_step_is_one_with_r1_and_fifteen_without():
    assert lazy([17.0, 33.0], [1.0, 1.0], 16) == [2.0, 3.0]
    assert lazy([17.0, 33.0], [1.0, 1.0], 1) == [17.0, 33.0]


def test_ratios_are_taken_round_by_round():
    speed = _speed([1.0, 4.0, 2.0], [2.0, 4.0, 8.0], batch_size=2)
    assert [speed[f"relative{end}"] for end in ("", "_lowest", "_highest")] == [2, 1, 4]
    assert [speed[f"images_per_s{end}"] for end in ("", "_lowest", "_highest")] == [1, 0.5, 2]


@pytest.mark.parametrize("name", [OURS, TAMING])
def test_a_step_trains_both_networks_and_penalises_where_it_should(tiny_config, name, monkeypatch):
    torch.manual_seed(0)
    model = VQHiT(tiny_config) if name == OURS else TamingVQGAN(tiny_config)
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


def test_arithmetic_is_counted_forward_and_backward():
    weight, x = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    assert _gflops(lambda: (x @ weight.T).sum().backward()) == 3 * 2 * 5 * 4 * 3 / 1e9


def test_arithmetic_is_that_of_torchs_counter(tiny_model):
    images = torch.rand(1, 3, 16, 16)

    def run():
        tiny_model(images).reconstruction.sum().backward()

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    assert _gflops(run) == counter.get_total_flops() / 1e9


def test_peak_memory_is_what_is_held_at_once():
    held = torch.zeros(1000)

    def run():
        first = held + 1
        second = first + 1
        del first
        second + 1

    assert _peak_bytes(run, CPU) == pytest.approx(8000, abs=100)  # 1 is a tensor too


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; allowed: 1 or more"),
        ({"rounds": 0}, "rounds is 0; allowed: 1 or more"),
        ({"precision": "float16"}, "precision 'float16'; allowed: float32, bfloat16"),
    ],
)
def test_impossible_requests_are_refused(tiny_config, change, message):
    given = {"device": CPU, "batch_size": 2, "rounds": 1, **change}
    with pytest.raises(ValueError, match=message):
        compare_training(tiny_config, DISCRIMINATOR, **given)
