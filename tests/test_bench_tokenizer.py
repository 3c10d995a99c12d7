"""A tokenizer beside taming's VQGAN: the same work, fairly timed, and checked; no time is asserted."""

import json

import pytest
import torch

from vqhit.bench_tokenizer import bench_tokenizer, random_tokenizer
from vqhit.execution import Compilable
from vqhit.models import VQHiT, VQHiTConfig
from vqhit.norms import BatchNorm
from vqhit.quantizer import QuantizerConfig
from vqhit.vqgan import ConvDecoderConfig, EncoderConfig

EAGER = ["taming eager", "vqhit eager", "vqhit optimized"]
ALL = ["taming eager", "taming compiled", "vqhit eager", "vqhit optimized", "vqhit compiled"]


@pytest.fixture(autouse=True)
def brighter(monkeypatch):
    """What optimizes a model here makes its pictures brighter by 1/8, to tell them apart."""
    optimize = VQHiT.optimize_for_inference

    def brighten(model):
        model.last_layer.bias.data += 0.125
        return optimize(model)

    monkeypatch.setattr(VQHiT, "optimize_for_inference", brighten)


@pytest.fixture
def conv_model(conv_config):
    torch.manual_seed(0)
    return VQHiT(conv_config).eval()


@pytest.fixture
def timed(monkeypatch):
    """What would be timed, last; contender i takes i + 1 seconds, half of it in the second round, as the last one's."""
    seen = {}

    def time_in_turns(parts, rounds, device, on_done):
        seen.clear()
        seen.update(parts)
        return {name: [1.0 + i, (1.0 + i) / 2, 4.0] for i, name in enumerate(parts)}

    monkeypatch.setattr("vqhit.bench_tokenizer.time_in_turns", time_in_turns)
    return seen


def test_a_result_has_a_row_for_each_contender_and_a_protocol(tiny_model):
    results = bench_tokenizer(tiny_model, name="tiny", batch_size=2, rounds=2, backend=None)
    assert json.loads(json.dumps(results)) == results
    assert list(results) == ["decode", "encode", "reconstruct", "protocol"]
    for subject in ("decode", "encode", "reconstruct"):
        rows = results[subject]
        assert [row["contender"] for row in rows] == EAGER
        for row in rows:
            assert 0 < row["images_per_s_lowest"] <= row["images_per_s"] <= row["images_per_s_highest"]
            assert row["gflops_per_s"] == row["gflops"] * row["images_per_s"]
            assert row["peak_mib"] > 0
            assert row["compile_s"] is None
    counted = {subject: results[subject][1]["gflops"] for subject in ("decode", "encode", "reconstruct")}
    assert counted["reconstruct"] == pytest.approx(counted["decode"] + counted["encode"])
    protocol = results["protocol"]
    assert (protocol["model"], protocol["resolution"], protocol["precisions"]) == ("tiny", 16, ["float32"])
    assert (protocol["batch_size"], protocol["rounds"], protocol["backend"]) == (2, 2, None)


def test_taming_needs_more_memory_to_encode(tiny_model):
    theirs, ours, _ = bench_tokenizer(tiny_model, ["encode"], name="tiny", rounds=1, backend=None)["encode"]
    assert theirs["peak_mib"] > 1.2 * ours["peak_mib"]


def test_ratios_are_of_rounds_and_to_the_same_mode(tiny_model, timed, monkeypatch):
    for kind in (torch.nn.Module, Compilable):
        monkeypatch.setattr(kind, "compile", lambda module, backend: None)
    rows = bench_tokenizer(tiny_model, ["decode"], name="tiny", batch_size=6, backend="eager")["decode"]
    assert [row["contender"] for row in rows] == ALL == list(timed)
    assert [row["images_per_s"] for row in rows] == [6.0, 3.0, 2.0, 1.5, 1.5]
    assert [row["images_per_s_lowest"] for row in rows] == [1.5, 1.5, 1.5, 1.5, 1.2]
    assert [row["relative"] for row in rows] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    assert {row["relative_highest"] for row in rows} == {1.0}
    assert [row["relative_in_mode"] for row in rows] == pytest.approx([1, 1, 1 / 3, 1 / 4, 2 / 5])


def test_what_differs_from_the_model_eager_is_reported(tiny_model):
    results = bench_tokenizer(tiny_model, ["decode", "encode"], name="tiny", rounds=1, backend=None)
    assert [row["tokens_differing"] for row in results["encode"]] == [0.0, 0.0, 0.0]
    theirs, eager, optimized = (row["largest_difference"] for row in results["decode"])
    assert (theirs, eager) == (None, 0.0)
    assert optimized == pytest.approx(0.125, abs=1e-5)


