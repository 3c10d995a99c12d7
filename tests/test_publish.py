"""`vqhit push` of a run: what is published, what the card says, and what must not get out."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision import models

from tests.commands import write_recipe
from tests.model_hub import served
from tests.test_repository import environment
from vqhit import VQHiT
from vqhit.evaluate import evaluate_tokenizer
from vqhit.files import sha256
from vqhit.finetune import BegunWith, write_begun_with
from vqhit.hub import PUBLISHED
from vqhit.perceptual import FeaturesConfig
from vqhit.protocol import EvaluationSettings
from vqhit.publish import package
from vqhit.recipe import RunConfig
from vqhit.runs import RunFolder
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


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.effect_noise((20, 20), 50).convert("RGB").save(tmp_path / "photos" / f"{number}.png")


def evaluate(run, out, **settings):
    model = VQHiT.from_pretrained(run / "model")
    settings = EvaluationSettings(**{"metrics": ("psnr", "ssim", "codebook"), "max_bad": 1.0, **settings})
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
    assert set(found.files) <= set(PUBLISHED)


def test_the_settings_can_be_trained_again_and_hide_where_they_were(run, tmp_path):
    text = package(run, "someone/tiny").files["training.yaml"].decode()
    assert "secret" not in text
    assert str(run.parent) not in text
    (tmp_path / "training.yaml").write_text(text)
    again = RunConfig.from_yaml(tmp_path / "training.yaml", [f"run_dir={tmp_path / 'again'}"])
    before = RunConfig.from_yaml(run / "config.yaml")
    assert (again.model, again.loss, again.train) == (before.model, before.loss, before.train)
    assert again.data.path == "photos"


def test_relative_paths_are_nobodys_business_either_wherever_the_command_runs(run, tmp_path, monkeypatch):
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["data"]["path"] = "clients/acme"
    values["eval"]["path"] = "clients/acme-held-out"
    values["init_from"] = "runs/secret"
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    write_begun_with(RunFolder(run), BegunWith(None, None, "1" * 64, []))
    monkeypatch.chdir("/")
    found = package(run, "someone/tiny")
    settings = found.files["training.yaml"].decode()
    for text in (found.card, settings):
        assert "clients" not in text
        assert "secret" not in text
    assert "- **Data**: acme; " in found.card
    assert f"- **Begun with**: a model whose weights have sha256 {'1' * 64}" in found.card
    assert ModelCard(found.card).data.base_model is None
    write_begun_with(RunFolder(run), BegunWith("someone/base", "2" * 40, "1" * 64, []))
    card = package(run, "someone/tiny").card
    assert ModelCard(card).data.base_model == "someone/base"
    assert f"- **Begun with**: someone/base at {'2' * 40}" in card


def test_the_card_of_a_decoder_for_the_tokens_of_another_model_says_whose_they_are(run):
    values = yaml.safe_load((run / "config.yaml").read_text())
    values |= {"init_from": "someone/base", "freeze_tokens": True}
    values["train"]["restart_codes_after"] = 0
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    write_begun_with(RunFolder(run), BegunWith("someone/base", "2" * 40, "1" * 64, []))
    found = package(run, "someone/tiny")
    whose = f"- **Begun with**: someone/base at {'2' * 40}, whose encoder and codebook stayed as they were"
    assert whose in found.card
    settings = yaml.safe_load(found.files["training.yaml"])
    assert settings["init_from"] == f"someone/base@{'2' * 40}"
    assert RunConfig.from_dict({**settings, "run_dir": "again"}).freeze_tokens


def test_statistics_of_a_reference_do_not_tell_where_they_were_made(run, photos, tmp_path):
    torch.manual_seed(0)
    weights = models.squeezenet1_1(weights=None).features[:2].state_dict(prefix="features.")
    save_file(weights, tmp_path / "features.safetensors")
    network = {
        "metrics": ("rfid",),
        "features": FeaturesConfig(network="squeezenet1_1", layers=(1,)),
        "feature_weights": str(tmp_path / "features.safetensors"),
    }
    evaluate(run, tmp_path / "first.json", save_stats=str(tmp_path / "secret" / "stats.npz"), **network)
    results = evaluate(run, run / "eval.json", stats=str(tmp_path / "secret" / "stats.npz"), **network)
    card = package(run, "someone/tiny").card
    assert "- **compared with**: statistics of 3 images, sha256 " in card
    assert str(tmp_path) not in card
    assert "secret" not in card
    assert ModelCard(card).data.eval_results[0].metric_value == results["frechet_distance"]


def test_the_card_says_how_it_was_trained_and_measured(run, photos, tmp_path):
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


def test_a_folder_is_known_from_within_and_through_a_link(run, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(run / "checkpoints" / "step_000000004")
    assert "training.yaml" in package(tmp_path / "link", "someone/tiny").files
    for folder in (run, run / "model", run / "checkpoints" / "step_000000004"):
        monkeypatch.chdir(folder)
        assert "training.yaml" in package(".", "someone/tiny").files
    (tmp_path / "config.yaml").write_text("foo: 1")
    shutil.copytree(run / "model", tmp_path / "model")
    assert "training.yaml" not in package(tmp_path / "model", "someone/tiny").files


def test_an_unfinished_run_says_so(run):
    shutil.rmtree(run / "checkpoints" / "step_000000004")
    shutil.rmtree(run / "model")
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


def test_numbers_of_other_weights_or_none_are_refused_or_left_out(run, photos, tmp_path):
    results = evaluate(run, run / "eval.json")
    (run / "eval.json").write_text(json.dumps({**results, "model_sha256": "0" * 64}))
    found = package(run, "someone/tiny")
    assert "Nothing: no evaluation was given." in found.card
    assert any("measured on other weights" in remark for remark in found.remarks)
    with pytest.raises(ValueError, match=r"eval\.json: measured on other weights .*; evaluate these with"):
        package(run, "someone/tiny", evaluations=[run / "eval.json"])
    of_others = [{"protocol": {}}, {"psnr": None}, {"psnr": "20"}, {"images_per_s": []}, {"model_sha256": 1}]
    texts = ["{", "{}", "[]", "[" * 200_000, *(json.dumps({**results, **change}) for change in of_others)]
    texts.append(json.dumps({**results, "psnr": float("nan")}))
    for text in texts:
        (run / "eval.json").write_text(text)
        with pytest.raises(ValueError, match=r"eval\.json: not an? "):
            package(run, "someone/tiny", evaluations=[run / "eval.json"])
        assert any("left out: " in remark for remark in package(run, "someone/tiny").remarks)
    with pytest.raises(ValueError, match=r"none\.json: no such file"):
        package(run, "someone/tiny", evaluations=[run / "none.json"])


def test_the_state_of_the_training_is_that_of_the_same_step(run):
    found = package(run, "someone/tiny", with_training_state=True)
    newest = run / "checkpoints" / "step_000000004"
    state = json.loads(found.files["training_state.json"])
    assert state["model_sha256"] == sha256(newest / "model.safetensors")
    listed = state["files"]
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
    with pytest.raises(ValueError, match="no whole checkpoint of this step"):
        package(run / "model", "someone/tiny", with_training_state=True)


def test_what_cannot_be_published_is_named(run, tmp_path):
    with pytest.raises(ValueError, match="none: no such folder; allowed: a run's folder"):
        package(tmp_path / "none", "someone/tiny")
    with pytest.raises(ValueError, match="license: found 'My Licence'; allowed"):
        package(run / "model", "someone/tiny", license="My Licence")
    damaged = run / "checkpoints" / "step_000000004" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="damaged"):  # the run is done, and its model is whole
        assert package(run, "someone/tiny").files["model.safetensors"] == run / "model" / "model.safetensors"
    shutil.rmtree(run / "model")
    with pytest.warns(UserWarning, match="damaged"):
        assert package(run, "someone/tiny").files["model.safetensors"].parent.name == "step_000000002"
    with pytest.raises(ValueError, match="damaged"):
        package(damaged.parent, "someone/tiny")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match="a run without a checkpoint or a model"):
        package(run, "someone/tiny")


@pytest.fixture
def on_hub(run, tmp_path, tiny_model):
    """The run's model, published with its training's state; yields the Hub and what commands run with."""
    with served() as (hub, address):
        hub.create("someone/tiny", files={"training.yaml": b"of an older push"})
        files = {}
        for name, content in package(run, "someone/tiny", with_training_state=True).files.items():
            files[name] = content if isinstance(content, bytes) else content.read_bytes()
        hub.commit("someone/tiny", "main", files)
        env = environment(address, tmp_path / "home")
        yield hub, {"env": env, "capture_output": True, "text": True, "check": False, "timeout": 200, "cwd": tmp_path}


COMMAND = [sys.executable, "-m", "vqhit"]


def fine_tune(run, tmp_path, options, init_from="someone/tiny@main"):
    values = yaml.safe_load((run / "config.yaml").read_text())
    values |= {"run_dir": str(tmp_path / "tuned"), "init_from": init_from, "eval": None}
    values["train"] |= {"steps": 2, "checkpoint_every": 1}
    (tmp_path / "tune.json").write_text(json.dumps(values))
    return subprocess.run([*COMMAND, "train", tmp_path / "tune.json"], **options)


def test_a_run_is_fine_tuned_from_what_was_pushed(run, tmp_path, on_hub, picture):
    """In a fresh process; one that is continued needs no Hub, and a push of it names the commit that it began with."""
    hub, options = on_hub
    result = fine_tune(run, tmp_path, options)
    assert result.returncode == 0, result.stderr
    assert (
        "begun with someone/tiny@main: the model, the weights behind its average, its discriminator, the optimizer of "
        "the model, the optimizer of the discriminator" in result.stdout
    )
    shutil.rmtree(tmp_path / "tuned" / "checkpoints" / "step_000000002")
    again = fine_tune(run, tmp_path, options | {"env": options["env"] | {"HF_HUB_OFFLINE": "1"}})
    assert again.returncode == 0, again.stderr
    assert "begun with" not in again.stdout
    commit = hub.repositories["someone/tiny"]["branches"]["main"]
    card = package(tmp_path / "tuned", "someone/tuned", branch="new").card
    assert f"- **Begun with**: someone/tiny at {commit}" in card
    pushed = subprocess.run([*COMMAND, "push", "tuned", "someone/tuned", "--branch", "new"], **options)
    assert pushed.returncode == 0, pushed.stderr
    picture(90, 70).save(tmp_path / "photo.jpg")
    (lines,) = re.findall(r"```python\n(.*?)```", hub.files("someone/tuned", "new")["README.md"].decode(), re.DOTALL)
    used = subprocess.run([sys.executable, "-c", lines], **options)
    assert used.returncode == 0, used.stderr
    assert (tmp_path / "reconstruction.png").is_file()


def test_state_that_is_of_another_model_or_not_what_it_says_is_refused(run, tmp_path, on_hub, tiny_model):
    hub, options = on_hub
    whole = hub.repositories["someone/tiny"]["branches"]["main"]
    listed = json.loads(hub.files("someone/tiny")["training_state.json"])
    tiny_model.save_pretrained(tmp_path / "other")
    for name, changes, message in (
        ("swapped", {"model.safetensors": (tmp_path / "other" / "model.safetensors").read_bytes()}, "of another model"),
        ("leaving", {"training_state.json": json.dumps({**listed, "files": {"../x": "1"}})}, "names '../x'; allowed: "),
        ("damaged", {"trained.safetensors": b"x"}, "trained.safetensors: damaged, its sha256 is not that in training"),
        ("nested", {"training_state.json": "[" * 100_000}, "training_state.json: damaged"),
    ):
        data = {file: text if isinstance(text, bytes) else text.encode() for file, text in changes.items()}
        hub.commit("someone/tiny", "main", data)
        result = fine_tune(run, tmp_path, options)
        assert result.returncode == 2, name
        assert message in result.stderr.splitlines()[-1]
        assert not (tmp_path / "tuned" / "checkpoints").exists()
        hub.repositories["someone/tiny"]["branches"]["main"] = whole


def test_a_model_pushed_from_python_replaces_another_ones_state_and_card(on_hub, tmp_path):
    hub, options = on_hub
    code = "from vqhit import VQHiT; VQHiT.from_pretrained('vqhit-tiny-64').push_to_hub('someone/tiny')"
    result = subprocess.run([sys.executable, "-c", code], **options)
    assert result.returncode == 0, result.stderr
    assert set(hub.files("someone/tiny")) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
