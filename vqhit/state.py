"""All that a step of training changes: networks, averages, optimizers, codebook, counters; to files and back."""

import math
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from vqhit import checkpoint, distributed
from vqhit.codebook import CodebookTraining, CodebookUsage
from vqhit.config import ConfigError
from vqhit.discriminator import Discriminator
from vqhit.ema import EMA
from vqhit.files import sha256, write_atomic
from vqhit.generator import Generator
from vqhit.models import VQHiT, build_model
from vqhit.norms import BatchNorm
from vqhit.objective import GANLossConfig, LossConfig
from vqhit.optimizer import Optimizer
from vqhit.quantizer import Quantizer
from vqhit.recipe import RunConfig


class TrainingState:
    """The state of a run at its first step, drawn from the run's seed; the same in every process."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.step = 0
        self.r1 = math.nan
        """The latest R1, which lazy R1 does not compute at every step."""
        self.images = 0
        """Number of training images, on which their order depends."""
        self.perceptual_sha256 = _perceptual_sha256(config.loss)
        self.synchronized = config.train.sync_batch_norm
        torch.manual_seed(config.seed)
        self.model = build_model(config.model).to(device)
        if config.freeze_tokens and isinstance(self.model, VQHiT):
            self.model.freeze_tokens()
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, BatchNorm):
                module.synchronized = self.synchronized
        self.optimizers = {"model": Optimizer(self.model, config.optimizer, config.train.steps)}
        self.discriminator: Discriminator | None = None
        if config.trains_discriminator and config.discriminator is not None:
            self.discriminator = Discriminator(config.discriminator).to(device)
            settings = config.discriminator_optimizer or config.optimizer
            start = config.loss.discriminator_start_step if isinstance(config.loss, LossConfig) else 0
            self.optimizers["discriminator"] = Optimizer(self.discriminator, settings, config.train.steps, start)
        self.ema = EMA(self.model, config.ema) if config.ema.decay else None
        self.usage: CodebookUsage | None = None
        """Of a tokenizer, in this process, since the last epoch ended."""
        self.codebook: CodebookTraining | None = None
        """Of a learned codebook that is trained."""
        if isinstance(self.model, VQHiT):
            self.usage = CodebookUsage(self.model.codebook_size)
            if isinstance(self.model.quantizer, Quantizer) and not config.freeze_tokens:
                self.codebook = CodebookTraining(self.model.quantizer, config.train.restart_codes_after, config.seed)

    @property
    def evaluated_model(self) -> VQHiT | Generator:
        """The model that is evaluated and saved: the average if there is one."""
        return self.model if self.ema is None else self.ema.model

    @property
    def models(self) -> list[VQHiT | Generator]:
        """The model that is trained, and its average if there is one."""
        return [self.model] if self.ema is None else [self.model, self.ema.model]

    def modules(self) -> dict[str, nn.Module]:
        """The modules of a checkpoint by file name; `model` is the one to use, `trained` the one behind the average."""
        modules: dict[str, nn.Module] = {"model": self.evaluated_model}
        if self.ema is not None:
            modules["trained"] = self.model
        if self.discriminator is not None:
            modules["discriminator"] = self.discriminator
        return modules

    def check_processes(self) -> None:
        """Raise `SharedError` if the weights are not the same in all processes."""
        modules = [self.model, *([] if self.discriminator is None else [self.discriminator])]
        distributed.check_equal(
            {f"{type(m).__name__} {name}": tensor for m in modules for name, tensor in m.named_parameters()}
        )

    def share_statistics(self) -> None:
        """Make batch norm's statistics the means over all processes, where each has its own."""
        if self.synchronized:
            return
        for model in self.models:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    distributed.mean(buffer)

    def save(self, folder: Path, usage: CodebookUsage | None) -> None:
        """Write all files of a checkpoint, as one process; `usage` is that of all."""
        self.evaluated_model.save_pretrained(folder)
        for name, module in self.modules().items():
            if name != "model":
                _save_tensors(module.state_dict(), folder / f"{name}.safetensors")
        for name, optimizer in self.optimizers.items():
            _save_tensors(optimizer.state_dict(), folder / f"{name}_optimizer.safetensors")
        state = {
            "step": torch.tensor(self.step),
            "images": torch.tensor(self.images),
            "r1": torch.tensor(self.r1, dtype=torch.float64),
            "perceptual_sha256": self.perceptual_sha256,
        }
        if usage is not None:
            state["usage_counts"] = usage.counts
        if self.codebook is not None:
            state |= self.codebook.state_dict()
        _save_tensors(state, folder / "state.safetensors")

    def load(self, folder: Path) -> None:
        """Take back what `save` wrote; raises `CheckpointError` if the files are not those of such a run."""
        try:
            self._load(folder)
        except (FileNotFoundError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise checkpoint.CheckpointError(
                f"{folder}: of another version of vqhit, or another run ({reason}); choose another run_dir"
            ) from None

    def _load(self, folder: Path) -> None:
        for name, module in self.modules().items():
            module.load_state_dict(load_file(folder / f"{name}.safetensors"))
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(load_file(folder / f"{name}_optimizer.safetensors"))
        state = load_file(folder / "state.safetensors")
        self.step, self.r1 = int(state["step"]), float(state["r1"])
        if self.usage is not None and distributed.is_first():  # the counts are those of all processes
            self.usage.counts = state["usage_counts"]
        if self.codebook is not None:
            self.codebook.load_state_dict(state)
        if (images := int(state["images"])) != self.images and distributed.is_first():
            warnings.warn(
                f"there are {self.images} training images, and {images} when the run began: their order is another now",
                stacklevel=2,
            )
        if not torch.equal(state["perceptual_sha256"], self.perceptual_sha256):
            raise ConfigError("loss.perceptual_weights: another file than the run was started with")


def _perceptual_sha256(loss: LossConfig | GANLossConfig) -> Tensor:
    """Hash of the file of weights where the user alone decides what is in it, as bytes."""
    if isinstance(loss, GANLossConfig):
        return torch.empty(0, dtype=torch.uint8)
    if not loss.perceptual or loss.perceptual_network != "features" or loss.perceptual_weights is None:
        return torch.empty(0, dtype=torch.uint8)
    digest = sha256(Path(loss.perceptual_weights).expanduser())
    return torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    write_atomic(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))
