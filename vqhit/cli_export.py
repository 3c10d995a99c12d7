"""The command `vqhit export`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vqhit.options import ModelDir


def export(
    model: ModelDir,
    out: Annotated[Path, typer.Option("--out", help="Folder for the files, new or empty.")],
    format: Annotated[str, typer.Option("--format", help="torch (torch.export, .pt2) or onnx.")] = "torch",
    part: Annotated[str, typer.Option("--part", help="encoder, decoder or both.")] = "both",
) -> None:
    """Write a tokenizer's encoder and decoder as files that run without vqhit, and check them against the model.

    Images (B, 3, H, W) float32 in [-1, 1] and tokens (B, h, w) int64, B free; export.json beside them says the rest.

    Example: vqhit export --model vqhit-tiny-64 --out exported --format onnx
    """
    from vqhit.export import export as write_files

    for name, made in write_files(model, out, format=format, part=part)["parts"].items():
        megabytes = sum(made["files"].values()) / 1e6
        print(f"{out / next(iter(made['files']))}: {megabytes:.2f} MB; {_checked(name, made['check'])}")


def _checked(part: str, check: dict[str, Any] | None) -> str:
    if check is None:
        return "not checked: onnxruntime is not installed (pip install 'vqhit[onnx]')"
    sizes = " and ".join(map(str, check["batch_sizes"]))
    if part == "encoder":
        found = f"{check['tokens_differing']} of {check['tokens']} tokens differ from the model's"
    else:
        found = f"images differ from the model's by at most {check['largest_difference']:.1e}"
    return f"{found}, run by {check['run_by']} on batches of {sizes}"
