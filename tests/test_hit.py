"""HiT is the official HiT: numbers of the TensorFlow code, within the tolerances measured for a correct port."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

from tests.parity import TINY64, generator_variables, golden
from vqhit.config import ConfigError
from vqhit.convert import hit_gan_generator
from vqhit.hit import HiTConfig
from vqhit.layers import Linear
from vqhit.models import HiTGenerator, HiTGeneratorConfig


def official(config_name: str, config: HiTGeneratorConfig) -> HiTGenerator:
    backbone = config.backbone
    attention = "multi_query" if backbone.multi_query else "multi_head"
    with torch.device("meta"):
        model = HiTGenerator(config)
    variables = generator_variables(config_name, attention, backbone.norm)
    model.load_state_dict(hit_gan_generator(variables), strict=True, assign=True)
    return model.eval()


def variant(config: HiTGeneratorConfig, **changes) -> HiTGeneratorConfig:
    backbone = HiTConfig(**{**config.backbone.to_dict(), **changes})
    return HiTGeneratorConfig(latent_dim=config.latent_dim, backbone=backbone)


@pytest.fixture(scope="module")
def reference():
    return golden("generator_tiny64.npz")


@pytest.fixture
def tiny():
    return official("tiny64", TINY64)


def nhwc(images: torch.Tensor) -> np.ndarray:
    return images.detach().permute(0, 2, 3, 1).numpy()


def outputs_equal(model, reference, mode):
    expected = reference[mode]  # of the first samples, whose batch statistics are those of all
    with torch.no_grad():
        images = nhwc(model.train(mode == "train")(torch.from_numpy(reference["z"])))
    np.testing.assert_allclose(images[: len(expected)], expected, rtol=0, atol=1e-4)


VARIANTS = {
    "": {},
    "_multi_head_sample": {"multi_query": False},
    "_layer_sample": {"norm": "layer"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_tiny_generators_with_gradients_and_moving_statistics(name):
    """In eval and train mode, with batch or layer norm, multi-query or multi-head attention."""
    reference = golden(f"generator_tiny64{name}.npz")
    config = variant(TINY64, **VARIANTS[name])
    model = official("tiny64", config)
    outputs_equal(model, reference, "eval")

    images = model.train()(torch.from_numpy(reference["z"]))
    np.testing.assert_allclose(nhwc(images)[: len(reference["train"])], reference["train"], rtol=0, atol=1e-4)
    loss = images.square().mean()
    loss.backward()
    assert loss.item() == pytest.approx(float(reference["train_loss"]), rel=1e-5)
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    full = {name.removeprefix("grad/"): array for name, array in reference.items() if name.startswith("grad/")}
    assert len(full) == 5
    for name, expected in hit_gan_generator(full).items():
        np.testing.assert_allclose(ours[name].numpy(), expected.numpy(), rtol=1e-4, atol=1e-6, err_msg=name)

    norms = dict(zip(reference["grad_names"].tolist(), reference["grad_l2"].tolist(), strict=True))
    attention = "multi_query" if config.backbone.multi_query else "multi_head"
    variables = generator_variables("tiny64", attention, config.backbone.norm)
    assert len(norms) == len(ours) == 149
    for canonical, expected in norms.items():
        (name,) = hit_gan_generator({canonical: variables[canonical]})
        if name.endswith("attention.key.bias"):  # zero in exact arithmetic: softmax does not see a shift of all logits
            assert ours[name].norm() < 1e-6
        else:
            np.testing.assert_allclose(ours[name].norm().item(), expected, rtol=1e-4, atol=1e-6, err_msg=name)

    after = {name.removeprefix("after/"): array for name, array in reference.items() if name.startswith("after/")}
    state = model.state_dict()
    statistics = {k: v for k, v in hit_gan_generator(after).items() if not k.endswith("num_batches_tracked")}
    assert len(statistics) == len(after) == (38 if config.backbone.norm == "batch" else 0)
    for name, expected in statistics.items():
        np.testing.assert_allclose(state[name].numpy(), expected.numpy(), rtol=0, atol=1e-6, err_msg=name)


def test_tiny_generator_in_eval_mode_with_new_statistics(tiny, reference):
    tiny.train()(torch.from_numpy(reference["z"]))
    outputs_equal(tiny, {"z": reference["z"], "eval": reference["eval_after"]}, "eval")


def test_intermediate_maps_of_the_tiny_generator(tiny, reference):
    seen = {}

    def record(name):
        def hook(module, inputs, output=None):
            seen[name] = (inputs[0] if output is None else output).numpy()

        return hook

    stage0, stage1 = tiny.backbone.stages[0], tiny.backbone.stages[1]
    tiny.stem.tokens.register_forward_hook(record("embeddings"))
    stage0.cross.register_forward_pre_hook(record("position"))
    stage0.cross.register_forward_hook(record("cross"))
    stage0.blocks[-1].register_forward_hook(record("out"))
    stage1.register_forward_pre_hook(record("stage1_in"))
    with torch.no_grad():
        tiny(torch.from_numpy(reference["z"]))
    blocked_position = reference["mid/stage0_in_after_position"].reshape(4, 2, 4, 2, 4, 32).swapaxes(2, 3)
    expected = {
        "embeddings": reference["mid/embeddings"][:, 0],
        "position": blocked_position.reshape(4, 4, 16, 32),
        "cross": reference["mid/stage0_cross"],
        "out": reference["mid/stage0_out_blocked"],
        "stage1_in": reference["mid/stage1_in"],
    }
    for name, array in expected.items():
        np.testing.assert_allclose(seen[name], array, rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_256_generator(mode):
    reference = golden("generator_256_sample.npz")
    model = official("256", HiTGeneratorConfig.preset("hit-b-256"))
    model.train(mode == "train")
    with torch.no_grad():
        images = nhwc(model(torch.from_numpy(reference["z"])))
    assert images.shape == (2, 256, 256, 3)
    np.testing.assert_allclose(images[:, 96:144, 96:144], reference[f"{mode}_crop"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(images[:, ::8, ::8], reference[f"{mode}_strided"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(images.mean((1, 2)), reference[f"{mode}_mean"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(images.std((1, 2)), reference[f"{mode}_std"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(np.abs(images).max(), reference[f"{mode}_max_abs"], rtol=0, atol=1e-3)
    if mode == "train":
        for name in ("embedding_layer.norm", "blocks.0.cross.norm", "blocks.3.self.1.mlp.norm"):
            norm = model.get_submodule(
                name.replace("embedding_layer", "stem.tokens")
                .replace("blocks.", "backbone.stages.", 1)
                .replace(".self.", ".blocks.")
            )
            np.testing.assert_allclose(norm.running_mean, reference[f"after/{name}.moving_mean"], rtol=0, atol=1e-6)
            np.testing.assert_allclose(norm.running_var, reference[f"after/{name}.moving_variance"], rtol=0, atol=1e-6)


def millions(config: HiTGeneratorConfig) -> float:
    with torch.device("meta"):
        model = HiTGenerator(config)
    return round(sum(p.numel() for p in model.parameters()) / 1e6, 2)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("hit-s-256", 34.73),
        ("hit-b-256", 46.22),
        ("hit-l-256", 97.46),
        ("hit-b-1024", 88.22),
        ("hit-b-128", 32.87),
        ("hit-l-128", 67.60),
    ],
)
def test_parameter_counts_of_the_presets(preset, expected):
    assert millions(HiTGeneratorConfig.preset(preset)) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"cross_attention": False, "block_sizes": ()}, 42.68),
        ({"block_sizes": ()}, 61.55),
        ({"attention": "full", "block_sizes": (None,) * 4}, 67.60),
        ({"attention": "axial", "block_sizes": (None,) * 4}, 67.60),
        ({"attention": "blocked"}, 67.60),
        ({"attention": "interleaved"}, 67.60),
        ({"block_sizes": (8,) * 4}, 67.60),
        ({"block_sizes": (4,)}, 66.01),
        ({"block_sizes": (4, 4)}, 67.19),
        ({"block_sizes": (4, 4, 8)}, 67.52),
    ],
)
def test_parameter_counts_of_the_ablations(changes, expected):
    """Tables 5 and 6."""
    assert millions(variant(HiTGeneratorConfig.preset("hit-l-128"), **changes)) == expected


@pytest.mark.parametrize(
    ("changes", "reached"),
    [
        ({"attention": "blocked"}, [16]),
        ({"attention": "interleaved"}, [16, 64]),
        ({"attention": "multi_axis"}, [16 + 4 - 1, 64]),
        ({"attention": "axial", "block_sizes": (None, None)}, [8 + 8 - 1, 64]),
        ({"attention": "full", "block_sizes": (None, None)}, [64]),
    ],
)
def test_how_far_a_pixel_is_seen_after_each_block(changes, reached):
    """Of 8x8 pixels in 2x2 blocks of 4x4: each kind of attention reaches as far as the paper says."""
    torch.manual_seed(0)
    config = variant(TINY64, **{"depths": (2, 2, 1, 1), **changes})
    stage = HiTGenerator(config).eval().double().backbone.stages[0]
    for module in stage.modules():
        if isinstance(module, Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    x = torch.randn(1, 8, 8, 32, dtype=torch.float64)
    moved = x.clone()
    moved[:, 3, 5] += 1
    tokens = torch.zeros(1, 16, 32, dtype=torch.float64)
    found = []
    for depth in range(1, len(reached) + 1):
        cut = copy.deepcopy(stage)
        cut.blocks = cut.blocks[:depth]
        with torch.no_grad():
            given = cut.given(tokens, 8, 8)
            difference = cut(moved, None, given)[0] - cut(x, None, given)[0]
        found.append(int((difference.abs().amax(3) > 1e-12).sum()))
    assert found == reached


def test_without_cross_attention_nothing_of_it_is_left():
    model = HiTGenerator(variant(TINY64, cross_attention=False, block_sizes=()))
    assert not [name for name, _ in model.named_parameters() if "cross" in name or "token" in name]
    assert model(torch.randn(2, 16)).shape == (2, 3, 64, 64)
    assert all(stage.to_rgb is not None for stage in model.backbone.stages)


def test_generator_state_dict_is_the_official_set_of_variables_for_every_official_size():
    from tests.parity import rule

    for name, preset in (("128", "hit-b-128"), ("256", "hit-b-256"), ("1024", "hit-b-1024")):
        with torch.device("meta"):
            model = HiTGenerator(HiTGeneratorConfig.preset(preset))
        zeros = {n: np.broadcast_to(np.float32(0), shape) for n, shape, _ in rule.generator_specs(name)}
        ours = hit_gan_generator(zeros)
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in model.state_dict().items()}


def test_conversion_refuses_an_unknown_variable():
    with pytest.raises(ValueError, match=r"'from_rgb\.kernel' is no variable of a HiT-GAN generator"):
        hit_gan_generator({"from_rgb.kernel": np.zeros((3, 3, 3, 512), np.float32)})


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"widths": (32,) * 40}, "40 stages make images of 4398046511104 px; allowed: 10 stages"),
        ({"depths": (2, 1)}, "depths has 2 entries and widths has 4"),
        ({"block_sizes": (4, 4, 4, 4)}, "block_sizes has 4 entries for 4 stages"),
        ({"block_sizes": (3,)}, "stage 0: a 8x8 map does not divide into blocks of 3"),
        ({"heads": (1, 2, 2, 2)}, "stage 0: 1 heads; multi_axis attention shares them out among two axes: an even"),
        ({"attention": "interleaved"}, "stage 1: depth 1; interleaved attention takes its two kinds in turn: an even"),
        ({"attention": "axial"}, "stage 0: block size 4; axial attention has no blocks: null"),
        ({"attention": "full", "block_sizes": (None, 4)}, "stage 1: block size 4; full attention has no blocks: null"),
        ({"block_sizes": (4, None)}, "stage 1: block size null; multi_axis attention needs a number"),
        ({"attention": "blocked", "block_sizes": ()}, "attention blocked: block_sizes is empty, so no stage has self-"),
        (
            {"multi_query": False, "block_sizes": (), "cross_attention": False},
            "multi_query false: block_sizes is empty and cross_attention false, so there are no heads",
        ),
        ({"attention": "local"}, "attention: found 'local'; input should be 'multi_axis', 'blocked', 'axial', 'inter"),
        ({"norm": "group"}, "norm: found 'group'; input should be 'batch' or 'layer'"),
        ({"heads": (4, 3, 2, 2)}, "stage 1: width 32 must be divisible by 4 and by its 3 heads"),
        ({"widths": (32, 32, 16, 0)}, "widths.3: found 0; input should be greater than or equal to 1"),
    ],
)
def test_impossible_sizes_are_refused_at_construction(change, found):
    with pytest.raises(ConfigError, match=re.escape(found)):
        HiTConfig(**{**TINY64.backbone.to_dict(), **change})


def test_generator_refuses_noise_of_another_length(tiny):
    with pytest.raises(ValueError, match=r"z is \(2, 8\); this model takes \(B, 16\)"):
        tiny(torch.zeros(2, 8))


def test_initial_weights_are_truncated_at_two_standard_deviations():
    model = HiTGenerator(TINY64)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" not in name:
            assert parameter.abs().max() <= 0.04, name
    wide = model.stem.feature_map.weight
    assert wide.std().item() == pytest.approx(0.0176, abs=2e-4)
