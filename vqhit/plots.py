"""Pictures of numbers."""

from io import BytesIO
from pathlib import Path

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
    content = BytesIO()
    figure.savefig(content, format="png", dpi=100)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(Path(path), content.getvalue())


def histogram_bins(counts: Tensor) -> Tensor:
    """Edges of bins, four to a doubling, that hold all of some positive counts."""
    low, high = int(counts.min().log2().floor()), int(counts.max().log2().floor()) + 1
    return torch.linspace(low, high, 4 * (high - low) + 1, dtype=counts.dtype).exp2()
