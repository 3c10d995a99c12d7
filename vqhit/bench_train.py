"""Speed and memory of training steps: ours beside taming-transformers' VQGAN, in one process, in turns."""

import copy
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqhit.bench import (
    PRECISIONS,
    check_counts,
    check_known,
    count_gflops,
    images_per_s,
    peak_mib,
    protocol,
    ratio_of_speeds,
    time_in_turns,
)
from vqhit.discriminator import Discriminator, DiscriminatorConfig
from vqhit.execution import recompute_activations
from vqhit.losses import discriminator_loss, generator_loss, r1_penalty, reconstruction_loss
from vqhit.models import VQHiT, VQHiTConfig
from vqhit.objective import LossConfig, TokenizerObjective
from vqhit.optimizer import Optimizer, OptimizerConfig
from vqhit.peer import TamingVQGAN
from vqhit.perceptual import FeatureDistance, FeaturesConfig
from vqhit.progress import ProgressBar

TAMING, OURS, RECOMPUTED = "taming eager", "vqhit eager", "vqhit, activation checkpointing"
LAZY_R1 = 16
"""Steps from one R1 to the next where it is lazy (StyleGAN2's)."""


Autoencoder = VQHiT | TamingVQGAN
_CONV4_3 = 22
_Runs = dict[str, Callable[[], None]]
_RUNS = 18
"""Timed in a round."""


def bench_train(
    *,
    device: torch.device,
    preset: str = "vqhit-b-256",
    precisions: Iterable[str] = ("float32",),
    batch_size: int = 2,
    rounds: int = 5,
) -> dict[str, Any]:
    """Time a preset's training steps beside those of taming's VQGAN, with random weights and images.

    Returns a dict for JSON: `train`, and `protocol`. Lists of rows of `train`, each of a precision: `autoencoder`, the
    forward and backward pass of the autoencoder alone; `steps`, of both networks with every loss, one in `r1_every`
    with R1; `parts`, of which our step consists; `sums`, of these and of the step as a whole. `relative` is to taming.
    """
    config = VQHiTConfig.preset(preset)
    found = compare_training(
        config,
        DiscriminatorConfig(resolution=config.image_size),
        device=device,
        precisions=precisions,
        batch_size=batch_size,
        rounds=rounds,
    )
    return {**found, "protocol": {**found["protocol"], "model": f"{preset}, random weights"}}


def compare_training(
    config: VQHiTConfig,
    discriminator: DiscriminatorConfig,
    *,
    device: torch.device,
    precisions: Iterable[str],
    batch_size: int,
    rounds: int,
) -> dict[str, Any]:
    """`bench_train` of any tokenizer with a codebook such as taming's, and any discriminator."""
    precisions = list(dict.fromkeys(precisions))
    check_counts(batch_size=batch_size, rounds=rounds)
    check_known("precision", precisions, PRECISIONS)
    train: dict[str, list[dict[str, Any]]] = {"autoencoder": [], "steps": [], "parts": [], "sums": []}
    images = torch.empty(batch_size, 3, config.image_size, config.image_size, device=device)
    with ProgressBar("bench train", len(precisions) * _RUNS * rounds) as bar:
        for precision in precisions:
            torch.manual_seed(0)
            trained = _contenders(config, discriminator, precision, device)
            found = _compare(trained, images.uniform_(-1, 1), rounds, on_done=lambda: bar.advance(2 * batch_size))
            for name, rows in found.items():
                train[name] += [{"precision": precision, **row} for row in rows]
    more = {
        "resolution": config.image_size,
        "precisions": precisions,
        "mode": "eager, train, random weights and images; weights in float32, bfloat16 by autocast",
        "taming": "the same encoder and codebook, VQGAN's decoder: taming's modules, composed as its VQModel",
        "losses": "L2 reconstruction, codebook, perceptual (VGG16 conv4_3, random weights), adversarial; Adam of both",
        "lazy_r1": f"mean of {LAZY_R1} steps: (one with R1 + {LAZY_R1 - 1} without) / {LAZY_R1}; peak: of the one with",
        "peak": "of torch's allocator, above what was held before the step; gradients included",
        "gflops": "per image, forward and backward: matrix products and convolutions, two per multiply-add",
    }
    return {"train": train, "protocol": protocol(device, batch_size, rounds) | more}


