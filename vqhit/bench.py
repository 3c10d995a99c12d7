"""Instruments that compare speeds: parts timed in turns in one process, their rates and ratios, arithmetic, memory."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vqhit import __version__

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What can be compared."""


def check_counts(**counts: int) -> None:
    """Raise `ValueError` naming the first number that is not 1 or more."""
    for name, number in counts.items():
        if number < 1:
            raise ValueError(f"{name} is {number}; allowed: 1 or more")


def check_known(what: str, found: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise `ValueError` naming the first that is not among those allowed."""
    for value in found:
        if value not in allowed:
            raise ValueError(f"{what} is {value!r}; allowed: {', '.join(allowed)}")


def time_in_turns(
    parts: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    on_done: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each part in each round, A B C A B C ...

    Each part runs once before it is timed, so that what the part before it left in caches and memory is not measured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        for name, part in parts.items():
            part()
            seconds[name].append(seconds_of(part, device))
            on_done()
    return seconds


def seconds_of(part: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, what it asked of the device included."""
    _wait(device)
    started = time.perf_counter()
    part()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def images_per_s(seconds: list[float], images: int) -> dict[str, float]:
    """Rate of calls that each took so many images: of the median time, lowest and highest."""
    return {
        "images_per_s": images / statistics.median(seconds),
        "images_per_s_lowest": images / max(seconds),
        "images_per_s_highest": images / min(seconds),
    }


def ratio_of_speeds(name: str, seconds: list[float], base: list[float]) -> dict[str, float]:
    """How many times as fast as `base`, round by round: median, lowest and highest, under names that begin so."""
    ratios = [theirs / ours for ours, theirs in zip(seconds, base, strict=True)]
    return {name: statistics.median(ratios), f"{name}_lowest": min(ratios), f"{name}_highest": max(ratios)}


def count_gflops(run: Callable[[], object]) -> float:
    """Counted arithmetic of a call in GFLOPs, two per multiply-add: convolutions, matrix products, attention's.

    A backward pass in it is counted too.
    """
    with sdpa_kernel(SDPBackend.MATH), _Counter() as counter:  # not all fused kernels are counted
        run()
    return counter.flops / 1e9


_COUNTED = flop_registry | {torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}
"""torch's own leaves out a product that adds in place."""


class _Counter(TorchDispatchMode):
    """Counts as FlopCounterMode does, whose module hooks fail where `autograd.grad` asks for a leaf's gradient."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (count := _COUNTED.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        return out


def peak_mib(run: Callable[[], object], device: torch.device) -> float:
    """Most memory that a call holds at once beyond what was held before it, its result included, in MiB.

    It is what torch's allocator hands out, exact and the same each time: not the scratch space that oneDNN or MKL take
    for themselves, nor what the allocator keeps in reserve.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return allocated(run).peak / 2**20


class Allocated(NamedTuple):
    """What a call on the CPU asks of torch's allocator, in bytes."""

    peak: int
    """Most held at once, beyond what was held before."""
    total: int
    """All that was handed out, freed or not: what passes through memory."""


def allocated(run: Callable[[], object]) -> Allocated:
    """Count the memory of a call on the CPU, as `peak_mib`."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it says on standard error that there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = total = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
        total += max(event.nbytes(), 0)
    return Allocated(peak, total)


def protocol(device: torch.device, batch_size: int, rounds: int) -> dict[str, Any]:
    """How and on what it was measured, for a JSON file."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "batch_size": batch_size,
        "rounds": rounds,
        "order": "in turns, each after a run that is not counted; medians",
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "vqhit": __version__,
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
