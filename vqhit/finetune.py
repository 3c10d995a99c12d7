"""The start of a run from a trained model: its weights and, where they are there, those of its training."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from vqhit import checkpoint, distributed
from vqhit.config import ConfigError, differences
from vqhit.feed import Feed
from vqhit.files import read_json, sha256, write_atomic
from vqhit.generator import Generator
from vqhit.hub import (
    CONFIG_FILE,
    PACKAGED,
    STATE_FILES,
    STATE_LIST_FILE,
    WEIGHTS_FILE,
    Located,
    check_tensors,
    locate,
    read_tensors,
)
from vqhit.images import from_uint8
from vqhit.models import VQHiT
from vqhit.origin import read_origin
from vqhit.recipe import RunConfig
from vqhit.repository import download, has_file
from vqhit.runs import RunFolder
from vqhit.state import TrainingState

_CPU = torch.device("cpu")
_OF_CODEBOOK_TRAINING = {f"quantizer.{key}" for key in ("commitment", "update", "ema_decay", "gradient", "entropy")}
"""Settings of a model that its tokens do not depend on."""


class BegunWith(NamedTuple):
    """The model that a run began with, as its folder remembers it."""

    repository: str | None
    """Its id on the Hub, or the name of a model that comes with the package; None if it was a folder."""
    commit: str | None
    """Of a repository on the Hub."""
    weights_sha256: str
    taken: list[str]
    """What was taken of it."""
    converted_from: str | None = None

    @property
    def public(self) -> str:
        """What to call it in public."""
        if self.repository is None:
            whence = f" converted from {self.converted_from}," if self.converted_from else ""
            return f"a model{whence} whose weights have sha256 {self.weights_sha256}"
        return f"{self.repository} at {self.commit}" if self.commit else f"{self.repository}, which comes with vqhit"

    @property
    def address(self) -> str | None:
        """What `init_from` takes to begin with the very same, anywhere."""
        return f"{self.repository}@{self.commit}" if self.commit else self.repository

    @property
    def on_hub(self) -> str | None:
        """Its id there, if it is from the Hub."""
        return self.repository if self.commit else None


def begin_with(state: TrainingState, config: RunConfig, feed: Feed) -> BegunWith:
    """Give a run at its first step what `init_from` has, and return what that was.

    With `freeze_tokens`, encoder and codebook are those of the model that is there, the average; if the decoder is
    another one, nothing else is taken, and its stem is fitted to the codes of some training images. Raises `ValueError`
    (`ConfigError`, `HubError`, `CheckpointError`) if there is no model, it is damaged, or it does not fit what the run
    trains.
    """
    assert config.init_from is not None
    with distributed.first_here():
        located = _find(config.init_from)
    folder = located.folder
    saved = type(state.model).from_pretrained(folder)
    changed = differences(saved.config.to_dict(), config.model.to_dict())
    if config.freeze_tokens:
        changed = {key: text for key, text in changed.items() if key not in _OF_CODEBOOK_TRAINING}
    decoder = {key for key in changed if key.split(".")[0] in ("stem", "decoder")}
    if unlike := [text for key, text in changed.items() if not (config.freeze_tokens and key in decoder)]:
        raise ConfigError(f"model: init_from {config.init_from} is another one ({', '.join(unlike[:3])})")
    if (theirs := saved.config.image_size) != (mine := config.model.image_size):
        raise ConfigError(f"model: init_from {config.init_from} has images of {theirs} px; this run's are {mine} px")
    taken = [] if decoder else ["the model", *_take_all(state, saved, folder)]
    if config.freeze_tokens:
        _take_tokens(state, saved)
        taken.append("its encoder and codebook, which stay as they are")
        if decoder:
            _fit_stem(state, feed)
    public = located.commit or folder.parent == PACKAGED
    origin = read_origin(folder)
    return BegunWith(
        located.name if public else None,
        located.commit,
        sha256(folder / WEIGHTS_FILE),
        taken,
        origin and origin.text,
    )


def _take_all(state: TrainingState, saved: VQHiT | Generator, folder: Path) -> list[str]:
    """Give a run the weights of the same model, and what there is of its training; returns what that was."""
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
            tensors = _trained(read_tensors(path, _CPU), optimizer.module)
            if name == "model" and _without_tokens(tensors) and not _without_tokens(optimizer.parameters):
                continue  # of a run whose tokens were frozen, as this one's are not
            optimizer.load_fitting(tensors, str(path))
            taken.append(f"the optimizer of the {name}")
    if state.codebook is not None:
        state.codebook.begin_trained()
        if (path := folder / "state.safetensors").is_file() and state.codebook.load_means(read_tensors(path, _CPU)):
            taken.append("the running means of its codes")
    return taken


def _trained(tensors: dict[str, torch.Tensor], module: nn.Module) -> dict[str, torch.Tensor]:
    """An optimizer's state without that of parameters that this run does not train."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {key: tensor for key, tensor in tensors.items() if key.rpartition("/")[0] not in frozen}


def _without_tokens(names: Iterable[str]) -> bool:
    """Whether names of parameters, or what begins with them, are none of encoder and codebook."""
    return not any(name.startswith(VQHiT.token_part_names) for name in names)


def _take_tokens(state: TrainingState, saved: VQHiT | Generator) -> None:
    """Give a run the encoder and codebook of a tokenizer."""
    for model in state.models:
        assert isinstance(model, VQHiT)
        assert isinstance(saved, VQHiT)
        for mine, theirs in zip(model.token_parts, saved.token_parts, strict=True):
            mine.load_state_dict(theirs.state_dict())


def _fit_stem(state: TrainingState, feed: Feed) -> None:
    """Give a new stem outputs of near unit variance for the codes of a trained codebook, whose scale may be any."""
    model = state.model
    if not isinstance(model, VQHiT) or model.config.stem is None:
        return

    def code_rms() -> float:
        images = from_uint8(feed.shown()).to(model.quant_conv.weight)
        return float(model.lookup(model.encode(images)).square().mean().sqrt()) if len(images) else 0.0

    if found := distributed.on_first(code_rms):
        for each in state.models:
            assert isinstance(each, VQHiT)
            each.stem.multiply_weights(model.config.quantizer.code_std / found)


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
