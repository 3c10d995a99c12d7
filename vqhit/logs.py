"""Where a run's numbers and pictures go besides its folder: TensorBoard and Weights & Biases, on request.

A number of metrics.jsonl is shown as metrics/NAME, one of evaluations.jsonl as evaluations/NAME, both over the step.
"""

import secrets
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vqhit.config import Config, ConfigError, Flag, Text
from vqhit.files import write_atomic


class LogConfig(Config):
    """Besides the lines of JSON, which are always written."""

    tensorboard: Flag = False
    """Write run_dir/tensorboard."""
    wandb: Text | None = None
    """Project of Weights & Biases; its own environment variables (WANDB_MODE=offline, say) hold."""


class Logs:
    """Passes records and pictures on; raises `ConfigError` if a package that is asked for is missing."""

    def __init__(self, config: LogConfig, folder: Path, settings: dict[str, Any], step: int) -> None:
        self._tensorboard = _tensorboard(folder, step) if config.tensorboard else None
        self._wandb = None if config.wandb is None else _wandb(config.wandb, folder, settings)

    def record(self, file: str, record: dict[str, Any]) -> None:
        """Pass on a record that was appended to `file`."""
        kind = Path(file).stem
        numbers = {f"{kind}/{name}": value for name, value in record.items() if name != "step"}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log({**numbers, "step": record["step"]})

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Pass on an RGB picture."""
        if self._tensorboard is not None:
            self._tensorboard.add_image(name, np.asarray(picture), step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(picture), "step": step})

    def close(self) -> None:
        """Write what is still on its way."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("log.tensorboard needs another package: pip install tensorboard") from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


def _wandb(project: str, folder: Path, settings: dict[str, Any]) -> Any:
    """The run of Weights & Biases that belongs to the folder; a continued run goes on in it.

    Steps that are trained again after a kill are logged again: it takes nothing back.
    """
    try:
        import wandb
    except ImportError:
        raise ConfigError("log.wandb needs another package: pip install wandb") from None
    known = folder / "wandb_id"
    if not known.exists():
        write_atomic(known, secrets.token_hex(4).encode())
    try:
        run = wandb.init(
            project=project, name=folder.name, id=known.read_text(), resume="allow", dir=str(folder), config=settings
        )
    except Exception as error:  # no key, no network, a name that it does not allow
        raise ConfigError(f"log.wandb {project}: {' '.join(str(error).split())}") from None
    run.define_metric("*", step_metric="step")
    return run
