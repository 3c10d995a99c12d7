"""Work that can be counted stays what it was: arithmetic, memory, graphs. Times, which a busy machine moves, are not.

Recorded in `fixtures/counted_work.json`; after a change that is meant, record anew: python -m tests.test_counted_work
"""

import copy
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch

from vqhit import VQHiT, VQHiTConfig
from vqhit.bench import allocated, count_gflops
from vqhit.export import sample_inputs
from vqhit.hit import HiTConfig
from vqhit.quantizer import QuantizerConfig
from vqhit.stems import StemConfig
from vqhit.vector_quantize import build_quantizer
from vqhit.vqgan import EncoderConfig

RECORDED = Path(__file__).parent / "fixtures" / "counted_work.json"
AGAIN = "record anew: python -m tests.test_counted_work"
PRESETS = ("vqhit-s-256", "vqhit-b-256", "vqhit-l-256")
PACKAGED = "vqhit-tiny-64"
MORE, LESS = 0.05, 0.20
"""By how much memory may exceed what is recorded, and fall short of it before that is out of date."""


def search_gflops(config, backward=False):
    """Of finding the nearest codes of one image; on the CPU, since autocast knows no meta device."""
    quantizer = build_quantizer(config.quantizer)
    latents = torch.zeros(1, config.quantizer.dim, *config.token_grid, requires_grad=backward)

    def search():
        quantized = quantizer(latents)
        if backward:
            (quantized.latents.sum() + quantized.loss).backward()

    with torch.set_grad_enabled(backward):
        return count_gflops(search)


def preset_gflops(preset):
    """GFLOPs of one image: `encode` and `decode`, as loaded and optimized."""
    config = VQHiTConfig.preset(preset)
    with torch.device("meta"):
        model = VQHiT(config).eval()
        images = torch.empty(1, 3, config.image_size, config.image_size)
        codes = torch.empty(1, config.quantizer.dim, *config.token_grid)
    counted = {}
    for end in ("", "_optimized"):
        counted[f"encode{end}"] = count_gflops(lambda: model.encode_latents(images)) + search_gflops(config)
        counted[f"decode{end}"] = count_gflops(lambda: model.decode_latents(codes))
        model.optimize_for_inference()
    return counted


def training_gflops(preset):
    """GFLOPs of the forward and backward pass of one image through the autoencoder, without losses."""
    config = VQHiTConfig.preset(preset)
    with torch.device("meta"):
        model = VQHiT(config).train()
        images = torch.empty(1, 3, config.image_size, config.image_size)
    passes = count_gflops(lambda: model.decode_latents(model.encode_latents(images)).sum().backward())
    return passes + search_gflops(config, backward=True)


