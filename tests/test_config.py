"""Configuration files: strict, with errors that name the key and the nearest allowed one."""

import re
from pathlib import Path

import pytest
import torch
from torchvision import models

from vqhit.config import ConfigError, differences
from vqhit.convnet import ConvNetGeneratorConfig
from vqhit.discriminator import DiscriminatorConfig
from vqhit.models import HiTGenerator, HiTGeneratorConfig, VQHiT, VQHiTConfig
from vqhit.perceptual import FeaturesConfig
from vqhit.recipe import RunConfig
from vqhit.vqgan import EncoderConfig

CONFIGS = Path(__file__).parent.parent / "configs"
RUNS = sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("ablations/*.yaml")])


def load(tmp_path, text, *overrides):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return RunConfig.from_yaml(path, overrides)


@pytest.fixture
def demo_text():
    return (CONFIGS / "demo.yaml").read_text()


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_config_file_loads_and_survives_a_round_trip(path, tmp_path):
    config = RunConfig.from_yaml(path)
    assert load(tmp_path, config.to_yaml()) == config


@pytest.mark.parametrize("data", ["imagenet256", "tinyimagenet64"])
def test_the_baselines_differ_in_nothing_but_the_decoder(data):
    ours, theirs = (RunConfig.from_yaml(CONFIGS / f"{model}_{data}.yaml") for model in ("vqhit", "vqgan"))
    left = [
        {**config.to_dict(), "run_dir": "", "model": {**config.model.to_dict(), "stem": None, "decoder": None}}
        for config in (ours, theirs)
    ]
    assert left[0] == left[1]
    assert (ours.model.decoder.kind, theirs.model.decoder.kind) == ("hit", "conv")
    assert ours.model.image_size == theirs.model.image_size


@pytest.mark.parametrize("kind", ["vqhit", "vqgan"])
def test_the_packaged_tokenizers_are_those_of_their_configurations(kind):
    packaged = VQHiT.from_pretrained(f"{kind}-tiny-64")
    assert packaged.config == RunConfig.from_yaml(CONFIGS / f"{kind}_tinyimagenet64.yaml").model


def test_the_packaged_generator_is_that_of_its_configuration():
    packaged = HiTGenerator.from_pretrained("hit-tiny-64")
    assert packaged.config == RunConfig.from_yaml(CONFIGS / "hitgan_tinyimagenet64.yaml").model


def test_the_small_decoders_have_as_many_parameters():
    counts = []
    for name in ("vqhit", "vqgan"):
        with torch.device("meta"):
            model = VQHiT(RunConfig.from_yaml(CONFIGS / f"{name}_tinyimagenet64.yaml").model)
        counts.append(sum(tensor.numel() for part in model.decoder_parts for tensor in part.parameters()))
    assert counts[1] == pytest.approx(counts[0], rel=0.02)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("features/*.yaml")), ids=lambda path: path.stem)
def test_every_network_for_distances_exists(path):
    config = FeaturesConfig.from_yaml(path)
    with torch.device("meta"):
        assert max(config.layers) < len(models.get_model(config.network).features)


def test_imagenet_config_is_the_papers_recipe():
    config = RunConfig.from_yaml(CONFIGS / "vqhit_imagenet256.yaml")
    assert config.model == VQHiTConfig.preset("vqhit-b-256")
    for optimizer in (config.optimizer, config.discriminator_optimizer):
        assert (optimizer.learning_rate, optimizer.beta1, optimizer.beta2) == (1e-4, 0.0, 0.99)
        assert (optimizer.schedule, optimizer.warmup_steps) == ("constant", 0)
    assert (config.train.batch_size, config.train.steps) == (256, 500_000)
    loss = config.loss
    assert (loss.reconstruction, loss.perceptual, loss.perceptual_network) == (1, 5e-5, "vgg16")
    assert (loss.adversarial, loss.adaptive, loss.gan, loss.r1, loss.r1_every) == (0.1, False, "non_saturating", 10, 1)
    assert (config.discriminator.resolution, config.discriminator.channel_multiplier) == (256, 2)
    assert config.discriminator.pool == "blur"
    assert not config.discriminator.equalized_lr
    assert not config.discriminator.minibatch_stddev


def changed(first, second):
    """Keys in which two runs differ, but for their folders."""
    return set(differences(*({**config.to_dict(), "run_dir": ""} for config in (first, second))))


GAN_RECIPES = {  # preset, learning rate, bCR, steps, batch size, of D: resolution and multiplier
    "hitgan_imagenet128": ("hit-b-128", 1e-4, 0, 1_000_000, 256, (128, 1)),
    "hitgan_celebahq256": ("hit-b-256", 5e-5, 10, 500_000, 256, (256, 2)),
    "hitgan_ffhq256": ("hit-b-256", 5e-5, 10, 500_000, 256, (256, 2)),
    "hitgan_celebahq1024": ("hit-b-1024", 1e-4, 0, 500_000, 32, (1024, 2)),
    "hitgan_ffhq1024": ("hit-b-1024", 1e-4, 0, 500_000, 32, (1024, 2)),
}


