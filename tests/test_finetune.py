"""Runs that begin with a trained model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands import write_recipe
from vqhit import ConfigError, HiTGenerator, VQHiT
from vqhit.checkpoint import CheckpointError
from vqhit.recipe import RunConfig
from vqhit.train import Trainer


@pytest.fixture
def values(tmp_path, tiny_config):
    """Settings of a run with everything, of 3 steps, not begun."""
    write_recipe(tmp_path, tiny_config, steps=3, checkpoint_every=0, grid_every=0, batch_norm_batches=0)
    values = json.loads((tmp_path / "run.json").read_text())
    values["run_dir"] = str(tmp_path / "run")
    values["data"]["path"] = str(tmp_path / "photos")
    values["eval"] = None
    return values


def trainer(values, **changes):
    return Trainer(RunConfig.from_dict({**values, **changes}))


@pytest.fixture
def run(values, tmp_path):
    """A finished run."""
    trainer(values).run()
    return tmp_path / "run"


@pytest.mark.parametrize("source", ["", "checkpoints/step_000000003"])
def test_a_run_gives_weights_average_discriminator_optimizers_and_no_steps(values, run, tmp_path, source):
    before = trainer(values).state
    begun = trainer(values, run_dir=str(tmp_path / "tuned"), seed=5, init_from=str(run / source)).state
    assert (before.step, begun.step) == (3, 0)
    pairs = [
        (before.model, begun.model),
        (before.ema.model, begun.ema.model),
        (before.discriminator, begun.discriminator),
    ]
    for old, new in pairs:
        for name, tensor in old.state_dict().items():
            assert torch.equal(new.state_dict()[name], tensor), name
    for name, optimizer in before.optimizers.items():
        kept = optimizer.state_dict()
        assert kept
        for key, tensor in begun.optimizers[name].state_dict().items():
            assert torch.equal(tensor, kept[key]), key


def test_a_model_gives_weights_and_average_and_a_fresh_discriminator(values, run, tmp_path):
    fresh = trainer(values, run_dir=str(tmp_path / "fresh")).state
    begun = trainer(values, run_dir=str(tmp_path / "tuned"), init_from=str(run / "model")).state
    published = VQHiT.from_pretrained(run / "model").state_dict()
    for model in (begun.model, begun.ema.model):
        for name, tensor in published.items():
            assert torch.equal(model.state_dict()[name], tensor), name
    for name, tensor in fresh.discriminator.state_dict().items():
        assert torch.equal(begun.discriminator.state_dict()[name], tensor), name
    assert all(not optimizer.state_dict() for optimizer in begun.optimizers.values())


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_the_codes_of_a_trained_codebook_are_not_restarted_nor_averaged_with_random_ones(
    values, run, tmp_path, update, tiny_config
):
    """Every code of a new run counts as dead: its first step would place all of them anew."""
    quantizer = tiny_config.quantizer.model_copy(update={"update": update})
    model = tiny_config.model_copy(update={"quantizer": quantizer})
    folder = tmp_path / "model"
    torch.manual_seed(3)
    VQHiT(model).save_pretrained(folder)
    learning = {"learning_rate": 1e-9}
    options = {"model": model.to_dict(), "optimizer": learning, "run_dir": str(tmp_path / "tuned")}
    options["train"] = {**values["train"], "steps": 1, "restart_codes_after": 2}
    begun = trainer(values, init_from=str(folder), **options)
    codebook = begun.state.model.quantizer.codebook.detach().clone()
    begun.run()
    moved = (begun.state.model.quantizer.codebook.detach() - codebook).abs().amax(1)
    unused = begun.state.codebook.dead_codes.unused_steps > 0
    assert unused.any()
    assert moved[unused].max() < 1e-3 * codebook.abs().max()


def test_means_of_codes_go_on(values, tmp_path, tiny_config):
    quantizer = tiny_config.quantizer.model_copy(update={"update": "ema"})
    values["model"] = tiny_config.model_copy(update={"quantizer": quantizer}).to_dict()
    trainer(values).run()
    kept = load_file(tmp_path / "run" / "checkpoints" / "step_000000003" / "state.safetensors")
    begun = trainer(values, run_dir=str(tmp_path / "tuned"), init_from=str(tmp_path / "run")).state
    assert torch.equal(begun.codebook.average.counts, kept["code_counts"])
    assert torch.equal(begun.codebook.average.sums, kept["code_sums"])


def test_a_run_without_an_average_begins_with_the_averaged_weights(values, run, tmp_path):
    begun = trainer(values, run_dir=str(tmp_path / "tuned"), init_from=str(run), ema={"decay": 0.0}).state
    for name, tensor in VQHiT.from_pretrained(run / "model").state_dict().items():
        assert torch.equal(begun.model.state_dict()[name], tensor), name


def test_the_average_goes_on_if_it_starts_at_step_0(values, run, tmp_path):
    changes = {"run_dir": str(tmp_path / "tuned"), "init_from": str(run), "ema": {"decay": 0.9, "start_step": 0}}
    changes["train"] = {**values["train"], "steps": 1, "restart_codes_after": 0}
    begun = trainer(values, **changes)
    average = {name: tensor.clone() for name, tensor in begun.state.ema.model.named_parameters()}
    begun.run()
    trained = dict(begun.state.model.named_parameters())
    for name, tensor in begun.state.ema.model.named_parameters():
        expected = 0.9 * average[name] + 0.1 * trained[name]
        assert torch.allclose(tensor, expected, atol=1e-6), name


def test_a_run_that_is_continued_does_not_begin_again(values, run, tmp_path):
    changes = {"run_dir": str(tmp_path / "tuned"), "init_from": str(run)}
    trainer(values, **changes).run()
    shutil.rmtree(run)
    assert trainer(values, **changes).state.step == 3


def test_what_does_not_fit_is_named(values, run, tmp_path, tiny_generator_config):
    tuned = {"run_dir": str(tmp_path / "tuned")}
    model = {**values["model"], "quantizer": {**values["model"]["quantizer"], "codebook_size": 64}}
    with pytest.raises(ConfigError, match=r"another one \(quantizer\.codebook_size: 32 there, 64 now\)"):
        trainer(values, model=model, init_from=str(run), **tuned)
    discriminator = {**values["discriminator"], "max_channels": 16}
    with pytest.raises(
        ConfigError, match=r"init_from: .*discriminator\.safetensors: .*; give the Discriminator the sizes"
    ):
        trainer(values, discriminator=discriminator, init_from=str(run), **tuned)
    HiTGenerator(tiny_generator_config).save_pretrained(tmp_path / "generator")
    with pytest.raises(ConfigError, match="holds a HiTGenerator, not a VQHiT"):
        trainer(values, init_from=str(tmp_path / "generator"), **tuned)
    with pytest.raises(ValueError, match="no such folder, and no id on the Hugging Face Hub"):
        trainer(values, init_from=str(tmp_path / "none"), **tuned)
    folder = run / "checkpoints" / "step_000000003"
    state = load_file(folder / "model_optimizer.safetensors")
    state.pop("quantizer.codebook/exp_avg")
    save_file(state, folder / "model_optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"model_optimizer\.safetensors: damaged, "):
        trainer(values, init_from=str(folder), **tuned)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"not the state of these parameters \(quantizer\.codebook/exp_avg is in one"):
        trainer(values, init_from=str(folder), **tuned)
    assert not (tmp_path / "tuned").exists()
