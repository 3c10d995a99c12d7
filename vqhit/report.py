"""What a run tells of itself: records, evaluations and grids, to its folder and to where else they are asked for."""

import math
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vqhit import distributed
from vqhit.comparison import Comparison, Metric
from vqhit.extractors import Extractor
from vqhit.feed import SHOWN_IMAGES, Feed, open_shared
from vqhit.files import write_atomic
from vqhit.folder import DataError, FolderSource
from vqhit.frechet import FeatureStatistics
from vqhit.generator import Generator
from vqhit.images import compare_grid, from_uint8, image_grid, rows_of, to_uint8
from vqhit.logs import LogConfig, Logs
from vqhit.measure import ImageSet, Taken, exact_float32, measure, take_reference, take_samples
from vqhit.models import VQHiT, VQHiTConfig
from vqhit.norms import in_eval_mode
from vqhit.progress import say
from vqhit.recipe import RunConfig
from vqhit.runs import EVALUATIONS, METRICS, RunFolder
from vqhit.sources import ImageSource, evenly_spaced
from vqhit.state import TrainingState


class Report:
    """Called by all processes alike; the first one writes."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, feed: Feed, state: TrainingState, micro_batch_size: int
    ) -> None:
        self.config, self.folder, self.feed, self.state = config, folder, feed, state
        self.micro_batch_size = micro_batch_size
        self.device = next(state.model.parameters()).device
        self.evaluated_on: ImageSource | None = None
        if config.eval is not None:
            kept = folder.eval_index if folder.exists() else None
            self.evaluated_on = open_shared(config.eval, "validation", kept)
        self.extractor: Extractor | None = None
        """What the Fréchet distance is measured with, if it is."""
        if config.eval is not None and config.eval.compares_features:
            with distributed.first_here():
                self.extractor = config.eval.extractor(config.model.image_size)
            assert self.extractor is not None
            self.extractor.to(self.device)
            assert self.evaluated_on is not None
            if len(self.evaluated_on) < 2:
                raise DataError(f"{config.eval.path}: one image; a Fréchet distance needs at least 2")
        self._reference: tuple[FeatureStatistics, Taken] | None = None
        """Of a generator: what its samples are compared with."""
        self._named: set[str] = set()

    def start(self) -> None:
        """Open the logs, once the folder is this run's and the state is that of its first step."""
        if distributed.is_first() and isinstance(self.evaluated_on, FolderSource):
            write_atomic(self.folder.eval_index, self.evaluated_on.index)
        log = self.config.log if distributed.is_first() else LogConfig()
        self.logs = Logs(log, self.folder.path, self.config.to_dict(), self.state.step)

    def metrics(self, values: dict[str, float], images_per_s: float) -> None:
        """Record the numbers of a step, if it is one of those that are recorded."""
        state, config = self.state, self.config
        if state.step % config.train.log_every and state.step != config.train.steps:
            return
        record: dict[str, float] = {
            "step": state.step,
            "images": state.step * config.train.batch_size,
            **values,
            "learning_rate": state.optimizers["model"].learning_rate(state.step - 1),
            "skipped_images": len(self.feed.skipped),
            "images_per_s": round(images_per_s, 2),
            **_memory_mib(self.device),
        }
        if not math.isnan(state.r1):
            record["r1"] = state.r1  # the latest, where it is computed every few steps
        if state.usage is not None:
            assert isinstance(config.model, VQHiTConfig)
            usage = state.usage.gather()
            if int(usage.counts.sum()) >= self.feed.epoch_images * math.prod(config.model.token_grid):
                record |= {"codebook_usage": usage.usage, "codebook_perplexity": usage.perplexity}
                state.usage.counts.zero_()
        self._append(METRICS, record)

    def _append(self, file: str, record: dict[str, float]) -> None:
        if distributed.is_first():
            self.folder.append(file, record)
            self.logs.record(file, record)

    @torch.no_grad()
    def grid(self) -> None:
        """Up to 16 training images above their reconstructions, or 16 samples, always of the same noise."""
        if not distributed.is_first():
            return
        with self.evaluating() as model:
            if isinstance(model, VQHiT):
                if not len(originals := self.feed.shown()):
                    return
                parts = from_uint8(originals).to(self.device).split(self.micro_batch_size)
                reconstructions = torch.cat([to_uint8(model.reconstruct(part)).cpu() for part in parts])
                grid = compare_grid(list(zip(originals, reconstructions, strict=True)))
            else:
                samples = model.sample(SHOWN_IMAGES, seed=self.config.seed, batch_size=self.micro_batch_size)
                grid = image_grid(rows_of(to_uint8(samples).cpu()))
        grids = self.folder.path / "grids"
        grids.mkdir(exist_ok=True)
        grid.save(grids / f"step_{self.state.step:09d}.png")
        self.logs.picture("grids", grid, self.state.step)

    def evaluate(self) -> None:
        """Measure the model that would be saved on the images of `eval`."""
        config = self.config.eval
        assert config is not None
        assert self.evaluated_on is not None
        images = ImageSet(
            source=self.evaluated_on,
            indices=evenly_spaced(len(self.evaluated_on), config.images),
            size=self.config.model.image_size,
            batch_size=self.micro_batch_size,
            workers=self.config.data.workers,
        )
        with self.evaluating() as model, exact_float32():
            if isinstance(model, VQHiT):
                metrics: tuple[Metric, ...] = ("psnr", "ssim", "codebook", *(("rfid",) if self.extractor else ()))
                measured = measure(model, images, Comparison(metrics, self.device, extractor=self.extractor))
                found, skipped = measured.result(), measured.skipped
            else:
                statistics, taken = self._reference or self._take_reference(images)
                self._reference = statistics, taken
                comparison = Comparison(("fid",), self.device, extractor=self.extractor, statistics=statistics)
                take_samples(comparison, model, taken.images, seed=self.config.seed, batch_size=self.micro_batch_size)
                comparison.gather()
                found = {"images": taken.images, "skipped": len(taken.skipped), **comparison.result()}
                skipped = taken.skipped
        self._append(EVALUATIONS, {"step": self.state.step, **found})
        for problem in skipped:
            if distributed.is_first() and problem not in self._named:
                say(f"skipped in evaluation: {problem}", sys.stderr)
            self._named.add(problem)

    def _take_reference(self, images: ImageSet) -> tuple[FeatureStatistics, Taken]:
        """Statistics of the features of the images of `eval`; raises `DataError` if fewer than two can be read."""
        comparison = Comparison(("fid",), self.device, extractor=self.extractor)
        taken = take_reference(comparison, images)
        comparison.gather()
        if taken.images < 2:
            reason = f"; the first problem: {taken.skipped[0]}" if taken.skipped else ""
            raise DataError(f"a Fréchet distance needs at least 2 images; {taken.images} can be read{reason}")
        statistics = comparison.reference_statistics({})
        assert statistics is not None
        return statistics, taken

    @contextmanager
    def evaluating(self) -> Iterator[VQHiT | Generator]:
        """The evaluated model in eval mode."""
        model = self.state.evaluated_model
        with in_eval_mode(model), torch.compiler.set_stance("force_eager"):
            yield model


def _memory_mib(device: torch.device) -> dict[str, float]:
    """Memory of this process, and the most that it has had on its GPU, where they can be known."""
    memory: dict[str, float] = {}
    try:
        resident, shared = Path("/proc/self/statm").read_text().split()[1:3]  # shared: pages of files too, data mapped
        memory["memory_mib"] = round((int(resident) - int(shared)) * resource.getpagesize() / 2**20, 1)
    except OSError:  # no Linux
        pass
    if device.type == "cuda":
        memory["gpu_peak_memory_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return memory
