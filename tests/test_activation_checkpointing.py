"""Activation checkpointing: the same losses, gradients, statistics and runs, in less memory."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vqhit.config import ConfigError
from vqhit.convnet import ConvNetGenerator, ConvNetGeneratorConfig
from vqhit.discriminator import Discriminator, DiscriminatorConfig
from vqhit.execution import recompute_activations
from vqhit.hit import HiTConfig
from vqhit.models import HiTGenerator, HiTGeneratorConfig, VQHiT
from vqhit.objective import GANLossConfig, GANObjective, LossConfig, TokenizerObjective
from vqhit.recipe import RunConfig
from vqhit.train import Trainer

DISCRIMINATOR = {"resolution": 16, "widths": [8, 8, 8]}
CLOCKED = {"images_per_s", "memory_mib"}


@pytest.fixture
def build(tiny_config, conv_config, tiny_generator_config):
    """Makes a model in training mode by its name."""

    def make(name):
        torch.manual_seed(0)
        if name == "convnet generator":
            model = ConvNetGenerator(ConvNetGeneratorConfig(latent_dim=4, resolution=16, channels=8, attention_size=8))
        elif name == "generator":
            model = HiTGenerator(tiny_generator_config)
        else:
            model = VQHiT(conv_config if name == "conv" else tiny_config)
        return model.train()

    return make


def backward(model, precision):
    """Terms of two steps' losses, adaptive weight included, in two micro-batches each; gradients stay in the model."""
    torch.manual_seed(1)
    discriminator = Discriminator(DiscriminatorConfig(**DISCRIMINATOR))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    images, noise = torch.rand(4, 3, 16, 16) * 2 - 1, torch.randn(4, 4)
    found = []
    for part in (slice(0, 2), slice(2, 4)):
        if isinstance(model, VQHiT):
            objective = TokenizerObjective(
                LossConfig(adversarial=0.1, adaptive=True), model, discriminator, autocast=autocast
            )
            found.append(objective.backward(images[part], 0, share=0.5)[1])
        else:
            objective = GANObjective(GANLossConfig(), model, discriminator, autocast)
            found.append(objective.backward(images[part], noise[part], 0, share=0.5))
    return found


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["hit", "conv", "generator", "convnet generator"])
def test_losses_gradients_and_statistics_are_the_same_to_the_bit(build, name, precision):
    usual = build(name)
    recomputed = copy.deepcopy(usual)
    recompute_activations(recomputed)
    assert backward(recomputed, precision) == backward(usual, precision)
    for (key, parameter), other in zip(usual.named_parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), key
    expected = usual.state_dict()
    assert recomputed.state_dict().keys() == expected.keys()
    for key, value in recomputed.state_dict().items():
        assert torch.equal(value, expected[key]), key
    if name in ("hit", "generator"):
        assert int(expected["backbone.stages.0.cross.norm.num_batches_tracked"]) == 2


def kept_bytes(model, inputs):
    """Bytes that a forward pass keeps for the backward pass, each storage once; weights are not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept, held = {}, []

    def pack(tensor):
        held.append(tensor)  # so that no address is given out twice
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(inputs)
    (output.reconstruction if isinstance(model, VQHiT) else output).sum().backward()
    return sum(kept.values())


@pytest.mark.parametrize("name", ["hit", "conv", "generator", "convnet generator"])
def test_less_is_kept_for_the_backward_pass(build, name):
    model = build(name)
    inputs = torch.rand(2, 3, 16, 16) if isinstance(model, VQHiT) else torch.randn(2, 4)
    usual = kept_bytes(model, inputs)
    recompute_activations(model)
    found = kept_bytes(model, inputs)
    print(f"{name}: {found} of {usual} bytes")
    assert found < 0.7 * usual


def test_nothing_is_recomputed_without_gradients(build, monkeypatch):
    def fail(*_, **__):
        raise AssertionError

    monkeypatch.setattr("vqhit.execution.checkpoint", fail)
    model, images = build("hit"), torch.rand(2, 3, 16, 16)
    model(images)  # nor where it is off
    recompute_activations(model)
    model.eval().reconstruct(images)
    with pytest.raises(AssertionError):
        model.train()(images)


@pytest.fixture
def make_config(photo_folder, tmp_path, tiny_config, tiny_generator_config):
    def make(name, run, **train):
        shallow = HiTConfig(widths=(16,), depths=(1,), heads=(2,), block_sizes=())
        models = {
            "hit": tiny_config,
            "generator": tiny_generator_config,
            "shallow": HiTGeneratorConfig(latent_dim=4, backbone=shallow),  # one stage, quick to compile
        }
        terms = {"adversarial": 0.1, "adaptive": True} if name == "hit" else {}
        discriminator = {"resolution": 8, "widths": [8, 8]} if name == "shallow" else DISCRIMINATOR
        return RunConfig.from_dict(
            {
                "run_dir": str(tmp_path / run),
                "device": "cpu",
                "model": models[name].to_dict(),
                "discriminator": discriminator,
                "data": {"path": str(photo_folder)},
                "loss": terms,
                "ema": {"decay": 0.9, "start_step": 0},
                "train": {"steps": 2, "batch_size": 3, "micro_batch_size": 2, "log_every": 1, "grid_every": 0, **train},
            }
        )

    return make


def metrics(config):
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCKED} for line in lines]


@pytest.mark.parametrize("name", ["hit", "generator"])
def test_a_run_is_the_same_run(make_config, name):
    configs = [make_config(name, f"{on}", activation_checkpointing=on) for on in (False, True)]
    for config in configs:
        trainer = Trainer(config)
        trainer.run()
        recomputing = [module for module in trainer.state.model.modules() if getattr(module, "recompute", False)]
        assert bool(recomputing) == config.train.activation_checkpointing
        assert not any(getattr(module, "recompute", False) for module in trainer.state.evaluated_model.modules())
    assert metrics(configs[0]) == metrics(configs[1])
    for file in ("model", "trained", "discriminator"):
        usual, other = (
            load_file(Path(config.run_dir) / "checkpoints" / "step_000000002" / f"{file}.safetensors")
            for config in configs
        )
        assert usual.keys() == other.keys()
        for key, value in usual.items():
            assert torch.equal(value, other[key]), key


def test_compiled_it_trains_as_eager_models_do(make_config, traced):
    configs = [
        make_config("shallow", f"{on}", activation_checkpointing=on, compile=on, batch_size=4) for on in (False, True)
    ]
    for config in configs:
        Trainer(config).run()
    assert traced == ["HiTBackbone"]
    for eager, other in zip(*map(metrics, configs), strict=True):
        for key, value in eager.items():
            assert other[key] == pytest.approx(value, rel=2e-3, abs=1e-5), key
    usual, other = (
        load_file(Path(config.run_dir) / "checkpoints" / "step_000000002" / "trained.safetensors") for config in configs
    )
    for key, value in usual.items():
        if "running" in key or "num_batches" in key:
            torch.testing.assert_close(other[key], value, rtol=2e-3, atol=1e-5, msg=key)


def test_the_option_may_change_when_a_run_is_continued(make_config):
    Trainer(make_config("hit", "run")).run()
    Trainer(make_config("hit", "run", activation_checkpointing=True)).run()
    with pytest.raises(ConfigError, match=r"train.activation_checkpointing: found 1; input should be a valid boolean"):
        make_config("hit", "run", activation_checkpointing=1)
