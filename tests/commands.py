"""Real runs of `vqhit train` in processes of their own, and what they leave behind."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision import models

from vqhit.models import VQHiTConfig

CLOCKED = {"images_per_s", "memory_mib"}
"""Numbers that no two runs share."""


def write_photos(folder, count=10):
    """Smooth JPEG files of several sizes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((40 + 4 * index, 48), Image.Resampling.BICUBIC).save(folder / f"{index}.jpg")


def write_recipe(folder, model, **train):
    """photos/ and run.json: all terms and averages, micro-batches, lazy R1, restarts, a bad image; 24 steps.

    Of a tokenizer; for a generator, all that it has of these.
    """
    write_photos(folder / "photos")
    (folder / "photos" / "page.jpg").write_text("<html>not found</html>")
    config = {
        "run_dir": "run",
        "device": "cpu",
        "model": model.to_dict(),
        "data": {"path": "photos", "max_bad": 0.1},
        "loss": {"adversarial": 0.1, "adaptive": True, "r1_every": 2, "consistency": 1.0},
        "discriminator": {"resolution": 16, "channel_multiplier": 1, "max_channels": 8},
        "ema": {"decay": 0.9, "start_step": 1, "warmup": True},
        "optimizer": {"learning_rate": 1e-3},
        "eval": {"path": "photos", "every": 6, "images": 5},
        "train": {
            "steps": 24,
            "batch_size": 4,
            "micro_batch_size": 2,
            "log_every": 1,
            "grid_every": 12,
            "checkpoint_every": 5,
            "restart_codes_after": 3,
            "batch_norm_batches": 2,
            **train,
        },
    }
    if not isinstance(model, VQHiTConfig):
        config["loss"] = {"r1_every": 2, "consistency": 1.0}
        del config["train"]["restart_codes_after"]
        torch.manual_seed(0)
        weights = models.squeezenet1_1(weights=None).features[:2].state_dict(prefix="features.")
        save_file(weights, folder / "features.safetensors")
        config["eval"] |= {
            "features": {"network": "squeezenet1_1", "layers": [1]},
            "feature_weights": "features.safetensors",
        }
    (folder / "run.json").write_text(json.dumps(config))


def start(*arguments, cwd, processes=1, **options):
    """`vqhit train run.json ...`, in a process group of its own; with several processes by torchrun."""
    run = ["torch.distributed.run", "--nproc-per-node", str(processes), "-m", "vqhit"] if processes > 1 else ["vqhit"]
    return subprocess.Popen(
        [sys.executable, "-m", *run, "train", "run.json", *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def finish(process, timeout=120):
    """Exit code and standard error of a process, and the seconds until it ended."""
    started = time.monotonic()
    try:
        _, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, errors, time.monotonic() - started


def wait_for_step(run_dir, step, process):
    """Wait until a run has trained so many steps."""
    while process.poll() is None and len(records(run_dir)) < step:
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[1]


def records(run_dir, name="metrics.jsonl"):
    """Records of a run; a line that is just being written is left out."""
    path = run_dir / name
    return (
        [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.exists() else []
    )


def timeless(run_dir):
    """Records without the numbers that no two runs share."""
    return [{name: value for name, value in record.items() if name not in CLOCKED} for record in records(run_dir)]


def assert_same_run(run_dir, expected):
    """Losses of every step, evaluations, and all tensors of the last checkpoint are the same bits."""
    assert timeless(run_dir) == timeless(expected)
    assert records(run_dir, "evaluations.jsonl") == records(expected, "evaluations.jsonl")
    last = sorted((expected / "checkpoints").iterdir())[-1]
    names = sorted(path.name for path in last.glob("*.safetensors"))
    assert len(names) == 6
    for name in names:
        assert (run_dir / "checkpoints" / last.name / name).read_bytes() == (last / name).read_bytes(), name


def largest_differences(folder, other, file):
    """Largest difference of each tensor of a checkpoint's file."""
    mine, theirs = load_file(folder / file), load_file(other / file)
    assert mine.keys() == theirs.keys()
    return {
        name: float((mine[name].double() - theirs[name].double()).abs().max()) for name in mine if mine[name].numel()
    }
