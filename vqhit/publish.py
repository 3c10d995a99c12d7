"""What `vqhit push` publishes of a run: model, card, grid, configuration and, if asked for, the state of its training.

`vqhit train ... init_from=ID` begins with it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqhit import checkpoint
from vqhit.card import CARD_FILE, GRID_FILE, ModelKind, Training, check_evaluation, model_card
from vqhit.files import read_json, sha256
from vqhit.finetune import read_begun_with
from vqhit.hub import (
    CONFIG_FILE,
    PUBLISHED,
    RUN_CONFIG_FILE,
    STATE_FILES,
    STATE_LIST_FILE,
    WEIGHTS_FILE,
    repository_id,
)
from vqhit.models import VQHiT, load_model
from vqhit.origin import read_origin
from vqhit.recipe import RunConfig
from vqhit.repository import upload
from vqhit.run_card import public_settings, training_facts
from vqhit.runs import RunFolder

EVALUATION_FILE = "eval.json"


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
        return upload(repo_id, self.files, replaces=PUBLISHED, branch=branch, private=private, message=message)


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
    source = _find(Path(path).resolve())
    model = load_model(source.model)
    files: dict[str, Path | bytes] = {file: source.model / file for file in (CONFIG_FILE, WEIGHTS_FILE)}
    remarks: list[str] = []
    measured = _evaluations(source, model.model_kind, evaluations, remarks)
    training = None
    if source.run is not None:
        config = RunConfig.from_yaml(source.run.path / "config.yaml")
        step = _step(source, config)
        begun_with = None if config.init_from is None else read_begun_with(source.run)
        files[RUN_CONFIG_FILE] = public_settings(config, begun_with and begun_with.address).encode()
        name_of_base = None if begun_with is None else begun_with.public
        facts = training_facts(config, step, name_of_base)
        training = Training(facts, config.train.steps - step, None, begun_with and begun_with.on_hub)
        if grid and (picture := _grid(source.run, step)) is not None:
            files[GRID_FILE] = picture
            shown = "Training images above their reconstructions" if isinstance(model, VQHiT) else "Samples"
            training = training._replace(grid=f"{shown}, step {step:,}")
            if isinstance(model, VQHiT):
                remarks.append(f"{GRID_FILE} shows training images; --no-grid leaves it out")
    if with_training_state:
        files |= _training_state(source)
    origin = read_origin(source.model)
    own = source.model / CARD_FILE
    if own.is_file():
        files[CARD_FILE] = _own_card(own)
        remarks.append(f"the card is {own}, as it stands")
    else:
        card = model_card(
            model.model_kind,
            name,
            model.summary() | ({} if origin is None else {"Converted from": origin.text}),
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
    if (path / "config.yaml").is_file() and not (path / CONFIG_FILE).is_file():
        return _of_run(RunFolder(path))
    above = RunFolder(path.parent if path.name == "model" else path.parent.parent)
    of_run = above if above.checkpoints.is_dir() and (above.path / "config.yaml").is_file() else None
    if (path / checkpoint.MANIFEST).is_file():
        checkpoint.verify(path)
        return _Source(path, path, of_run)
    return _Source(path, None, of_run if of_run is not None and path == of_run.model else None)


def _of_run(run: RunFolder) -> _Source:
    """The newest checkpoint that is whole, or the model that a run has written after it, at its end."""
    last = run.model / CONFIG_FILE
    try:
        newest = checkpoint.newest(run.checkpoints)
    except checkpoint.CheckpointError:
        if not last.is_file():
            raise
        newest = None
    if newest is None and not last.is_file():
        raise ValueError(f"{run.path}: a run without a checkpoint or a model; nothing is there to publish yet")
    if newest is None:
        return _Source(run.model, None, run)
    done = checkpoint.step_of(newest) == RunConfig.from_yaml(run.path / "config.yaml").train.steps
    if not done and last.is_file() and last.stat().st_mtime > (newest / checkpoint.MANIFEST).stat().st_mtime:
        return _Source(run.model, None, run)
    return _Source(newest, newest, run)


def _step(source: _Source, config: RunConfig) -> int:
    """The step that the model is of; a run's `model` folder is written at the last one."""
    if source.checkpoint is None:
        return config.train.steps
    return checkpoint.step_of(source.checkpoint)


def _evaluations(
    source: _Source, kind: ModelKind, given: Sequence[Path], remarks: list[str]
) -> list[Mapping[str, Any]]:
    """Evaluations of these weights; one that was given and is of others, or is none, raises `ValueError`."""
    weights = sha256(source.model / WEIGHTS_FILE)
    beside = [source.model / EVALUATION_FILE, *([] if source.run is None else [source.run.path / EVALUATION_FILE])]
    found: list[Mapping[str, Any]] = []
    for path in given or [path for path in beside if path.is_file()]:
        try:
            results = _read_evaluation(path, kind)
            if results["model_sha256"] != weights:
                raise ValueError(
                    f"{path}: measured on other weights (sha256 {results['model_sha256']}, these have {weights}); "
                    "evaluate these with `vqhit eval`"
                )
        except ValueError as error:
            if given:
                raise
            remarks.append(f"left out: {error}")
        else:
            found.append(results)
    return found


def _read_evaluation(path: Path, kind: ModelKind) -> Mapping[str, Any]:
    try:
        results = read_json(path)
        if not isinstance(results, dict) or not isinstance(results.get("model_sha256"), str):
            raise ValueError("not an evaluation of a model by `vqhit eval`")
        check_evaluation(kind, results)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return results


def _own_card(path: Path) -> bytes:
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
    return content


def _grid(run: RunFolder, step: int) -> Path | None:
    """The newest grid up to a step."""
    grids = sorted(path for path in (run.path / "grids").glob("step_?????????.png"))
    until = [path for path in grids if path.stem <= f"step_{step:09d}"]
    return until[-1] if until else None


def _training_state(source: _Source) -> dict[str, Path | bytes]:
    """What a fine-tuning run takes over besides the model, and a list of it with hashes."""
    if source.checkpoint is None:
        raise ValueError(f"{source.model}: no whole checkpoint of this step; --with-training-state takes its files")
    found = {name: source.checkpoint / name for name in STATE_FILES if (source.checkpoint / name).is_file()}
    hashes = {name: sha256(path) for name, path in found.items()}
    listed = {"model_sha256": sha256(source.model / WEIGHTS_FILE), "files": hashes}
    return {**found, STATE_LIST_FILE: (json.dumps(listed, indent=2) + "\n").encode()}
