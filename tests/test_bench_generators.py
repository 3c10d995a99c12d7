"""The paper's generators: which they are, its numbers beside ours; no time is asserted."""

import json
from pathlib import Path

import pytest
import torch

from vqhit.bench_generators import bench_generators, gflops, paper_generators
from vqhit.hit import HiTConfig
from vqhit.models import HiTGenerator, HiTGeneratorConfig
from vqhit.recipe import RunConfig

CONFIGS = Path(__file__).parent.parent / "configs"


def test_the_generators_are_those_of_the_configurations():
    """And their sizes those of the paper, but for HiT-S, where it disagrees with itself."""
    files = {
        "hit-s-256": "table7_hit_s_bcr",
        "hit-b-256": "table7_hit_b_bcr",
        "hit-l-256": "table7_hit_l_bcr",
        "hit-l-128": "full_model",
        "INR": "table5_inr",
        "cross-attention only": "table5_cross_attention",
        "full attention": "table5_all_to_all",
        "axial attention": "table5_axial",
        "blocked attention": "table5_blocked",
        "interleaved attention": "table5_interleaved",
        "multi-axis, unbalanced": "table5_multi_axis",
        "attention in 1 stage": "table6_1_stage",
        "attention in 2 stages": "table6_2_stages",
        "attention in 3 stages": "table6_3_stages",
    }
    generators = paper_generators()
    assert generators.keys() == files.keys()
    for name, (config, published) in generators.items():
        assert config == RunConfig.from_yaml(CONFIGS / "ablations" / f"{files[name]}.yaml").model, name
        with torch.device("meta"):
            millions = sum(p.numel() for p in HiTGenerator(config).parameters()) / 1e6
        assert round(millions, 2) == (34.73 if name == "hit-s-256" else published.millions), name


@pytest.fixture
def small(monkeypatch, tiny_generator_config):
    """The paper's generators at 16 px, under their names."""
    monkeypatch.setattr("vqhit.bench_generators._BASES", {16: "hit-l-128"})
    shrunk = {name: (tiny_generator_config, published) for name, (_, published) in paper_generators().items()}
    monkeypatch.setattr("vqhit.bench_generators.paper_generators", lambda: shrunk)


@pytest.mark.usefixtures("small")
def test_the_result_has_a_row_for_each_generator_and_a_protocol():
    results = bench_generators(device=torch.device("cpu"), batch_size=2, rounds=2)
    assert json.loads(json.dumps(results)) == results
    rows = {row["name"]: row for row in results["generators"]}
    assert len(rows) == 14
    for row in rows.values():
        assert 0 < row["images_per_s_lowest"] <= row["images_per_s"] <= row["images_per_s_highest"]
        assert row["relative"] == pytest.approx(row["images_per_s"] / rows["hit-l-128"]["images_per_s"])
    assert rows["INR"]["paper_relative"] == pytest.approx(110.39 / 75.33)
    assert rows["full attention"]["paper_relative"] is None
    assert {"device", "threads", "batch_size", "rounds", "torch", "vqhit"} <= results["protocol"].keys()


def test_arithmetic_is_counted_with_attention():
    """Full attention costs as much more as its longer rows of keys; what a single layer costs is counted by hand."""
    one = HiTConfig(widths=(32,), depths=(0,), heads=(4,), block_sizes=(), cross_attention=False)
    assert gflops(HiTGeneratorConfig(latent_dim=8, backbone=one)) == 2 * 64 * (8 * 32 + 32 * 3) / 1e9
    base = HiTGeneratorConfig.preset("hit-l-128")
    full, _ = paper_generators()["full attention"]
    # two blocks a stage: every pixel to every other, two products, where multi-axis has P + G for each
    extra = sum(
        2 * 2 * 2 * width * pixels * (pixels - side * side // 2 - pixels // (side * side) // 2)
        for width, pixels, side in ((1024, 64, 4), (512, 256, 4), (256, 1024, 8), (128, 4096, 8))
    )
    assert gflops(full) - gflops(base) == pytest.approx(extra / 1e9, rel=1e-3)


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("rounds", 0)])
def test_impossible_numbers_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is 0; allowed: 1 or more"):
        bench_generators(device=torch.device("cpu"), **{name: value})
