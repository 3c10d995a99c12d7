"""Training: one Trainer, read from top to bottom.

A run is a folder: config.yaml (resolved), metrics.jsonl, grids/*.png, checkpoints/ and, at the end, model/. The same
command continues it from the newest checkpoint.
"""

import json
import math
import time
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from vqhit import checkpoint
from vqhit.config import Config, ConfigError, Count, Decay, NonNegativeInt, Positive, Text
from vqhit.data import CenterCrops, DataConfig, TrainingCrops, list_images, training_batches
from vqhit.hub import select_device, write_atomic
from vqhit.images import compare_grid, from_uint8, to_uint8
from vqhit.layers import reestimate_batch_norm
from vqhit.losses import LossConfig, reconstruction_loss
from vqhit.models import VQHiT, VQHiTConfig, VQHiTOutput
from vqhit.progress import ProgressBar
from vqhit.quantizer import CodebookUsage, DeadCodes

_GRID_IMAGES = 16
# What may change between the start of a run and its continuation; anything else would make it another run.
_CHANGEABLE = {"run_dir", "device", "data.path", "data.workers", "data.cache_images"} | {
    f"train.{key}" for key in ("log_every", "grid_every", "checkpoint_every", "keep_checkpoints", "max_minutes")
}


class OptimizerConfig(Config):
    """Adam, with the paper's settings as defaults (appendix A.5)."""

    learning_rate: Positive = 1e-4
    beta1: Decay = 0.0
    beta2: Decay = 0.99
    schedule: Literal["constant", "cosine"] = "constant"
    """`cosine` falls to zero over the run's steps."""
    warmup_steps: NonNegativeInt = 0


class TrainConfig(Config):
    """Length of a run and what it writes; 0 switches a periodic output off (the last step always saves)."""

    steps: Count
    batch_size: Count
    log_every: Count = 50
    grid_every: NonNegativeInt = 1000
    checkpoint_every: NonNegativeInt = 1000
    keep_checkpoints: Count = 3
    restart_codes_after: NonNegativeInt = 0
    """Move a code that no latent chose for this many steps onto a latent of the batch; 0 never does."""
    batch_norm_batches: NonNegativeInt = 0
    """Batches over which HiT's batch norm statistics are taken before saving and evaluating; 0 keeps running ones."""
    max_minutes: Positive | None = None
    """Stop, with a checkpoint, after this long in one go."""


