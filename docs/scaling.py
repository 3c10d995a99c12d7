"""Time and memory against pixels, and multi-axis against full attention: python docs/scaling.py PICTURE.png [SIZE]...

`decode` of an optimized vqhit-b-256 with random weights, one image at a time, at 128, 256, 512 and 1024 px unless
sizes are given; and self-attention of one 64x64 map, width 128, 4 heads: in blocks of 8x8 along both axes, and of every
pixel to every other. Times are medians of rounds, all sizes in turns; exponents are least squares of logarithms.
"""

import statistics
import sys
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure

from vqhit.bench import count_gflops, peak_mib, time_in_turns
from vqhit.bench_tokenizer import random_tokenizer
from vqhit.layers import SelfAttention
from vqhit.tables import print_table

SIZES = (128, 256, 512, 1024)
ROUNDS = 5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAP, WIDTH, HEADS, BLOCK = 64, 128, 4, 8


def measure(parts):
    """Median seconds, MiB at most and GFLOPs of each part, as rows of numbers."""
    memory = {name: peak_mib(part, DEVICE) for name, part in parts.items()}
    seconds = time_in_turns(parts, ROUNDS, DEVICE)
    return {name: (statistics.median(seconds[name]), memory[name], count_gflops(parts[name])) for name in parts}


def decodings(sizes):
    """A call of `decode` for each size in pixels."""
    model = random_tokenizer("vqhit-b-256", DEVICE).optimize_for_inference()
    parts = {}
    for size in sizes:
        side = size // model.config.encoder.downsampling
        tokens = torch.randint(0, model.codebook_size, (1, side, side), device=DEVICE)
        parts[size] = partial(model.decode, tokens)
    return parts


def attentions():
    """A call of multi-axis attention on a blocked map, and of full attention on the same map in one block."""
    torch.manual_seed(0)
    pixels = torch.randn(1, MAP**2, WIDTH, device=DEVICE)
    blocked = pixels.view(1, (MAP // BLOCK) ** 2, BLOCK**2, WIDTH)
    multi_axis = SelfAttention(WIDTH, HEADS).to(DEVICE).eval()
    full = SelfAttention(WIDTH, HEADS, axes=("regional",)).to(DEVICE).eval()
    return {"multi-axis": partial(multi_axis, blocked), "full": partial(full, pixels.unsqueeze(1))}


def exponent(pixels, values):
    """Slope and intercept of log(values) over log(pixels)."""
    return np.polyfit(np.log(pixels), np.log(values), 1)


def draw(sizes, found, path):
    """Time and memory against pixels on logarithmic axes, each with its fitted line."""
    pixels = np.array(sizes, dtype=float) ** 2
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, column, label in zip(panels, (0, 1), ("seconds an image", "peak memory (MiB)"), strict=True):
        values = np.array([found[size][column] for size in sizes])
        slope, intercept = exponent(pixels, values)
        panel.plot(pixels, np.exp(intercept) * pixels**slope, color="tab:gray", label=f"pixels^{slope:.2f}")
        panel.plot(pixels, values, "o", color="tab:blue", label="measured")
        panel.set(xscale="log", yscale="log", xlabel="image", ylabel=label)
        panel.set_xticks(pixels, [f"{size} px" for size in sizes], minor=False)
        panel.minorticks_off()
        panel.legend()
    figure.suptitle("vqhit-b-256, optimized: decode of one image")
    figure.savefig(path, dpi=100)


@torch.no_grad()
def main(path, sizes):
    """Print two tables and draw a picture."""
    found = measure(decodings(sizes))
    rows = [
        {"image": f"{size} px", "ms": f"{1e3 * time:.1f}", "peak MiB": f"{peak:.1f}", "GFLOPs": f"{gflops:.2f}"}
        for size, (time, peak, gflops) in found.items()
    ]
    if len(sizes) > 1:
        pixels = np.array(sizes, dtype=float) ** 2
        slopes = [exponent(pixels, [found[size][column] for size in sizes])[0] for column in range(3)]
        columns = zip(("ms", "peak MiB", "GFLOPs"), slopes, strict=True)
        rows.append({"image": "exponent of pixels"} | {name: f"{slope:.3f}" for name, slope in columns})
        draw(sizes, found, path)
    print_table(f"decode, {DEVICE}, {torch.get_num_threads()} threads", rows)

    found = measure(attentions())
    base = found["multi-axis"]
    rows = [
        {
            "attention": name,
            "ms": f"{1e3 * time:.2f}",
            "ratio": f"{time / base[0]:.2f}",
            "peak MiB": f"{peak:.1f}",
            "GFLOPs": f"{gflops:.3f}",
        }
        for name, (time, peak, gflops) in found.items()
    ]
    print_table(f"self-attention, {MAP}x{MAP} map, width {WIDTH}, {HEADS} heads", rows)


if __name__ == "__main__":
    if len(sys.argv) < 2 or not all(size.isdigit() for size in sys.argv[2:]):
        sys.exit("usage: python docs/scaling.py PICTURE.png [SIZE]...")
    main(sys.argv[1], tuple(map(int, sys.argv[2:])) or SIZES)