def _contenders(
    config: VQHiTConfig, discriminator: DiscriminatorConfig, precision: str, device: torch.device
) -> dict[str, "_Step"]:
    ours = VQHiT(config)
    models: dict[str, Autoencoder] = {TAMING: TamingVQGAN(ours), OURS: ours, RECOMPUTED: copy.deepcopy(ours)}
    recompute_activations(models[RECOMPUTED])
    network, perceptual = Discriminator(discriminator).to(device), random_vgg16().to(device)
    return {
        name: _Step(model.train().to(device), copy.deepcopy(network), perceptual, precision)
        for name, model in models.items()
    }


def _compare(
    trained: dict[str, "_Step"], images: Tensor, rounds: int, on_done: Callable[[], None]
) -> dict[str, list[dict[str, Any]]]:
    """Rows of each list of `train`."""
    alone: _Runs = {name: partial(step.autoencoder, images) for name, step in trained.items()}
    penalised: _Runs = {f"{name}, R1": partial(step.whole, images, r1=True) for name, step in trained.items()}
    others: _Runs = {name: partial(step.whole, images, r1=False) for name, step in trained.items()}
    parts: _Runs = {"whole step": penalised[f"{OURS}, R1"], **trained[OURS].parts(images)}
    assert sum(map(len, (alone, penalised, others, parts))) == _RUNS
    alone_seconds, step_seconds, part_seconds = (
        time_in_turns(runs, rounds, images.device, on_done) for runs in (alone, penalised | others, parts)
    )
    found: dict[str, list[dict[str, Any]]] = {"autoencoder": [], "steps": [], **_shares(part_seconds)}
    counted = {name: step.gflops(images) for name, step in trained.items()}
    peaks = {name: step.peak_mib(images) for name, step in trained.items()}
    for name in trained:
        speed = _speed(alone_seconds[name], alone_seconds[TAMING], len(images), counted[name]["autoencoder"])
        found["autoencoder"].append({"contender": name, **speed, "peak_mib": peaks[name]["autoencoder"]})
    for every in (1, LAZY_R1):
        for name in trained:
            seconds, theirs = (lazy(step_seconds[f"{each}, R1"], step_seconds[each], every) for each in (name, TAMING))
            (gflops,) = lazy([counted[name]["with_r1"]], [counted[name]["without_r1"]], every)
            speed = _speed(seconds, theirs, len(images), gflops)
            found["steps"].append({"contender": name, "r1_every": every, **speed, "peak_mib": peaks[name]["with_r1"]})
    return found


def lazy(penalised: list[float], others: list[float], every: int) -> list[float]:
    """Mean cost of a step, round by round, where one in `every` has R1."""
    return [(one + (every - 1) * other) / every for one, other in zip(penalised, others, strict=True)]


def _speed(seconds: list[float], base: list[float], batch_size: int, gflops: float) -> dict[str, float]:
    speed = images_per_s(seconds, batch_size)
    ratio = ratio_of_speeds("relative", seconds, base)
    return {**speed, **ratio, "gflops": gflops, "gflops_per_s": gflops * speed["images_per_s"]}


def _shares(seconds: dict[str, list[float]]) -> dict[str, list[dict[str, Any]]]:
    """Of our step: R1 is what a pass over photographs with it takes more than one without."""
    times = dict(seconds)
    whole, penalised = times.pop("whole step"), times.pop("R1")
    times["R1"] = [both - plain for both, plain in zip(penalised, times["D on photographs"], strict=True)]
    medians = {name: statistics.median(each) for name, each in times.items()}
    total = sum(medians.values())
    rows = [
        {
            "part": name,
            "seconds": medians[name],
            "seconds_lowest": min(each),
            "seconds_highest": max(each),
            "share": medians[name] / total,
        }
        for name, each in times.items()
    ]
    sums = {"whole_step_seconds": statistics.median(whole), "sum_of_parts_seconds": total}
    return {"parts": rows, "sums": [sums]}


