"""Training: one Trainer, read from top to bottom.

A run is a folder (see `runs.py`). The same command continues it from the newest checkpoint. With torchrun the same
command runs in several processes: each trains on its share of every batch, the first one writes the folder.
"""

import math
import sys
import time
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from signal import Signals

import numpy as np
import torch
from torch import Tensor

from vqhit import __version__, checkpoint, distributed
from vqhit.augment import Draws, draw
from vqhit.config import ConfigError
from vqhit.distributed import SharedError, StopSignal
from vqhit.feed import Feed
from vqhit.folder import DataError
from vqhit.hub import select_device
from vqhit.images import from_uint8
from vqhit.layers import BatchNorm, reestimate_batch_norm
from vqhit.objective import TokenizerObjective
from vqhit.perceptual import check_image_size, perceptual_network
from vqhit.progress import ProgressBar, say
from vqhit.recipe import CHANGEABLE, RunConfig
from vqhit.report import Report
from vqhit.runs import SKIPPED, RunFolder
from vqhit.state import TrainingState


class Trainer:
    """Trains a tokenizer as its configuration says; raises `ConfigError` or `ValueError` before the first step."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.folder = RunFolder(config.run_dir)
        self.device = select_device(distributed.start(config.device, config.train.timeout_minutes))
        self.processes = distributed.world_size()
        self.micro_batch_size = distributed.on_first(lambda: config.images_at_a_time(self.processes))
        self.feed = Feed(config, self.folder)
        loss, train = config.loss, config.train
        perceptual: torch.nn.Module | None = None
        if loss.perceptual:
            with distributed.first_here():
                perceptual = perceptual_network(
                    loss.perceptual_network, loss.perceptual_weights, loss.perceptual_features
                )
            check_image_size(perceptual.to(self.device), config.model.image_size)
        if self.device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = train.allow_tf32
        self.state = TrainingState(config, self.device)
        if train.compile:  # after the average's copy, which is not compiled
            self.state.model.encoder.compile()
            for part in self.state.model.decoder_parts:
                part.compile()
            if perceptual is not None:
                perceptual.compile()
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=train.precision == "bfloat16")
        self.objective = TokenizerObjective(loss, self.state.model, self.state.discriminator, perceptual, autocast)
        self.stopped_by: Signals | None = None
        """The signal that ended `run`, if one did."""
        self.report = Report(config, self.folder, self.feed, self.state, self.micro_batch_size)
        self._settled_at = -1
        self._claim()

    def _claim(self) -> None:
        """Lock the run's folder, continue from its newest checkpoint if there is one, write what a run starts with."""

        def newest() -> Path | None:
            self.folder.lock()
            self.folder.check(self.config, CHANGEABLE)
            return checkpoint.newest(self.folder.checkpoints)

        self.state.images = self.feed.count or 0
        if (folder := distributed.on_first(newest)) is not None:
            if not folder.is_dir():
                raise ConfigError(
                    f"run_dir {self.folder.path}: not seen by all processes; give all machines the same one"
                )
            self.state.load(folder)
        self._saved_at = self.state.step
        self.feed.start_at(self.state.step)
        start = self.folder.start
        self.feed.skipped.add(distributed.on_first(lambda: start(self.config, self.state.step, self.feed.index)))
        self.report.start()

    def run(self) -> Path | None:
        """Train to the last step and return the model's folder.

        None if `train.max_minutes` or a signal (see `stopped_by`) ended the run first, with a checkpoint after the step
        that was under way.
        """
        config, state, started = self.config.train, self.state, time.monotonic()
        batches = self.feed.batches()
        bar = ProgressBar("train", config.steps, done=state.step, hidden=not distributed.is_first())
        with StopSignal() as signal, closing(batches), bar:
            while state.step < config.steps:
                if (batch := signal.next(batches)) is None:  # while waiting for images, that perhaps never come
                    self.stopped_by = signal.received
                    if self._saved_at != state.step:
                        self._save()
                    break
                values = self.train_step(from_uint8(batch.images.to(self.device, non_blocking=True)))
                bar.advance(len(batch.images) * self.processes, loss=values["loss"])
                out_of_time = bool(config.max_minutes and time.monotonic() - started > 60 * config.max_minutes)
                out_of_time, self.stopped_by = self._agree(batch.skipped, out_of_time, signal.received)
                self.report.metrics(values, bar.rate)
                last = state.step == config.steps
                grid = config.grid_every and (last or _due(state.step, config.grid_every))
                evaluation = self.config.eval and (last or _due(state.step, self.config.eval.every))
                stop = out_of_time or self.stopped_by
                save = last or stop or _due(state.step, config.checkpoint_every)
                if grid or evaluation:
                    self._settle_batch_norm()
                if grid:
                    self.report.grid()
                if evaluation:
                    self.report.evaluate()
                if save:
                    self._save()
                if stop:
                    break
        self.report.logs.close()
        if state.step < config.steps:
            return None
        if distributed.is_first():
            state.evaluated_model.save_pretrained(self.folder.model)
        return self.folder.model

    def train_step(self, images: Tensor) -> dict[str, float]:
        """One update of all networks from this process's share of a batch, (B, 3, H, W) in [-1, 1].

        Returns what `TokenizerObjective.backward` found, averaged over the micro-batches and processes, and the norms
        of the gradients. Raises `ValueError`, before any weight is updated, for a loss or a gradient that is not
        finite, in all processes alike.
        """
        state = self.state
        for optimizer in state.optimizers.values():
            optimizer.zero_grad()
        latents: list[Tensor] = []
        tokens: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        for start in range(0, len(images), self.micro_batch_size):
            part = slice(start, min(start + self.micro_batch_size, len(images)))
            share = (part.stop - start) / len(images)
            with self._graph_kept():
                output, found = self.objective.backward(images[part], state.step, share, self._draws(part, len(images)))
            latents.append(output.latents)
            tokens.append(output.tokens)
            sums = {name: share * value + sums.get(name, 0) for name, value in found.items()}
        values = self._averaged(sums)
        for optimizer in state.optimizers.values():
            optimizer.average_gradients()
        try:
            norms = {f"{name}_gradient_norm": each.gradient_norm() for name, each in state.optimizers.items()}
        except ValueError as error:
            raise self._not_finite(str(error)) from None
        for optimizer in state.optimizers.values():
            optimizer.step(state.step)
        self._update_codebook(torch.cat(latents), torch.cat(tokens))
        state.step += 1
        if state.ema is not None:
            state.ema.update(state.model, state.step)
        state.r1 = values.get("r1", state.r1)
        return values | norms

    def _draws(self, part: slice, share: int) -> tuple[Draws, Draws] | None:
        """Augmentations of some images of this process's share, drawn for the whole batch from (seed, step)."""
        if not self.config.loss.consistency:
            return None
        size, first = self.config.model.image_size, distributed.rank() * share
        mine = slice(first + part.start, first + part.stop)
        words = np.random.SeedSequence((self.config.seed, 3, self.state.step)).generate_state(2)
        generators = (torch.Generator().manual_seed(int(word)) for word in words)
        images, reconstructions = (
            draw(share * self.processes, size, size, generator=generator).part(mine) for generator in generators
        )
        return images, reconstructions

    def _averaged(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Means over the processes as numbers; raises if one of them is not finite, and says in which process."""
        mine = torch.stack(list(sums.values()))
        means = distributed.mean(mine.clone()).tolist()  # one wait for the device
        if not all(map(math.isfinite, means)):
            for name, *found in zip(sums, *distributed.gather_objects(mine.tolist()), strict=True):
                bad = {process: value for process, value in enumerate(found) if not math.isfinite(value)}
                if bad:  # of several processes batch norm makes one
                    where = f" in process {', '.join(map(str, bad))}" if self.processes > 1 else ""
                    raise self._not_finite(f"{name} is {next(iter(bad.values()))}{where}")
            raise self._not_finite("the mean of a term over the processes is out of range")
        return dict(zip(sums, means, strict=True))

    def _not_finite(self, what: str) -> SharedError:
        return SharedError(f"step {self.state.step}: {what}; stopped before the update")

    def _graph_kept(self) -> AbstractContextManager[None]:
        """With the adaptive weight, gradients pass backward through the compiled decoder more than once."""
        if self.config.train.compile and self.config.loss.adaptive:
            return torch._functorch.config.patch(donated_buffer=False)
        return nullcontext()

    def _update_codebook(self, latents: Tensor, tokens: Tensor) -> None:
        """Count the codes of the whole batch, then what `CodebookTraining` does; a moved code has no past."""
        state = self.state
        state.usage.update(tokens)
        if state.codebook is None:
            return
        moved = state.codebook.update(latents, tokens, state.step)
        if len(moved):
            codebook = state.codebook.codebook
            state.optimizers["model"].reset_rows(codebook, moved)
            if state.ema is not None:
                state.ema.model.get_parameter("quantizer.codebook").data[moved] = codebook.data[moved]

    def _agree(self, skipped: list[str], out_of_time: bool, received: Signals | None) -> tuple[bool, Signals | None]:
        """What happened in any process: images that could not be read, the end of its time, a signal."""
        new = [problem for problem in skipped if problem not in self.feed.skipped.problems]
        flags = distributed.total(torch.tensor([len(new), out_of_time, received or 0]))
        if flags[0]:
            self._note_skipped([problem for each in distributed.gather_objects(new) for problem in each])
        if flags[2]:
            received = next(filter(None, distributed.gather_objects(received)))
        return bool(flags[1]), received

    def _note_skipped(self, problems: list[str]) -> None:
        """Name images that could not be read, each once; raises `SharedError` if they are too many."""
        new = self.feed.skipped.add(problems)
        if distributed.is_first():
            for problem in new:
                self.folder.append(SKIPPED, {"step": self.state.step, "skipped": problem})
                say(f"skipped: {problem}", sys.stderr)
        try:
            self.feed.skipped.check(self.state.step * self.config.train.batch_size)
        except DataError as error:
            if distributed.on_first(self.folder.exists):  # a start that fails claims no folder
                self._save()
            raise SharedError(f"step {self.state.step}: {error}") from None

    def _save(self) -> None:
        state, train = self.state, self.config.train
        self._settle_batch_norm()
        state.check_processes()
        usage = state.usage.gather()
        about = {"config": self.config.to_dict(), "vqhit": __version__, "torch": torch.__version__}

        def write() -> None:
            with checkpoint.writing(self.folder.checkpoints, state.step, about) as folder:
                state.save(folder, usage)
            checkpoint.prune(self.folder.checkpoints, state.step, train.keep_checkpoints, train.keep_every)

        distributed.on_first(write)
        self._saved_at = state.step

    def _settle_batch_norm(self) -> None:
        """Statistics of the weights as they are, over the first micro-batches of the run's order."""
        if self._settled_at == self.state.step:
            return
        count = self.config.train.batch_norm_batches
        if count and any(isinstance(module, BatchNorm) for module in self.state.model.modules()):
            batches = self.feed.first_batches(count, self.micro_batch_size)
            images = (from_uint8(batch.images.to(self.device)) for batch in batches)
            with torch.compiler.set_stance("force_eager"):  # not worth code of its own
                reestimate_batch_norm(self.state.evaluated_model, images)
        self.state.share_statistics()
        self._settled_at = self.state.step


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
