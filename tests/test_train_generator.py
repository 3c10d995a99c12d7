"""A run of a generator: what it writes, its samples, its evaluations; what cannot be combined."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import models

from tests.inception import Colours
from vqhit import HiTGenerator, VQHiT
from vqhit.config import ConfigError
from vqhit.convnet import ConvNetGenerator, ConvNetGeneratorConfig
from vqhit.evaluate import evaluate_generator, evaluate_tokenizer
from vqhit.folder import DataError, FolderSource
from vqhit.frechet import FeatureSums, frechet_distance
from vqhit.generator import Purpose, draw_noise
from vqhit.images import center_crop, from_uint8, image_grid, pil_to_uint8, rows_of, to_uint8
from vqhit.models import load_model
from vqhit.norms import BatchNorm
from vqhit.perceptual import FeaturesConfig
from vqhit.protocol import EvaluationSettings
from vqhit.train import RunConfig, Trainer

FEATURES = {"network": "squeezenet1_1", "layers": [1]}


@pytest.fixture
def feature_weights(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "squeezenet.safetensors"
    save_file(models.squeezenet1_1(weights=None).features.state_dict(prefix="features."), path)
    return str(path)


@pytest.fixture
def values(tiny_generator_config, photo_folder, tmp_path):
    """The configuration of a run, as a dict to change."""
    return {
        "run_dir": str(tmp_path / "run"),
        "device": "cpu",
        "model": tiny_generator_config.to_dict(),
        "discriminator": {"resolution": 16, "widths": [8, 8, 8]},
        "data": {"path": str(photo_folder)},
        "loss": {"consistency": 10.0},
        "optimizer": {"learning_rate": 1e-3},
        "ema": {"start_step": 1, "decay": 0.9},
        "train": {
            "steps": 6,
            "batch_size": 3,
            "log_every": 2,
            "grid_every": 3,
            "checkpoint_every": 4,
            "batch_norm_batches": 2,
        },
    }


def records(run_dir, name="metrics.jsonl"):
    return [json.loads(line) for line in (Path(run_dir) / name).read_text().splitlines()]


@pytest.mark.parametrize("kind", ["hit", "convnet"])
def test_a_run_writes_metrics_samples_checkpoints_and_the_average(values, kind):
    if kind == "convnet":
        values["model"] = ConvNetGeneratorConfig(latent_dim=4, resolution=16, channels=8, attention_size=8).to_dict()
    config = RunConfig.from_dict(values)
    trainer = Trainer(config)
    folder = trainer.run()
    run_dir = Path(config.run_dir)
    assert RunConfig.from_yaml(run_dir / "config.yaml") == config
    found = records(run_dir)
    assert [record["step"] for record in found] == [2, 4, 6]
    terms = {"generator", "discriminator", "r1", "consistency", "real_logits", "fake_logits", "loss"}
    for record in found:
        assert terms | {"model_gradient_norm", "discriminator_gradient_norm", "learning_rate"} <= record.keys()
        assert record["loss"] == record["generator"]
        assert "codebook_usage" not in record
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_000000004", "step_000000006"]
    model = (HiTGenerator if kind == "hit" else ConvNetGenerator).from_pretrained(folder)
    average = trainer.state.ema.model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, average[name]), name
    grid = Image.open(run_dir / "grids" / "step_000000006.png")
    expected = image_grid(rows_of(to_uint8(model.sample(16, seed=config.seed, batch_size=3))))
    assert grid.tobytes() == expected.tobytes()


def test_saved_batch_norm_statistics_are_those_of_the_saved_weights(values):
    values["train"]["batch_norm_batches"] = 4
    trainer = Trainer(RunConfig.from_dict(values))
    model = HiTGenerator.from_pretrained(trainer.run())
    saved = {name: tensor.clone() for name, tensor in model.named_buffers() if "running" in name}
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        for number in range(4):
            model.train()(draw_noise(0, Purpose.BATCH_NORM_STATISTICS, number, 3, 4))
    for name, tensor in saved.items():
        torch.testing.assert_close(model.get_buffer(name), tensor, msg=name)


def test_every_step_has_noise_of_its_own(values):
    trainer = Trainer(RunConfig.from_dict(values))
    seen = []
    trainer.state.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    for _ in range(2):
        trainer.train_step(torch.zeros(3, 3, 16, 16))
    assert [tuple(z.shape) for z in seen] == [(3, 4)] * 2
    assert torch.equal(seen[0], draw_noise(0, Purpose.TRAINING_STEP, 0, 3, 4))
    assert not torch.equal(seen[0], seen[1])


def test_evaluations_are_the_distance_of_the_average_as_measured_afterwards(values, photo_folder, feature_weights):
    values["eval"] = {
        "path": str(photo_folder),
        "every": 3,
        "images": 5,
        "features": FEATURES,
        "feature_weights": feature_weights,
    }
    config = RunConfig.from_dict(values)
    folder = Trainer(config).run()
    found = records(config.run_dir, "evaluations.jsonl")
    assert [record["step"] for record in found] == [3, 6]
    measured = evaluate_generator(
        HiTGenerator.from_pretrained(folder),
        photo_folder,
        EvaluationSettings(
            features=FeaturesConfig(**FEATURES), feature_weights=feature_weights, samples=5, limit=5, metrics=("fid",)
        ),
    )
    assert (measured["images"], measured["samples"]) == (5, 5)
    assert found[-1]["frechet_distance"] == pytest.approx(measured["frechet_distance"], rel=1e-4)
    assert found[0]["frechet_distance"] != found[1]["frechet_distance"]


def test_a_tokenizer_is_evaluated_by_the_distance_too(values, tiny_config, photo_folder, feature_weights):
    values |= {"model": tiny_config.to_dict(), "loss": {}}
    values["eval"] = {"path": str(photo_folder), "features": FEATURES, "feature_weights": feature_weights}
    config = RunConfig.from_dict(values)
    folder = Trainer(config).run()
    found = records(config.run_dir, "evaluations.jsonl")[-1]
    measured = evaluate_tokenizer(
        VQHiT.from_pretrained(folder),
        photo_folder,
        EvaluationSettings(
            features=FeaturesConfig(**FEATURES),
            feature_weights=feature_weights,
            batch_size=3,
            metrics=("rfid", "psnr"),
        ),
    )
    for name in ("psnr", "frechet_distance"):
        assert found[name] == pytest.approx(measured[name], rel=1e-4), name


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_fid_while_training_is_that_of_the_saved_model(values, tiny_config, photo_folder, monkeypatch, kind):
    if kind == "tokenizer":
        values |= {"model": tiny_config.to_dict(), "loss": {}}
    asked = []

    def build(path, key):
        asked.append((path, key))
        return Colours()

    monkeypatch.setattr("vqhit.recipe.InceptionExtractor", build)
    values["eval"] = {"path": str(photo_folder), "fid": True, "inception": "inception.pth"}
    config = RunConfig.from_dict(values)
    model = load_model(Trainer(config).run())
    assert asked == [("inception.pth", "eval.inception")]
    found = records(config.run_dir, "evaluations.jsonl")[-1]
    photos = FolderSource.scan(photo_folder)
    crops = torch.stack([pil_to_uint8(center_crop(photos.read(index), 16)) for index in range(len(photos))])
    pictures = (
        model.reconstruct(from_uint8(crops)) if kind == "tokenizer" else model.sample(len(photos), seed=config.seed)
    )
    sums = [FeatureSums(3), FeatureSums(3)]
    for each, images in zip(sums, (crops, to_uint8(pictures)), strict=True):
        each.update(Colours()(images).features)
    expected = frechet_distance(*(each.statistics() for each in sums))
    assert found["rfid" if kind == "tokenizer" else "fid"] == pytest.approx(expected, rel=1e-3)
    assert "frechet_distance" not in found


def test_one_image_is_too_few_to_evaluate_on(values, photo_folder, feature_weights, tmp_path):
    (tmp_path / "one").mkdir()
    shutil.copy(photo_folder / "0.jpg", tmp_path / "one")
    values["eval"] = {"path": str(tmp_path / "one"), "features": FEATURES, "feature_weights": feature_weights}
    with pytest.raises(DataError, match="one: one image; a Fréchet distance needs at least 2"):
        Trainer(RunConfig.from_dict(values))


def test_an_evaluation_that_cannot_be_loses_no_training(values, feature_weights, tmp_path):
    (tmp_path / "pages").mkdir()
    for name in "ab":
        (tmp_path / "pages" / f"{name}.jpg").write_text("<html>not found</html>")
    values["eval"] = {"path": str(tmp_path / "pages"), "features": FEATURES, "feature_weights": feature_weights}
    config = RunConfig.from_dict({**values, "train": {**values["train"], "checkpoint_every": 0}})
    with pytest.raises(DataError, match="needs at least 2 images; 0 can be read"):
        Trainer(config).run()
    assert HiTGenerator.from_pretrained(Trainer(config).run()).image_size == 16


def test_the_generator_runs_in_the_precision_asked_for(values):
    values["train"] |= {"precision": "bfloat16", "steps": 2}
    trainer = Trainer(RunConfig.from_dict(values))
    seen = {}
    for name, module in (
        ("G", trainer.state.model.backbone.stages[1].blocks[0].fc1),
        ("D", trainer.state.discriminator.blocks[0].conv0),
    ):
        module.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output.dtype}))
    trainer.run()
    assert seen == {"G": torch.bfloat16, "D": torch.float32}


def test_a_compiled_generator_trains_as_an_eager_one_does(values, tmp_path, traced):
    found = []
    for compile_it in (False, True):
        values["train"] |= {"compile": compile_it, "steps": 2, "log_every": 1}
        config = RunConfig.from_dict({**values, "run_dir": str(tmp_path / str(compile_it))})
        Trainer(config).run()
        found.append(records(config.run_dir))
    assert traced == ["HiTBackbone"]
    for eager, other in zip(*found, strict=True):
        for name in ("generator", "discriminator", "r1", "model_gradient_norm"):
            assert other[name] == pytest.approx(eager[name], rel=1e-4), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"discriminator": None}, "a model of kind hit_generator needs a discriminator: give its sizes under"),
        ({"discriminator": {"resolution": 32}}, "discriminator.resolution 32: the model's images are 16 px"),
        (
            {"discriminator": {"resolution": 16, "widths": [8, 8]}},
            "discriminator: widths has 2 entries; 16 px down to 4 are 3 maps",
        ),
        ({"loss": {"perceptual": 1.0}}, "loss.perceptual: unknown key; allowed: gan, r1, r1_every, consistency"),
        ({"loss": [1]}, "loss: found [1]; expected a mapping"),
        ({"eval": {"path": "x"}}, "eval: a generator needs eval.fid=true, or eval.features and eval.feature_weights"),
        (
            {"eval": {"path": "x", "fid": True, "features": FEATURES, "feature_weights": "f"}},
            "eval: fid and features: FID has its own network; leave one out",
        ),
        ({"eval": {"path": "x", "inception": "f"}}, "eval: inception: only fid needs it"),
        (
            {"eval": {"path": "x", "feature_weights": "f"}},
            "eval: features, a network, is missing: a Fréchet distance needs both",
        ),
        (
            {"eval": {"path": "x", "images": 1, "features": FEATURES, "feature_weights": "f"}},
            "eval: images is 1; a Fréchet distance needs at least 2",
        ),
        (
            {"discriminator": {"resolution": 16, "widths": [8, 8, 8], "max_channels": 8}},
            "discriminator: widths stands in place of channel_multiplier and max_channels: leave these out",
        ),
        (
            {"model": {"latent_dim": 4, "backbone": {}}},
            "model.kind: without it, that is vqhit; there are: vqhit, hit_generator, convnet_generator",
        ),
        ({"train": {"steps": 1, "batch_size": 2, "restart_codes_after": 3}}, "a generator has none"),
        ({"model": {"kind": "gan"}}, "model.kind: found 'gan'; allowed: vqhit, hit_generator, convnet_generator"),
        ({"model": 3}, "model: found 3; expected a mapping, of kind vqhit, hit_generator, convnet_generator"),
        (
            {"model": {"kind": "hit_generator", "backbone": {"widths": [8]}}},
            "model.backbone.depths: missing; model.backbone.heads: missing; model.backbone.block_sizes: missing",
        ),
    ],
)
def test_options_that_do_not_fit_together_are_named(values, changes, message):
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict({**values, **changes})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
