"""The start of a run from a trained model: its weights and, where they are published, those of its training."""

import json
from pathlib import Path

import torch
from torch import nn

from vqhit import checkpoint, distributed
from vqhit.config import ConfigError, differences
from vqhit.files import sha256
from vqhit.hub import CONFIG_FILE, Located, check_tensors, locate, read_tensors
from vqhit.recipe import RunConfig
from vqhit.repository import download, has_file
from vqhit.state import STATE_FILE, STATE_FILES, TrainingState

_CPU = torch.device("cpu")


def begin_with(state: TrainingState, config: RunConfig) -> list[str]:
    """Give a run at its first step what `init_from` has, and return what that was: the model, its discriminator, ...

    Raises `ValueError` (`ConfigError`, `HubError`) if there is none, or it does not fit what the run trains.
    """
    assert config.init_from is not None
    with distributed.first_here():
        folder = _found(config.init_from)
    saved = type(state.model).from_pretrained(folder)
    if changed := differences(saved.config.to_dict(), config.model.to_dict()):
        some = ", ".join(list(changed.values())[:3])
        raise ConfigError(f"model: init_from {config.init_from} is another one ({some})")
    weights, taken = saved.state_dict(), ["the model"]
    if state.ema is not None:
        state.ema.model.load_state_dict(weights)
    if (path := folder / "trained.safetensors").is_file():  # behind the average
        weights = _fitting(path, state.model)
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
        if (path := folder / "state.safetensors").is_file():
            state.codebook.load_means(read_tensors(path, _CPU))
    return taken


def _found(init_from: str) -> Path:
    """The folder that holds it all: a checkpoint of a run, a folder of a model, or the Hub's, fetched."""
    path = Path(init_from)
    if (path / "config.yaml").is_file() and not (path / CONFIG_FILE).is_file():
        return checkpoint.newest(path / "checkpoints") or path / "model"
    located = locate(init_from)
    if located.commit is not None:
        _fetch_state(located, located.commit)
    return located.folder


def _fetch_state(located: Located, commit: str) -> None:
    """Fetch what is published of the state of the training, if anything is; raises `ValueError` for a damaged file."""
    if not has_file(located.name, STATE_FILE, commit):
        return
    listing = located.folder / STATE_FILE
    try:
        hashes = dict(json.loads(listing.read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{listing}: damaged") from None
    if unknown := sorted(hashes.keys() - set(STATE_FILES)):
        raise ValueError(f"{listing}: names {unknown[0]!r}; allowed: {', '.join(STATE_FILES)}")
    if hashes:
        download(located.name, sorted(hashes), revision=commit)
    for name, expected in hashes.items():
        if sha256(located.folder / name) != expected:
            raise ValueError(f"{located.folder / name}: damaged, its sha256 is not that in {STATE_FILE}")


def _fitting(path: Path, module: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors of a file that are those of a module."""
    tensors = read_tensors(path, _CPU)
    try:
        check_tensors(module.state_dict(), tensors, path)
    except ValueError as error:
        raise ConfigError(
            f"init_from: {error}; give the {type(module).__name__} the sizes that it was trained with"
        ) from None
    return tensors
