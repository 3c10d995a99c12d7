"""How modules run: parts that `torch.compile` gets, activation checkpointing, few pixels at a time on the CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqhit.norms import BatchNorm


class Compilable:
    """A module of which `compile` gives `_run`, all that costs time, to torch.compile, and not the loop around it.

    Without gradients each batch size but 1 is the same code: what passes is `batched`.
    """

    _run: Callable[..., Any]
    _compiled = False

    def compile(self, **options: Any) -> None:
        """Compile `_run` with the options of `torch.compile`; shapes other than the batch's are static by default."""
        self._run = torch.compile(self._run, **{"dynamic": False, **options})
        self._compiled = True

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not compiled: what is compiled belongs to this module."""
        state: Any = super().__getstate__()
        return {name: value for name, value in state.items() if name not in ("_run", "_compiled")}

    def batched(self, *tensors: Tensor) -> None:
        """Say that the first dimension of tensors may be any."""
        if self._compiled and not torch.is_grad_enabled():
            for tensor in tensors:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)


def works_in_cache(module: nn.Module, x: Tensor) -> bool:
    """Whether to pass few pixels at a time through several layers: on the CPU, in eval mode, without gradients.

    In training mode batch norm needs all pixels at once; a compiler sees to its own order.
    """
    lean = x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return lean and not module.training


@contextmanager
def _recomputing() -> Iterator[None]:
    BatchNorm.recomputing = True
    try:
        yield
    finally:
        BatchNorm.recomputing = False


def checkpointed(recompute: bool, part: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """`part(*inputs)`; with `recompute`, its activations are not kept for the backward pass, which computes them again.

    Losses, gradients and running statistics stay the same (on the CPU to the bit). `part` must draw no random numbers.
    Batch norm over several processes exchanges its statistics again, all in the same order: the backward pass's.
    """
    if not recompute or not torch.is_grad_enabled():
        return part(*inputs)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if not torch.compiler.is_compiling():  # compiled code moves running statistics in its forward pass only
        options["context_fn"] = lambda: (nullcontext(), _recomputing())
    return checkpoint(part, *inputs, **options)


def recompute_activations(model: nn.Module) -> None:
    """From now on `model` trains with activation checkpointing: less memory, and a second forward pass."""
    for module in model.modules():
        if hasattr(module, "recompute"):
            setattr(module, "recompute", True)  # noqa: B010  (typed as a submodule)
