"""Training: one Trainer, read from top to bottom.

A run is a folder (see `runs.py`). The same command continues it from the newest checkpoint.
"""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vqhit import checkpoint
from vqhit.codebook import CodebookTraining, CodebookUsage
from vqhit.config import ConfigError
from vqhit.data import CenterCrops, TrainingCrops, list_images, training_batches
from vqhit.discriminator import Discriminator
from vqhit.ema import EMA
from vqhit.evaluate import evenly_spaced, measure
from vqhit.files import sha256
from vqhit.hub import select_device
from vqhit.images import compare_grid, from_uint8, to_uint8
from vqhit.layers import reestimate_batch_norm
from vqhit.models import VQHiT
from vqhit.objective import TokenizerObjective
from vqhit.optimizer import Optimizer
from vqhit.perceptual import check_image_size, perceptual_network
from vqhit.progress import ProgressBar
from vqhit.quantizer import Quantizer
from vqhit.recipe import CHANGEABLE, RunConfig
from vqhit.runs import EVALUATIONS, METRICS, RunFolder

_GRID_IMAGES = 16


class Trainer:
    """Trains a tokenizer as its configuration says; raises `ConfigError` or `ValueError` before the first step."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.folder = RunFolder(config.run_dir)
        self.device = select_device(config.device)
        self.paths = list_images(config.data.path)
        self.validation_paths = self._validation_paths()
        loss, train = config.loss, config.train
        self.micro_batch_size = train.micro_batch_size or train.batch_size
        perceptual: torch.nn.Module | None = None
        if loss.perceptual:
            perceptual = perceptual_network(loss.perceptual_network, loss.perceptual_weights, loss.perceptual_features)
            check_image_size(perceptual.to(self.device), config.model.image_size)
        self.perceptual_sha256 = self._perceptual_sha256()
        if self.device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = train.allow_tf32
        torch.manual_seed(config.seed)
        self.model = VQHiT(config.model).to(self.device).train()
        self.optimizers = {"model": Optimizer(self.model, config.optimizer, train.steps)}
        self.discriminator: Discriminator | None = None
        if loss.adversarial and config.discriminator is not None:
            self.discriminator = Discriminator(config.discriminator).to(self.device)
            settings = config.discriminator_optimizer or config.optimizer
            self.optimizers["discriminator"] = Optimizer(
                self.discriminator, settings, train.steps, loss.discriminator_start_step
            )
        self.ema = EMA(self.model, config.ema) if config.ema.decay else None
        if train.compile:  # after the average's copy, which is not compiled
            self.model.encoder.compile()
            self.model.stem.compile()
            self.model.backbone.compile()
            if perceptual is not None:
                perceptual.compile()
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=train.precision == "bfloat16")
        self.objective = TokenizerObjective(loss, self.model, self.discriminator, perceptual, autocast)
        self.crops = TrainingCrops(self.paths, config.data, config.model.image_size, config.seed)
        self.usage = CodebookUsage(self.model.codebook_size)
        self.codebook: CodebookTraining | None = None
        if isinstance(self.model.quantizer, Quantizer):
            self.codebook = CodebookTraining(self.model.quantizer, train.restart_codes_after, config.seed)
        self.step = 0
        self.r1 = math.nan
        self.folder.check(config, CHANGEABLE)
        self._resume()
        self.folder.start(config, self.step)

    def _validation_paths(self) -> list[Path]:
        config = self.config
        if not config.train.evaluate_every or config.data.validation_path is None:
            return []
        return evenly_spaced(list_images(config.data.validation_path), config.train.evaluate_images)

    @property
    def evaluated_model(self) -> VQHiT:
        """The model that is evaluated and saved: the average if there is one."""
        return self.model if self.ema is None else self.ema.model

    def run(self) -> Path | None:
        """Train to the last step and return the model's folder; None if `train.max_minutes` ended the run first."""
        config, started = self.config.train, time.monotonic()
        batches = training_batches(self.crops, config.batch_size, self.step, config.steps, self.config.data.workers)
        with ProgressBar("train", config.steps, done=self.step) as bar:
            for batch in batches:
                values = self.train_step(from_uint8(batch.to(self.device, non_blocking=True)))
                bar.advance(len(batch), loss=values["loss"])
                self._log(values, bar.rate)
                out_of_time = config.max_minutes and time.monotonic() - started > 60 * config.max_minutes
                last = out_of_time or self.step == config.steps
                grid = config.grid_every and (last or _due(self.step, config.grid_every))
                evaluation = config.evaluate_every and (last or _due(self.step, config.evaluate_every))
                save = last or _due(self.step, config.checkpoint_every)
                if grid or evaluation or save:
                    self._settle_batch_norm()
                if grid:
                    self._write_grid()
                if evaluation:
                    self._evaluate()
                if save:
                    self._save()
                if out_of_time:
                    break
        if self.step < config.steps:
            return None
        self.evaluated_model.save_pretrained(self.folder.model)
        return self.folder.model

    def train_step(self, images: Tensor) -> dict[str, float]:
        """One update of all networks from a batch (B, 3, H, W) in [-1, 1].

        Returns what `TokenizerObjective.backward` found, averaged over the micro-batches, and the norms of the
        gradients. Raises `ValueError`, before any weight is updated, for a loss or a gradient that is not finite.
        """
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        latents: list[Tensor] = []
        tokens: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        for part in images.split(self.micro_batch_size):
            share = len(part) / len(images)
            with self._graph_kept():
                output, found = self.objective.backward(part, self.step, share)
            latents.append(output.latents)
            tokens.append(output.tokens)
            sums = {name: share * value + sums.get(name, 0) for name, value in found.items()}
        values = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))  # one wait for the device
        try:
            _check_finite(values)
            norms = {f"{name}_gradient_norm": each.gradient_norm() for name, each in self.optimizers.items()}
        except ValueError as error:
            raise ValueError(f"step {self.step}: {error}; stopped before the update") from None
        for optimizer in self.optimizers.values():
            optimizer.step(self.step)
        self._update_codebook(torch.cat(latents), torch.cat(tokens))
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model, self.step)
        self.r1 = values.get("r1", self.r1)
        return values | norms

    def _graph_kept(self) -> AbstractContextManager[None]:
        """With the adaptive weight, gradients pass backward through the compiled decoder more than once."""
        if self.config.train.compile and self.config.loss.adaptive:
            return torch._functorch.config.patch(donated_buffer=False)
        return nullcontext()

    def _update_codebook(self, latents: Tensor, tokens: Tensor) -> None:
        """Count the codes of the whole batch, then what `CodebookTraining` does; a moved code has no past."""
        self.usage.update(tokens)
        if self.codebook is None:
            return
        moved = self.codebook.update(latents, tokens, self.step)
        if len(moved):
            codebook = self.codebook.codebook
            self.optimizers["model"].reset_rows(codebook, moved)
            if self.ema is not None:
                self.ema.model.get_parameter("quantizer.codebook").data[moved] = codebook.data[moved]

    def _resume(self) -> None:
        folder = checkpoint.newest(self.folder.checkpoints)
        if folder is None:
            return
        try:
            self._load(folder)
        except (FileNotFoundError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise checkpoint.CheckpointError(
                f"{folder}: of another version of vqhit, or another run ({reason}); choose another run_dir"
            ) from None

    def _load(self, folder: Path) -> None:
        for name, module in self._modules().items():
            module.load_state_dict(load_file(folder / f"{name}.safetensors"))
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(load_file(folder / f"{name}_optimizer.safetensors"))
        state = load_file(folder / "state.safetensors")
        self.step, self.usage.counts = int(state["step"]), state["usage_counts"]
        self.r1 = float(state["r1"])
        if self.codebook is not None:
            self.codebook.load_state_dict(state)
        if not torch.equal(state["perceptual_sha256"], self.perceptual_sha256):
            raise ConfigError("loss.perceptual_weights: another file than the run was started with")

    def _perceptual_sha256(self) -> Tensor:
        """Hash of the file of weights where the user alone decides what is in it, as bytes."""
        loss = self.config.loss
        if not loss.perceptual or loss.perceptual_network != "features" or loss.perceptual_weights is None:
            return torch.empty(0, dtype=torch.uint8)
        digest = sha256(Path(loss.perceptual_weights).expanduser())
        return torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)

    def _modules(self) -> dict[str, torch.nn.Module]:
        """The modules of a checkpoint by file name; `model` is the one to use, `trained` the one behind the average."""
        modules: dict[str, torch.nn.Module] = {"model": self.evaluated_model}
        if self.ema is not None:
            modules["trained"] = self.model
        if self.discriminator is not None:
            modules["discriminator"] = self.discriminator
        return modules

    def _save(self) -> None:
        with checkpoint.writing(self.folder.checkpoints, self.step) as folder:
            self.evaluated_model.save_pretrained(folder)
            for name, module in self._modules().items():
                if name != "model":
                    _save_tensors(module.state_dict(), folder / f"{name}.safetensors")
            for name, optimizer in self.optimizers.items():
                _save_tensors(optimizer.state_dict(), folder / f"{name}_optimizer.safetensors")
            state = {
                "step": torch.tensor(self.step),
                "usage_counts": self.usage.counts,
                "r1": torch.tensor(self.r1, dtype=torch.float64),
                "perceptual_sha256": self.perceptual_sha256,
            }
            if self.codebook is not None:
                state |= self.codebook.state_dict()
            _save_tensors(state, folder / "state.safetensors")
        checkpoint.prune(self.folder.checkpoints, self.step, self.config.train.keep_checkpoints)

    def _settle_batch_norm(self) -> None:
        """Statistics of the weights as they are, over the first micro-batches of the run's order."""
        if batches := self.config.train.batch_norm_batches:
            order = training_batches(self.crops, self.micro_batch_size, 0, batches, self.config.data.workers)
            images = (from_uint8(batch.to(self.device)) for batch in order)
            with torch.compiler.set_stance("force_eager"):  # not worth code of its own
                reestimate_batch_norm(self.evaluated_model, images)

    def _log(self, values: dict[str, float], images_per_s: float) -> None:
        if self.step % self.config.train.log_every and self.step != self.config.train.steps:
            return
        record: dict[str, float] = {
            "step": self.step,
            "images": self.step * self.config.train.batch_size,
            **values,
            "learning_rate": self.optimizers["model"].learning_rate(self.step - 1),
            "images_per_s": round(images_per_s, 2),
        }
        if not math.isnan(self.r1):
            record["r1"] = self.r1  # the latest, where it is computed every few steps
        if int(self.usage.counts.sum()) >= len(self.paths) * math.prod(self.config.model.token_grid):  # an epoch
            record |= {"codebook_usage": self.usage.usage, "codebook_perplexity": self.usage.perplexity}
            self.usage.counts.zero_()
        self.folder.append(METRICS, record)

    @torch.no_grad()
    def _write_grid(self) -> None:
        """Center crops of up to 16 training images, evenly spaced in the list, above their reconstructions."""
        chosen = self.paths[:: max(1, len(self.paths) // _GRID_IMAGES)][:_GRID_IMAGES]
        crops = CenterCrops(chosen, self.config.model.image_size)
        originals = torch.stack([crops[index] for index in range(len(crops))])
        with self._evaluating() as model:
            parts = from_uint8(originals).to(self.device).split(self.micro_batch_size)
            reconstructions = torch.cat([to_uint8(model.reconstruct(part)).cpu() for part in parts])
        grids = self.folder.path / "grids"
        grids.mkdir(exist_ok=True)
        pairs = list(zip(originals, reconstructions, strict=True))
        compare_grid(pairs).save(grids / f"step_{self.step:09d}.png")

    def _evaluate(self) -> None:
        with self._evaluating() as model:
            measured = measure(model, self.validation_paths, self.micro_batch_size, self.config.data.workers)
        self.folder.append(EVALUATIONS, {"step": self.step, **measured.result()})

    @contextmanager
    def _evaluating(self) -> Iterator[VQHiT]:
        """The evaluated model in eval mode."""
        model = self.evaluated_model
        training = model.training
        model.eval()
        try:
            with torch.compiler.set_stance("force_eager"):
                yield model
        finally:
            model.train(training)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _check_finite(values: dict[str, float]) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}")


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
