"""Progress of a long loop: a bar on a terminal, a plain line now and then in a file."""

import contextlib
import sys
import time
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_PLAIN_LINE_EVERY_S = 15.0


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line; one that nobody reads, in a closed pipe or on a full disk, must not end the work."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=file or sys.stdout, flush=True)


class ProgressBar:
    """Shows how far a loop is, its speed, the time left and any numbers given to `advance`.

    `total` and `done` count loop iterations, or with `images` images; the speed counts images. A `hidden` one only
    measures the speed.
    """

    def __init__(self, title: str, total: int, *, done: int = 0, images: bool = False, hidden: bool = False) -> None:
        self.title, self.total, self.done, self.images, self.hidden = title, total, done, images, hidden
        self.console = Console()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[numbers]}"),
            console=self.console,
            disable=hidden or not self.console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total, completed=done, numbers="")
        self.rate = 0.0
        self._pending = 0

    def __enter__(self) -> Self:
        self._last_time = self._last_line = time.perf_counter()
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, images: int, **numbers: float) -> None:
        """One iteration is done, of so many images; `numbers` are shown beside the bar."""
        steps = images if self.images else 1
        self.done += steps
        self._pending += images
        now = time.perf_counter()
        if (seconds := now - self._last_time) >= 0.5 or self.done == self.total:
            recent = self._pending / max(seconds, 1e-9)
            self.rate = recent if self.rate == 0 else 0.7 * self.rate + 0.3 * recent
            self._pending, self._last_time = 0, now
        parts = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items()]
        parts += [f"{self.rate:.3g} images/s"] if self.rate else []
        self._bar.update(self._task, advance=steps, numbers=", ".join(parts))
        if (
            self._bar.disable
            and not self.hidden
            and (now - self._last_line >= _PLAIN_LINE_EVERY_S or self.done == self.total)
        ):
            self._last_line = now
            left = self._bar.tasks[0].time_remaining
            parts += [f"{left:.0f} s left"] if left else []
            say(f"{self.title} {self.done}/{self.total}: {', '.join(parts)}")
