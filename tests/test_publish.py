"""`vqhit push` of a run: what is published, what the card says, and what must not get out."""

import json
import re
import shutil

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from tests.commands import write_recipe
from tests.model_hub import served
from tests.test_repository import TOKEN, environment
from vqhit import VQHiT
from vqhit.evaluate import evaluate_tokenizer
from vqhit.files import sha256
from vqhit.protocol import EvaluationSettings
from vqhit.publish import OURS, package
from vqhit.recipe import RunConfig
from vqhit.train import Trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_config):
    """The folder of a run of 4 steps with everything, whose photographs lie in a folder that is nobody's business."""
    folder = tmp_path_factory.mktemp("secret-project")
    write_recipe(folder, tiny_config, steps=4, checkpoint_every=2, grid_every=2, restart_codes_after=0)
    values = json.loads((folder / "run.json").read_text())
    values["run_dir"] = str(folder / "run")
    values["data"]["path"] = values["eval"]["path"] = str(folder / "photos")
    Trainer(RunConfig.from_dict(values)).run()
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def evaluate(run, out):
    model = VQHiT.from_pretrained(run / "model")
    settings = EvaluationSettings(metrics=("psnr", "ssim", "codebook"), max_bad=1.0)
    results = evaluate_tokenizer(model, run.parent / "photos", settings)
    results = {"model": str(run), "model_sha256": sha256(run / "model" / "model.safetensors"), **results}
    out.write_text(json.dumps(results))
    return results


