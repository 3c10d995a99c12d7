"""Training: one Trainer, read from top to bottom.

A run is a folder (see `runs.py`). The same command continues it from the newest checkpoint. With torchrun the same
command runs in several processes: each trains on its share of every batch, the first one writes the folder.
"""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from signal import Signals
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqhit import __version__, checkpoint, distributed
from vqhit.augment import Draws, draw
from vqhit.config import ConfigError
from vqhit.distributed import SharedError, StopSignal
from vqhit.execution import recompute_activations
from vqhit.feed import Feed
from vqhit.finetune import BegunWith, begin_with, write_begun_with
from vqhit.folder import DataError
from vqhit.generator import Generator, Purpose, draw_noise
from vqhit.hub import select_device
from vqhit.images import from_uint8
from vqhit.models import VQHiT, VQHiTOutput
from vqhit.norms import BatchNorm, reestimate_batch_norm
from vqhit.objective import GANLossConfig, GANObjective, LossConfig, TokenizerObjective
from vqhit.perceptual import check_image_size, perceptual_network
from vqhit.progress import ProgressBar, say
from vqhit.recipe import CHANGEABLE, RunConfig
from vqhit.report import Report
from vqhit.runs import SKIPPED, RunFolder
from vqhit.state import TrainingState

_AUGMENTATION = 3  # 0 to 2 are those of data.py: they keep the draws of one seed apart


