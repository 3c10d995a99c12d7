"""What `vqhit push` publishes of a run: model, card, grid, configuration and, if asked for, the state of its training.

`vqhit train ... init_from=ID` begins with it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqhit import checkpoint
from vqhit.card import CARD_FILE, GRID_FILE, Training, model_card, public_name
from vqhit.files import sha256
from vqhit.hub import CONFIG_FILE, WEIGHTS_FILE, repository_id
from vqhit.models import VQHiT, load_model
from vqhit.objective import LossConfig
from vqhit.recipe import RunConfig
from vqhit.repository import split_id, upload
from vqhit.runs import RunFolder
from vqhit.state import STATE_FILE, STATE_FILES

RUN_CONFIG_FILE = "training.yaml"
EVALUATION_FILE = "eval.json"
OURS = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, GRID_FILE, RUN_CONFIG_FILE, STATE_FILE, *STATE_FILES)
"""All that a push may write: what an earlier one left of these goes with the next one."""
_PATHS = ("data.path", "eval.path", "eval.feature_weights", "eval.inception", "loss.perceptual_weights", "init_from")
_TERMS = ("reconstruction", "perceptual", "adversarial", "codebook", "r1", "consistency")
_LEFT_OUT = ("run_dir", "device", "log")


@dataclass(frozen=True)
class Package:
    """The files of one commit."""

    files: dict[str, Path | bytes]
    remarks: list[str]
    """What whoever publishes should know."""

    @property
    def card(self) -> str:
        """Text of the model card."""
        content = self.files[CARD_FILE]
        return (content if isinstance(content, bytes) else content.read_bytes()).decode()

    def push(self, repo_id: str, *, branch: str | None, private: bool, message: str) -> str:
        """Put the files into a repository of the Hub in one commit; returns its address. Raises `HubError`."""
        return upload(repo_id, self.files, replaces=OURS, branch=branch, private=private, message=message)


@dataclass(frozen=True)
class _Source:
    """Where a model and what is known of it lie."""

    model: Path
    checkpoint: Path | None
    run: RunFolder | None


def package(
    path: Path | str,
    name: str,
    *,
    branch: str | None = None,
    license: str | None = None,
    evaluations: Sequence[Path] = (),
    grid: bool = True,
    with_training_state: bool = False,
) -> Package:
    """Collect what to publish of a run's folder, one of its checkpoints, or a model's folder, under `name`.

    Of a run it is the newest checkpoint that verifies: the average of the weights, if there is one. The model is loaded
    as any user will load it. An evaluation, given or eval.json beside the model or in the run's folder, must be of the
    very same weights. A README.md beside config.json is the card as it stands. Raises `ValueError` (`ConfigError`,
    `HubError`, `CheckpointError`) for what is missing or does not fit.
    """
    repository_id(name)
    source = _find(Path(path))
    model = load_model(source.model)
    files: dict[str, Path | bytes] = {file: source.model / file for file in (CONFIG_FILE, WEIGHTS_FILE)}
    remarks: list[str] = []
    measured = _evaluations(source, evaluations, remarks)
    training = None
    if source.run is not None:
        config = RunConfig.from_yaml(source.run.path / "config.yaml")
        files[RUN_CONFIG_FILE] = _public_config(config).encode()
        step = _step(source, config)
        training = Training(_facts(config, step), config.train.steps - step, None, _base_model(config))
        if grid and (picture := _grid(source.run, step)) is not None:
            files[GRID_FILE] = picture
            shown = "Training images above their reconstructions" if isinstance(model, VQHiT) else "Samples"
            training = training._replace(grid=f"{shown}, step {step:,}")
            if isinstance(model, VQHiT):
                remarks.append(f"{GRID_FILE} shows training images; --no-grid leaves it out")
    if with_training_state:
        files |= _training_state(source)
    own = source.model / CARD_FILE
    if own.is_file():
        files[CARD_FILE] = own
        remarks.append(f"the card is {own}, as it stands")
    else:
        card = model_card(
            model.model_kind,
            name,
            model.summary(),
            branch=branch,
            license=license,
            training=training,
            evaluations=measured,
        )
        files[CARD_FILE] = card.encode()
        if license is None:
            remarks.append("the card states no licence; --license names one")
        if not measured:
            remarks.append(f"the card has no numbers; `vqhit eval ... --out {Path(path) / EVALUATION_FILE}` gives some")
    return Package(files, remarks)


def _find(path: Path) -> _Source:
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; allowed: a run's folder, one of its checkpoints, a model's folder")
    if (path / "config.yaml").is_file() and (path / CONFIG_FILE).is_file() is False:
        run = RunFolder(path)
        newest = checkpoint.newest(run.checkpoints)
        if newest is None and not (run.model / CONFIG_FILE).is_file():
            raise ValueError(f"{path}: a run without a checkpoint or a model; nothing is there to publish yet")
        return _Source(newest or run.model, newest, run)
    above = RunFolder(path.parent if path.name == "model" else path.parent.parent)
    of_run = above if (above.path / "config.yaml").is_file() else None
    if (path / checkpoint.MANIFEST).is_file():
        checkpoint.verify(path)
        return _Source(path, path, of_run)
    return _Source(path, None, of_run if of_run is not None and path == of_run.model else None)


def _step(source: _Source, config: RunConfig) -> int:
    """The step that the model is of; a run's `model` folder is written at the last one."""
    if source.checkpoint is None:
        return config.train.steps
    return int(json.loads((source.checkpoint / checkpoint.MANIFEST).read_text())["step"])


