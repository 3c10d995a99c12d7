"""A run: what one step does, what it writes, and that the same command continues it."""

import json
import math
import re
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision import models

from vqhit import VQHiT, checkpoint, perceptual
from vqhit.config import ConfigError
from vqhit.evaluate import evaluate_tokenizer
from vqhit.files import KnownFile, sha256
from vqhit.images import from_uint8
from vqhit.norms import BatchNorm, reestimate_batch_norm
from vqhit.protocol import EvaluationSettings
from vqhit.train import RunConfig, Trainer

CLOCKED = {"images_per_s", "memory_mib"}
"""Numbers that no two runs share."""


EIGHT = {"channels": 32, "channel_multipliers": [1, 1], "num_res_blocks": 1, "attention_resolutions": []}
"""Sizes of an encoder or decoder for images of 8 px."""


@pytest.fixture
def make_config(tiny_config, photo_folder, tmp_path):
    def make(**train):
        optimizer = {key: train.pop(key) for key in ("learning_rate", "schedule", "warmup_steps") if key in train}
        names = ("run_dir", "seed", "loss", "discriminator", "ema", "data", "model", "eval", "log")
        top = {key: train.pop(key) for key in names if key in train}
        return RunConfig.from_dict(
            {
                "run_dir": str(tmp_path / "run"),
                "device": "cpu",
                "model": {**tiny_config.to_dict(), **top.pop("model", {})},
                "data": {"path": str(photo_folder), **top.pop("data", {})},
                "optimizer": {"learning_rate": 1e-3, **optimizer},
                "train": {"steps": 6, "batch_size": 3, "log_every": 2, "grid_every": 3, "checkpoint_every": 4, **train},
                **top,
            }
        )

    return make


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory):
    """A file of SqueezeNet features, generated."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "squeezenet.safetensors"
    save_file(models.squeezenet1_1(weights=None).features.state_dict(prefix="features."), path)
    return path


@pytest.fixture
def whole_recipe(squeezenet, photo_folder):
    """Options that switch on every term and every average."""
    return {
        "loss": {
            "perceptual": 0.5,
            "perceptual_network": "features",
            "perceptual_weights": str(squeezenet),
            "perceptual_features": {"network": "squeezenet1_1", "layers": [1]},
            "adversarial": 0.1,
            "adaptive": True,
            "discriminator_start_step": 1,
            "r1_every": 2,
        },
        "discriminator": {"resolution": 16, "channel_multiplier": 1, "max_channels": 8},
        "ema": {"decay": 0.9, "start_step": 1, "warmup": True},
        "model": {"quantizer": {"codebook_size": 32, "dim": 8, "update": "ema", "normalize": True}},
        "eval": {"path": str(photo_folder), "every": 3, "images": 4},
        "micro_batch_size": 2,
        "restart_codes_after": 2,
        "batch_norm_batches": 2,
        "checkpoint_every": 3,
    }


def records(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_its_config_metrics_grids_checkpoints_and_model(make_config):
    config = make_config()
    folder = Trainer(config).run()
    run_dir = Path(config.run_dir)
    assert RunConfig.from_yaml(run_dir / "config.yaml") == config
    assert [record["step"] for record in records(run_dir)] == [2, 4, 6]
    first = records(run_dir)[0]
    assert first["loss"] == pytest.approx(first["reconstruction"] + first["codebook"])
    assert first["images"] == 6
    assert 1 / 32 <= first["codebook_usage"] <= 1  # six images are an epoch
    assert sorted(path.name for path in (run_dir / "grids").iterdir()) == ["step_000000003.png", "step_000000006.png"]
    assert Image.open(run_dir / "grids" / "step_000000006.png").size == (4 + 6 * 20, 4 + 2 * 20)
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["step_000000004", "step_000000006"]
    assert folder == run_dir / "model"
    final = VQHiT.from_pretrained(folder).state_dict()
    for name, tensor in VQHiT.from_pretrained(run_dir / "checkpoints" / "step_000000006").state_dict().items():
        assert torch.equal(tensor, final[name]), name


def test_codebook_usage_is_counted_over_each_epoch(make_config):
    trainer = Trainer(make_config(steps=4, batch_size=3, log_every=1, learning_rate=1e-9))
    trainer.run()
    model = VQHiT.from_pretrained(Path(trainer.config.run_dir) / "checkpoints" / "step_000000004")
    found = [record.get("codebook_usage") for record in records(trainer.config.run_dir)]
    for epoch in (0, 1):  # six images, two steps of three
        batch = torch.stack([trainer.feed.crops[sample].image for sample in range(6 * epoch, 6 * epoch + 6)])
        assert found[2 * epoch : 2 * epoch + 2] == [None, len(model.encode(from_uint8(batch)).unique()) / 32]


def test_grids_show_originals_above_their_reconstructions(make_config):
    trainer = Trainer(make_config(steps=3))
    trainer.run()
    model = VQHiT.from_pretrained(Path(trainer.config.run_dir) / "model")
    first = model.preprocess(trainer.feed.source.name(0))
    grid = Image.open(Path(trainer.config.run_dir) / "grids" / "step_000000003.png")
    for top, expected in ((4, first), (24, model.reconstruct(first))):
        assert grid.crop((4, top, 20, top + 16)).tobytes() == model.postprocess(expected)[0].tobytes()


def test_saved_batch_norm_statistics_are_those_of_the_saved_weights(make_config):
    trainer = Trainer(make_config(batch_norm_batches=2))
    model = VQHiT.from_pretrained(trainer.run())
    saved = model.backbone.stages[1].cross.norm.running_mean.clone()
    batches = [
        from_uint8(torch.stack([trainer.feed.crops[n].image for n in range(start, start + 3)])) for start in (0, 3)
    ]
    reestimate_batch_norm(model, batches)
    torch.testing.assert_close(model.backbone.stages[1].cross.norm.running_mean, saved)


def test_moved_codes_lose_their_averages(make_config):
    trainer = Trainer(make_config(restart_codes_after=1))
    images = from_uint8(torch.stack([trainer.feed.crops[sample].image for sample in range(3)]))
    codebook = trainer.state.model.quantizer.codebook
    before = codebook.detach().clone()
    trainer.train_step(images)
    moved = (codebook.detach() - before).abs().amax(1) > 2e-3  # further than one step of Adam
    assert moved.any()
    assert not trainer.state.optimizers["model"].adam.state[codebook]["exp_avg"][moved].any()


def test_only_the_asked_number_of_checkpoints_is_kept(make_config):
    config = make_config(checkpoint_every=1, keep_checkpoints=2)
    Trainer(config).run()
    names = sorted(path.name for path in (Path(config.run_dir) / "checkpoints").iterdir())
    assert names == ["step_000000005", "step_000000006"]


@pytest.mark.parametrize("content", ["", "run_dir: [", "- a list"])
def test_a_damaged_configuration_of_a_run_is_named(make_config, content):
    config = make_config(max_minutes=1e-6)
    Trainer(config).run()
    (Path(config.run_dir) / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml: .*: damaged, or of another version; put the run.s own back"):
        Trainer(config)


def test_the_largest_seed_works(make_config):
    assert Trainer(make_config(seed=2**63 - 1, steps=1, restart_codes_after=1)).run() is not None


def test_a_start_that_failed_does_not_claim_the_folder(make_config):
    Trainer(make_config())  # nothing was trained or saved
    assert Trainer(make_config(batch_size=2)).config.train.batch_size == 2


def test_one_step_is_adam_on_the_weighted_sum_of_the_terms(make_config):
    trainer = Trainer(make_config())
    twin = VQHiT(trainer.config.model).train()
    twin.load_state_dict(trainer.state.model.state_dict())
    images = from_uint8(torch.stack([trainer.feed.crops[sample].image for sample in range(3)]))

    losses = trainer.train_step(images)

    output = twin(images)
    reconstruction = (output.reconstruction - images).square().mean()
    (reconstruction + output.codebook_loss).backward()
    assert losses["reconstruction"] == pytest.approx(reconstruction.item(), rel=1e-6)
    assert losses["codebook"] == pytest.approx(output.codebook_loss.item(), rel=1e-6)
    for (name, ours), theirs in zip(trainer.state.model.named_parameters(), twin.parameters(), strict=True):
        gradient = theirs.grad.double()  # Adam's first step, beta1 = 0
        expected = theirs.detach().double() - 1e-3 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(ours.detach().double(), expected, rtol=1e-4, atol=1e-6, msg=name)


def test_training_lowers_the_loss(make_config):
    trainer = Trainer(make_config(steps=60, restart_codes_after=5))
    images = from_uint8(torch.stack([trainer.feed.crops[sample].image for sample in range(6)]))
    losses = [trainer.train_step(images)["reconstruction"] for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("recipe", ["reconstruction", "with restarts and a schedule", "whole", "convolutions"])
def test_the_same_command_continues_to_the_same_weights(make_config, whole_recipe, conv_config, tmp_path, recipe):
    options = {
        "convolutions": {**whole_recipe, "model": conv_config.to_dict()},
        "reconstruction": {},
        "with restarts and a schedule": {"restart_codes_after": 1, "batch_norm_batches": 2, "schedule": "cosine"},
        "whole": whole_recipe,
    }[recipe]
    uninterrupted = VQHiT.from_pretrained(Trainer(make_config(run_dir=str(tmp_path / "whole"), **options)).run())

    class StoppedError(Exception):
        pass

    trainer = Trainer(make_config(**options))
    step = trainer.train_step

    def stop_after_five(images):
        if trainer.state.step == 5:
            raise StoppedError
        return step(images)

    trainer.train_step = stop_after_five
    with pytest.raises(StoppedError):
        trainer.run()
    again = Trainer(make_config(**options))
    whole = recipe in ("whole", "convolutions")
    assert again.state.step == (3 if whole else 4)
    continued = VQHiT.from_pretrained(again.run())
    for name, tensor in continued.state_dict().items():
        assert torch.equal(tensor, uninterrupted.state_dict()[name]), name
    for path in sorted((tmp_path / "whole" / "checkpoints" / "step_000000006").glob("*.safetensors")):
        other = load_file(tmp_path / "run" / "checkpoints" / "step_000000006" / path.name)
        for name, tensor in load_file(path).items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=0, equal_nan=True, msg=f"{path.name}: {name}")
    if whole:
        evaluations = [(tmp_path / run / "evaluations.jsonl").read_text() for run in ("run", "whole")]
        assert evaluations[0] == evaluations[1]
        assert len(evaluations[0].splitlines()) == 2
    timeless = [{k: v for k, v in r.items() if k not in CLOCKED} for r in records(tmp_path / "run")]
    assert timeless == [{k: v for k, v in r.items() if k not in CLOCKED} for r in records(tmp_path / "whole")]


def test_a_metrics_line_cut_off_by_a_kill_does_not_stop_the_run(make_config, tmp_path):
    Trainer(make_config(max_minutes=1e-6, log_every=1)).run()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "images": 6}\n{"step": 3, "ima')
    Trainer(make_config(log_every=1)).run()
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_is_not_trained_again(make_config):
    Trainer(make_config()).run()
    again = Trainer(make_config())
    assert again.state.step == 6
    again.train_step = None
    assert again.run() == Path(again.config.run_dir) / "model"


def test_a_run_folder_of_another_run_is_refused(make_config):
    Trainer(make_config()).run()
    with pytest.raises(
        ConfigError, match=r"holds another run .train.batch_size: 3 there, 2 now.; choose another run_dir"
    ):
        Trainer(make_config(batch_size=2))
    Trainer(make_config(log_every=5))  # how often it reports does not make it another run


def test_a_time_limit_stops_with_a_checkpoint(make_config):
    trainer = Trainer(make_config(max_minutes=1e-6))
    assert trainer.run() is None
    assert Trainer(make_config()).state.step == 1


def test_a_loss_that_is_not_finite_stops_before_the_step(make_config):
    trainer = Trainer(make_config())
    before = {name: tensor.clone() for name, tensor in trainer.state.model.named_parameters()}
    with pytest.raises(ValueError, match="step 0: reconstruction is nan; stopped before the update"):
        trainer.train_step(torch.full((2, 3, 16, 16), float("nan")))
    for name, tensor in trainer.state.model.named_parameters():
        assert torch.equal(tensor, before[name]), name


def test_batch_norm_statistics_are_those_of_the_present_weights():
    torch.manual_seed(0)
    norm = BatchNorm(4)
    norm.train()(torch.randn(9, 4) * 50)  # a past that must not count
    batches = [torch.randn(5, 7, 4) + 2 for _ in range(3)]
    norm.eval()
    reestimate_batch_norm(norm, batches)
    flat = torch.stack(batches).flatten(1, 2)
    torch.testing.assert_close(norm.running_mean, flat.mean((0, 1)))
    torch.testing.assert_close(norm.running_var, flat.var(1).mean(0))
    assert not norm.training
    assert norm.momentum == 0.01


def test_the_seed_decides_the_run(make_config, tmp_path):
    first = Trainer(make_config(run_dir=str(tmp_path / "a"), seed=1)).state.model.quantizer.codebook
    same = Trainer(make_config(run_dir=str(tmp_path / "b"), seed=1)).state.model.quantizer.codebook
    other = Trainer(make_config(run_dir=str(tmp_path / "c"), seed=2)).state.model.quantizer.codebook
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_an_unusable_device_is_named(make_config):
    config = make_config()
    with pytest.raises(ConfigError, match="device 'tpu9' cannot be used here"):
        Trainer(config.model_copy(update={"device": "tpu9"}))


def test_the_average_is_what_is_evaluated_and_saved(make_config, whole_recipe):
    trainer = Trainer(make_config(**whole_recipe))
    folder = trainer.run()
    final, average = VQHiT.from_pretrained(folder).state_dict(), trainer.state.ema.model.state_dict()
    for name, tensor in average.items():
        assert torch.equal(final[name], tensor), name
    saved = trainer.folder.checkpoints / "step_000000006"
    assert torch.equal(VQHiT.from_pretrained(saved).quant_conv.weight, trainer.state.ema.model.quant_conv.weight)
    behind = load_file(saved / "trained.safetensors")
    assert torch.equal(behind["quant_conv.weight"], trainer.state.model.quant_conv.weight)
    assert not torch.equal(behind["quant_conv.weight"], final["quant_conv.weight"])

    batches = [from_uint8(torch.stack([trainer.feed.crops[n].image for n in pair])) for pair in ((0, 1), (2, 3))]
    model = VQHiT.from_pretrained(folder)
    reestimate_batch_norm(model, batches)  # the saved statistics are those of the saved, averaged weights
    name = "backbone.stages.1.cross.norm.running_mean"
    torch.testing.assert_close(model.state_dict()[name], final[name])


def test_evaluations_are_those_of_the_average_on_the_validation_images(make_config, whole_recipe, photo_folder):
    trainer = Trainer(make_config(**whole_recipe))
    folder = trainer.run()
    last = json.loads((trainer.folder.path / "evaluations.jsonl").read_text().splitlines()[-1])
    settings = EvaluationSettings(metrics=("psnr", "ssim", "codebook"), limit=4)
    expected = evaluate_tokenizer(VQHiT.from_pretrained(folder), photo_folder, settings)
    assert last["step"] == 6
    for name in ("images", "psnr", "ssim", "codes_used", "codebook_perplexity"):
        assert last[name] == pytest.approx(expected[name]), name


def test_every_term_is_logged(make_config, whole_recipe):
    trainer = Trainer(make_config(**{**whole_recipe, "log_every": 1}))
    trainer.run()
    first, *rest = records(trainer.folder.path)
    assert "adversarial" not in first  # the discriminator starts at step 1
    terms = ("reconstruction", "perceptual", "codebook", "adversarial")
    for record in rest[1:]:
        assert record["loss"] == pytest.approx(sum(record[name] for name in terms))
        numbers = ("discriminator", "real_logits", "fake_logits", "r1", "adversarial_weight")
        assert all(math.isfinite(record[name]) for name in numbers)
    values = [record.get("r1") for record in [first, *rest]]  # at steps 2 and 4, and the latest is repeated
    assert values[:2] == [None, None]
    assert values[2] == values[3]
    assert values[4] == values[5]
    assert values[2] != values[4]


def test_moved_codes_are_moved_in_the_average_too(make_config, whole_recipe):
    recipe = {**whole_recipe, "ema": {"decay": 0.9, "start_step": 0}, "restart_codes_after": 1}
    trainer = Trainer(make_config(**recipe))
    images = from_uint8(torch.stack([trainer.feed.crops[sample].image for sample in range(3)]))
    ours, theirs = trainer.state.model.quantizer.codebook, trainer.state.ema.model.quantizer.codebook
    update, moved = trainer.state.codebook.update, []
    trainer.state.codebook.update = lambda *arguments: moved.append(update(*arguments)) or moved[-1]
    for _ in range(3):
        trainer.train_step(images)
    now = torch.isin(torch.arange(32), moved[-1])
    assert now.any()
    assert torch.equal(ours[now], theirs[now])
    assert not torch.equal(ours[~now], theirs[~now])


def test_a_gradient_that_is_not_finite_stops_before_any_update(make_config, whole_recipe):
    trainer = Trainer(make_config(**{**whole_recipe, "micro_batch_size": 3}))
    images = from_uint8(torch.stack([trainer.feed.crops[sample].image for sample in range(3)]))
    trainer.train_step(images)
    before = {
        name: tensor.clone() for name, tensor in trainer.state.model.state_dict().items() if "running" not in name
    }
    trainer.state.discriminator.final.fc2.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(
        ValueError, match=r"step 1: Discriminator: the gradient of final\.fc2\.weight is not finite; stopped"
    ):
        trainer.train_step(images)
    for name, tensor in before.items():
        if "num_batches" not in name:
            assert torch.equal(trainer.state.model.state_dict()[name], tensor), name


def test_a_validation_folder_that_is_not_there_is_named_before_training(make_config, tmp_path):
    with pytest.raises(ValueError, match="nowhere/at/all: no such folder"):
        Trainer(make_config(eval={"path": str(tmp_path / "nowhere" / "at" / "all")}))


def test_images_too_small_for_the_perceptual_network_are_named_before_training(make_config, whole_recipe, tmp_path):
    whole_recipe["loss"]["perceptual_features"] = {"network": "squeezenet1_1", "layers": [12]}
    with pytest.raises(ValueError, match=r"loss\.perceptual_network: images of 16 px do not pass through it"):
        Trainer(make_config(**whole_recipe))
    assert not (tmp_path / "run").exists()


def test_other_perceptual_weights_do_not_continue_a_run(make_config, whole_recipe, squeezenet, tmp_path):
    Trainer(make_config(**whole_recipe, max_minutes=1e-6)).run()
    moved, other = tmp_path / "moved.safetensors", tmp_path / "other.safetensors"
    moved.write_bytes(squeezenet.read_bytes())
    save_file({name: 3 * tensor for name, tensor in load_file(squeezenet).items()}, other)
    whole_recipe["loss"]["perceptual_weights"] = str(other)
    with pytest.raises(ConfigError, match=r"loss\.perceptual_weights: another file than the run was started with"):
        Trainer(make_config(**whole_recipe))
    whole_recipe["loss"]["perceptual_weights"] = str(moved)
    assert Trainer(make_config(**whole_recipe)).state.step == 1


def test_a_run_does_not_need_the_file_of_perceptual_weights_once_it_runs(
    make_config, whole_recipe, squeezenet, tmp_path
):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(squeezenet.read_bytes())
    whole_recipe["loss"]["perceptual_weights"] = str(copy)
    trainer = Trainer(make_config(**whole_recipe))
    copy.unlink()
    assert trainer.run() is not None


@pytest.mark.parametrize("fault", ["no file", "no tensor"])
def test_a_checkpoint_of_another_version_is_named_and_the_run_left_as_it_is(make_config, tmp_path, fault):
    config = make_config(max_minutes=1e-6)
    Trainer(config).run()
    folder = tmp_path / "run" / "checkpoints" / "step_000000001"
    if fault == "no file":
        (folder / "model_optimizer.safetensors").rename(folder / "optimizer.safetensors")
    else:
        state = load_file(folder / "state.safetensors")
        save_file({"step": state["step"]}, folder / "state.safetensors")
    files = [path for path in folder.iterdir() if path.name != "manifest.json"]
    entries = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}
    content = {"step": 1, "files": entries}
    (folder / "manifest.json").write_text(json.dumps({**content, "sha256": checkpoint._digest(content)}))
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(
        ValueError, match=r"step_000000001: of another version of vqhit, or another run .*; choose another"
    ):
        Trainer(make_config(log_every=1))
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_weights_that_cannot_be_had_are_named_before_training(make_config, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    for kind, known in (("vgg16", "VGG16_CAFFE"), ("lpips", "VGG16_TORCHVISION")):
        name = getattr(perceptual, known).name
        monkeypatch.setattr(perceptual, known, KnownFile(name, f"http://127.0.0.1:9/{name}", "0" * 64))
        expected = (
            f"cannot download .*{name} .*; put that file at .*/torch/hub/checkpoints/{name}, "
            "or its place in loss.perceptual_weights"
        )
        with pytest.raises(ValueError, match=expected):
            Trainer(make_config(loss={"perceptual": 1.0, "perceptual_network": kind}))
        with pytest.raises(ValueError, match=r"nowhere\.pth: no such file"):
            Trainer(
                make_config(loss={"perceptual": 1.0, "perceptual_network": kind, "perceptual_weights": "nowhere.pth"})
            )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss": {"adversarial": 0.1}},
            "loss.adversarial needs a discriminator: give its sizes under `discriminator`",
        ),
        ({"discriminator": {"resolution": 32}}, "discriminator.resolution 32: the model's images are 16 px"),
        ({"eval": {"every": 2}}, "eval.path: missing"),
        (
            {
                "eval": {"path": "photos"},
                "model": {"encoder": EIGHT, "stem": None, "decoder": {**EIGHT, "kind": "conv", "resolution": 8}},
            },
            "eval: SSIM needs images of at least 11 px; the model's are 8 px",
        ),
        ({"loss": {"consistency": 10.0}}, "loss.consistency is a term of the discriminator: it needs loss.adversarial"),
        (
            {"model": {"stem": {"latent_grid": 1}}, "batch_size": 4, "micro_batch_size": 3},
            "model.stem.latent_grid 1: batch",
        ),
        (
            {
                "discriminator": {"resolution": 16, "minibatch_stddev": True},
                "batch_size": 13,
                "micro_batch_size": 7,
            },
            "minibatch_stddev: .micro-.batches of 7 images; allowed: up to 4, or a multiple of it",
        ),
        (
            {
                "restart_codes_after": 2,
                "model": {"quantizer": {"kind": "lfq", "codebook_size": 32, "dim": 5}},
            },
            "train.restart_codes_after moves codes of quantizer kind vq; this is lfq",
        ),
    ],
)
def test_options_that_do_not_fit_together_are_named(make_config, options, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**options)


@pytest.mark.parametrize(
    "quantizer",
    [
        {"kind": "fsq", "levels": [4, 4, 4], "dim": 3, "codebook_size": 64},
        {"kind": "lfq", "dim": 6, "codebook_size": 64},
        {"kind": "sim_vq", "dim": 8, "codebook_size": 64},
        {"kind": "vq", "dim": 8, "codebook_size": 64, "gradient": "rotation_trick"},
        {"kind": "vq", "dim": 8, "codebook_size": 64, "update": "ema"},
        {"kind": "vq", "dim": 8, "codebook_size": 64, "normalize": True},
    ],
)
def test_every_quantizer_trains(make_config, quantizer):
    restart = 5 if quantizer["kind"] == "vq" else 0
    trainer = Trainer(make_config(steps=30, model={"quantizer": quantizer}, restart_codes_after=restart))
    images = from_uint8(torch.stack([trainer.feed.crops[sample].image for sample in range(6)]))
    losses = [trainer.train_step(images)["reconstruction"] for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    assert len(trainer.state.model(images).tokens.unique()) >= 8


@pytest.mark.parametrize("decoder", ["hit", "conv"])
def test_compiled_parts_train_as_eager_ones_do(make_config, whole_recipe, conv_config, tmp_path, traced, decoder):
    if decoder == "conv":
        whole_recipe["model"] = conv_config.to_dict()
    values = []
    for compiled in (False, True):
        config = make_config(**{**whole_recipe, "run_dir": str(tmp_path / f"{compiled}"), "compile": compiled})
        trainer = Trainer(config)
        images = from_uint8(torch.stack([trainer.feed.crops[sample].image for sample in range(3)]))
        values.append([trainer.train_step(images) for _ in range(3)])
        trainer._settle_batch_norm()
        with trainer.report.evaluating() as model:
            values[-1].append({"mean": float(model.reconstruct(images).mean())})
        assert not any("_orig_mod" in name for name in trainer.state.model.state_dict())
    for eager, other in zip(*values, strict=True):
        for name, value in eager.items():
            assert other[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name


def test_no_pass_through_the_networks_has_more_images_than_a_micro_batch(make_config, whole_recipe):
    trainer = Trainer(make_config(**whole_recipe))
    sizes = []
    for module in (
        trainer.state.model,
        trainer.state.ema.model,
        trainer.state.discriminator,
        trainer.objective.perceptual,
    ):
        module.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    trainer.run()
    assert max(sizes) == 2


def test_the_trainer_runs_the_autoencoder_in_the_precision_asked_for(make_config, whole_recipe):
    dtypes = {}
    for precision in ("float32", "bfloat16"):
        run_dir = f"{make_config().run_dir}-{precision}"
        trainer = Trainer(make_config(**whole_recipe, precision=precision, run_dir=run_dir))
        seen = dtypes[precision] = {}
        for name, module in (("model", trainer.state.model.encoder), ("D", trainer.state.discriminator)):
            module.register_forward_hook(lambda *args, name=name, seen=seen: seen.update({name: args[2].dtype}))
        trainer.run()
    assert dtypes["float32"] == {"model": torch.float32, "D": torch.float32}
    assert dtypes["bfloat16"] == {"model": torch.bfloat16, "D": torch.float32}


def test_the_codebook_is_updated_from_the_whole_batch(make_config, whole_recipe):
    codebooks, usages = [], []
    for micro_batch_size in (1, 3):
        recipe = {**whole_recipe, "micro_batch_size": micro_batch_size}
        trainer = Trainer(make_config(**recipe, run_dir=f"{make_config().run_dir}-{micro_batch_size}"))
        trainer.train_step(from_uint8(torch.stack([trainer.feed.crops[sample].image for sample in range(3)])))
        codebooks.append(trainer.state.model.quantizer.codebook)
        usages.append(trainer.state.usage.counts)
    torch.testing.assert_close(codebooks[0], codebooks[1])
    assert torch.equal(usages[0], usages[1])
    assert usages[0].sum() == 3 * 64


def test_both_networks_have_the_same_optimizer_unless_told_otherwise(make_config, whole_recipe):
    trainer = Trainer(make_config(**whole_recipe, learning_rate=3e-4))
    model, discriminator = trainer.state.optimizers["model"], trainer.state.optimizers["discriminator"]
    assert discriminator.config == model.config
    assert (model.first_step, discriminator.first_step) == (0, 1)  # its schedule starts when it does


@pytest.fixture
def spoilt_folder(tmp_path, picture):
    """200 photographs and six files that are none."""
    folder = tmp_path / "spoilt"
    folder.mkdir()
    for index in range(200):
        picture(20, 18, seed=index).save(folder / f"{index:03d}.jpg")
    whole = (folder / "000.jpg").read_bytes()
    for name, content in {
        "bad_truncated.jpg": whole[: len(whole) // 2],
        "bad_empty.png": b"",
        "bad_page.jpg": b"<html>not found</html>",
    }.items():
        (folder / name).write_bytes(content)
    Image.new("RGB", (1, 1)).save(folder / "bad_pixel.png")
    return folder


def test_images_that_cannot_be_read_are_skipped_named_once_and_counted(make_config, spoilt_folder, capfd, tmp_path):
    data = {"path": str(spoilt_folder), "max_bad": 0.02, "workers": 2}
    config = make_config(data=data, steps=48, batch_size=10, eval={"path": str(spoilt_folder), "every": 40})
    assert Trainer(config).run() is not None  # two epochs and more
    assert records(config.run_dir)[-1]["skipped_images"] == 4
    lines = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    named = [line for line in capfd.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert sorted(json.loads(line)["skipped"] for line in lines) == sorted(n.removeprefix("skipped: ") for n in named)
    assert sorted(re.findall(r"bad_\w+", " ".join(named))) == ["bad_empty", "bad_page", "bad_pixel", "bad_truncated"]
    evaluation = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()[-1])
    assert (evaluation["images"], evaluation["skipped"]) == (200, 4)


def test_too_many_images_that_cannot_be_read_stop_the_run_with_a_checkpoint_if_there_was_one(
    make_config, spoilt_folder
):
    config = make_config(data={"path": str(spoilt_folder)}, steps=60, batch_size=10, checkpoint_every=1)
    with pytest.raises(
        ValueError, match=r"step \d+: 3 of 204 images cannot be read, more than max_bad 0.01 allows; the"
    ):
        Trainer(config).run()
    more = make_config(data={"path": str(spoilt_folder), "max_bad": 0.1}, steps=60, batch_size=10, checkpoint_every=1)
    again = Trainer(more)
    stopped_at = again.state.step
    assert stopped_at > 0
    assert again.run() is not None


def test_a_run_keeps_its_list_of_images_when_files_come_and_go(make_config, photo_folder, tmp_path):
    Trainer(make_config(max_minutes=1e-6)).run()
    (photo_folder / "0.jpg").rename(photo_folder / "00.jpg")
    continued = Trainer(make_config(data={"max_bad": 0.5}))
    assert [Path(continued.feed.source.name(n)).name for n in range(6)] == [f"{n}.jpg" for n in range(4)] + [
        "4.JPEG",
        "5.JPEG",
    ]
    assert continued.run() is not None
    assert "0.jpg: no such file" in (tmp_path / "run" / "skipped.jsonl").read_text()


def test_a_stream_of_a_data_set_trains_and_continues(make_config, photo_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    files = [str(path) for path in sorted(photo_folder.rglob("*.*"))]
    table = datasets.Dataset.from_dict({"image": files}, features=datasets.Features({"image": datasets.Image()}))
    (tmp_path / "table").mkdir()
    table.to_parquet(tmp_path / "table" / "train-00000-of-00001.parquet")
    data = {"path": str(tmp_path / "table"), "streaming": True, "shuffle_buffer": 4}
    options = {"data": data, "batch_norm_batches": 1, "steps": 8}
    assert Trainer(make_config(**options, max_minutes=1e-6)).run() is None
    continued = Trainer(make_config(**options))
    assert continued.state.step == 1
    assert continued.run() is not None
    assert [record["images"] for record in records(tmp_path / "run")] == [6, 12, 18, 24]
    assert Image.open(tmp_path / "run" / "grids" / "step_000000008.png").size == (4 + 8 * 20, 4 + 4 * 20)


def test_a_data_set_that_has_grown_is_noticed(make_config, photo_folder, tmp_path):
    files = [str(path) for path in sorted(photo_folder.rglob("*.*"))]
    features = datasets.Features({"image": datasets.Image()})
    for name, chosen in (("before", files[:5]), ("after", files)):
        datasets.Dataset.from_dict({"image": chosen}, features=features).save_to_disk(tmp_path / name)
    Trainer(make_config(data={"path": str(tmp_path / "before")}, max_minutes=1e-6)).run()
    with pytest.warns(
        UserWarning, match="there are 6 training images, and 5 when the run began: their order is another now"
    ):
        continued = Trainer(make_config(data={"path": str(tmp_path / "after")}))
    assert continued.run() is not None


def test_the_images_to_evaluate_on_stay_the_same_when_files_come(make_config, photo_folder, picture):
    on_photos = {"path": str(photo_folder), "every": 1}
    Trainer(make_config(eval=on_photos, max_minutes=1e-6)).run()
    picture(40, 48, seed=9).save(photo_folder / "9.jpg")
    assert len(Trainer(make_config(eval=on_photos)).report.evaluated_on) == 6
    others = photo_folder.parent / "others"
    others.mkdir()
    picture(40, 48, seed=9).save(others / "only.jpg")
    assert len(Trainer(make_config(eval={"path": str(others), "every": 1})).report.evaluated_on) == 1


def test_another_folder_of_images_does_not_continue_a_run(make_config, photo_folder, picture, tmp_path):
    Trainer(make_config(max_minutes=1e-6)).run()
    others = tmp_path / "others"
    others.mkdir()
    picture(40, 48).save(others / "only.jpg")
    with pytest.raises(ValueError, match=r"others: not the folder that the run began with; .*images\.index lists"):
        Trainer(make_config(data={"path": str(others)}))
    photo_folder.rename(tmp_path / "moved")
    assert Trainer(make_config(data={"path": str(tmp_path / "moved")})).run() is not None


def test_a_damaged_list_of_images_is_named(make_config, tmp_path):
    Trainer(make_config(max_minutes=1e-6)).run()
    index = tmp_path / "run" / "images.index"
    index.write_bytes(index.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"run/images\.index: the index of .* is damaged; .* remove it to list anew"):
        Trainer(make_config())


def test_a_run_without_its_configuration_is_not_taken_for_another(make_config, tmp_path):
    Trainer(make_config(max_minutes=1e-6)).run()
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"config\.yaml: missing; the manifest\.json of each checkpoint has it"):
        Trainer(make_config(seed=5))
