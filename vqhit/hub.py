"""Strict saving and loading of models as a folder: config.json and model.safetensors, nothing that executes.

Some small trained models come with the package, in its folder `pretrained`, and are found by name; `owner/name` is one
on the Hugging Face Hub. Loading refuses what does not fit exactly: a missing, extra or misshapen tensor, an unknown or
ill-typed configuration key, another class's folder, a newer format.

The methods are called as those of huggingface_hub's ModelHubMixin, which is not their base: its loading lets missing
tensors and misspelt keys pass, and its import alone costs a third of a second.
"""

import json
import tempfile
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from vqhit import __version__
from vqhit.card import CARD_FILE, GRID_FILE, ModelKind, model_card
from vqhit.config import Config, ConfigError
from vqhit.files import read_json, write_atomic
from vqhit.repository import HubError, download, split_id, upload

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
RUN_CONFIG_FILE = "training.yaml"
"""The settings of the run that trained a published model."""
STATE_FILES = (
    "trained.safetensors",
    "discriminator.safetensors",
    "model_optimizer.safetensors",
    "discriminator_optimizer.safetensors",
    "state.safetensors",
)
"""What a checkpoint has besides the model."""
STATE_LIST_FILE = "training_state.json"
"""Which of them are published with a model, their sha256 and the model's."""
PUBLISHED = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, GRID_FILE, RUN_CONFIG_FILE, STATE_LIST_FILE, *STATE_FILES)
"""All that is ever published: what an older push left of these, and a new one has not, is removed."""
_FLOATING = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
_OPTIMIZED = "the model is optimized for inference, its layers merged, which cannot be undone"
PACKAGED = Path(__file__).parent / "pretrained"
"""The models that come with the package, a folder each."""


class Located(NamedTuple):
    """Where a model is."""

    folder: Path
    name: str
    """The folder, the packaged model's name, or the id on the Hub."""
    commit: str | None
    """Of a repository on the Hub."""


