"""A decoder trained for the tokens of another tokenizer, whose encoder and codebook stay as they are."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.commands import write_recipe
from vqhit import ConfigError, VQHiT
from vqhit.finetune import read_begun_with
from vqhit.images import from_uint8
from vqhit.models import VQHiTConfig
from vqhit.recipe import RunConfig
from vqhit.run_card import training_facts
from vqhit.train import Trainer

MADE_OF = ("encoder.", "quant_conv.", "quantizer.")
"""Names of the tensors that tokens come from."""


@pytest.fixture
def source(tmp_path, conv_config):
    """A convolutional tokenizer."""
    return save(VQHiT(conv_config), tmp_path / "source")


def save(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def values(tmp_path, tiny_config, source):
    """Settings of a run of 3 steps with every term, a HiT decoder and frozen tokens."""
    write_recipe(tmp_path, tiny_config, steps=3, checkpoint_every=1, grid_every=0, restart_codes_after=0)
    values = json.loads((tmp_path / "run.json").read_text())
    values |= {"run_dir": str(tmp_path / "run"), "eval": None, "init_from": str(source), "freeze_tokens": True}
    values["data"]["path"] = str(tmp_path / "photos")
    return values


def trainer(values, **changes):
    return Trainer(RunConfig.from_dict({**values, **changes}))


def images(count=4):
    torch.manual_seed(1)
    return torch.rand(count, 3, 16, 16) * 2 - 1


def with_quantizer(values, tmp_path, conv_config, **changes):
    """The run's and the source's codebook changed."""
    quantizer = {**conv_config.quantizer.to_dict(), **changes}
    save(VQHiT(VQHiTConfig.from_dict({**conv_config.to_dict(), "quantizer": quantizer})), tmp_path / "source")
    return {**values, "model": {**values["model"], "quantizer": quantizer}}


@pytest.mark.parametrize(
    ("quantizer", "precision"),
    [
        ({}, "float32"),
        ({}, "bfloat16"),
        ({"update": "ema"}, "float32"),
        ({"normalize": True}, "float32"),
        ({"gradient": "rotation_trick"}, "float32"),
        ({"kind": "fsq", "levels": [4, 3, 3], "codebook_size": 36, "dim": 3}, "float32"),
        ({"kind": "lfq", "codebook_size": 256}, "float32"),
        ({"kind": "sim_vq"}, "float32"),
    ],
)
def test_tokens_are_bit_identical_and_the_decoder_trains(values, tmp_path, conv_config, quantizer, precision):
    values = with_quantizer(values, tmp_path, conv_config, **quantizer)
    values["train"]["precision"] = precision
    begun = trainer(values)
    fresh = {name: tensor.clone() for name, tensor in begun.state.model.state_dict().items()}
    fresh_discriminator = [tensor.clone() for tensor in begun.state.discriminator.parameters()]
    folder = begun.run()
    before, after = VQHiT.from_pretrained(tmp_path / "source"), VQHiT.from_pretrained(folder)
    tokens = before.encode(images(16))
    assert len(tokens.unique()) > 4
    assert torch.equal(after.encode(images(16)), tokens)
    kept = {name: tensor for name, tensor in before.state_dict().items() if name.startswith(MADE_OF)}
    for model in (begun.state.model, begun.state.ema.model, after):
        found = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(MADE_OF)}
        assert found.keys() == kept.keys()
        for name, tensor in kept.items():
            assert torch.equal(found[name], tensor), name
    for name, parameter in begun.state.model.named_parameters():
        moved = not torch.equal(parameter, fresh[name])
        still = ".key.bias" in name  # softmax does not see it
        assert still or moved != name.startswith(MADE_OF), name
    assert any(
        not torch.equal(new, old)
        for new, old in zip(begun.state.discriminator.parameters(), fresh_discriminator, strict=True)
    )
    assert not [key for key in begun.state.optimizers["model"].state_dict() if key.startswith(MADE_OF)]


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_the_training_pass_decodes_the_tokens_of_encode(tiny_config, precision):
    torch.manual_seed(0)
    model = VQHiT(tiny_config)
    model.freeze_tokens()
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is not None):
        output = model(images())
        expected = model.decode_latents(model.lookup(output.tokens))
    assert torch.equal(output.tokens, model.eval().encode(images()))
    assert torch.equal(output.reconstruction, expected)
    assert float(output.codebook_loss) == 0
    assert not output.latents.requires_grad


def test_with_the_same_decoder_that_is_taken_too_and_goes_on(values, tmp_path, tiny_config):
    """Tokens are those of the published model, the average, not of the weights behind it."""
    first = {"run_dir": str(tmp_path / "first"), "init_from": None, "freeze_tokens": False}
    trained = trainer(values, **first)
    trained.run()
    begun = trainer(values, init_from=str(tmp_path / "first")).state
    published = VQHiT.from_pretrained(tmp_path / "first" / "model").state_dict()
    behind = trained.state.model.state_dict()
    for name, tensor in begun.model.state_dict().items():
        assert torch.equal(tensor, (published if name.startswith(MADE_OF) else behind)[name]), name
    assert not torch.equal(published["encoder.conv_in.weight"], behind["encoder.conv_in.weight"])
    expected = trained.state.optimizers["model"].state_dict()
    found = begun.optimizers["model"].state_dict()
    assert found.keys() == {key for key in expected if not key.startswith(MADE_OF)}
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_a_new_stem_is_fitted_to_the_codes_whatever_their_scale(values, tmp_path, conv_config, scale):
    torch.manual_seed(0)
    model = VQHiT(conv_config)
    for part in (model.quant_conv.weight, model.quant_conv.bias, model.quantizer.codebook):
        part.data.mul_(scale)
    save(model, tmp_path / "source")
    begun = trainer(values)
    codes = model.lookup(model.eval().encode(from_uint8(begun.feed.shown())))
    for each in begun.state.models:
        feature_map, *_ = each.stem(codes)
        assert 0.5 < feature_map.std() < 2


def test_a_continued_run_is_bit_equal_and_does_not_look_at_the_source_again(values, tmp_path, source):
    trainer(values).run()
    expected = VQHiT.from_pretrained(tmp_path / "run" / "model").state_dict()
    shutil.rmtree(source)
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000000003")
    again = trainer(values)
    assert again.state.step == 2
    found = VQHiT.from_pretrained(again.run()).state_dict()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_decoder_for_frozen_tokens_can_be_trained_on_together_with_its_encoder(values, tmp_path):
    """The state of the first run's optimizer knows no encoder: it is left out."""
    trainer(values).run()
    both = {"run_dir": str(tmp_path / "both"), "init_from": str(tmp_path / "run"), "freeze_tokens": False}
    begun = trainer(values, **both).state
    behind = trainer(values).state.model.state_dict()
    for name, tensor in begun.model.state_dict().items():
        assert torch.equal(tensor, behind[name]), name
    assert not begun.optimizers["model"].state_dict()
    assert begun.optimizers["discriminator"].state_dict()


