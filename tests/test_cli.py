"""The command line, as a user runs it: exit codes, one-line errors, files written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import models

from vqhit import HiTGenerator, VQHiT
from vqhit.files import KnownFile, sha256
from vqhit.images import to_uint8, uint8_to_pil
from vqhit.recipe import RunConfig


def vqhit(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "vqhit", *map(str, arguments)], capture_output=True, text=True, cwd=cwd, check=False
    )


@pytest.fixture
def model_folder(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def fails(result, *parts):
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("vqhit: ")
    for part in parts:
        assert part in line


COMMANDS = ["demo", "prepare", "train", "eval", "push", "sample", "tokenize", "detokenize", "bench", "doctor"]
COMMANDS += ["reconstruct", "convert taming", "convert llamagen", "export"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    result = vqhit(*command.split(), "--help")
    assert result.returncode == 0
    assert f"Example: vqhit {command}" in " ".join(result.stdout.split())


def test_version_and_unknown_commands():
    assert vqhit("--version").stdout.strip() == "0.1.0"
    assert vqhit("trian").returncode == 2


def test_train_eval_and_reconstruct_one_after_the_other(tiny_config, photo_folder, tmp_path):
    config = {
        "run_dir": "run",
        "device": "cpu",
        "model": tiny_config.to_dict(),
        "data": {"path": str(photo_folder)},
        "train": {"steps": 4, "batch_size": 2},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    first = vqhit("train", "run.yaml", "train.checkpoint_every=2", "train.max_minutes=1e-6", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "stopped at step 1; the same command continues" in first.stdout
    second = vqhit("train", "run.yaml", "train.checkpoint_every=2", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert "continuing run at step 1" in second.stdout
    assert "train 4/4: loss " in second.stdout
    assert "images/s" in second.stdout

    quick = ("--metrics", "psnr,ssim,codebook")
    evaluated = vqhit("eval", "--model", "run/model", "--data", photo_folder, *quick, cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    results = json.loads((tmp_path / "eval.json").read_text())
    assert results["images"] == 6
    assert f"{results['psnr']:.2f}" in evaluated.stdout

    Image.new("CMYK", (50, 30), (10, 200, 30, 0)).save(tmp_path / "print.jpg")
    Image.new("LA", (9, 70), (200, 128)).save(tmp_path / "ghost.png")
    Image.new("RGB", (700, 20), "red").save(tmp_path / "long.webp")
    photos = ["print.jpg", "ghost.png", "long.webp"]
    reconstructed = vqhit("reconstruct", *photos, "--model", "run/model", "--out", "pictures", cwd=tmp_path)
    assert reconstructed.returncode == 0, reconstructed.stderr
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["ghost.png", "long.png", "print.png"]
    picture = Image.open(tmp_path / "pictures" / "print.png")
    assert picture.size == (2 * 16 + 3 * 4, 16 + 2 * 4)
    model = VQHiT.from_pretrained(tmp_path / "run" / "model")
    original = model.preprocess(tmp_path / "print.jpg")
    for left, expected in ((4, original), (24, model.reconstruct(original))):
        shown = picture.crop((left, 4, left + 16, 20))
        assert shown.tobytes() == model.postprocess(expected)[0].tobytes()


def test_photographs_are_reconstructed_at_another_size(inside, model_folder, tmp_path, picture):
    picture(50, 40).save(tmp_path / "photo.png")
    given = ("reconstruct", "photo.png", "--model", "model", "--out", "pictures", "--size")
    result = inside(*given, 24, cwd=tmp_path)
    assert "from 144 tokens" in result.stdout
    assert Image.open(tmp_path / "pictures" / "photo.png").size == (2 * 24 + 3 * 4, 24 + 2 * 4)
    fails(
        inside(*given, 25, cwd=tmp_path), "size is 25; this model takes H and W multiples of 8 from 8 to 4096; 24 and"
    )


def test_a_file_that_is_no_image_is_named_and_nothing_is_written(inside, model_folder, tmp_path, picture):
    picture(20, 20).save(tmp_path / "good.png")
    (tmp_path / "page.jpg").write_text("<html>")
    result = inside("reconstruct", "good.png", "page.jpg", "--model", "model", "--out", "pictures", cwd=tmp_path)
    fails(result, "page.jpg: not an image")
    assert not (tmp_path / "pictures").exists()


def test_two_photographs_of_one_name_are_refused(inside, model_folder, tmp_path, picture):
    (tmp_path / "other").mkdir()
    picture(20, 20).save(tmp_path / "a.png")
    picture(20, 20).save(tmp_path / "other" / "a.jpg")
    result = inside("reconstruct", "a.png", "other/a.jpg", "--model", "model", "--out", "pictures", cwd=tmp_path)
    fails(result, "pictures/a.png")


def test_a_photograph_is_never_overwritten(inside, model_folder, tmp_path, picture):
    picture(20, 20).save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    fails(
        inside("reconstruct", "a.png", "--model", "model", "--out", ".", cwd=tmp_path), "would overwrite a photograph"
    )
    assert (tmp_path / "a.png").read_bytes() == before


def test_paths_may_look_like_markup(inside, model_folder, photo_folder, tmp_path):
    photo_folder.rename(tmp_path / "ph [bold] x")
    result = inside("eval", "--model", "model", "--data", "ph [bold] x", "--metrics", "psnr", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "ph [bold] x" in result.stdout


def test_user_mistakes_are_one_line_each(inside, model_folder, photo_folder, tmp_path):
    fails(inside("eval", "--model", "nowhere", "--data", photo_folder, cwd=tmp_path), "nowhere: no such folder")
    fails(inside("eval", "--model", model_folder, "--data", "empty", cwd=tmp_path), "empty: no such folder, and no id")
    fails(
        inside("eval", "--model", model_folder, "--data", photo_folder, "--out", tmp_path, cwd=tmp_path),
        "a folder; expected the name of a file",
    )
    fails(inside("train", "absent.yaml", cwd=tmp_path), "absent.yaml: no such file")
    demo = Path(__file__).parent.parent / "configs" / "demo.yaml"
    fails(inside("train", demo, "train.stepz=1", cwd=tmp_path), "train.stepz: unknown key; did you mean 'steps'?")
    fails(inside("train", demo, "data.path=nowhere", cwd=tmp_path), "nowhere: no such folder, and no id")
    fails(inside("demo", "train.steps=5", cwd=tmp_path), "'train.steps=5' changes a training run; add --train")
    fails(inside("demo", "--out", model_folder / "config.json", cwd=tmp_path), "config.json: a file; --out is a folder")
    given = ("eval", "--model", model_folder, "--data", photo_folder)
    for options, message in (
        (("--features", "w.pth"), "--features-kind is missing"),
        (("--features-kind", "squeezenet1_1"), "--features is missing"),
        (("--features", "w.pth", "--features-kind", "resnet"), "features kind 'resnet': allowed: squeezenet1_1, vgg16"),
        (("--metrics", "psnr,fvd"), "--metrics: found 'fvd'; allowed: rfid, fid, is, psnr, ssim, lpips, codebook"),
        (("--metrics", ""), "--metrics: found ''; allowed: rfid"),
        (("--metrics", "psnr,psnr"), "metrics: found psnr, psnr; each once"),
        (("--metrics", "psnr", "--inception", "absent.pth"), "inception: none of the metrics needs it; leave it out"),
        (("--metrics", "psnr", "--lpips", "absent.pth"), "lpips: none of the metrics needs its file; leave it out"),
        (("--features", "absent.pth", "--features-kind", "squeezenet1_1"), "absent.pth: no such file"),
        (("--out", "/dev/null"), "/dev/null: no regular file; expected the name of a file"),
        (("--out", model_folder / "config.json" / "x.json"), "config.json is a file"),
        (("--out", "same.json", "--save-stats", "same.json"), "same.json: would be written twice"),
        (("--out", "same.json", "--save-stats", "same_codebook.png"), "same_codebook.png: would be written twice"),
        (("--out", "s.npz", "--stats", "s.npz"), "s.npz: would overwrite a file that is read"),
        (("--out", model_folder / "config.json"), "config.json: would overwrite a file that is read"),
        (("--out", photo_folder / "more" / "eval.json"), "eval_codebook.png: would become one of the images of"),
        (("--metrics", "fid"), "metric 'fid': not of a tokenizer; allowed: rfid, is, psnr, ssim, lpips, codebook"),
        (("--metrics", "rfid", "--inception", "absent.pth"), "absent.pth: no such file"),
        (("--metrics", "rfid", "--inception", model_folder / "config.json"), "config.json: another file, or damaged"),
        (("--images", photo_folder), "both given: one of --model and --images is needed"),
        (("--reference", photo_folder), "--reference goes with --images"),
        (("--save-stats", photo_folder), "a folder; expected the name of a file"),
        (("--metrics", "psnr", "--stats", "absent.npz"), "absent.npz: no such file"),
    ):
        fails(inside(*given, *options, cwd=tmp_path), message)
    fails(inside("eval", cwd=tmp_path), "nothing to measure: one of --model and --images is needed")
    fails(inside("eval", "--model", model_folder, cwd=tmp_path), "--data is missing: the images to reconstruct")
    assert not (tmp_path / "demo").exists()
    assert not (tmp_path / "eval.json").exists()


def test_evaluation_with_another_network_names_it_and_is_not_fid(inside, model_folder, photo_folder, tmp_path):
    save_file(models.squeezenet1_1(weights=None).features.state_dict(prefix="features."), tmp_path / "w.safetensors")
    (tmp_path / "features.yaml").write_text("network: squeezenet1_1\nlayers: [4]\n")
    given = ("--features", "w.safetensors", "--features-kind", "features.yaml", "--metrics", "rfid,psnr,codebook")
    result = inside("eval", "--model", model_folder, "--data", photo_folder, *given, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Fréchet" in result.stdout
    assert "FID" not in result.stdout
    results = json.loads((tmp_path / "eval.json").read_text())
    assert results["frechet_distance"] > 0
    assert "rfid" not in results
    assert results["model_sha256"] == sha256(model_folder / "model.safetensors")
    assert results["protocol"]["network"]["layers"] == [4]
    assert Image.open(tmp_path / "eval_codebook.png").format == "PNG"


def test_fid_of_pictures_with_its_network_from_a_path(inside, inception, photo_folder, tmp_path, picture):
    (tmp_path / "made").mkdir()
    for index in range(10):
        picture(16, 16, seed=index).save(tmp_path / "made" / f"{index}.png")
    given = ("eval", "--images", "made", "--reference", photo_folder, "--inception", inception, "--out", "new/fid.json")
    result = inside(*given, "--save-stats", "new/photos.npz", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "new" / "fid.json").read_text())
    assert f"{results['fid']:.3f}" in result.stdout
    assert results["protocol"]["network"]["sha256"] == sha256(inception)
    assert (results["images"], results["reference_images"]) == (10, 6)
    assert results["is"] >= 1
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["fid.json", "photos.npz"]


def test_what_is_left_out_is_said(inside, no_downloads, model_folder, photo_folder, tmp_path):
    result = inside("eval", "--model", model_folder, "--data", photo_folder, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for metric in ("rfid", "is", "lpips"):
        assert f"left out: {metric} (" in result.stdout
    assert "weights-inception-2015-12-05-6726825d.pth" in result.stdout


def test_the_doctor_lists_what_is_there_and_what_is_not(inside, no_downloads, photo_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = inside("doctor", "--data", photo_folder, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (
        f"missing weights of LPIPS: {no_downloads / 'vgg16-397923af.pth'}: not there (sha256 397923af" in result.stdout
    )
    assert "fix: downloaded from https://download.pytorch.org/models/vgg16-397923af.pth" in result.stdout
    assert f"ok      data: {photo_folder}: 6 images" in result.stdout
    assert inside("doctor", "--data", "nowhere", cwd=tmp_path).returncode == 1


@pytest.fixture
def generator_folder(tiny_generator_config, tmp_path):
    torch.manual_seed(0)
    HiTGenerator(tiny_generator_config).save_pretrained(tmp_path / "generator")
    return tmp_path / "generator"


def test_samples_are_files_that_depend_on_seed_and_number(inside, generator_folder, tmp_path):
    given = ("sample", "--model", generator_folder, "--seed", "5")
    assert inside(*given, "--n", "10", "--out", "ten", "--grid", cwd=tmp_path).returncode == 0
    assert inside(*given, "--n", "3", "--out", "three", cwd=tmp_path).returncode == 0
    names = [f"{number:06d}.png" for number in range(10)]
    assert sorted(path.name for path in (tmp_path / "ten").iterdir()) == [*names, "grid.png"]
    assert Image.open(tmp_path / "ten" / "grid.png").size == (4 + 8 * 20, 4 + 2 * 20)
    for name in names[:3]:
        assert (tmp_path / "three" / name).read_bytes() == (tmp_path / "ten" / name).read_bytes()
    generator = HiTGenerator.from_pretrained(generator_folder)
    first = uint8_to_pil(to_uint8(generator.sample(2, seed=5))[1])
    assert Image.open(tmp_path / "ten" / "000001.png").tobytes() == first.tobytes()


def test_interpolations_are_strips_between_two_samples(inside, generator_folder, tmp_path):
    given = ("sample", "--model", generator_folder, "--seed", "5")
    strips = inside(*given, "--n", "2", "--out", "strips", "--interpolate", "--grid", cwd=tmp_path)
    assert strips.returncode == 0, strips.stderr
    assert inside(*given, "--n", "4", "--out", "single", cwd=tmp_path).returncode == 0
    for strip in range(2):
        picture = Image.open(tmp_path / "strips" / f"{strip:06d}.png")
        assert picture.size == (8 * 16, 16)
        for column, sample in ((0, 2 * strip), (7, 2 * strip + 1)):
            alone = Image.open(tmp_path / "single" / f"{sample:06d}.png")
            assert picture.crop((16 * column, 0, 16 * column + 16, 16)).tobytes() == alone.tobytes()
    assert Image.open(tmp_path / "strips" / "grid.png").size == (4 + 8 * 20, 4 + 2 * 20)


def test_a_generator_is_measured_by_the_distance_of_its_samples(
    inside, no_downloads, generator_folder, photo_folder, tmp_path, monkeypatch
):
    save_file(models.squeezenet1_1(weights=None).features.state_dict(prefix="features."), tmp_path / "w.safetensors")
    (tmp_path / "features.yaml").write_text("network: squeezenet1_1\nlayers: [1]\n")
    given = ("eval", "--model", generator_folder, "--data", photo_folder)
    network = ("--features", "w.safetensors", "--features-kind", "features.yaml")
    result = inside(*given, *network, "--samples", "7", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "eval.json").read_text())
    assert (results["images"], results["samples"]) == (6, 7)
    assert results["protocol"]["pictures_are"] == "7 samples of seed 0, clamped and rounded to uint8"
    monkeypatch.setattr("vqhit.extractors.INCEPTION", KnownFile("none.pth", "", "0" * 64))
    fails(inside(*given, cwd=tmp_path), "nothing can be measured: cannot download")


def test_mistakes_with_generators_are_one_line_each(inside, model_folder, generator_folder, photo_folder, tmp_path):
    sample = ("sample", "--model")
    fails(inside(*sample, model_folder, "--out", "new", cwd=tmp_path), "a VQHiT, not a generator")
    fails(
        inside(*sample, generator_folder, "--out", photo_folder, cwd=tmp_path),
        "not empty; give a new or empty folder",
    )
    fails(
        inside(*sample, generator_folder, "--out", generator_folder / "config.json", cwd=tmp_path),
        "a file; give a new or",
    )
    reconstruct = ("reconstruct", next(photo_folder.glob("*.jpg")), "--out", "new", "--model", generator_folder)
    fails(inside(*reconstruct, cwd=tmp_path), "HiTGenerator")
    tokenizer = ("eval", "--model", model_folder, "--data", photo_folder, "--samples", "5")
    fails(inside(*tokenizer, cwd=tmp_path), "a tokenizer; --samples and --seed are of a generator")
    assert not (tmp_path / "new").exists()


def test_the_demo_and_the_one_that_trains_write_beside_each_other(inside, tmp_path):
    assert inside("demo", cwd=tmp_path).returncode == 0
    trained = inside("demo", "--train", "train.steps=2", "train.batch_norm_batches=1", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "demo/trained/model" in trained.stdout
    found = [json.loads((tmp_path / "demo" / part / "results.json").read_text()) for part in ("", "trained")]
    assert [results["model"] for results in found] == ["vqhit-tiny-64", "demo/trained/model"]


def test_only_a_bare_name_is_that_of_a_packaged_model(inside, photo_folder, tmp_path):
    photo = next(photo_folder.glob("*.jpg"))
    given = ("reconstruct", photo, "--out", "pictures", "--model")
    assert inside(*given, "vqhit-tiny-64", cwd=tmp_path).returncode == 0
    fails(inside(*given, "./vqhit-tiny-64", cwd=tmp_path), "vqhit-tiny-64: no such folder")


def test_the_imagenet_config_takes_a_step_of_the_whole_recipe(inside, photo_folder, tmp_path):
    config = Path(__file__).parent.parent / "configs" / "vqhit_imagenet256.yaml"
    features = models.squeezenet1_1(weights=None).features.state_dict(prefix="features.")
    save_file(features, tmp_path / "features.safetensors")
    overrides = [
        "train.steps=1",
        "train.batch_size=2",
        "train.precision=float32",
        "train.batch_norm_batches=1",
        "device=cpu",
        "data.workers=0",
        "train.log_every=1",
        "train.grid_every=0",
        "discriminator.max_channels=16",  # the paper's 512 take minutes on a CPU
        "loss.perceptual_network=features",
        "loss.perceptual_features={network: squeezenet1_1, layers: [1]}",
        "loss.perceptual_weights=features.safetensors",
    ]
    result = inside("train", config, f"data.path={photo_folder}", *overrides, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run_dir = tmp_path / "runs" / "vqhit_imagenet256"
    record = json.loads((run_dir / "metrics.jsonl").read_text())
    assert {"reconstruction", "perceptual", "adversarial", "codebook", "discriminator", "r1"} <= record.keys()
    assert RunConfig.from_yaml(run_dir / "config.yaml").train.batch_size == 2
    assert (run_dir / "model" / "model.safetensors").stat().st_size > 4 * 57e6
