"""Tables on the terminal."""

from typing import Any

METRICS = {
    "rfid": ("rFID", ".3f"),
    "fid": ("FID", ".3f"),
    "frechet_distance": ("Fréchet distance", ".5g"),
    "is": ("IS", ".2f"),
    "psnr": ("PSNR (dB)", ".2f"),
    "ssim": ("SSIM", ".4f"),
    "lpips": ("LPIPS (VGG)", ".4f"),
}
"""What each number of an evaluation is called, and its digits."""
_WIDEST = 120


def print_table(title: str, rows: list[dict[str, str]]) -> None:
    """Print a line and a table of rows with the same columns."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    made = Table(box=box.SIMPLE, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for column in rows[0]:
        made.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        made.add_row(*row.values())
    print(title)
    console = Console()
    if not console.is_terminal:  # a file has no width, and rich would take 80
        console.width = max(console.width, _WIDEST)
    console.print(made)


def evaluation_rows(results: dict[str, Any]) -> list[dict[str, str]]:
    """The metrics that an evaluation has found, one to a row: all of them side by side are wider than a terminal."""
    found: dict[str, str] = {}
    for key, (name, digits) in METRICS.items():
        if key in results:
            found[name] = format(results[key], digits)
    if "is" in results:
        found["IS"] += f" ± {results['is_std']:.2f}"
    if "codes_used" in results:
        used, dead = results["codes_used"], results["dead_codes"]
        found["codes used"] = f"{used} of {results['codebook_size']} ({results['codebook_usage']:.1%}), {dead} dead"
        found["perplexity"] = f"{results['codebook_perplexity']:.1f}"
    found["seconds"] = f"{results['seconds']:.1f} ({results['images_per_s']:.3g} images/s)"
    return [{"metric": name, "value": value} for name, value in found.items()]


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


def speed_row(subject: str, row: dict[str, Any]) -> dict[str, str]:
    """A contender of a comparison of speeds; what differs are a share of the tokens, or values of images at most."""
    differs = _number(row["largest_difference"], ".0e")
    if row["tokens_differing"] is not None:
        differs = f"{row['tokens_differing']:.2%}"
    return {
        "": subject,
        "contender": row["contender"],
        "preci-\nsion": row["precision"],
        "images\n/s": f"{row['images_per_s']:.4g}",
        "ratio": f"{row['relative']:.2f}",
        "lowest to\nhighest": f"{row['relative_lowest']:.2f}-{row['relative_highest']:.2f}",
        "same\nmode": f"{row['relative_in_mode']:.2f}",
        "GFLOPs\n/image": f"{row['gflops']:.1f}",
        "GFLOP\n/s": f"{row['gflops_per_s']:.0f}",
        "peak\nMiB": f"{row['peak_mib']:.0f}",
        "com-\npile s": _number(row["compile_s"], ".0f"),
        "differs": differs,
    }


def training_row(subject: str, row: dict[str, Any]) -> dict[str, str]:
    """A contender of a comparison of training."""
    return {
        "": subject,
        "contender": row["contender"],
        "preci-\nsion": row["precision"],
        "images\n/s": f"{row['images_per_s']:.4g}",
        "ratio": f"{row['relative']:.2f}",
        "lowest to\nhighest": f"{row['relative_lowest']:.2f}-{row['relative_highest']:.2f}",
        "GFLOPs\n/image": f"{row['gflops']:.1f}",
        "GFLOP\n/s": f"{row['gflops_per_s']:.0f}",
        "peak\nMiB": f"{row['peak_mib']:.0f}",
    }


def part_row(row: dict[str, Any]) -> dict[str, str]:
    """A part of a training step."""
    return {
        "part": row["part"],
        "precision": row["precision"],
        "seconds": f"{row['seconds']:.4g}",
        "lowest to highest": f"{row['seconds_lowest']:.4g}-{row['seconds_highest']:.4g}",
        "share": f"{row['share']:.1%}",
    }


def _number(value: float | None, digits: str = ".2f") -> str:
    return "-" if value is None else format(value, digits)
