"""Tables on the terminal."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def print_table(title: str, rows: list[dict[str, str]]) -> None:
    """Print a line and a table of rows with the same columns."""
    made = Table(box=box.SIMPLE, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for column in rows[0]:
        made.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        made.add_row(*row.values())
    print(title)
    Console().print(made)


def evaluation_row(results: dict[str, Any]) -> dict[str, str]:
    """The metrics that an evaluation has found."""
    row: dict[str, str] = {}
    for key, heading, digits in (
        ("rfid", "rFID", ".3f"),
        ("fid", "FID", ".3f"),
        ("frechet_distance", "Fréchet\ndistance", ".5g"),
        ("is", "IS", ".2f"),
        ("psnr", "PSNR\n(dB)", ".2f"),
        ("ssim", "SSIM", ".4f"),
        ("lpips", "LPIPS\n(VGG)", ".4f"),
    ):
        if key in results:
            row[heading] = format(results[key], digits)
    if "is" in results:
        row["IS"] += f" ± {results['is_std']:.2f}"
    if "codes_used" in results:
        row["codes\nused"] = f"{results['codes_used']} of {results['codebook_size']}"
        row["perplexity"] = f"{results['codebook_perplexity']:.1f}"
    return {**row, "images\n/s": f"{results['images_per_s']:.3g}", "seconds": f"{results['seconds']:.1f}"}


def bench_row(row: dict[str, Any]) -> dict[str, str]:
    """A model beside the paper's numbers of it."""
    return {
        "generator": row["name"],
        "M para-\nmeters": f"{row['parameters_millions']:.2f}",
        "paper": f"{row['paper_parameters_millions']:.2f}",
        "GFLOPs": f"{row['gflops']:.1f}",
        "images\n/s": f"{row['images_per_s']:.2f}",
        "ratio": f"{row['relative']:.2f}",
        "V100": _number(row["paper_images_per_s"]),
        "V100\nratio": _number(row["paper_relative"]),
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
