"""Normalisation of the last axis: batch norm over all processes, its folding into linear layers, its statistics."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqhit import distributed


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation of the last axis over all others: (..., C) -> (..., C).

    Keras' epsilon 1e-3, by default, and momentum 0.99 (torch counts the other way: 0.01). The running variance is the
    unbiased one.
    Departure: the paper says layer norm (appendix A.1); the official code and its results have batch norm.

    `synchronized`, set before training with several processes, takes the statistics over the batches of all of them,
    which must be equally large (the official code: of each by itself). torch's SyncBatchNorm needs CUDA; this does not.
    """

    recomputing: ClassVar = False
    """While the backward pass repeats a part of the forward pass, which has already moved the running statistics."""

    def __init__(self, channels: int, eps: float = 1e-3) -> None:
        super().__init__(channels, eps=eps, momentum=0.01)
        self.synchronized = False

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.training and self.synchronized and distributed.world_size() > 1:
            return self._synchronized(rows).view(x.shape)
        if self.training and BatchNorm.recomputing:
            assert self.running_mean is not None
            assert self.running_var is not None
            thrown_away = self.running_mean.clone(), self.running_var.clone()
            return F.batch_norm(rows, *thrown_away, self.weight, self.bias, training=True, eps=self.eps).view(x.shape)
        return super().forward(rows).view(x.shape)

    def _synchronized(self, rows: Tensor) -> Tensor:
        values = rows.to(torch.promote_types(rows.dtype, torch.float32))
        own_variance, own_mean = torch.var_mean(values, 0, unbiased=False)
        means, variances = distributed.gathered(torch.stack([own_mean, own_variance])).unbind(1)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        if not BatchNorm.recomputing:
            self._move(mean, variance, len(rows) * len(means))
        scale = self.weight * (variance + self.eps).rsqrt()
        return torch.addcmul(self.bias - mean * scale, values, scale).to(rows.dtype)

    @torch.no_grad()
    def _move(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the running statistics towards those of `count` rows."""
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        weight = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean), weight)
        self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), weight)


@torch.no_grad()
def fold_norm(norm: nn.Module, readers: Iterable[nn.Linear]) -> nn.Module:
    """Move a norm's scale and shift into the linear layers that read it; returns what is left of it.

    Exact but for rounding: nothing is left of batch norm, as it is in eval mode; of layer norm all but the affine part.
    """
    scale, shift, rest = _scale_and_shift(norm)
    for reader in readers:
        reader.bias.copy_(exact(reader.bias) + exact(reader.weight) @ shift)
        reader.weight.copy_(exact(reader.weight) * scale)
    return rest


@torch.no_grad()
def fold_norm_back(norm: nn.Module, source: nn.Linear, *added: Tensor) -> nn.Module:
    """Move batch norm into the linear layer, and what is added to its output, that the norm reads; else nothing.

    The layer may give several vectors, one after the other, each of which the norm reads.
    """
    if not isinstance(norm, BatchNorm):
        return norm
    scale, shift, rest = _scale_and_shift(norm)
    vectors = source.out_features // len(scale)
    source.weight.copy_(exact(source.weight) * scale.repeat(vectors).unsqueeze(1))
    source.bias.copy_(exact(source.bias) * scale.repeat(vectors) + shift.repeat(vectors))
    for tensor in added:
        tensor.copy_(exact(tensor) * scale)
    return rest


def exact(tensor: Tensor) -> Tensor:
    """In float64, which MPS has not."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor, nn.Module]:
    if isinstance(norm, nn.LayerNorm):
        rest = nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False)
        return exact(norm.weight), exact(norm.bias), rest
    assert isinstance(norm, BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = exact(norm.weight) * (exact(norm.running_var) + norm.eps).rsqrt()
    return scale, exact(norm.bias) - exact(norm.running_mean) * scale, nn.Identity()


Norm = Literal["batch", "layer"]


def build_norm(kind: Norm, channels: int) -> nn.Module:
    """Normalisation of the last axis: batch, or layer with the official code's epsilon 1e-6 (appendix A.1, Table 8)."""
    return BatchNorm(channels) if kind == "batch" else nn.LayerNorm(channels, eps=1e-6)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode for a while; then every part has the mode that it had."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics by averages over `batches`, run through `model` as it is now.

    The usual running average trails weights that move fast: after a few hundred steps evaluation would see statistics
    of weights long gone. Leaves the model in the mode it was in.
    """
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    training, momenta = model.training, [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch: a plain average over all batches
    try:
        model.train()
        for batch in batches:
            model(batch)
    finally:
        model.train(training)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