def test_a_decoder_of_tamings_weights_is_compared_with_it(conv_model):
    (theirs, *_) = bench_tokenizer(conv_model, ["decode"], name="conv", rounds=1, backend=None)["decode"]
    assert theirs["largest_difference"] < 1e-5


def test_the_model_itself_stays_as_it_is(tiny_model):
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    bench_tokenizer(tiny_model, ["decode"], name="tiny", precisions=["bfloat16"], rounds=1, backend=None)
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == before[name].dtype


def test_a_precision_is_that_of_all_contenders(tiny_model, timed):
    given = {"name": "tiny", "batch_size": 1, "backend": None}
    results = bench_tokenizer(tiny_model, ["decode"], precisions=["float32", "bfloat16"], **given)
    assert {run().dtype for run in timed.values()} == {torch.bfloat16}
    assert [row["precision"] for row in results["decode"]] == ["float32"] * 3 + ["bfloat16"] * 3
    bench_tokenizer(tiny_model, ["decode"], **given)
    assert {run().dtype for run in timed.values()} == {torch.float32}


@pytest.fixture
def shallow_model():
    """One level of one block, quick to compile."""
    sizes = {"channels": 32, "channel_multipliers": (1,), "num_res_blocks": 1, "attention_resolutions": ()}
    torch.manual_seed(0)
    config = VQHiTConfig(
        encoder=EncoderConfig(**sizes, z_channels=8),
        quantizer=QuantizerConfig(codebook_size=32, dim=8),
        decoder=ConvDecoderConfig(**sizes, resolution=8, z_channels=8),
    )
    return VQHiT(config).eval()


def test_each_part_is_compiled_once(shallow_model, timed, monkeypatch):
    torch.compiler.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    results = bench_tokenizer(shallow_model, name="shallow", batch_size=2, backend=backend)
    assert len(graphs) == 2 * len(shallow_model.compiled_parts) - 1  # the encoder is not, on the CPU
    for run in timed.values():
        run()
    assert len(graphs) == 2 * len(shallow_model.compiled_parts) - 1  # the encoder is not, on the CPU
    seconds = {subject: [row["compile_s"] for row in results[subject]] for subject in ("decode", "encode")}
    for row, decode, encode in zip(results["reconstruct"], *seconds.values(), strict=True):
        compiled = row["contender"].endswith("compiled")
        assert (row["compile_s"] is None) == (decode is None) == (not compiled)
        assert (encode is None) == (row["contender"] != "taming compiled")  # ours is not compiled on the CPU
        if compiled:
            assert 0 < row["compile_s"] == (encode or 0) + decode
    assert {row["tokens_differing"] for row in results["encode"]} == {0.0}
    assert results["decode"][-1]["largest_difference"] == pytest.approx(0.125, abs=1e-5)


def test_what_cannot_be_compiled_is_said_with_the_way_out(shallow_model):
    def backend(*_):
        raise OSError("no compiler")

    torch.compiler.reset()
    with pytest.raises(ValueError, match=r"nothing can be compiled here .*no compiler.*--no-compile"):
        bench_tokenizer(shallow_model, ["encode"], name="shallow", rounds=1, backend=backend)


def test_random_weights_come_with_statistics_of_them(tiny_config, monkeypatch):
    monkeypatch.setattr(VQHiTConfig, "preset", classmethod(lambda cls, name: tiny_config))
    first, second = (random_tokenizer("vqhit-s-256", torch.device("cpu")) for _ in range(2))
    assert not first.training
    norms = [module for module in first.modules() if isinstance(module, BatchNorm)]
    assert norms
    assert all((norm.running_mean != 0).any() for norm in norms)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; allowed: 1 or more"),
        ({"rounds": 0}, "rounds is 0; allowed: 1 or more"),
        ({"precisions": ["float32", "float16"]}, "precision is 'float16'; allowed: float32, bfloat16"),
        ({"subjects": ["decoder"]}, "subject is 'decoder'; allowed: decode, encode, reconstruct"),
    ],
)
def test_impossible_arguments_are_refused(tiny_model, wrong, message):
    with pytest.raises(ValueError, match=message):
        bench_tokenizer(tiny_model, name="tiny", **wrong)


def test_a_codebook_that_taming_has_not_is_refused(tiny_config):
    quantizer = {**tiny_config.quantizer.to_dict(), "normalize": True}
    model = VQHiT(VQHiTConfig.from_dict({**tiny_config.to_dict(), "quantizer": quantizer}))
    with pytest.raises(ValueError, match="codebook is vq, normalised; taming's"):
        bench_tokenizer(model, name="tiny", backend=None)
