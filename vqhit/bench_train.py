"""Speed and memory of training steps: ours beside taming-transformers' VQGAN, in one process, in turns."""

import copy
import statistics
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from itertools import accumulate
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from taming.modules.diffusionmodules import model as taming
from taming.modules.vqvae.quantize import VectorQuantizer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vqhit.bench import protocol, time_in_turns
from vqhit.discriminator import Discriminator, DiscriminatorConfig
from vqhit.layers import recompute_activations
from vqhit.losses import discriminator_loss, generator_loss, r1_penalty, reconstruction_loss
from vqhit.models import VQHiT, VQHiTConfig, VQHiTOutput
from vqhit.objective import LossConfig, TokenizerObjective
from vqhit.optimizer import Optimizer, OptimizerConfig
from vqhit.perceptual import FeatureDistance, FeaturesConfig
from vqhit.progress import ProgressBar
from vqhit.vqgan import taming_arguments

OURS, RECOMPUTED, TAMING = "vqhit", "vqhit, activation checkpointing", "taming VQGAN"
LAZY_R1 = 16
"""Steps from one R1 to the next where it is lazy (StyleGAN2's)."""
Precision = Literal["float32", "bfloat16"]


class TamingVQGAN(nn.Module):
    """taming's autoencoder, composed of its own modules as its `VQModel` does, with our outputs: for comparisons.

    It has the encoder and the codebook of `config`, and a decoder of the encoder's sizes. Its β is the
    codebook term's.
    """

    tokens_frozen = False

    def __init__(self, config: VQHiTConfig) -> None:
        super().__init__()
        sizes = taming_arguments(config.encoder, config.image_size)
        codes, dim, channels = config.quantizer.codebook_size, config.quantizer.dim, config.encoder.z_channels
        with redirect_stdout(StringIO()):  # taming prints the shape of its latents
            self.encoder, self.decoder = taming.Encoder(**sizes, double_z=False), taming.Decoder(**sizes)
        self.quantize = VectorQuantizer(codes, dim, beta=config.quantizer.commitment)
        self.quant_conv = nn.Conv2d(channels, dim, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(dim, channels, kernel_size=1)

    @property
    def last_layer(self) -> nn.Conv2d:
        """The layer to RGB."""
        return cast(nn.Conv2d, self.decoder.conv_out)

    def forward(self, images: Tensor) -> VQHiTOutput:
        """(B, 3, H, W) in [-1, 1], as VQHiT's."""
        latents = self.quant_conv(self.encoder(images))
        quantized, loss, (_, _, tokens) = self.quantize(latents)
        reconstruction = self.decoder(self.post_quant_conv(quantized))
        return VQHiTOutput(reconstruction, tokens.reshape(latents[:, 0].shape), loss, latents)


Autoencoder = VQHiT | TamingVQGAN
_Runs = dict[str, Callable[[], None]]


def bench_train(
    *,
    device: torch.device,
    preset: str = "vqhit-b-256",
    batch_size: int = 2,
    rounds: int = 5,
    precision: Precision = "float32",
) -> dict[str, Any]:
    """Time a preset's training steps beside those of taming's VQGAN, with random weights and images.

    Returns a dict for JSON: `autoencoder`, the forward and backward pass of the autoencoder alone; `steps`, of both
    networks with every loss; `parts`, of which our step consists; `protocol`. `relative` is to taming.
    """
    config = VQHiTConfig.preset(preset)
    discriminator = DiscriminatorConfig(resolution=config.image_size)
    return {
        "preset": preset,
        **compare_training(
            config, discriminator, device=device, batch_size=batch_size, rounds=rounds, precision=precision
        ),
    }


def compare_training(
    config: VQHiTConfig,
    discriminator: DiscriminatorConfig,
    *,
    device: torch.device,
    batch_size: int,
    rounds: int,
    precision: Precision = "float32",
) -> dict[str, Any]:
    """`bench_train` of any tokenizer with a learned codebook and any discriminator."""
    for name, number in (("batch_size", batch_size), ("rounds", rounds)):
        if number < 1:
            raise ValueError(f"{name} is {number}; allowed: 1 or more")
    if precision not in get_args(Precision):
        raise ValueError(f"precision {precision!r}; allowed: {', '.join(get_args(Precision))}")
    torch.manual_seed(0)
    models: dict[str, Autoencoder] = {OURS: VQHiT(config), TAMING: TamingVQGAN(config)}
    models[RECOMPUTED] = copy.deepcopy(models[OURS])
    recompute_activations(models[RECOMPUTED])
    network, perceptual = Discriminator(discriminator).to(device), random_vgg16().to(device)
    trained = {
        name: _Step(models[name].train().to(device), copy.deepcopy(network), perceptual, precision)
        for name in (OURS, RECOMPUTED, TAMING)
    }
    images = torch.rand(batch_size, 3, config.image_size, config.image_size, device=device) * 2 - 1
    alone: _Runs = {name: partial(step.autoencoder, images) for name, step in trained.items()}
    penalised: _Runs = {f"{name}, R1": partial(step.whole, images, r1=True) for name, step in trained.items()}
    others: _Runs = {name: partial(step.whole, images, r1=False) for name, step in trained.items()}
    parts: _Runs = {"whole step": penalised[f"{OURS}, R1"], **trained[OURS].parts(images)}
    with ProgressBar("bench train", (len(alone) + len(penalised) + len(others) + len(parts)) * rounds) as bar:
        alone_seconds, step_seconds, part_seconds = (
            time_in_turns(runs, rounds, device, on_done=lambda: bar.advance(2 * batch_size))
            for runs in (alone, penalised | others, parts)
        )
    autoencoder: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    for name, step in trained.items():
        about = {**step.gflops(images), **step.peak_mib(images)}
        speed = _speed(alone_seconds[name], alone_seconds[TAMING], batch_size)
        autoencoder.append(
            {"name": name, **speed, "gflops": about["autoencoder"], "peak_mib": about["autoencoder_peak"]}
        )
        for every in (1, LAZY_R1):
            seconds, theirs = (lazy(step_seconds[f"{each}, R1"], step_seconds[each], every) for each in (name, TAMING))
            (gflops,) = lazy([about["with_r1"]], [about["without_r1"]], every)
            row = {"name": name, "r1_every": every, **_speed(seconds, theirs, batch_size), "gflops": gflops}
            steps.append({**row, "peak_mib": about["with_r1_peak"]})
    more = {
        "mode": f"eager, train, {precision}, random weights and images",
        "taming": "the same encoder and codebook, VQGAN's decoder: taming's modules, composed as its VQModel",
        "losses": "L2 reconstruction, codebook, perceptual (VGG16 conv4_3, random weights), adversarial; Adam of both",
        "lazy_r1": f"mean of {LAZY_R1} steps: (one with R1 + {LAZY_R1 - 1} without) / {LAZY_R1}; peak: of the one with",
        "peak_mib": "allocated by torch during a step beyond what was before it; gradients included",
        "gflops": "per image, forward and backward: matrix products and convolutions, two per multiply-add",
    }
    return {
        "autoencoder": autoencoder,
        "steps": steps,
        **_shares(part_seconds),
        "protocol": protocol(device, batch_size, rounds) | more,
    }


def lazy(penalised: list[float], others: list[float], every: int) -> list[float]:
    """Mean cost of a step, round by round, where one in `every` has R1."""
    return [(one + (every - 1) * other) / every for one, other in zip(penalised, others, strict=True)]


def _speed(seconds: list[float], base: list[float], batch_size: int) -> dict[str, float]:
    """Images/s, and how many times those of `base`: medians over the rounds, with the lowest and highest."""
    found: dict[str, float] = {}
    ratios = [theirs / ours for ours, theirs in zip(seconds, base, strict=True)]
    for key, values in (("images_per_s", [batch_size / each for each in seconds]), ("relative", ratios)):
        found |= {key: statistics.median(values), f"{key}_lowest": min(values), f"{key}_highest": max(values)}
    return found


def _shares(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Of our step: R1 is what a pass over photographs with it takes more than one without."""
    times = dict(seconds)
    whole, penalised = times.pop("whole step"), times.pop("R1")
    times["R1"] = [both - plain for both, plain in zip(penalised, times["D on photographs"], strict=True)]
    medians = {name: statistics.median(each) for name, each in times.items()}
    total = sum(medians.values())
    rows = [
        {
            "name": name,
            "seconds": medians[name],
            "seconds_lowest": min(each),
            "seconds_highest": max(each),
            "share": medians[name] / total,
        }
        for name, each in times.items()
    ]
    return {"parts": rows, "whole_step_seconds": statistics.median(whole), "sum_of_parts_seconds": total}


class _Step:
    """A training step of an autoencoder, a discriminator and their optimizers; whole, or a part of it at a time."""

    def __init__(
        self, model: Autoencoder, discriminator: Discriminator, perceptual: FeatureDistance, precision: Precision
    ) -> None:
        self.model, self.discriminator, self.perceptual, self.precision = model, discriminator, perceptual, precision
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
        return {name: _gflops(run) for name, run in runs.items()}

    def peak_mib(self, images: Tensor) -> dict[str, float]:
        """Memory of the autoencoder's passes alone and of a whole step, the gradients of before forgotten."""
        runs: _Runs = {
            "autoencoder_peak": partial(self.autoencoder, images),
            "with_r1_peak": partial(self.whole, images, r1=True),
        }
        found = {}
        for name, run in runs.items():
            self.forget()
            found[name] = _peak_bytes(run, images.device) / 2**20
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
            model.quantize(latents.requires_grad_()).loss.backward()

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

        return {
            "encoder": encoder,
            "codebook": codebook,
            "decoder": decoder,
            "D on reconstructions": on_reconstructions,
            "D on photographs": on_photographs,
            "R1": r1,
            "perceptual": perceptual,
            "Adam": self.update,
        }


def random_vgg16() -> FeatureDistance:
    """The paper's perceptual network, VGG16 up to conv4_3, with random weights (He et al. 2015)."""
    from torchvision import models

    with torch.device("meta"):
        shapes = models.vgg16(weights=None).features.state_dict(prefix="features.")
    weights = {
        name: torch.zeros(tensor.shape) if tensor.ndim == 1 else nn.init.kaiming_normal_(torch.empty(tensor.shape))
        for name, tensor in shapes.items()
    }
    return FeatureDistance(FeaturesConfig(network="vgg16", layers=(22,)), weights, "random weights")


class _Counter(TorchDispatchMode):
    """Counts as FlopCounterMode does, whose module hooks fail where `autograd.grad` asks for a leaf's gradient."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        return out


def _gflops(run: Callable[[], None]) -> float:
    with sdpa_kernel(SDPBackend.MATH), _Counter() as counter:  # not all fused kernels are counted
        run()
    return counter.flops / 1e9


def _peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """Most bytes that torch holds at once during `run`, beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate((event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())), initial=0))