class Pretrained(nn.Module):
    """A module built from one `Config`, with `save_pretrained`, `from_pretrained` and `push_to_hub`."""

    config_class: ClassVar[type[Config]]
    model_kind: ClassVar[ModelKind]
    """What its model card says of it."""
    config: Any
    optimized = False
    """Whether `optimize_for_inference` was called."""

    def optimize_for_inference(self, *, compile: bool = False) -> Self:
        """Make this model faster, in place, where that cannot be undone; returns it, in eval mode, without gradients.

        HiT's batch norm, and layer norm's affine part, go into the linear layers that read them, and its last MLP into
        the layer to RGB; VQGAN's convolutions become channels-last. In float32 images move by rounding alone (1e-5),
        and so do latents: a token may change where two codes are equally near. For other precisions call it before
        `to(dtype)`. Such a model can be neither trained nor saved, and runs at its best without gradients, as in
        `encode`, `decode` and `sample`, or under `torch.no_grad()`. Models are not optimised when they are loaded.

        With `compile`, `torch.compile` gets its parts, on the CPU all but VQGAN's encoder, which would be slower. The
        first images take a minute or more, and so do the first ones of another size, and the first batch of one among
        larger ones or the reverse; other batch sizes are the same code.
        """
        if not self.optimized:
            self._optimize()
            self.eval().requires_grad_(False)  # the layers that are new, too
            self.optimized = True
        if compile:
            for part in self.compiled_parts:
                part.compile()
        return self

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """What `torch.compile` gets, each by itself."""
        return [self]

    def _optimize(self) -> None:
        """What a class does; nothing by default."""

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`; raises `ValueError` if the model is optimized for inference."""
        if mode and self.optimized:
            raise ValueError(f"{_OPTIMIZED}; train the model as it was loaded")
        return super().train(mode)

    def save_pretrained(self, directory: Path | str) -> None:
        """Write config.json and model.safetensors; each file is complete or absent, never half-written.

        Raises `ValueError` if the model is optimized for inference.
        """
        if self.optimized:
            raise ValueError(f"{_OPTIMIZED}; save the model as it was loaded")
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        head = {"model": type(self).__name__, "format_version": FORMAT_VERSION, "vqhit_version": __version__}
        text = json.dumps({**head, "config": self.config.to_dict()}, indent=2) + "\n"
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_atomic(directory / WEIGHTS_FILE, save(weights, metadata={"format": "pt"}))
        write_atomic(directory / CONFIG_FILE, text.encode())

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: Path | str | None = None,
        local_files_only: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Load a model in eval mode: a folder, a packaged model by its name, or `owner/name` of the Hugging Face Hub.

        A folder that is there goes first. Of the Hub, configuration and weights are of one commit, that of `revision`
        (a branch, tag or commit; also as `owner/name@revision`); what was fetched before is found without a network.
        `device` may also be `auto`: CUDA where there is one. `dtype` converts the floating-point tensors; without it
        they become float32, unless all are float64 on disk. Raises `ValueError` (`ConfigError`, `HubError`) naming the
        key, tensor or file that does not fit, or what the Hub does not give.
        """
        where = locate(path, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        directory = where.folder
        config = cls._read_config(directory / CONFIG_FILE)
        try:
            with torch.device("meta"):
                model = cls(config)
        except RuntimeError as error:
            raise ConfigError(f"no such model can be built ({error})", str(directory / CONFIG_FILE)) from None
        weights = read_tensors(directory / WEIGHTS_FILE, select_device(device))
        check_tensors(model.state_dict(), weights, directory / WEIGHTS_FILE)
        if dtype is None:
            found = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
            dtype = torch.float64 if found == {torch.float64} else torch.float32
        model.load_state_dict(weights, strict=True, assign=True)
        return model.to(select_device(device), dtype).eval()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        branch: str | None = None,
        private: bool = False,
        token: str | bool | None = None,
        commit_message: str = "Upload a model of vqhit",
        license: str | None = None,
    ) -> str:
        """Put the model and a short card into a repository of the Hub, in one commit; returns the commit's address.

        The repository, and `branch`, are made if they are not there; what an older push left there of another model,
        its card and its training's state, is replaced or removed. The card says what the model is; that of `vqhit push`
        of a run also how it was trained and what was measured. Raises `HubError` for what the Hub does not take.
        """
        name = repository_id(repo_id)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            files: dict[str, Path | bytes] = {file: Path(folder) / file for file in (CONFIG_FILE, WEIGHTS_FILE)}
            card = model_card(self.model_kind, name, self.summary(), branch=branch, license=license)
            files[CARD_FILE] = card.encode()
            return upload(
                name,
                files,
                replaces=PUBLISHED,
                branch=branch,
                private=private,
                token=token,
                message=commit_message,
            )

    def summary(self) -> dict[str, str]:
        """What the model is, for its card: a name and a value each."""
        return {"Parameters": f"{sum(parameter.numel() for parameter in self.parameters()) / 1e6:.2f} million"}

    @classmethod
    def _read_config(cls, path: Path) -> Any:
        values = _read_head(path)
        found, version = values.get("format_version"), values.get("vqhit_version")
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            raise ConfigError(f"format_version: found {found!r}; expected {FORMAT_VERSION}", str(path))
        if found > FORMAT_VERSION:
            raise ConfigError(
                f"format_version {found} is newer than this vqhit ({__version__}) reads, {FORMAT_VERSION}; install "
                f"vqhit {version} or later",
                str(path),
            )
        if (name := values.get("model")) != cls.__name__:
            raise ConfigError(f"holds a {name}, not a {cls.__name__}", str(path))
        if unknown := sorted(values.keys() - {"model", "format_version", "vqhit_version", "config"}):
            raise ConfigError(f"unknown key {', '.join(map(repr, unknown))}", str(path))
        return cls.config_class.from_dict(values["config"], str(path))


def select_device(name: torch.device | str) -> torch.device:
    """Return a device by name, `auto` for CUDA where there is one; raises `ConfigError` if it cannot be used here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
        if device.type == "meta":
            raise RuntimeError("it holds no data")
        return device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {str(name)!r} cannot be used here ({str(error).splitlines()[0]})") from None


def locate(
    path: Path | str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Path | str | None = None,
    local_files_only: bool = False,
) -> Located:
    """Find a model's folder, fetched from the Hub if need be; the arguments are those of `from_pretrained`.

    A folder goes first, except that one without a config.json does not hide a packaged model; a `Path` is never a name.
    Raises `ValueError` if there is no such model, `HubError` for what the Hub does not give.
    """
    directory = Path(path)
    packaged = {folder.name: folder for folder in sorted(PACKAGED.glob("*/"))}
    try:
        on_hub = split_id(path) if isinstance(path, str) and not directory.exists() else None
    except HubError as error:
        raise HubError(f"{error}; and there is no folder {path}") from None
    if on_hub is not None:
        name, named = on_hub
        if revision is not None and named is not None:
            raise ValueError(f"{path}: names a revision, and revision {revision!r} is given; leave one out")
        try:
            folder, commit = download(
                name,
                (CONFIG_FILE, WEIGHTS_FILE),
                revision=named if revision is None else revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        except HubError as error:
            raise HubError(f"{error}; and there is no folder {path}") from error.__cause__
        return Located(folder, name, commit)
    if isinstance(path, str) and path in packaged and not (directory / CONFIG_FILE).exists():
        directory = packaged[path]
    elif not directory.is_dir():
        raise ValueError(
            f"{directory}: no such folder, and no id on the Hugging Face Hub (owner/name[@revision]); a model "
            f"folder holds {CONFIG_FILE} and {WEIGHTS_FILE}; with the package comes {', '.join(packaged)}"
        )
    if revision is not None:
        raise ValueError(f"revision {revision!r}: {path} is a folder, not a repository of the Hub; leave it out")
    return Located(directory, str(path), None)


def repository_id(text: str) -> str:
    """An id to publish under, `owner/name`; raises `HubError` for anything else."""
    found = split_id(text)
    if found is None or found[1] is not None:
        raise HubError(
            f"{text!r}: no id of a repository on the Hub; allowed: owner/name, of letters, digits, - _ and ."
        )
    return found[0]


def saved_class(folder: Path) -> str | None:
    """Name of the class of the model in a folder, if its config.json says one; raises as `from_pretrained`."""
    name = _read_head(folder / CONFIG_FILE).get("model")
    return name if isinstance(name, str) else None


def _read_head(path: Path) -> dict[str, Any]:
    """A config.json with its `config` mapping."""
    try:
        values = read_json(path)
    except FileNotFoundError:
        there = path.parent / "model" / path.name
        raise ConfigError(f"no such file{f'; there is {there}' if there.exists() else ''}", str(path)) from None
    except ValueError as error:
        raise ConfigError(str(error), str(path)) from None
    if not isinstance(values, dict) or not isinstance(values.get("config"), dict):
        raise ConfigError("not written by vqhit: it has no 'config' mapping", str(path))
    return values


def read_tensors(path: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """Read a safetensors file; raises `ValueError` if it is missing or damaged."""
    try:
        weights: dict[str, torch.Tensor] = load_file(path, device=str(device))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged, or not a safetensors file ({error})") from None
    return weights


def check_tensors(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], path: Path) -> None:
    """Raise `ValueError` naming the first tensor of a file that is missing, extra, misshapen or not finite."""
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"{path}: missing tensor {_some(missing)}")
    if extra := sorted(found.keys() - expected.keys()):
        raise ValueError(f"{path}: extra tensor {_some(extra)}")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: tensor {name} is {tuple(found[name].shape)}; the configuration says {tuple(tensor.shape)}"
            )
        if found[name].dtype not in (_FLOATING if tensor.dtype.is_floating_point else {tensor.dtype}):
            raise ValueError(f"{path}: tensor {name} is {found[name].dtype}; expected {tensor.dtype}")
        values = found[name].float() if found[name].itemsize == 1 else found[name]  # float8 has no isfinite
        if not values.isfinite().all():
            raise ValueError(f"{path}: tensor {name} holds values that are not finite")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
