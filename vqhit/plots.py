"""Pictures of numbers."""

from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqhit.codebook import CodebookUsage
from vqhit.files import write_atomic


def codebook_histogram(usage: CodebookUsage, path: Path | str) -> None:
    """Draw how many codes are chosen how often, and each code's share, as a PNG file."""
    from matplotlib.figure import Figure

    counts = usage.counts.double()
    uniform = float(counts.sum()) / len(counts)
    chosen = counts[counts > 0]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    figure.suptitle(
        f"{usage.codes_used} of {len(counts)} codes used ({usage.usage:.1%}), {usage.dead_codes} dead, "
        f"perplexity {usage.perplexity:.1f}"
    )
    left, right = figure.subplots(1, 2)
    if len(chosen):
        left.hist(chosen.numpy(), bins=histogram_bins(chosen).numpy(), color="tab:blue")
        left.set_xscale("log", base=2)
        left.axvline(uniform, color="black", linestyle="--", linewidth=1, label="all equally often")
        left.legend(title=f"{usage.dead_codes} never")
    left.set(xlabel="times chosen", ylabel="codes")
    right.plot((counts.sort(descending=True).values / counts.sum().clamp(min=1)).numpy(), color="tab:blue")
    right.axhline(1 / len(counts), color="black", linestyle="--", linewidth=1)
    right.set(xlabel="codes, from the most to the least often chosen", ylabel="share of tokens", yscale="log")
    _write(figure, path)


def speed_bars(groups: dict[str, list[dict[str, Any]]], path: Path | str, title: str) -> None:
    """Draw images/s of contenders as bars, a panel to a group, as a PNG file.

    A line spans lowest to highest; the number at its end is `relative`, the ratio to the group's first.
    """
    from matplotlib.figure import Figure

    count = sum(map(len, groups.values()))
    figure = Figure(figsize=(10, 1 + 0.55 * len(groups) + 0.32 * count), layout="constrained")
    figure.suptitle(title)
    heights = [len(rows) + 1 for rows in groups.values()]
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (name, rows) in zip(panels, groups.items(), strict=True):
        for place, row in enumerate(rows):
            speed, lowest, highest = (row[f"images_per_s{end}"] for end in ("", "_lowest", "_highest"))
            color = "tab:gray" if row["contender"].startswith("taming") else "tab:blue"
            panel.barh(place, speed, color=color, height=0.7)
            panel.plot([lowest, highest], [place, place], color="black", linewidth=1)
            panel.annotate(
                f"{row['relative']:.2f}x",
                (max(speed, highest), place),
                xytext=(4, 0),
                textcoords="offset points",
                verticalalignment="center",
            )
        panel.set_yticks(range(len(rows)), [row["contender"] for row in rows])
        panel.invert_yaxis()
        panel.margins(x=0.1)
        panel.set_xlim(left=0)
        panel.set_title(name, loc="left", fontsize="medium")
    panels[-1].set_xlabel(f"images/s; times as fast as {rows[0]['contender']}")
    _write(figure, path)


def _write(figure: Any, path: Path | str) -> None:
    content = BytesIO()
    figure.savefig(content, format="png", dpi=100)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(Path(path), content.getvalue())


def histogram_bins(counts: Tensor) -> Tensor:
    """Edges of bins, four to a doubling, that hold all of some positive counts."""
    low, high = int(counts.min().log2().floor()), int(counts.max().log2().floor()) + 1
    return torch.linspace(low, high, 4 * (high - low) + 1, dtype=counts.dtype).exp2()
