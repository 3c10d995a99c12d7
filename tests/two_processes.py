"""What tests/test_distributed.py runs under torchrun: python -m torch.distributed.run tests/two_processes.py NAME."""

import json
import math
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.inception import Colours, Differences
from vqhit import HiTGenerator, HiTGeneratorConfig, VQHiT, distributed
from vqhit.comparison import Comparison
from vqhit.execution import checkpointed
from vqhit.frechet import FeatureSums
from vqhit.hit import HiTConfig
from vqhit.inception_score import InceptionScore
from vqhit.measure import ImageSet, measure, take_pairs, take_pictures, take_reference, take_samples
from vqhit.norms import BatchNorm
from vqhit.recipe import RunConfig
from vqhit.sources import open_source
from vqhit.train import Trainer

TINY_GENERATOR = HiTGeneratorConfig(
    latent_dim=4, backbone=HiTConfig(widths=(32, 16), depths=(1, 1), heads=(4, 2), block_sizes=(4,))
)


def sum_of_weights(trainer):
    return sum(float(p.double().sum()) for module in trainer.state.modules().values() for p in module.parameters())


def planted(where):
    """Train; at step 3, in process 1 only, plant a NaN. Writes what each process raised, and its weights' sum."""
    trainer = Trainer(RunConfig.from_yaml("run.json", [f"run_dir=planted-{where}", "train.checkpoint_every=2"]))
    step, backward = trainer.train_step, trainer.objective.backward
    poison = [False]

    before = [0.0]

    def train_step(images):
        poison[0] = trainer.state.step == 3 and distributed.rank() == 1
        before[0] = sum_of_weights(trainer)
        return step(images.fill_(math.nan) if poison[0] and where == "input" else images)

    def poisoned_backward(*arguments):
        output, found = backward(*arguments)
        return output, {**found, "r1" if "r1" in found else "codebook": torch.tensor(math.nan)} if poison[0] else found

    trainer.train_step = train_step
    if where == "term":
        trainer.objective.backward = poisoned_backward
    if where == "gradient":
        weight = trainer.state.model.get_parameter("encoder.conv_in.weight")
        weight.register_hook(lambda gradient: gradient * math.nan if poison[0] else gradient)
    try:
        trainer.run()
    except ValueError as error:
        record = {
            "error": str(error),
            "step": trainer.state.step,
            "weights_before": before[0],
            "weights": sum_of_weights(trainer),
        }
        Path(f"planted-{where}-{distributed.rank()}.json").write_text(json.dumps(record))


def normalisation():
    """Outputs, gradients and moving statistics of a batch norm over both processes, beside one over the whole batch.

    With activation checkpointing the backward pass normalises once more; the statistics move once.
    """
    for recompute in (False, True):
        normalise(recompute)