class RunConfig(Config):
    """A configuration file of `vqhit train`."""

    run_dir: Text
    seed: NonNegativeInt = 0
    device: Text = "auto"
    """`auto` is CUDA if there is a device, else the CPU."""
    model: VQHiTConfig
    data: DataConfig
    loss: LossConfig = Field(default_factory=LossConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    train: TrainConfig


class Trainer:
    """Trains a tokenizer as its configuration says; raises `ConfigError` or `ValueError` before the first step."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.run_dir = Path(config.run_dir)
        self.device = select_device(config.device)
        self.paths = list_images(config.data.path)
        torch.manual_seed(config.seed)
        self.model = VQHiT(config.model).to(self.device).train()
        self.optimizer = torch.optim.Adam(
            self.model.parameters(),
            lr=config.optimizer.learning_rate,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
        )
        self.crops = TrainingCrops(self.paths, config.data, config.model.image_size, config.seed)
        self.usage = CodebookUsage(self.model.codebook_size)
        self.dead_codes = DeadCodes(self.model.codebook_size, config.train.restart_codes_after)
        self.step = 0
        self._claim_run_dir()
        self._resume()

    def run(self) -> Path | None:
        """Train to the last step and return the model's folder; None if `train.max_minutes` ended the run first."""
        config, started = self.config.train, time.monotonic()
        batches = training_batches(self.crops, config.batch_size, self.step, config.steps, self.config.data.workers)
        with ProgressBar("train", config.steps, done=self.step) as bar:
            for batch in batches:
                losses = self.train_step(from_uint8(batch.to(self.device, non_blocking=True)))
                bar.advance(len(batch), loss=losses["loss"])
                self._log(losses, bar.rate)
                out_of_time = config.max_minutes and time.monotonic() - started > 60 * config.max_minutes
                last = out_of_time or self.step == config.steps
                grid = last or _due(self.step, config.grid_every)
                save = last or _due(self.step, config.checkpoint_every)
                if grid or save:
                    self._settle_batch_norm()
                if grid and config.grid_every:
                    self._write_grid()
                if save:
                    self._save()
                if out_of_time:
                    break
        if self.step < config.steps:
            return None
        self.model.eval().save_pretrained(self.run_dir / "model")
        return self.run_dir / "model"

    def train_step(self, images: Tensor) -> dict[str, float]:
        """One update from a batch (B, 3, H, W) in [-1, 1]; returns each loss term and their weighted sum, `loss`."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        output = self.model(images)
        terms = {
            "reconstruction": self.config.loss.reconstruction * reconstruction_loss(output.reconstruction, images),
            "codebook": self.config.loss.codebook * output.codebook_loss,
        }
        loss = torch.stack(list(terms.values())).sum()
        values = {name: float(term.detach()) for name, term in terms.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise ValueError(f"step {self.step}: the {name} loss is {value}; stopped before the update")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.config.train.restart_codes_after:
            self._restart_codes(output)
        self.usage.update(output.tokens)
        self.step += 1
        return {"loss": sum(values.values()), **values}

    def _restart_codes(self, output: VQHiTOutput) -> None:
        codebook = self.model.quantizer.codebook
        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + self.step) % 2**63)
        moved = self.dead_codes.restart(codebook, output.latents, output.tokens, generator).to(self.device)
        for average in ("exp_avg", "exp_avg_sq"):  # a moved code has no past
            self.optimizer.state[codebook][average][moved] = 0

    def learning_rate(self, step: int) -> float:
        """Learning rate of the update after `step` steps: linear warm-up, then constant or cosine."""
        config, steps = self.config.optimizer, self.config.train.steps
        rate = config.learning_rate
        if step < config.warmup_steps:
            return rate * (step + 1) / config.warmup_steps
        if config.schedule == "cosine":
            done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
            return rate * 0.5 * (1 + math.cos(math.pi * done))
        return rate

    def _claim_run_dir(self) -> None:
        """Write the resolved configuration, or check that the run that is already there is this one."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / "config.yaml"
        if path.exists() and any((self.run_dir / "checkpoints").glob("step_*")):
            try:
                there = yaml.safe_load(path.read_text())
            except yaml.YAMLError:
                there = None
            if not isinstance(there, dict):
                raise ConfigError("damaged: it holds no configuration; put the run's own back", str(path))
            before, now = _flat(there), _flat(self.config.to_dict())
            changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
            if changed := [key for key in changed if key not in _CHANGEABLE]:
                differences = ", ".join(f"{key}: {before.get(key)} there, {now.get(key)} now" for key in changed[:3])
                raise ConfigError(f"run_dir {self.run_dir} holds another run ({differences}); choose another run_dir")
        write_atomic(path, self.config.to_yaml().encode())

    def _resume(self) -> None:
        folder = checkpoint.newest(self.run_dir / "checkpoints")
        if folder is not None:
            loaded = VQHiT.from_pretrained(folder)
            self.model.load_state_dict(loaded.state_dict())
            _load_optimizer(self.optimizer, self.model, load_file(folder / "optimizer.safetensors"))
            state = load_file(folder / "state.safetensors")
            self.step, self.usage.counts = int(state["step"]), state["usage_counts"]
            self.dead_codes.unused_steps = state["unused_steps"]
        metrics = self.run_dir / "metrics.jsonl"
        if metrics.exists():  # drop what came after the checkpoint: those steps are trained again
            kept = [line for line in metrics.read_text().splitlines() if _step_of(line) <= self.step]
            write_atomic(metrics, "".join(line + "\n" for line in kept).encode())

    def _settle_batch_norm(self) -> None:
        """Statistics of the weights as they are, over the first batches of the run's order."""
        size, batches = self.config.train.batch_size, self.config.train.batch_norm_batches
        if batches:
            order = training_batches(self.crops, size, 0, batches, self.config.data.workers)
            reestimate_batch_norm(self.model, (from_uint8(batch.to(self.device)) for batch in order))

    def _save(self) -> None:
        root = self.run_dir / "checkpoints"
        with checkpoint.writing(root, self.step) as folder:
            self.model.save_pretrained(folder)
            save_file(_optimizer_tensors(self.optimizer, self.model), folder / "optimizer.safetensors")
            state = {
                "step": torch.tensor(self.step),
                "usage_counts": self.usage.counts,
                "unused_steps": self.dead_codes.unused_steps,
            }
            save_file(state, folder / "state.safetensors")
        checkpoint.prune(root, self.step, self.config.train.keep_checkpoints)

    def _log(self, losses: dict[str, float], images_per_s: float) -> None:
        if self.step % self.config.train.log_every and self.step != self.config.train.steps:
            return
        record: dict[str, float] = {
            "step": self.step,
            "images": self.step * self.config.train.batch_size,
            **losses,
            "learning_rate": self.learning_rate(self.step - 1),
            "images_per_s": round(images_per_s, 2),
        }
        if int(self.usage.counts.sum()) >= len(self.paths) * math.prod(self.config.model.token_grid):  # an epoch
            record |= {"codebook_usage": self.usage.usage, "codebook_perplexity": self.usage.perplexity}
            self.usage.counts.zero_()
        with (self.run_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    @torch.no_grad()
    def _write_grid(self) -> None:
        """Center crops of up to 16 training images, evenly spaced in the list, above their reconstructions."""
        chosen = self.paths[:: max(1, len(self.paths) // _GRID_IMAGES)][:_GRID_IMAGES]
        crops = CenterCrops(chosen, self.config.model.image_size)
        originals = torch.stack([crops[index] for index in range(len(crops))])
        self.model.eval()
        reconstructions = to_uint8(self.model.reconstruct(from_uint8(originals).to(self.device))).cpu()
        self.model.train()
        folder = self.run_dir / "grids"
        folder.mkdir(exist_ok=True)
        pairs = list(zip(originals, reconstructions, strict=True))
        compare_grid(pairs).save(folder / f"step_{self.step:09d}.png")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _step_of(metrics_line: str) -> float:
    """Step of a line of metrics.jsonl; infinite for one that a kill cut off."""
    try:
        return float(json.loads(metrics_line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _optimizer_tensors(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, Tensor]:
    """Adam's state by parameter name: `<parameter>/exp_avg`, `/exp_avg_sq`, `/step`."""
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, model: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    names = [name for name, _ in model.named_parameters()]
    state = optimizer.state_dict()
    state["state"] = {
        index: {key: tensors[f"{name}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        for index, name in enumerate(names)
        if f"{name}/step" in tensors
    }
    optimizer.load_state_dict(state)
