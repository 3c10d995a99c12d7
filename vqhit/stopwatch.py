"""Where the time of a loop goes."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


class Stopwatch:
    """Seconds spent in each part of a loop; on a GPU a part ends when its work has."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.started = time.perf_counter()
        self.stopped: float | None = None
        self.parts: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of this block to a part."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # not those that copy ahead
        self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - start

    def waiting(self, items: Iterable[T], name: str = "waiting for images") -> Iterator[T]:
        """The items, the time until each is there added to a part."""
        iterator = iter(items)
        while True:
            with self.part(name):
                found = next(iterator, None)
            if found is None:
                return
            yield found

    def stop(self) -> None:
        """The loop, and what belongs to it, is over."""
        self.stopped = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since it was made, until it was stopped."""
        return (self.stopped or time.perf_counter()) - self.started