def test_a_convolutional_decoder_trains_alone_too(values, tmp_path, conv_config, source):
    begun = trainer(values, model=conv_config.to_dict())
    before = VQHiT.from_pretrained(source)
    assert all(
        torch.equal(tensor, before.state_dict()[name]) for name, tensor in begun.state.model.state_dict().items()
    )
    after = VQHiT.from_pretrained(begun.run())
    assert torch.equal(after.encode(images()), before.encode(images()))
    assert not torch.equal(after.decoder.conv_out.weight, before.decoder.conv_out.weight)


def test_settings_of_a_codebooks_training_do_not_matter(values, tmp_path):
    quantizer = {**values["model"]["quantizer"], "commitment": 1.0, "update": "ema"}
    begun = trainer(values, model={**values["model"], "quantizer": quantizer}).state
    source = VQHiT.from_pretrained(tmp_path / "source")
    assert torch.equal(begun.model.eval().encode(images()), source.encode(images()))


def test_there_is_no_term_of_the_codebook_and_the_card_names_none(values):
    begun = trainer(values)
    found = begun.train_step(from_uint8(begun.feed.shown()[:4]))
    assert "codebook" not in found
    weights = training_facts(begun.config, 1, "someone/base")["Loss weights"]
    assert "codebook" not in weights
    assert "reconstruction 1" in weights


def test_the_packaged_tokenizer_gets_a_decoder_by_its_configuration(tmp_path, values):
    """As it stands, but on other photographs and without the perceptual network."""
    config = Path(__file__).parent.parent / "configs" / "redecode_tinyimagenet64.yaml"
    changes = [f"data.path={values['data']['path']}", "data.max_bad=0.1", "eval=null", "loss.perceptual=0"]
    begun = Trainer(RunConfig.from_yaml(config, [*changes, f"run_dir={tmp_path / 'run'}", "train.batch_size=2"]))
    about = read_begun_with(begun.folder)
    assert about.public == about.address + ", which comes with vqhit" == "vqgan-tiny-64, which comes with vqhit"
    assert about.taken == ["its encoder and codebook, which stay as they are"]
    source = VQHiT.from_pretrained("vqgan-tiny-64")
    photos = source.preprocess(sorted((tmp_path / "photos").glob("[0-9].jpg")))
    assert torch.equal(begun.state.model.eval().encode(photos), source.encode(photos))


def test_what_cannot_be_is_named(values, tmp_path, conv_config):
    with pytest.raises(ConfigError, match="freeze_tokens: which ones\\? init_from names the tokenizer"):
        trainer(values, init_from=None)
    generator = {"kind": "hit_generator", "latent_dim": 4, "backbone": values["model"]["decoder"]}
    with pytest.raises(ConfigError, match="freeze_tokens: a generator has no tokens"):
        trainer(values, model=generator, loss={})
    with pytest.raises(ConfigError, match=r"restart_codes_after moves codes, which freeze_tokens keeps; set it to 0"):
        trainer(values, train={**values["train"], "restart_codes_after": 5})
    with pytest.raises(ConfigError, match=r"is another one \(decoder\..*there, .* now"):
        trainer(values, freeze_tokens=False)
    encoder = {**values["model"]["encoder"], "num_res_blocks": 2}
    with pytest.raises(ConfigError, match=r"is another one \(encoder\.num_res_blocks: 1 there, 2 now\)"):
        trainer(values, model={**values["model"], "encoder": encoder})
    plain = conv_config.encoder.model_copy(update={"attention_resolutions": ()})
    save(VQHiT(conv_config.model_copy(update={"encoder": plain})), tmp_path / "source")
    larger = {**values["model"]["decoder"], "widths": [32, 16, 16], "depths": [1, 1, 1], "heads": [4, 2, 2]}
    model = {**values["model"], "encoder": plain.to_dict(), "decoder": larger}
    discriminator = {**values["discriminator"], "resolution": 32}
    with pytest.raises(ConfigError, match=r"has images of 16 px; this run's are 32 px"):
        trainer(values, model=model, discriminator=discriminator)
    assert not (tmp_path / "run").exists()
