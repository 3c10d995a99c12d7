"""A run that is killed, told to stop or started twice: real processes, real signals."""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import assert_same_run, finish, records, start, wait_for_step, write_recipe
from vqhit.recipe import RunConfig
from vqhit.train import Trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_config):
    folder = tmp_path_factory.mktemp("resume")
    write_recipe(folder, tiny_config)
    return folder


@pytest.fixture(scope="module")
def gan_folder(tmp_path_factory, tiny_generator_config):
    folder = tmp_path_factory.mktemp("resume_gan")
    write_recipe(folder, tiny_generator_config)
    return folder


def whole_run(folder):
    code, errors, _ = finish(start("run_dir=whole", cwd=folder))
    assert code == 0, errors
    return folder / "whole"


@pytest.fixture(scope="module")
def uninterrupted(folder):
    return whole_run(folder)


def killed_and_continued(folder):
    run_dir = folder / "killed"
    steps = sorted(random.sample(range(1, 23), 3))
    for step, workers in zip(steps, (2, 0, 2), strict=True):
        process = start(f"run_dir={run_dir}", f"data.workers={workers}", cwd=folder)
        wait_for_step(run_dir, step, process)
        time.sleep(random.uniform(0, 0.1))
        os.killpg(process.pid, signal.SIGKILL)
        finish(process)
    code, errors, _ = finish(start(f"run_dir={run_dir}", cwd=folder))
    assert code == 0, (steps, errors)
    return run_dir


def test_killed_at_three_random_steps_a_run_continues_to_the_same_bits(folder, uninterrupted):
    assert_same_run(killed_and_continued(folder), uninterrupted)


def test_killed_at_three_random_steps_the_run_of_a_generator_continues_to_the_same_bits(gan_folder):
    assert_same_run(killed_and_continued(gan_folder), whole_run(gan_folder))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_ends_the_step_saves_and_exits(folder, uninterrupted, number):
    run_dir = folder / f"stopped-{number.name}"
    command = (f"run_dir={run_dir}", "data.workers=2")
    process = start(*command, cwd=folder)
    wait_for_step(run_dir, 7, process)
    os.killpg(process.pid, number)
    code, errors, seconds = finish(process)
    assert code == 128 + number, errors
    assert seconds < 10
    stopped_at = records(run_dir)[-1]["step"]
    assert stopped_at < 24
    assert (run_dir / "checkpoints" / f"step_{stopped_at:09d}").is_dir()
    assert finish(start(*command, cwd=folder))[0] == 0
    assert_same_run(run_dir, uninterrupted)


def test_a_second_run_in_the_same_folder_says_so_and_leaves_it_alone(folder, uninterrupted):
    run_dir = folder / "twice"
    first = start(f"run_dir={run_dir}", "data.workers=2", cwd=folder)
    wait_for_step(run_dir, 2, first)
    os.kill(first.pid, signal.SIGSTOP)  # or it may be done before the other has started
    code, errors, _ = finish(start(f"run_dir={run_dir}", cwd=folder))
    os.kill(first.pid, signal.SIGCONT)
    assert code == 2
    assert f"run_dir {run_dir} is in use by process {first.pid} on " in errors
    assert len(errors.splitlines()) == 1
    assert finish(first)[0] == 0
    assert_same_run(run_dir, uninterrupted)


def test_killed_at_any_point_inside_saving_there_is_a_whole_checkpoint(folder):
    script = Path(__file__).parent / "killed_while_saving.py"
    (folder / "saving.json").write_text((folder / "run.json").read_text().replace('"run"', '"saving"'))
    environment = {**os.environ, "PYTHONPATH": str(script.parent.parent)}
    done = subprocess.run(
        [sys.executable, str(script), "saving.json", "30"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    events, killed = map(int, re.findall(r"(\d+) (?:events|times)", done.stdout))
    assert events >= 30
    assert killed >= 30


FILES = (
    "config.json",
    "model.safetensors",
    "trained.safetensors",
    "discriminator.safetensors",
    "model_optimizer.safetensors",
    "discriminator_optimizer.safetensors",
    "state.safetensors",
    "manifest.json",
)


def damage(file, fault):
    content = bytearray(file.read_bytes())
    if fault == "deleted":
        file.unlink()
    elif fault == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize("fault", ["flipped", "truncated", "deleted"])
def test_a_damaged_file_of_each_kind_is_named_and_the_checkpoint_before_continued(
    folder, uninterrupted, tmp_path, monkeypatch, fault
):
    monkeypatch.chdir(folder)
    for name in FILES:
        run_dir = tmp_path / name.replace(".", "-")
        shutil.copytree(uninterrupted, run_dir)
        newest, before = sorted((run_dir / "checkpoints").iterdir(), reverse=True)[:2]
        assert {path.name for path in newest.iterdir()} == set(FILES)
        damage(newest / name, fault)
        with pytest.warns(UserWarning, match=rf"{newest.name}.*{re.escape(name)}"):
            trainer = Trainer(RunConfig.from_yaml("run.json", [f"run_dir={run_dir}"]))
        assert trainer.state.step == int(before.name.removeprefix("step_"))


def test_the_command_names_a_damaged_file_and_continues_to_the_same_bits(folder, uninterrupted, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    damage(run_dir / "checkpoints" / "step_000000024" / "trained.safetensors", "flipped")
    code, errors, _ = finish(start(f"run_dir={run_dir}", cwd=folder))
    assert code == 0
    assert "vqhit: warning: " in errors
    assert "step_000000024/trained.safetensors: damaged" in errors
    assert_same_run(run_dir, uninterrupted)


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing_half_written(folder, tmp_path):
    run_dir = tmp_path / "run"
    limit = 100_000  # bytes of a file, as a quota would have it
    full = start(
        f"run_dir={run_dir}", cwd=folder, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    code, errors, _ = finish(full)
    assert code == 2
    (line,) = [line for line in errors.splitlines() if not line.startswith("skipped: ")]
    assert "File too large" in line
    assert list((run_dir / "checkpoints").iterdir()) == []


def started_with_a_loader(run_dir, folder):
    """A run at step 7, and its loader of training images: the oldest, as evaluations have others."""
    process = start(f"run_dir={run_dir}", "data.workers=1", cwd=folder)
    wait_for_step(run_dir, 7, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return process, min(map(int, children))


def test_a_run_that_waits_for_images_that_never_come_can_be_stopped(folder, tmp_path):
    run_dir = tmp_path / "run"
    process, loader = started_with_a_loader(run_dir, folder)
    os.kill(loader, signal.SIGSTOP)
    time.sleep(2)  # what it had loaded is trained on
    os.kill(process.pid, signal.SIGTERM)
    code, errors, seconds = finish(process)
    assert code == 143, errors
    assert seconds < 10
    last = records(run_dir)[-1]["step"]
    assert (run_dir / "checkpoints" / f"step_{last:09d}").is_dir()


def test_a_killed_loader_process_is_one_line(folder, tmp_path):
    run_dir = tmp_path / "run"
    process, loader = started_with_a_loader(run_dir, folder)
    os.kill(loader, signal.SIGKILL)
    code, errors, _ = finish(process)
    assert code == 2
    (line,) = [line for line in errors.splitlines() if not line.startswith("skipped: ")]
    assert line.startswith("vqhit: DataLoader worker")
