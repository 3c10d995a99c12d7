"""TensorBoard and Weights & Biases are given what the JSON lines hold, under the same names."""

import json
import sys

import pytest
from PIL import Image

from vqhit.config import ConfigError
from vqhit.logs import LogConfig, Logs


def shown(folder):
    """All scalars and pictures of a folder of TensorBoard events: {tag: {step: value}}, {tag: steps}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags["scalars"]}
    return scalars, {tag: [event.step for event in events.Images(tag)] for tag in tags["images"]}


def test_tensorboard_holds_the_same_numbers_under_the_names_of_their_files(tmp_path):
    logs = Logs(LogConfig(tensorboard=True), tmp_path, {}, step=0)
    logs.record("metrics.jsonl", {"step": 2, "loss": 0.5, "codebook_usage": 0.25})
    logs.record("evaluations.jsonl", {"step": 2, "psnr": 18.5, "codebook_usage": 1.0})
    logs.picture("grids", Image.new("RGB", (8, 8)), 2)
    logs.close()
    scalars, pictures = shown(tmp_path)
    assert scalars == {
        "metrics/loss": {2: 0.5},
        "metrics/codebook_usage": {2: 0.25},
        "evaluations/psnr": {2: 18.5},
        "evaluations/codebook_usage": {2: 1.0},
    }
    assert pictures == {"grids": [2]}


def test_a_continued_run_takes_the_place_of_the_steps_that_are_trained_again(tmp_path):
    for first, steps, value in ((0, (1, 2, 3), 1.0), (1, (2,), 7.0)):
        logs = Logs(LogConfig(tensorboard=True), tmp_path, {}, step=first)
        for step in steps:
            logs.record("metrics.jsonl", {"step": step, "loss": value})
        logs.close()
    assert shown(tmp_path)[0] == {"metrics/loss": {1: 1.0, 2: 7.0}}


def test_weights_and_biases_is_given_the_same_names_in_one_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    given = []
    for step in (1, 2):
        logs = Logs(LogConfig(wandb="tests"), tmp_path, {"seed": 0}, step=0)
        log = logs._wandb.log
        monkeypatch.setattr(logs._wandb, "log", lambda values, log=log: given.append(values) or log(values))
        logs.record("metrics.jsonl", {"step": step, "loss": 0.5})
        logs.picture("grids", Image.new("RGB", (8, 8)), step)
        logs.close()
    assert [{name: type(value).__name__ for name, value in values.items()} for values in given] == [
        {"metrics/loss": "float", "step": "int"},
        {"grids": "Image", "step": "int"},
    ] * 2
    assert given[2] == {"metrics/loss": 0.5, "step": 2}
    runs = [path.name.rsplit("-", 1)[1] for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert set(runs) == {(tmp_path / "wandb_id").read_text()}


@pytest.mark.parametrize(("package", "option"), [("tensorboard", {"tensorboard": True}), ("wandb", {"wandb": "tests"})])
def test_a_missing_package_is_named_with_the_way_to_install_it(tmp_path, monkeypatch, package, option):
    for name in (package, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"log.{package} needs another package: pip install {package}"):
        Logs(LogConfig(**option), tmp_path, {}, step=0)


def test_a_project_that_is_refused_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(ConfigError, match=r"log.wandb a/b\?: Invalid project name"):
        Logs(LogConfig(wandb="a/b?"), tmp_path, {}, step=0)


def test_a_run_shows_there_what_it_writes_to_its_folder(tmp_path, tiny_config, photo_folder):
    from vqhit.recipe import RunConfig
    from vqhit.train import Trainer

    Trainer(
        RunConfig.from_dict(
            {
                "run_dir": str(tmp_path / "run"),
                "device": "cpu",
                "model": tiny_config.to_dict(),
                "data": {"path": str(photo_folder)},
                "train": {"steps": 4, "batch_size": 2, "log_every": 2, "grid_every": 4},
                "eval": {"path": str(photo_folder), "every": 2},
                "log": {"tensorboard": True},
            }
        )
    ).run()
    scalars, pictures = shown(tmp_path / "run")
    for name in ("metrics", "evaluations"):
        for line in (tmp_path / "run" / f"{name}.jsonl").read_text().splitlines():
            record = json.loads(line)
            step = record.pop("step")
            assert {key: scalars[f"{name}/{key}"][step] for key in record} == pytest.approx(record)
    assert pictures == {"grids": [4]}