def packaged_memory():
    """Bytes of `encode` and `decode` of two images on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, counted = VQHiT.from_pretrained(PACKAGED), {}
        images, tokens = sample_inputs(model, "encoder", 2), sample_inputs(model, "decoder", 2)
        for end in ("", "_optimized"):
            for name, run in (("encode", lambda: model.encode(images)), ("decode", lambda: model.decode(tokens))):
                run()  # the first call of all asks for more
                counted[f"{name}{end}"] = allocated(run)._asdict()
            model.optimize_for_inference()
        return counted
    finally:
        torch.set_num_threads(threads)


def record():
    """All that is counted here."""
    gflops = {preset: preset_gflops(preset) for preset in PRESETS}
    gflops["vqhit-b-256"]["forward_and_backward"] = training_gflops("vqhit-b-256")
    return {"torch": torch.__version__, "gflops_per_image": gflops, "bytes_of_batch_2": packaged_memory()}


@pytest.fixture(scope="module")
def recorded():
    return json.loads(RECORDED.read_text())


@pytest.mark.parametrize("preset", PRESETS)
def test_arithmetic_of_the_presets(recorded, preset):
    expected = dict(recorded["gflops_per_image"][preset])
    expected.pop("forward_and_backward", None)
    assert preset_gflops(preset) == pytest.approx(expected, rel=1e-9), AGAIN


def test_arithmetic_of_a_training_pass(recorded):
    expected = recorded["gflops_per_image"]["vqhit-b-256"]["forward_and_backward"]
    assert training_gflops("vqhit-b-256") == pytest.approx(expected, rel=1e-9), AGAIN


def test_memory_of_the_packaged_model(recorded):
    found, expected = packaged_memory(), recorded["bytes_of_batch_2"]
    assert found.keys() == expected.keys()
    for name, counts in found.items():
        for what, count in counts.items():
            change = count / expected[name][what] - 1
            said = f"{name}: {what} {count} bytes, recorded {expected[name][what]} with torch {recorded['torch']}"
            assert change <= MORE, f"{said}: {change:+.1%}"
            assert change >= -LESS, f"{said}: {change:+.1%}; {AGAIN}"


@pytest.fixture(scope="module")
def small():
    """Few layers, of every kind: tracing takes seconds a layer. 16 px, 16x16 tokens, two stages."""
    torch.manual_seed(0)
    config = VQHiTConfig(
        encoder=EncoderConfig(
            channels=32, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(16,), z_channels=8
        ),
        quantizer=QuantizerConfig(codebook_size=32, dim=8),
        stem=StemConfig(skip=True),
        decoder=HiTConfig(widths=(32, 16), depths=(1, 0), heads=(4, 4), block_sizes=(4,)),
    )
    return VQHiT(config).eval()


@pytest.mark.parametrize("part", ["encoder", "stem", "backbone"])
def test_a_part_is_one_graph_whatever_the_batch(small, part):
    """`fullgraph` lets no break pass; a batch of another size must not be traced again."""
    module = getattr(small, part)
    assert module in small.compiled_parts
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(module, backend=count, fullgraph=True)
    with torch.no_grad():
        for batch in (2, 3, 5):
            given = inputs_of(small, part, batch)
            expected = module(*given)
            for tensor in given:
                torch._dynamo.mark_dynamic(tensor, 0)
            torch.testing.assert_close(compiled(*given), expected, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1


def test_what_inference_compiles_is_the_same_code_whatever_the_batch(monkeypatch):
    """Graphs for the stem, the stages of the whole map and a band of rows; for a batch of one the first two anew."""
    monkeypatch.setattr("vqhit.hit._BAND_PIXELS", 512)  # two bands an image
    torch.manual_seed(0)
    config = VQHiTConfig(
        encoder=EncoderConfig(
            channels=32, channel_multipliers=(1, 1), num_res_blocks=1, attention_resolutions=(), z_channels=8
        ),
        quantizer=QuantizerConfig(codebook_size=32, dim=8),
        stem=StemConfig(skip=True),
        decoder=HiTConfig(widths=(32, 16, 16), depths=(1, 0, 0), heads=(4, 4, 4), block_sizes=(4,)),
    )
    eager, graphs = VQHiT(config).eval(), []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = copy.deepcopy(eager).optimize_for_inference()
    for part in compiled.compiled_parts:
        part.compile(backend=count, fullgraph=True)
    counts = []
    for batch in (2, 3, 5, 1, 4, 1):
        images = sample_inputs(eager, "encoder", batch)
        tokens = eager.encode(images)
        assert torch.equal(compiled.encode(images), tokens)
        torch.testing.assert_close(compiled.decode(tokens), eager.decode(tokens), rtol=1e-5, atol=1e-5)
        counts.append(len(graphs))
    assert counts == [3, 3, 3, 5, 5, 5]


def test_a_copy_of_a_compiled_model_is_a_model_of_its_own(small):
    compiled = copy.deepcopy(small)
    for part in compiled.compiled_parts:
        part.compile(backend="eager")
    tokens = sample_inputs(small, "decoder", 2)
    expected = compiled.decode(tokens)
    other = pickle.loads(pickle.dumps(copy.deepcopy(compiled)))
    assert torch.equal(other.decode(tokens), small.decode(tokens))
    with torch.no_grad():
        other.last_layer.bias += 0.25
    assert (other.decode(tokens) - expected).mean() > 0.1
    assert torch.equal(compiled.decode(tokens), expected)


def inputs_of(model, part, batch):
    """What a part of the model is called with, each a tensor of its own."""
    if part == "encoder":
        return (sample_inputs(model, "encoder", batch),)
    codes = model.lookup(sample_inputs(model, "decoder", batch)).contiguous()
    return (codes,) if part == "stem" else tuple(tensor.clone() for tensor in model.stem(codes))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit("usage: python -m tests.test_counted_work")
    RECORDED.write_text(json.dumps(record(), indent=2) + "\n")