@pytest.mark.parametrize("name", GAN_RECIPES)
def test_gan_configs_are_the_papers_recipes(name):
    preset, learning_rate, consistency, steps, batch_size, discriminator = GAN_RECIPES[name]
    config = RunConfig.from_yaml(CONFIGS / f"{name}.yaml")
    assert config.model == HiTGeneratorConfig.preset(preset)
    for optimizer in (config.optimizer, config.discriminator_optimizer):
        assert (optimizer.learning_rate, optimizer.beta1, optimizer.beta2) == (learning_rate, 0.0, 0.99)
        assert (optimizer.schedule, optimizer.warmup_steps) == ("constant", 0)
    assert (config.train.steps, config.train.batch_size) == (steps, batch_size)
    loss = config.loss
    assert (loss.gan, loss.r1, loss.r1_every, loss.consistency) == ("non_saturating", 10, 1, consistency)
    assert (config.discriminator.resolution, config.discriminator.channel_multiplier) == discriminator
    assert changed(config, config.model_copy(update={"discriminator": DiscriminatorConfig()})) <= {
        "discriminator.resolution",
        "discriminator.channel_multiplier",
    }
    assert (config.ema.decay, config.ema.start_step, config.ema.warmup) == (0.999, 10, False)
    crop = 0.875 if "imagenet" in name else 1.0
    assert (config.data.flip, config.data.crop_proportion) == (True, (crop, crop))


def test_yaml_that_is_endless_when_written_out_or_nested_too_deep_is_one_short_line(tmp_path):
    rows = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))]
    (tmp_path / "bomb.yaml").write_text("\n".join([*rows, "channels: *a11", "z_channels: *a11"]))
    (tmp_path / "deep.yaml").write_text("[" * 20_000)
    for name, message in (("bomb", "channels: found"), ("deep", "not valid YAML: nested too deep")):
        with pytest.raises(ConfigError, match=message) as error:
            EncoderConfig.from_yaml(tmp_path / f"{name}.yaml")
        assert len(str(error.value)) < 3000


@pytest.mark.parametrize(
    ("name", "base"),
    [("redecode_vqgan_imagenet256", "vqhit_imagenet256"), ("redecode_tinyimagenet64", "vqhit_tinyimagenet64")],
)
def test_a_decoder_for_other_tokens_is_trained_as_a_tokenizer_is(name, base):
    ours, theirs = (RunConfig.from_yaml(CONFIGS / f"{each}.yaml") for each in (name, base))
    assert changed(ours, theirs) <= {
        "init_from",
        "freeze_tokens",
        "model.stem.skip_kernel",
        "train.restart_codes_after",
    }
    assert ours.freeze_tokens


def test_the_convolutional_baseline_differs_in_nothing_but_the_model():
    ours, theirs = (RunConfig.from_yaml(CONFIGS / f"{name}_imagenet128.yaml") for name in ("hitgan", "convnet"))
    assert all(key.startswith("model.") for key in changed(ours, theirs))
    assert theirs.model == ConvNetGeneratorConfig()


