"""Processes that train together: torchrun's environment, collectives that do nothing alone, shared errors, signals.

Plain modules, no wrappers: gradients are averaged by one flat all-reduce an optimizer. (DDP's hooks skip the averaging,
silently, when R1 has a backward pass of its own.)
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class SharedError(ValueError):
    """An error that every process raises alike; one of them reports it."""


class LostProcessError(ValueError):
    """Another process ended, or has not answered in time."""


@contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's
        reason = " ".join(str(error).split())[:200]
        raise LostProcessError(
            f"process {rank()}: another process ended or did not answer ({reason}); the same command continues "
            "from the last checkpoint"
        ) from None


def start(device: str, timeout_minutes: float) -> str:
    """Join the processes that torchrun started, if it did; returns this process's device.

    NCCL between GPUs, gloo otherwise; a process that hears nothing for `timeout_minutes` gives up. Raises `ValueError`
    for a device that the processes cannot share out.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if gpus:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= gpus:
            raise ValueError(
                f"torchrun started {os.environ.get('LOCAL_WORLD_SIZE', local + 1)} processes on a machine with {gpus} "
                f"GPUs; allowed: --nproc-per-node up to {gpus}"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    elif device not in ("auto", "cpu"):
        found = "no GPU is there" if device == "cuda" else f"processes cannot share {device!r}"
        raise ValueError(f"device {device}: {found}; allowed: auto, cuda, cpu")
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    return device


def stop() -> None:
    """Leave the group, at the end of a command that went well."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return rank() == 0


def total(tensor: Tensor) -> Tensor:
    """Sum of a tensor over all processes; in place, no gradient.

    This and what follows raise `LostProcessError` where gloo notices that a process is gone. NCCL's watchdog ends the
    process instead.
    """
    if world_size() > 1:
        with _answered():
            dist.all_reduce(tensor)
    return tensor


def mean(tensor: Tensor) -> Tensor:
    """Mean of a tensor over all processes; in place, no gradient."""
    return total(tensor).div_(world_size()) if world_size() > 1 else tensor


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace all gradients by their means over the processes; each must have those of the same parameters."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    flat = mean(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        rows = tensor.new_zeros(world_size(), *tensor.shape)
        rows[rank()] = tensor
        return total(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return total(gradients[0].clone())[rank()]


def gathered(tensor: Tensor) -> Tensor:
    """Tensors (...) of all processes -> (processes, ...), differentiable: the gradient is the sum of theirs."""
    return _Gathered.apply(tensor)


def gather_objects(value: T) -> list[T]:
    """A small Python object of each process, in the order of their numbers."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    with _answered():
        dist.all_gather_object(found, value)
    return found


def on_first(function: Callable[[], T]) -> T:
    """Result of a function that only the first process calls; its error is raised by all, as a `SharedError`."""
    if world_size() == 1:
        return function()
    box: list[Any] = [None, None]
    cause = None
    if is_first():
        try:
            box = [function(), None]
        except Exception as error:  # the others wait: whatever it is, they must hear of it
            box, cause = [None, str(error) or type(error).__name__], error
    with _answered():
        dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise SharedError(box[1]) from cause
    return box[0]


@contextmanager
def first_here() -> Iterator[None]:
    """One process of each machine passes through the block before the others do: it downloads, they find the file."""
    waits = os.environ.get("LOCAL_RANK", "0") != "0"
    if waits:
        gather_objects(None)
    try:
        yield
    finally:
        if not waits:
            gather_objects(None)


def check_equal(tensors: dict[str, Tensor]) -> None:
    """Compare tensors over processes; raises `SharedError` naming the first that is not the same everywhere."""
    if world_size() == 1:
        return
    sums = torch.stack([tensor.detach().double().sum() for tensor in tensors.values()])
    lowest, highest = sums.clone(), sums.clone()
    with _answered():
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
    for name, low, high in zip(tensors, lowest.tolist(), highest.tolist(), strict=True):
        if low != high:
            raise SharedError(f"{name} is no longer the same in all processes (its sum is {low!r} to {high!r})")


class _WaitingError(Exception):
    """A signal came while there was nothing to lose."""


class StopSignal:
    """Notes a signal to stop instead of dying of it, while its block runs; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._waiting = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        if self._waiting:
            raise _WaitingError

    def next(self, items: Iterator[T]) -> T | None:
        """Next item; None at the end, or if a signal comes first (of several processes all go on to the next step)."""
        if world_size() > 1:
            return next(items, None)
        try:
            self._waiting = True
            item = None if self.received else next(items, None)
            self._waiting = False
        except _WaitingError:
            self._waiting = False
            return None
        return item


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Processes started in this block never hear of a signal to the whole group: it must not kill them under a step."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
