"""Strict saving and loading of models as a folder: config.json and model.safetensors, nothing that executes.

Some small trained models come with the package, in its folder `pretrained`, and are found by name. Loading refuses what
does not fit exactly: a missing, extra or misshapen tensor, an unknown or ill-typed configuration key, another class's
folder, a newer format.
"""

import json
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from vqhit import __version__
from vqhit.config import Config, ConfigError
from vqhit.files import write_atomic

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PACKAGED = Path(__file__).parent / "pretrained"
"""The models that come with the package, a folder each."""


class Pretrained(nn.Module):
    """A module built from one `Config`, with `save_pretrained` and `from_pretrained`."""

    config_class: ClassVar[type[Config]]
    config: Any

    def save_pretrained(self, directory: Path | str) -> None:
        """Write config.json and model.safetensors; each file is complete or absent, never half-written."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        head = {"model": type(self).__name__, "format_version": FORMAT_VERSION, "vqhit_version": __version__}
        text = json.dumps({**head, "config": self.config.to_dict()}, indent=2) + "\n"
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_atomic(directory / WEIGHTS_FILE, save(weights, metadata={"format": "pt"}))
        write_atomic(directory / CONFIG_FILE, text.encode())

    @classmethod
    def from_pretrained(
        cls, path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> Self:
        """Load a folder written by `save_pretrained`, or a model that comes with the package by its name, in eval mode.

        A folder with a config.json goes before a name. `device` may also be `auto`: CUDA where there is one. `dtype`
        converts the floating-point tensors; without it they become float32, unless all are float64 on disk. Raises
        `ValueError` (or `ConfigError`) naming the key, tensor or file that does not fit.
        """
        directory = find_model(path)
        config = cls._read_config(directory / CONFIG_FILE)
        with torch.device("meta"):
            model = cls(config)
        weights = _read_weights(directory / WEIGHTS_FILE, select_device(device))
        _check_tensors(model.state_dict(), weights, directory / WEIGHTS_FILE)
        if dtype is None:
            found = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
            dtype = torch.float64 if found == {torch.float64} else torch.float32
        model.load_state_dict(weights, strict=True, assign=True)
        return model.to(select_device(device), dtype).eval()

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


def find_model(path: Path | str) -> Path:
    """Return a model's folder: the one given, or that of a packaged model, of which only a `str` is the name.

    A folder of that name that holds a config.json goes first. Raises `ValueError` if there is neither.
    """
    directory = Path(path)
    packaged = {folder.name: folder for folder in sorted(PACKAGED.glob("*/"))}
    if isinstance(path, str) and path in packaged and not (directory / CONFIG_FILE).exists():
        return packaged[path]
    if directory.is_dir():
        return directory
    raise ValueError(
        f"{directory}: no such folder; a model folder holds {CONFIG_FILE} and {WEIGHTS_FILE} (with the package comes "
        f"{', '.join(packaged)}; this version does not yet load from the Hugging Face Hub)"
    )


def saved_class(path: Path | str) -> str | None:
    """Name of the class of the model in a folder, if its config.json says one; raises as `from_pretrained`."""
    name = _read_head(find_model(path) / CONFIG_FILE).get("model")
    return name if isinstance(name, str) else None


def _read_head(path: Path) -> dict[str, Any]:
    """A config.json with its `config` mapping."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("no such file", str(path)) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"not a readable JSON file: {error}", str(path)) from None
    if not isinstance(values, dict) or not isinstance(values.get("config"), dict):
        raise ConfigError("not written by vqhit: it has no 'config' mapping", str(path))
    return values


def _read_weights(path: Path, device: torch.device) -> dict[str, torch.Tensor]:
    try:
        weights: dict[str, torch.Tensor] = load_file(path, device=str(device))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged, or not a safetensors file ({error})") from None
    return weights


def _check_tensors(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], path: Path) -> None:
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"{path}: missing tensor {_some(missing)}")
    if extra := sorted(found.keys() - expected.keys()):
        raise ValueError(f"{path}: extra tensor {_some(extra)}")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: tensor {name} is {tuple(found[name].shape)}; the configuration says {tuple(tensor.shape)}"
            )
        if found[name].dtype.is_floating_point != tensor.dtype.is_floating_point:
            raise ValueError(f"{path}: tensor {name} is {found[name].dtype}; expected {tensor.dtype}")
        values = found[name].float() if found[name].itemsize == 1 else found[name]  # float8 has no isfinite
        if not values.isfinite().all():
            raise ValueError(f"{path}: tensor {name} holds values that are not finite")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