ABLATIONS = {
    "table5_inr": {"block_sizes", "cross_attention"},
    "table5_cross_attention": {"block_sizes"},
    "table5_all_to_all": {"attention", "block_sizes"},
    "table5_axial": {"attention", "block_sizes"},
    "table5_blocked": {"attention"},
    "table5_interleaved": {"attention"},
    "table5_multi_axis": {"block_sizes"},
    "table6_1_stage": {"block_sizes"},
    "table6_2_stages": {"block_sizes"},
    "table6_3_stages": {"block_sizes"},
    "table8_layer_norm": {"norm"},
    "table8_multi_head": {"multi_query"},
    "table10_nested_transformer": {"attention", "cross_attention"},
    "table10_multi_axis_only": {"cross_attention"},
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_differs_from_the_full_model_in_what_it_is_named_for(name):
    path = CONFIGS / "ablations" / f"{name}.yaml"
    full = RunConfig.from_yaml(CONFIGS / "ablations" / "full_model.yaml")
    found = changed(RunConfig.from_yaml(path), full)
    assert found == {f"model.backbone.{key}" for key in ABLATIONS[name]}
    comment = " ".join(path.read_text().replace("#", " ").partition("run_dir:")[0].split())
    named = " and ".join(f"model.backbone.{key}" for key in sorted(ABLATIONS[name]))
    assert f"It differs from full_model.yaml in {named} alone." in comment


def test_table_7_is_with_and_without_bcr_for_each_size():
    ablations = CONFIGS / "ablations"
    for size in "sbl":
        on, off = (RunConfig.from_yaml(ablations / f"table7_hit_{size}_{bcr}.yaml") for bcr in ("bcr", "no_bcr"))
        rates = {"optimizer.learning_rate", "discriminator_optimizer.learning_rate"}
        assert changed(on, off) == {"loss.consistency", *rates}
        assert (on.loss.consistency, on.optimizer.learning_rate) == (10, 5e-5)
        assert (off.loss.consistency, off.optimizer.learning_rate) == (0, 1e-4)
        assert on.model == HiTGeneratorConfig.preset(f"hit-{size}-256")
    base = RunConfig.from_yaml(ablations / "table7_hit_b_bcr.yaml")
    assert not changed(base, RunConfig.from_yaml(CONFIGS / "hitgan_ffhq256.yaml"))
    assert len(list(ablations.glob("*.yaml"))) == len(ABLATIONS) + 1 + 6


def test_overrides_reach_nested_keys_and_are_typed_as_yaml(tmp_path, demo_text):
    config = load(
        tmp_path,
        demo_text,
        "train.steps=7",
        "optimizer.learning_rate=1e-4",
        "data.path=/x y",
        "model.decoder.depths=[1,1,1,1]",
    )
    assert config.train.steps == 7
    assert config.optimizer.learning_rate == 1e-4
    assert config.data.path == "/x y"
    assert config.model.decoder.depths == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batchsize=4", "train.batchsize: unknown key; did you mean 'batch_size'?"),
        (
            "model.quantizer.codebook_sise=4",
            "model.quantizer.codebook_sise: unknown key; did you mean 'codebook_size'?",
        ),
        (
            "zzz=4",
            "zzz: unknown key; allowed: run_dir, seed, device, init_from, freeze_tokens, model, "
            "discriminator, data, loss, optimizer, "
            "discriminator_optimizer, ema, train",
        ),
        ("train.batch_size='4'", "train.batch_size: found '4'; input should be a valid integer"),
        ("train.batch_size=4.5", "train.batch_size: found 4.5; input should be a valid integer"),
        ("train.batch_size=true", "train.batch_size: found True; input should be a valid integer"),
        ("train.batch_size=0", "train.batch_size: found 0; input should be greater than or equal to 1"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate: found nan"),
        ("optimizer.schedule=linear", "optimizer.schedule: found 'linear'; input should be 'constant' or 'cosine'"),
        ("data.crop_proportion=1.5", "data.crop_proportion.0: found 1.5; input should be less than or equal to 1"),
        ("data.crop_proportion=[0.6, 0.2]", "data.crop_proportion: found [0.6, 0.2]; the smaller share comes first"),
        ("data.crop_proportion=all", "data.crop_proportion: found 'all'; input should be a valid tuple"),
        ("model.stem.latent_grid=3", "model: stem.latent_grid 3 does not divide the 16x16 token grid"),
        (
            "model.encoder.channel_multipliers=[1,1,1,1,1]",
            "model: the encoder turns 64 px into a 4x4 token grid; HiT needs at least 8x8",
        ),
        ("model.encoder.channels=48", "model.encoder: channels 48: group normalisation needs a multiple of 32"),
        ("seed=9999999999999999999", "seed: found 9999999999999999999; input should be less than"),
        ("optimizer.beta2=1.0", "optimizer.beta2: found 1.0; input should be less than 1"),
        (
            "model.encoder.attention_resolutions=[15]",
            "model.encoder.attention_resolutions: found [15]; the maps are 64",
        ),
        ("self=1", "self: unknown key"),
        ("train={1: 2}", "override 'train={1: 2}': key 1 (line 1 and below) is no text; put it in quotes"),
        ("train", "override 'train': expected key=value, as in train.batch_size=64"),
        ("seed.value=1", "override 'seed.value=1': seed is a value, it has no keys below it"),
        ("train.steps=[1", "override 'train.steps=[1': not valid YAML"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(tmp_path, demo_text, override, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load(tmp_path, demo_text, override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "found list; a configuration maps keys to values"),
        ("train: {steps: 1, steps: 2}", "key 'steps' is given twice"),
        ("a: [", "not valid YAML"),
        ("run_dir: !!python/object/apply:os.system [echo]", "not valid YAML: could not determine a constructor"),
        ("run_dir: x", "model: missing; data: missing; train: missing"),
    ],
)
def test_malformed_files_are_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "run.yaml"))


def test_yaml_anchors_and_merges_work(tmp_path, demo_text):
    config = load(tmp_path, demo_text + "\n", "loss={<<: {codebook: 0.5}, reconstruction: 2.0}")
    assert (config.loss.codebook, config.loss.reconstruction) == (0.5, 2.0)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file"):
        RunConfig.from_yaml(tmp_path / "absent.yaml")


def test_configurations_are_frozen():
    config = VQHiTConfig.preset("vqhit-b-256")
    with pytest.raises(ValueError, match="frozen"):
        config.stem = config.stem


def test_differences_of_nested_mappings_are_told_key_by_key():
    there = {"model": {"kind": "vq", "dim": 8}, "steps": 3, "gone": 1, "long": "x" * 500}
    now = {"model": {"kind": "vq", "dim": 9}, "steps": 3, "new": None, "long": "y"}
    assert differences(there, now) == {
        "gone": "gone: 1 there, None now",
        "long": f"long: {'x' * 100}... there, y now",
        "model.dim": "model.dim: 8 there, 9 now",
    }
    assert differences(now, now) == {}