class Trainer:
    """Trains a tokenizer or a generator as its configuration says.

    Raises `ConfigError` or `ValueError` before the first step.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.folder = RunFolder(config.run_dir)
        self.device = select_device(distributed.start(config.device, config.train.timeout_minutes))
        self.processes = distributed.world_size()
        self.micro_batch_size = distributed.on_first(lambda: config.images_at_a_time(self.processes))
        self.feed = Feed(config, self.folder)
        if self.device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.train.allow_tf32
        perceptual = self._perceptual()
        self.state = TrainingState(config, self.device)
        begun_with: BegunWith | None = None
        if config.init_from is not None and not distributed.on_first(self.folder.exists):
            begun_with = begin_with(self.state, config, self.feed)
        self.objective = self._objective(perceptual)
        self.stopped_by: Signals | None = None
        """The signal that ended `run`, if one did."""
        self.report = Report(config, self.folder, self.feed, self.state, self.micro_batch_size)
        self._settled_at = -1
        self._claim()
        if begun_with is not None:
            distributed.on_first(lambda: write_begun_with(self.folder, begun_with))
            if distributed.is_first():
                say(f"begun with {config.init_from}: {', '.join(begun_with.taken)}")

    def _perceptual(self) -> torch.nn.Module | None:
        loss = self.config.loss
        if isinstance(loss, GANLossConfig) or not loss.perceptual:
            return None
        with distributed.first_here():
            network = perceptual_network(loss.perceptual_network, loss.perceptual_weights, loss.perceptual_features)
        check_image_size(network.to(self.device), self.config.model.image_size)
        return network

    def _objective(self, perceptual: torch.nn.Module | None) -> TokenizerObjective | GANObjective:
        """The losses of the model, whose parts are compiled after the average's copy was made, which is not."""
        loss, state, train = self.config.loss, self.state, self.config.train
        if train.activation_checkpointing:
            recompute_activations(state.model)
        if train.compile:
            for part in [*state.model.compiled_parts, *([] if perceptual is None else [perceptual])]:
                part.compile()
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=train.precision == "bfloat16")
        if isinstance(loss, LossConfig):
            assert isinstance(state.model, VQHiT)
            return TokenizerObjective(loss, state.model, state.discriminator, perceptual, autocast)
        assert isinstance(state.model, Generator)
        assert state.discriminator is not None
        return GANObjective(loss, state.model, state.discriminator, autocast)

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
                    self._evaluate()
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

        Returns what the objective found, averaged over the micro-batches and processes, and the norms
        of the gradients. Raises `ValueError`, before any weight is updated, for a loss or a gradient that is not
        finite, in all processes alike.
        """
        state = self.state
        for optimizer in state.optimizers.values():
            optimizer.zero_grad()
        outputs: list[VQHiTOutput] = []
        sums: dict[str, Tensor] = {}
        for start in range(0, len(images), self.micro_batch_size):
            part = slice(start, min(start + self.micro_batch_size, len(images)))
            share, place = (part.stop - start) / len(images), self._place(part, len(images))
            with self._graph_kept():
                if isinstance(self.objective, GANObjective):
                    noise = self._noise(Purpose.TRAINING_STEP, state.step, place)
                    found = self.objective.backward(images[part], noise, state.step, share, self._augmentations(place))
                else:
                    output, found = self.objective.backward(images[part], state.step, share, self._augmentations(place))
                    outputs.append(output)
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
        if outputs:
            self._update_codebook(outputs)
        state.step += 1
        if state.ema is not None:
            state.ema.update(state.model, state.step)
        state.r1 = values.get("r1", state.r1)
        return values | norms

    def _place(self, part: slice, share: int) -> "_Place":
        """Where a part of this process's share of a batch stands in all of it."""
        first = distributed.rank() * share
        return _Place(slice(first + part.start, first + part.stop), share * self.processes)

    def _augmentations(self, place: "_Place") -> tuple[Draws, Draws] | None:
        """Of some images and of what the model makes, drawn for the whole batch from (seed, step)."""
        if not self.config.loss.consistency:
            return None
        size = self.config.model.image_size
        words = np.random.SeedSequence((self.config.seed, _AUGMENTATION, self.state.step)).generate_state(2)
        generators = (torch.Generator().manual_seed(int(word)) for word in words)
        images, fakes = (draw(place.batch, size, size, generator=each).part(place.images) for each in generators)
        return images, fakes

    def _noise(self, purpose: Purpose, number: int, place: "_Place") -> Tensor:
        """Noise of some images, drawn for the whole batch from (seed, purpose, number)."""
        assert isinstance(self.state.model, Generator)
        noise = draw_noise(self.config.seed, purpose, number, place.batch, self.state.model.latent_dim)
        return noise[place.images].to(self.device)

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
        if self.config.train.compile and isinstance(self.config.loss, LossConfig) and self.config.loss.adaptive:
            return torch._functorch.config.patch(donated_buffer=False)
        return nullcontext()

    def _update_codebook(self, outputs: list[VQHiTOutput]) -> None:
        """Count the codes of the whole batch, then what `CodebookTraining` does; a moved code has no past."""
        state = self.state
        latents, tokens = (torch.cat(parts) for parts in zip(*((o.latents, o.tokens) for o in outputs), strict=True))
        assert state.usage is not None
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
        usage = None if state.usage is None else state.usage.gather()
        about = {"config": self.config.to_dict(), "vqhit": __version__, "torch": torch.__version__}

        def write() -> None:
            with checkpoint.writing(self.folder.checkpoints, state.step, about) as folder:
                state.save(folder, usage)
            checkpoint.prune(self.folder.checkpoints, state.step, train.keep_checkpoints, train.keep_every)

        distributed.on_first(write)
        self._saved_at = state.step

    def _evaluate(self) -> None:
        try:
            self.report.evaluate()
        except DataError:  # no image can be read any more: what was trained must not be lost
            self._save()
            raise

    def _settle_batch_norm(self) -> None:
        """Batch norm's statistics of the weights as they are."""
        if self._settled_at == self.state.step:
            return
        count = self.config.train.batch_norm_batches
        if count and any(isinstance(module, BatchNorm) for module in self.state.model.modules()):
            with torch.compiler.set_stance("force_eager"):  # not worth code of its own
                reestimate_batch_norm(self.state.evaluated_model, self._statistics_inputs(count))
        self.state.share_statistics()
        self._settled_at = self.state.step

    def _statistics_inputs(self, count: int) -> Iterator[Tensor]:
        """The first micro-batches of the run's order, or as many of noise."""
        if isinstance(self.state.model, Generator):
            place = self._place(slice(0, self.micro_batch_size), self.micro_batch_size)
            for number in range(count):
                yield self._noise(Purpose.BATCH_NORM_STATISTICS, number, place)
        else:
            for batch in self.feed.first_batches(count, self.micro_batch_size):
                yield from_uint8(batch.images.to(self.device))


class _Place(NamedTuple):
    """Some images of a batch over all processes."""

    images: slice
    batch: int
    """Size of that batch."""


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
