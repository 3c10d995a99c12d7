"""Two real processes (torchrun, gloo) train as one does; what stops one stops both."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision import models

from tests.commands import (
    assert_same_run,
    finish,
    largest_differences,
    records,
    start,
    timeless,
    wait_for_step,
    write_recipe,
)
from vqhit import checkpoint, distributed
from vqhit.config import ConfigError
from vqhit.evaluate import evaluate_tokenizer
from vqhit.models import VQHiT
from vqhit.perceptual import FeaturesConfig
from vqhit.protocol import EvaluationSettings
from vqhit.recipe import RunConfig

SCRIPT = Path(__file__).parent / "two_processes.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_config):
    folder = tmp_path_factory.mktemp("distributed")
    write_recipe(folder, tiny_config)
    return folder


@pytest.fixture(scope="module")
def gan_folder(tmp_path_factory, tiny_generator_config):
    folder = tmp_path_factory.mktemp("distributed_gan")
    write_recipe(folder, tiny_generator_config)
    return folder


def torchrun(*arguments, cwd, timeout=200, script=True):
    arguments = (str(SCRIPT), *arguments) if script else arguments
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent.parent)}
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False, env=environment
    )


def gradients(folder):
    """Gradients of a checkpoint's last step: without momentum, Adam's first moment."""
    state = load_file(folder / "model_optimizer.safetensors")
    return {name.removesuffix("/exp_avg"): value for name, value in state.items() if name.endswith("/exp_avg")}


def weight_difference(one, two, file, steady):
    """Largest difference of the weights that `steady` selects."""
    weights, others = (load_file(folder / file) for folder in (one, two))
    return max(float((weights[name] - others[name]).abs()[mask].max()) for name, mask in steady.items() if mask.any())


# Batch norm's statistics and the adaptive weight are those of what passes at a time, in all processes together.
RECIPES = {
    "gradient": (("train.micro_batch_size=4",), ("train.micro_batch_size=2",)),
    "running-means-accumulation": (
        (
            "model.quantizer.update=ema",
            "model.quantizer.normalize=true",
            "train.restart_codes_after=1",
            "train.micro_batch_size=1",
            "train.sync_batch_norm=false",
            "loss.adaptive=false",
        ),
    )
    * 2,
    "frozen-tokens": (
        ("init_from=source", "freeze_tokens=true", "train.restart_codes_after=0", "train.micro_batch_size=4"),
        ("init_from=source", "freeze_tokens=true", "train.restart_codes_after=0", "train.micro_batch_size=2"),
    ),
    "generator": (
        ("train.micro_batch_size=4", "loss.r1_every=1", "eval.every=2"),
        ("train.micro_batch_size=2", "loss.r1_every=1", "eval.every=2"),
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_with_half_the_batch_train_as_one_with_all_of_it(folder, gan_folder, conv_config, recipe):
    folder = gan_folder if recipe == "generator" else folder
    VQHiT(conv_config).save_pretrained(folder / "source")
    common = ("train.steps=3", "train.checkpoint_every=1", "train.keep_checkpoints=3", "optimizer.learning_rate=1e-4")
    runs = []
    for processes, options in enumerate(RECIPES[recipe], start=1):
        run_dir = folder / f"{recipe}-{processes}"
        code, errors, _ = finish(start(f"run_dir={run_dir}", *common, *options, cwd=folder, processes=processes))
        assert code == 0, errors
        runs.append(run_dir)
    worst, steady = {}, {}
    for step in range(1, 4):
        one, two = (run / "checkpoints" / f"step_{step:09d}" for run in runs)
        for file in ("discriminator", "model_optimizer", "discriminator_optimizer", "state"):
            differences = largest_differences(one, two, f"{file}.safetensors")
            worst[file] = max(worst.get(file, 0), max(differences.values()))
        # Weights whose gradient has never been next to zero: there Adam makes whole steps of its rounding.
        now = {name: gradient.abs() > 3e-5 for name, gradient in gradients(one).items()}
        steady = {name: mask & steady.get(name, mask) for name, mask in now.items()}
        for file in ("trained", "model"):
            worst[file] = max(worst.get(file, 0), weight_difference(one, two, f"{file}.safetensors", steady))
    print(recipe, worst)
    assert max(worst.values()) < 1e-6
    compared = sum(int(mask.sum()) for mask in steady.values()) / sum(mask.numel() for mask in steady.values())
    # A generator's first gradients are small, and a decoder alone has fewer that are not.
    assert compared > {"generator": 0.05, "frozen-tokens": 0.15}.get(recipe, 0.3)
    assert [records(run, "skipped.jsonl") for run in runs] == [records(runs[0], "skipped.jsonl")] * 2
    for one, two in zip(timeless(runs[0]), timeless(runs[1]), strict=True):
        assert one.keys() == two.keys()
        assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-5, abs=1e-6)
    if recipe == "generator":
        evaluations = [records(run, "evaluations.jsonl") for run in runs]
        assert [record["step"] for record in evaluations[0]] == [2, 3]
        for one, two in zip(*evaluations, strict=True):
            assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-4)
    if "accumulation" in recipe:
        assert records(runs[0])[-1].keys() >= {"r1", "consistency", "adversarial", "codebook"}


def test_a_nan_in_one_process_stops_both_before_the_step_and_shared_functions_agree(folder):
    done = torchrun("all", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "done-0").exists()
    assert (folder / "done-1").exists()
    expected = {
        "input": "step 3: reconstruction is nan in process 0, 1; stopped before the update",
        "term": "step 3: codebook is nan in process 1; stopped before the update",
        "gradient": "step 3: VQHiT: the gradient of encoder.conv_in.weight is not finite; stopped before the update",
    }
    for where, error in expected.items():
        first, second = (json.loads((folder / f"planted-{where}-{rank}.json").read_text()) for rank in (0, 1))
        assert first == second
        assert first["error"] == error
        assert first["step"] == 3
        assert first["weights"] == first["weights_before"]
        checkpoint.verify(folder / f"planted-{where}" / "checkpoints" / "step_000000002")


def test_a_killed_process_ends_the_other_and_the_same_command_continues(folder):
    whole, killed = folder / "whole", folder / "killed"
    assert finish(start(f"run_dir={whole}", cwd=folder, processes=2))[0] == 0
    process = start(f"run_dir={killed}", cwd=folder, processes=2)
    wait_for_step(killed, 7, process)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    environments = [Path(f"/proc/{child}/environ").read_text().split("\0") for child in children]
    (second,) = [child for child, names in zip(children, environments, strict=True) if "RANK=1" in names]
    os.kill(int(second), signal.SIGKILL)
    code, errors, seconds = finish(process)
    assert code != 0
    assert seconds < 40, errors
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert finish(start(f"run_dir={killed}", cwd=folder, processes=2))[0] == 0
    assert_same_run(killed, whole)


def test_a_process_that_hangs_is_given_up_after_the_timeout(tmp_path):
    assert torchrun("silence", cwd=tmp_path).returncode != 0
    assert 5 < json.loads((tmp_path / "silence.json").read_text()) < 20


def test_sigterm_to_torchrun_saves_and_ends_all_processes(folder):
    run_dir = folder / "stopped"
    process = start(f"run_dir={run_dir}", "data.workers=1", cwd=folder, processes=2)
    wait_for_step(run_dir, 7, process)
    started = time.monotonic()
    process.terminate()
    finish(process)
    assert time.monotonic() - started < 15
    last = records(run_dir)[-1]["step"]
    assert last < 24
    checkpoint.verify(run_dir / "checkpoints" / f"step_{last:09d}")


def test_an_error_of_all_processes_is_said_once(folder):
    code, errors, _ = finish(start("run_dir=photos/0.jpg/run", cwd=folder, processes=2))
    assert code != 0
    assert len([line for line in errors.splitlines() if line.startswith("vqhit: ")]) == 1


def test_a_batch_that_cannot_be_shared_out_is_named(folder):
    config = RunConfig.from_yaml(folder / "run.json")
    with pytest.raises(ConfigError, match=r"train.batch_size 4: cannot be shared out evenly among 3 processes"):
        config.images_at_a_time(3)


def test_a_device_that_cannot_be_shared_out_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(ValueError, match="device cuda:1: processes cannot share 'cuda:1'; allowed: auto, cuda, cpu"):
        distributed.start("cuda:1", 1)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ValueError, match="on a machine with 2 GPUs; allowed: --nproc-per-node up to 2"):
        distributed.start("auto", 1)


def test_an_evaluation_by_two_processes_is_that_of_one(tiny_model, photo_folder, picture, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    save_file(models.squeezenet1_1(weights=None).features.state_dict(prefix="features."), tmp_path / "w.safetensors")
    (tmp_path / "features.yaml").write_text("network: squeezenet1_1\nlayers: [4]\n")
    picture(50, 50, seed=9).save(photo_folder / "7.png")  # seven images: one process has four, the other three
    metrics = ("rfid", "psnr", "ssim", "codebook")
    settings = EvaluationSettings(
        metrics=metrics,
        batch_size=2,
        features=FeaturesConfig(network="squeezenet1_1", layers=(4,)),
        feature_weights=str(tmp_path / "w.safetensors"),
        codebook_picture=str(tmp_path / "one.png"),
    )
    one = evaluate_tokenizer(tiny_model, photo_folder, settings)
    given = ("eval", "--model", "model", "--data", "photos", "--metrics", ",".join(metrics), "--batch-size", "2")
    network = ("--features", "w.safetensors", "--features-kind", "features.yaml")
    done = torchrun("-m", "vqhit", *given, *network, "--out", "two.json", cwd=tmp_path, script=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("two.json: the same, with the protocol") == 1
    two = json.loads((tmp_path / "two.json").read_text())
    assert (one["images"], two["images"]) == (7, 7)
    assert (one["protocol"]["processes"], two["protocol"]["processes"]) == (1, 2)
    for key in ("frechet_distance", "psnr", "ssim", "codebook_perplexity", "dead_codes"):
        assert two[key] == pytest.approx(one[key], rel=1e-6)
    assert (tmp_path / "two_codebook.png").read_bytes() == (tmp_path / "one.png").read_bytes()