class _Step:
    """A training step of an autoencoder, a discriminator and their optimizers; whole, or a part of it at a time."""

    def __init__(
        self, model: Autoencoder, discriminator: Discriminator, perceptual: FeatureDistance, precision: str
    ) -> None:
        self.model, self.discriminator, self.perceptual = model, discriminator, perceptual
        device = next(model.parameters()).device
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
        loss = LossConfig(perceptual=1.0, adversarial=0.1, r1_every=LAZY_R1)
        self.objective = TokenizerObjective(loss, cast(VQHiT, model), discriminator, perceptual, self.autocast)
        self.optimizers = [Optimizer(network, OptimizerConfig(), steps=1) for network in (model, discriminator)]

    def gflops(self, images: Tensor) -> dict[str, float]:
        """Counted arithmetic for one image."""
        one = images[:1]
        runs: _Runs = {
            "autoencoder": partial(self.autoencoder, one),
            "with_r1": partial(self.losses, one, r1=True),
            "without_r1": partial(self.losses, one, r1=False),
        }
        return {name: count_gflops(run) for name, run in runs.items()}

    def peak_mib(self, images: Tensor) -> dict[str, float]:
        """Memory of the autoencoder's passes alone and of a whole step, the gradients of before forgotten."""
        runs: _Runs = {
            "autoencoder": partial(self.autoencoder, images),
            "with_r1": partial(self.whole, images, r1=True),
        }
        found = {}
        for name, run in runs.items():
            self.forget()
            found[name] = peak_mib(run, images.device)
        self.forget()
        return found

    def forget(self) -> None:
        """Give the gradients' memory back."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def autoencoder(self, images: Tensor) -> None:
        """Forward and backward pass of reconstruction and codebook loss."""
        self.forget()
        with self.autocast:
            output = self.model(images)
        loss = reconstruction_loss(output.reconstruction.to(images.dtype), images) + output.codebook_loss
        loss.backward()

    def losses(self, images: Tensor, r1: bool) -> None:
        """Gradients of all losses for both networks."""
        self.forget()
        self.objective.backward(images, step=0 if r1 else 1)

    def update(self) -> None:
        """Adam, after a look at the gradients, as in training."""
        for optimizer in self.optimizers:
            optimizer.gradient_norm()
            optimizer.step(0)

    def whole(self, images: Tensor, r1: bool) -> None:
        """All losses, and the update of both networks."""
        self.losses(images, r1)
        self.update()

    def parts(self, images: Tensor) -> _Runs:
        """The parts of our step, each alone, forward and backward; R1 together with the photographs' logits."""
        model, discriminator = self.model, self.discriminator
        assert isinstance(model, VQHiT)
        with torch.no_grad(), self.autocast:
            latents = model.encode_latents(images)
            codes = model.quantize(latents).latents
        weights = list(discriminator.parameters())

        def encoder() -> None:
            with self.autocast:
                found = model.encode_latents(images)
            found.backward(torch.ones_like(found))

        def codebook() -> None:
            with self.autocast:
                loss = model.quantize(latents.requires_grad_()).loss
            loss.backward()

        def decoder() -> None:
            with self.autocast:
                found = model.decode_latents(codes.requires_grad_())
            found.backward(torch.ones_like(found))

        def on_reconstructions() -> None:
            fakes = images.clone().requires_grad_()
            logits = discriminator(fakes)
            torch.autograd.grad(generator_loss(logits), fakes, retain_graph=True)
            discriminator_loss(torch.zeros_like(logits), logits).backward(inputs=weights)

        def on_photographs() -> None:
            F.softplus(-discriminator(images)).mean().backward(inputs=weights)

        def r1() -> None:
            real = images.clone().requires_grad_()
            logits = discriminator(real)
            (F.softplus(-logits).mean() + r1_penalty(logits, real)).backward(inputs=weights)

        def perceptual() -> None:
            with self.autocast:
                distance = self.perceptual(images.clone().requires_grad_(), images)
            distance.backward()

        def alone(part: Callable[[], None]) -> Callable[[], None]:
            def run() -> None:
                self.forget()
                part()

            return run

        found = {
            "encoder": encoder,
            "codebook": codebook,
            "decoder": decoder,
            "D on reconstructions": on_reconstructions,
            "D on photographs": on_photographs,
            "R1": r1,
            "perceptual": perceptual,
        }
        return {name: alone(part) for name, part in found.items()} | {"Adam": self.update}


def random_vgg16() -> FeatureDistance:
    """The paper's perceptual network, VGG16 up to conv4_3, with random weights (He et al. 2015)."""
    from torchvision import models

    with torch.device("meta"):
        shapes = models.vgg16(weights=None).features.state_dict(prefix="features.")
    weights = {
        name: torch.zeros(tensor.shape) if tensor.ndim == 1 else nn.init.kaiming_normal_(torch.empty(tensor.shape))
        for name, tensor in shapes.items()
    }
    return FeatureDistance(FeaturesConfig(network="vgg16", layers=(_CONV4_3,)), weights, "random weights")
