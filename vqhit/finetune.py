"""The start of a run from a trained model: its weights and, where they are there, those of its training."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from vqhit import checkpoint, distributed
from vqhit.config import ConfigError, differences
from vqhit.files import read_json, sha256, write_atomic
from vqhit.hub import (
    CONFIG_FILE,
    STATE_FILES,
    STATE_LIST_FILE,
    WEIGHTS_FILE,
    Located,
    check_tensors,
    locate,
    read_tensors,
)
from vqhit.recipe import RunConfig
from vqhit.repository import download, has_file
from vqhit.runs import RunFolder
from vqhit.state import TrainingState

_CPU = torch.device("cpu")


class BegunWith(NamedTuple):
    """The model that a run began with, as its folder remembers it."""

    repository: str | None
    """Its id on the Hub; None if it was a folder."""
    commit: str | None
    weights_sha256: str
    taken: list[str]
    """What was taken besides the model."""

    @property
    def public(self) -> str:
        """What to call it in public."""
        if self.repository is None:
            return f"a model whose weights have sha256 {self.weights_sha256}"
        return f"{self.repository} at {self.commit}"


def begin_with(state: TrainingState, config: RunConfig) -> BegunWith:
    """Give a run at its first step what `init_from` has, and return what that was.

    Raises `ValueError` (`ConfigError`, `HubError`, `CheckpointError`) if there is none, it is damaged, or it does not
    fit what the run trains.
    """
    assert config.init_from is not None
    with distributed.first_here():
        located = _find(config.init_from)
    folder = located.folder
    saved = type(state.model).from_pretrained(folder)
    if changed := differences(saved.config.to_dict(), config.model.to_dict()):
        some = ", ".join(list(changed.values())[:3])
        raise ConfigError(f"model: init_from {config.init_from} is another one ({some})")
    weights = saved.state_dict()
    taken: list[str] = []
    if state.ema is not None:
        state.ema.model.load_state_dict(weights)
        if (path := folder / "trained.safetensors").is_file():
            weights = _fitting(path, state.model)
            taken.append("the weights behind its average")
    state.model.load_state_dict(weights)
    if state.discriminator is not None and (path := folder / "discriminator.safetensors").is_file():
        state.discriminator.load_state_dict(_fitting(path, state.discriminator))
        taken.append("its discriminator")
    for name, optimizer in state.optimizers.items():
        if (path := folder / f"{name}_optimizer.safetensors").is_file():
            optimizer.load_fitting(read_tensors(path, _CPU), str(path))
            taken.append(f"the optimizer of the {name}")
    if state.codebook is not None:
        state.codebook.begin_trained()
        if (path := folder / "state.safetensors").is_file() and state.codebook.load_means(read_tensors(path, _CPU)):
            taken.append("the running means of its codes")
    on_hub = located.name if located.commit else None
    return BegunWith(on_hub, located.commit, sha256(folder / WEIGHTS_FILE), taken)


def write_begun_with(run: RunFolder, begun_with: BegunWith) -> None:
    """Keep in a run's folder what it began with."""
    write_atomic(run.begun_with, (json.dumps(begun_with._asdict(), indent=2) + "\n").encode())


def read_begun_with(run: RunFolder) -> BegunWith | None:
    """What a run began with, if it began with a model; raises `ValueError` for a damaged record."""
    path = run.begun_with
    try:
        return BegunWith(**read_json(path))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise ValueError(f"{path}: damaged") from None


def _find(init_from: str) -> Located:
    """The folder that holds it all: a checkpoint of a run, a folder of a model, or the Hub's, fetched."""
    path = Path(init_from)
    if (path / "config.yaml").is_file() and not (path / CONFIG_FILE).is_file():
        return Located(checkpoint.newest(path / "checkpoints") or path / "model", init_from, None)
    located = locate(init_from)
    if (located.folder / checkpoint.MANIFEST).is_file():
        checkpoint.verify(located.folder)
    if located.commit is not None:
        _fetch_state(located, located.commit)
    return located


def _fetch_state(located: Located, commit: str) -> None:
    """Fetch what is published of the state of the training, if anything is.

    Raises `ValueError` for a list that is damaged or of another model, or a file that is not the one listed.
    """
    if not has_file(located.name, STATE_LIST_FILE, commit):
        return
    path = located.folder / STATE_LIST_FILE
    try:
        listed = read_json(path)
        model, hashes = listed["model_sha256"], {str(name): value for name, value in listed["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: damaged") from None
    if unknown := sorted(hashes.keys() - set(STATE_FILES)):
        raise ValueError(f"{path}: names {unknown[0]!r}; allowed: {', '.join(STATE_FILES)}")
    if model != sha256(located.folder / WEIGHTS_FILE):
        raise ValueError(f"{path}: of another model than the one beside it; publish both with `vqhit push`")
    if hashes:
        download(located.name, sorted(hashes), revision=commit)
    for name, expected in hashes.items():
        if sha256(located.folder / name) != expected:
            raise ValueError(f"{located.folder / name}: damaged, its sha256 is not that in {STATE_LIST_FILE}")


def _fitting(path: Path, module: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors of a file that are those of a module."""
    tensors = read_tensors(path, _CPU)
    try:
        check_tensors(module.state_dict(), tensors, path)
    except ValueError as error:
        name = type(module).__name__
        raise ConfigError(f"init_from: {error}; give the {name} the sizes that it was trained with") from None
    return tensors