def test_a_run_gives_its_averaged_model_a_grid_and_its_settings(run):
    found = package(run, "someone/tiny")
    assert set(found.files) == {"config.json", "model.safetensors", "README.md", "grid.png", "training.yaml"}
    newest = run / "checkpoints" / "step_000000004"
    assert found.files["model.safetensors"] == newest / "model.safetensors"
    assert (newest / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()
    averaged, trained = (load_file(newest / f"{name}.safetensors") for name in ("model", "trained"))
    assert not torch.equal(averaged["quantizer.codebook"], trained["quantizer.codebook"])
    assert found.files["grid.png"] == run / "grids" / "step_000000004.png"
    assert "grid.png shows training images; --no-grid leaves it out" in found.remarks
    assert "grid.png" not in package(run, "someone/tiny", grid=False).files
    assert set(found.files) <= set(OURS)


def test_the_settings_can_be_trained_again_and_hide_where_they_were(run, tmp_path):
    text = package(run, "someone/tiny").files["training.yaml"].decode()
    assert "secret" not in text
    assert str(run.parent) not in text
    (tmp_path / "training.yaml").write_text(text)
    again = RunConfig.from_yaml(tmp_path / "training.yaml", [f"run_dir={tmp_path / 'again'}"])
    before = RunConfig.from_yaml(run / "config.yaml")
    assert (again.model, again.loss, again.train) == (before.model, before.loss, before.train)
    assert again.data.path == "photos"


def test_the_card_says_how_it_was_trained_and_measured(run, tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.effect_noise((20, 20), 50).convert("RGB").save(tmp_path / "photos" / f"{number}.png")
    results = evaluate(run, run / "eval.json")
    card = package(run, "someone/tiny", license="cc-by-nc-4.0").card
    data = ModelCard(card).data
    assert (data.library_name, data.license, data.pipeline_tag) == ("vqhit", "cc-by-nc-4.0", "image-to-image")
    assert "arxiv:2106.07631" in data.tags
    measured = {found.metric_type: found.metric_value for found in data.eval_results}
    assert measured == {"psnr": results["psnr"], "ssim": results["ssim"]}
    assert {found.dataset_name for found in data.eval_results} == {"photos"}
    for text in (
        "- **Images**: 16x16 px, in [-1, 1]",
        "- **Tokens**: 8x8, of 32 codes (64 per image)",
        "- **Steps**: 4 of 4 images (16 crops)",
        "- **Data**: photos; ",
        "![Training images above their reconstructions, step 4](grid.png)",
        f"| PSNR (dB) | {results['psnr']:.2f} |",
        "- **psnr**: dB, data range 1, mean over images",
        "ADM center crop",
        "- **computed in**: float32 on cpu",
        "`cc-by-nc-4.0`.",
    ):
        assert text in card
    assert str(tmp_path) not in card
    assert "Not finished" not in card


def test_an_unfinished_run_says_so(run):
    shutil.rmtree(run / "checkpoints" / "step_000000004")
    card = package(run, "someone/tiny").card
    assert "Not finished: 2 steps of its run were still to come." in card
    assert "step 2](grid.png)" in card


def test_a_model_without_a_run_or_numbers_says_so(run, tmp_path):
    shutil.copytree(run / "model", tmp_path / "model")
    found = package(tmp_path / "model", "someone/tiny", branch="small")
    assert set(found.files) == {"config.json", "model.safetensors", "README.md"}
    assert "Nothing: no evaluation was given." in found.card
    assert "None is stated" in found.card
    assert ModelCard(found.card).data.license == "unknown"
    assert 'from_pretrained("someone/tiny", revision="small")' in found.card
    assert len(found.remarks) == 2


def test_the_six_lines_of_the_cards_work(run, tmp_path, monkeypatch, picture, tiny_generator_config):
    from vqhit import HiTGenerator

    HiTGenerator(tiny_generator_config).save_pretrained(tmp_path / "generator")
    picture(90, 70).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    for folder, made in ((run, "reconstruction.png"), (tmp_path / "generator", "sample_3.png")):
        card = package(folder, "someone/tiny").card
        (lines,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
        assert len([line for line in lines.splitlines() if line]) == 6
        shutil.rmtree("someone", ignore_errors=True)
        (tmp_path / "someone").mkdir()
        model = run / "model" if folder is run else folder
        shutil.copytree(model, tmp_path / "someone" / "tiny")  # a folder goes before the Hub
        exec(lines, {})
        assert (tmp_path / made).is_file()


def test_a_card_that_is_there_stays_as_it_is(run):
    for folder in (run / "model", run / "checkpoints" / "step_000000004"):
        (folder / "README.md").write_text("mine")
    assert package(run / "model", "someone/tiny").card == "mine"


def test_numbers_of_other_weights_are_refused_or_left_out(run, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.effect_noise((20, 20), 50).convert("RGB").save(tmp_path / "photos" / "0.png")
    results = evaluate(run, run / "eval.json")
    (run / "eval.json").write_text(json.dumps({**results, "model_sha256": "0" * 64}))
    found = package(run, "someone/tiny")
    assert "Nothing: no evaluation was given." in found.card
    assert any("measured on other weights" in remark for remark in found.remarks)
    with pytest.raises(ValueError, match=r"eval\.json: measured on other weights .*; evaluate these with"):
        package(run, "someone/tiny", evaluations=[run / "eval.json"])
    for text in ("{", "{}", "[]", json.dumps({**results, "protocol": {}})):
        (run / "eval.json").write_text(text)
        with pytest.raises(ValueError, match=r"eval\.json: not an evaluation of a model by `vqhit eval`"):
            package(run, "someone/tiny")
    with pytest.raises(ValueError, match=r"none\.json: cannot be read"):
        package(run, "someone/tiny", evaluations=[run / "none.json"])


def test_the_state_of_the_training_is_that_of_the_same_step(run):
    found = package(run, "someone/tiny", with_training_state=True)
    newest = run / "checkpoints" / "step_000000004"
    listed = json.loads(found.files["training_state.json"])["files"]
    assert set(listed) == {
        "trained.safetensors",
        "discriminator.safetensors",
        "model_optimizer.safetensors",
        "discriminator_optimizer.safetensors",
        "state.safetensors",
    }
    for name, expected in listed.items():
        assert found.files[name] == newest / name
        assert sha256(newest / name) == expected
    with pytest.raises(ValueError, match="no checkpoint of its training is there"):
        package(run / "model", "someone/tiny", with_training_state=True)


def test_what_cannot_be_published_is_named(run, tmp_path):
    with pytest.raises(ValueError, match="none: no such folder; allowed: a run's folder"):
        package(tmp_path / "none", "someone/tiny")
    with pytest.raises(ValueError, match="license: found 'My Licence'; allowed"):
        package(run / "model", "someone/tiny", license="My Licence")
    damaged = run / "checkpoints" / "step_000000004" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="damaged"):
        assert package(run, "someone/tiny").files["model.safetensors"].parent.name == "step_000000002"
    with pytest.raises(ValueError, match="damaged"):
        package(damaged.parent, "someone/tiny")
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "model")
    with pytest.raises(ValueError, match="a run without a checkpoint or a model"):
        package(run, "someone/tiny")


def test_a_run_is_fine_tuned_from_what_was_pushed(run, tmp_path, monkeypatch):
    """Pushed with its state by the command; a run in a fresh process begins with it, and one continued needs no Hub."""
    import os
    import subprocess
    import sys

    with served() as (_, address):
        env = environment(address, tmp_path / "home")
        command = [sys.executable, "-m", "vqhit"]
        options = {"env": env, "capture_output": True, "text": True, "check": False, "timeout": 200}
        pushed = subprocess.run([*command, "push", run, "someone/tiny", "--with-training-state"], **options)
        assert pushed.returncode == 0, pushed.stderr
        values = yaml.safe_load((run / "config.yaml").read_text())
        values |= {"run_dir": str(tmp_path / "tuned"), "init_from": "someone/tiny@main", "eval": None}
        values["train"] |= {"steps": 2, "checkpoint_every": 1}
        (tmp_path / "tune.json").write_text(json.dumps(values))
        result = subprocess.run([*command, "train", tmp_path / "tune.json"], **options)
    assert result.returncode == 0, result.stderr
    assert (
        "begun with someone/tiny@main: the model, its discriminator, the optimizer of the model, the optimizer of the "
        "discriminator" in result.stdout
    )
    shutil.rmtree(tmp_path / "tuned" / "checkpoints" / "step_000000002")
    shutil.rmtree(tmp_path / "home")
    again = subprocess.run([*command, "train", tmp_path / "tune.json"], **options)
    assert again.returncode == 0, again.stderr
    assert "begun with" not in again.stdout
    assert TOKEN not in result.stdout + os.linesep + result.stderr