def _evaluations(source: _Source, given: Sequence[Path], remarks: list[str]) -> list[Mapping[str, Any]]:
    """Evaluations of these weights; one that was given and is of others raises `ValueError`."""
    weights = sha256(source.model / WEIGHTS_FILE)
    beside = [source.model / EVALUATION_FILE, *([] if source.run is None else [source.run.path / EVALUATION_FILE])]
    found: list[Mapping[str, Any]] = []
    for path in given or [path for path in beside if path.is_file()]:
        results = _read_evaluation(path)
        if results["model_sha256"] == weights:
            found.append(results)
            continue
        problem = f"{path}: measured on other weights (sha256 {results['model_sha256']}, these have {weights})"
        if given:
            raise ValueError(f"{problem}; evaluate these with `vqhit eval`")
        remarks.append(f"{problem}: left out")
    return found


def _read_evaluation(path: Path) -> Mapping[str, Any]:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        protocol = results["protocol"]
        if not all(isinstance(part, dict) for part in (protocol["reference"], protocol["versions"])):
            raise TypeError
        str(results["model_sha256"]), float(results["seconds"]), str(protocol["device"])
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not an evaluation of a model by `vqhit eval`") from None
    return results


def _grid(run: RunFolder, step: int) -> Path | None:
    """The newest grid up to a step."""
    grids = sorted(path for path in (run.path / "grids").glob("step_?????????.png"))
    until = [path for path in grids if path.stem <= f"step_{step:09d}"]
    return until[-1] if until else None


def _training_state(source: _Source) -> dict[str, Path | bytes]:
    """What a fine-tuning run takes over besides the model, and a list of it with hashes."""
    if source.checkpoint is None:
        raise ValueError(
            f"{source.model}: no checkpoint of its training is there, which --with-training-state publishes"
        )
    found = {name: source.checkpoint / name for name in STATE_FILES if (source.checkpoint / name).is_file()}
    hashes = {name: sha256(path) for name, path in found.items()}
    return {**found, STATE_FILE: (json.dumps({"files": hashes}, indent=2) + "\n").encode()}


def _public_config(config: RunConfig) -> str:
    """The run's configuration as YAML, without where it ran; of local paths, only their last part."""
    values = config.to_dict()
    for key in _LEFT_OUT:
        del values[key]
    for key in _PATHS:
        *above, last = key.split(".")
        section = values
        for name in above:
            section = section.get(name) or {}
        if isinstance(section.get(last), str):
            section[last] = public_name(section[last])
    import yaml

    head = "# The configuration of the run; of local paths, only their last part. `run_dir` is for you to choose.\n"
    return head + yaml.safe_dump(values, sort_keys=False)


def _base_model(config: RunConfig) -> str | None:
    found = None if config.init_from is None or Path(config.init_from).exists() else split_id(config.init_from)
    return None if found is None else found[0]


def _facts(config: RunConfig, step: int) -> dict[str, str]:
    """How a model was trained, in a few lines; training.yaml has the rest."""
    data, train, optimizer, loss = config.data, config.train, config.optimizer, config.loss
    split = f", split {data.split}" if data.split else ""
    crops = f"random crops of {data.crop_proportion[0]:.0%} to {data.crop_proportion[1]:.0%} of the short side"
    of_discriminator = () if config.trains_discriminator else ("r1", "consistency")
    terms = {name: getattr(loss, name, 0.0) for name in _TERMS if name not in of_discriminator}
    weights = ", ".join(f"{name} {weight:g}" for name, weight in terms.items() if weight)
    facts = {
        "Data": f"{public_name(data.path)}{split}; {crops}{', flipped at random' if data.flip else ''}",
        "Steps": f"{step:,} of {train.batch_size} images ({step * train.batch_size:,} crops)",
        "Loss weights": weights,
        "Optimizer": f"Adam ({optimizer.beta1:g}, {optimizer.beta2:g}), learning rate {optimizer.learning_rate:g}, "
        f"{optimizer.schedule}",
        "Weights": f"exponential moving average, decay {config.ema.decay:g}"
        if config.ema.decay
        else "of the last step",
        "Precision": train.precision,
        "Seed": str(config.seed),
    }
    if isinstance(loss, LossConfig) and loss.perceptual:
        facts["Perceptual network"] = loss.perceptual_network
    if config.init_from is not None:
        facts["Begun with"] = public_name(config.init_from)
    return {**facts, "All settings": f"[{RUN_CONFIG_FILE}]({RUN_CONFIG_FILE})"}