def normalise(recompute):
    torch.manual_seed(0)
    whole, shared = BatchNorm(5).double(), BatchNorm(5).double()
    shared.synchronized = True
    x = (torch.randn(8, 3, 5, dtype=torch.float64) * 3 + 7).requires_grad_()
    weight = torch.randn(8, 3, 5, dtype=torch.float64)
    expected = whole(x)
    (expected * weight).sum().backward()
    mine = slice(4 * distributed.rank(), 4 * distributed.rank() + 4)
    part = x.detach()[mine].requires_grad_()
    found = checkpointed(recompute, shared, part)
    (found * weight[mine]).sum().backward()
    for ours, theirs in (
        (found, expected[mine]),
        (part.grad, x.grad[mine]),
        (distributed.total(shared.weight.grad), whole.weight.grad),
        (distributed.total(shared.bias.grad), whole.bias.grad),
        (shared.running_mean, whole.running_mean),
        (shared.running_var, whole.running_var),
        (shared.num_batches_tracked, whole.num_batches_tracked),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def agreement():
    """Errors of the first process reach all; weights that drift apart are noticed."""

    def fails():
        raise OSError("disk full")

    with pytest.raises(distributed.SharedError, match="disk full"):
        distributed.on_first(fails)
    with pytest.raises(distributed.SharedError, match="w is no longer the same"):
        distributed.check_equal({"w": torch.tensor([1.0, distributed.rank()])})
    assert distributed.on_first(lambda: "found") == "found"
    assert distributed.gather_objects(distributed.rank()) == [0, 1]


def distance():
    """Sums of features of both processes, of which one has none, are those of all features."""
    torch.manual_seed(0)
    features = torch.randn(9, 4)
    whole, shared = FeatureSums(4), FeatureSums(4)
    whole.update(features)
    if distributed.rank() == 1:
        shared.update(features[:5])
        shared.update(features[5:])
    shared.gather()
    assert shared.count == 9
    ours, expected = shared.statistics(), whole.statistics()
    torch.testing.assert_close(ours.mean, expected.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.covariance, expected.covariance, rtol=1e-12, atol=1e-12)


def score():
    """An inception score of images shared out unevenly equals that of all of them."""
    logits = 3 * torch.randn(23, 7, generator=torch.Generator().manual_seed(0))
    shared, whole = InceptionScore(23, 7), InceptionScore(23, 7)
    whole.update(logits, range(23))
    mine = [number for number in range(23) if (number % 3 == 0) == (distributed.rank() == 0)]
    shared.update(logits[mine], mine)
    shared.gather()
    assert shared.result() == pytest.approx(whole.result(), rel=1e-12)


def evaluations():
    """Tokenizer, generator and pictures, measured by both processes, one bad image among them, as by each alone."""
    config = RunConfig.from_yaml("run.json")
    photos = open_source(config.data)
    given = {"source": photos, "indices": range(len(photos)), "size": 16, "batch_size": 2, "workers": 0}
    torch.manual_seed(0)
    tokenizer, generator = VQHiT(config.model).eval(), HiTGenerator(TINY_GENERATOR).eval()

    def compare(metrics, count):
        return Comparison(metrics, "cpu", extractor=Colours(), lpips=Differences(), pictures=count)

    def of_tokenizer():
        metrics = ("rfid", "is", "psnr", "ssim", "lpips", "codebook")
        allowed = ImageSet(**given, max_bad=1 / len(photos))  # of all: one process has a larger share of bad ones
        measured = measure(tokenizer, allowed, compare(metrics, len(photos)))
        return measured.result(), sorted(measured.skipped)

    def of_generator():
        comparison = compare(("fid", "is"), 13)
        take_samples(comparison, generator, 13, seed=1, batch_size=3)
        taken = take_reference(comparison, ImageSet(**given))
        comparison.gather()
        return comparison.result(), taken.images, sorted(taken.skipped)

    def of_pictures():
        comparison = compare(("fid", "is", "psnr", "lpips"), len(photos))
        taken = [
            take_reference(comparison, ImageSet(**given, proportion=0.5)),
            take_pictures(comparison, ImageSet(**given)),
            take_pairs(comparison, ImageSet(**given, proportion=0.5), ImageSet(**given)),
        ]
        comparison.gather()
        return comparison.result(), [(images, sorted(skipped)) for images, skipped in taken], comparison.pairs

    for evaluate in (of_tokenizer, of_generator, of_pictures):
        with mock.patch.multiple(distributed, rank=lambda: 0, world_size=lambda: 1):
            expected, *counts = evaluate()
        found, *shared_counts = evaluate()
        assert shared_counts == counts, evaluate
        assert found == pytest.approx(expected, rel=1e-9), evaluate


def silence():
    """Process 1 hangs; process 0 gives up after the timeout."""
    if distributed.rank() == 1:
        time.sleep(60)
    started = time.monotonic()
    with pytest.raises(distributed.LostProcessError, match="did not answer"):
        distributed.total(torch.ones(1))
    Path("silence.json").write_text(json.dumps(time.monotonic() - started))
    sys.exit(3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.start("cpu", timeout_minutes=0.1 if sys.argv[1] == "silence" else 2)
    if sys.argv[1] == "all":
        for kind in ("input", "term", "gradient"):
            planted(kind)
        normalisation()
        agreement()
        distance()
        score()
        evaluations()
        Path(f"done-{distributed.rank()}").touch()
    else:
        silence()
    distributed.stop()
