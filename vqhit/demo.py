"""The demo: the tokenizer that comes with the package, or one trained on the spot, tried on photographs.

They are the colour photographs that ship inside scikit-image; two of them are held out of any training.
"""

import importlib.util
import json
import math
import time
from pathlib import Path
from signal import Signals
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vqhit.checkpoint import newest
from vqhit.files import write_atomic
from vqhit.hub import PACKAGED
from vqhit.images import compare_grid, crop_box, from_uint8, image_grid, load_image, pil_to_uint8, to_uint8
from vqhit.measure import Reconstruction
from vqhit.metrics import psnr, ssim
from vqhit.models import VQHiT
from vqhit.recipe import RunConfig
from vqhit.train import Trainer

PACKAGED_MODEL = "vqhit-tiny-64"
TRAINING_PHOTOS = (
    "astronaut.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)
HELD_OUT_PHOTOS = ("chelsea.png", "coffee.png")
TILE_ROWS = 4
"""Rows of tiles that a photograph is cut into."""


def run_demo(out: Path) -> dict[str, Any]:
    """Reconstruct the held-out photographs, tile by tile, with the tokenizer that comes with the package.

    Writes results.json and reconstruction.png into `out` and returns the results. Raises `ValueError` if scikit-image's
    photographs are not there.
    """
    model = VQHiT.from_pretrained(PACKAGED / PACKAGED_MODEL)  # not a folder of that name
    _copy_photos(HELD_OUT_PHOTOS, out / "photos" / "held_out")
    cut = [tiles(load_image(out / "photos" / "held_out" / name), model.config.image_size) for name in HELD_OUT_PHOTOS]
    results, reconstructions = _beside_baselines(model, torch.cat(cut))
    parts = reconstructions.split([len(each) for each in cut])
    pictures = [[_assembled(each) for each in photographs] for photographs in (cut, parts)]
    image_grid(pictures).save(out / "reconstruction.png")
    results = {"model": PACKAGED_MODEL, "of": f"tiles of {len(cut)} photographs", **results}
    write_atomic(out / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    return results


def tiles(photo: Image.Image, size: int) -> Tensor:
    """Cut a photograph, resized to `TILE_ROWS` times `size` px of height, into tiles: (N, 3, size, size) uint8.

    What is left over at its sides is cut off, the same on both. Raises `ValueError` if it is too narrow for one column.
    """
    height = TILE_ROWS * size
    width = round(photo.width * height / photo.height)
    if width < size:
        raise ValueError(f"{photo.width}x{photo.height} px: too narrow to be cut into {TILE_ROWS} rows of square tiles")
    left = (width % size) // 2
    resized = photo.resize((width, height), Image.Resampling.BICUBIC)
    pixels = pil_to_uint8(resized.crop((left, 0, left + width // size * size, height)))
    return rearrange(pixels, "c (rows h) (columns w) -> (rows columns) c h w", h=size, w=size)


def _assembled(parts: Tensor) -> Tensor:
    """Undo the cutting of `tiles`: (N, 3, S, S) -> (3, H, W)."""
    return rearrange(parts, "(rows columns) c h w -> c (rows h) (columns w)", rows=TILE_ROWS)


def demo_config(out: Path | str, overrides: list[str]) -> RunConfig:
    """Return configs/demo.yaml, from the installed package or beside it in a clone, its folders inside `out`."""
    package = Path(__file__).parent
    found = [path for path in (package / "configs", package.parent / "configs") if (path / "demo.yaml").is_file()]
    if not found:
        raise ValueError(f"configs/demo.yaml is neither beside nor in {package}; install vqhit again")
    folders = [
        f"run_dir={json.dumps(str(Path(out) / 'run'))}",
        f"data.path={json.dumps(str(Path(out) / 'photos' / 'train'))}",
    ]
    return RunConfig.from_yaml(found[0] / "demo.yaml", [*folders, *overrides])


def train_demo(config: RunConfig, out: Path) -> dict[str, Any] | Signals:
    """Train (or continue, or reuse) a small model in `out`, try it on crops of the held-out photographs.

    Writes results.json and reconstruction.png and returns the results, or the signal that ended the training first.
    Raises `ValueError` if scikit-image's photographs are not there.
    """
    started = time.perf_counter()
    _copy_photos(TRAINING_PHOTOS, out / "photos" / "train")
    _copy_photos(HELD_OUT_PHOTOS, out / "photos" / "held_out")
    trainer = Trainer(config)
    trained_from = trainer.state.step
    if trained_from < config.train.steps:
        trainer.run()
    if trainer.stopped_by is not None:
        return trainer.stopped_by
    training_s = time.perf_counter() - started if trainer.state.step > trained_from else 0.0
    if trained_from:  # training that an earlier call has done counts too
        training_s += _earlier_training_s(out / "results.json")
    if trainer.state.step < config.train.steps:
        print(f"out of time at step {trainer.state.step} of {config.train.steps}; the same command trains the rest")
    folder = newest(trainer.folder.checkpoints)
    assert folder is not None  # the trainer ends with a checkpoint
    model = VQHiT.from_pretrained(folder)
    model.save_pretrained(out / "model")

    crops = torch.cat([six_crops(out / "photos" / "held_out" / name, model) for name in HELD_OUT_PHOTOS])
    results, reconstructions = _beside_baselines(model, crops)
    results = {
        "model": str(out / "model"),
        "of": f"crops of {len(HELD_OUT_PHOTOS)} photographs held out of training",
        **results,
        "steps": trainer.state.step,
        "steps_this_time": trainer.state.step - trained_from,
        "seconds": round(training_s + results["seconds"], 1),
        "seconds_training": round(training_s, 1),
    }
    write_atomic(out / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    shown = [(crops[i], reconstructions[i]) for i in range(len(crops))]
    compare_grid(shown, columns=len(crops) // 2, enlarge=2).save(out / "reconstruction.png")
    return results


def _beside_baselines(model: VQHiT, originals: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Measure a tokenizer beside its baselines on (B, 3, S, S) uint8; the numbers, and the reconstructions."""
    started = time.perf_counter()
    measured = Reconstruction(model)
    reconstructions = torch.cat([measured.update(part) for part in originals.split(12)])
    seconds = time.perf_counter() - started
    bits = model.num_tokens * math.log2(model.codebook_size)
    mean_colour, thumbnails = baselines(originals, bits)
    results = {
        **measured.result(),
        "psnr_mean_colour": float(psnr(originals, mean_colour).mean()),
        "ssim_mean_colour": float(ssim(originals, mean_colour).mean()),
        "psnr_thumbnail": float(psnr(originals, thumbnails).mean()),
        "ssim_thumbnail": float(ssim(originals, thumbnails).mean()),
        "thumbnail_px": thumbnail_side(bits),
        "image_size": model.config.image_size,
        "tokens_per_image": model.num_tokens,
        "codebook_size": model.codebook_size,
        "bits_per_pixel": bits / model.config.image_size**2,
        "seconds": round(seconds, 1),
    }
    return results, reconstructions


def _earlier_training_s(results: Path) -> float:
    try:
        return float(json.loads(results.read_text())["seconds_training"])
    except (OSError, ValueError, KeyError, TypeError):  # stopped before it had results
        return 0.0


def print_results(results: dict[str, Any], console: Console) -> None:
    """The demo's table: the tokenizer beside its two baselines."""
    title = f"{results['images']} {results['of']}, {results['image_size']} px"
    table = Table(title=title, box=box.SIMPLE, padding=0, pad_edge=False)
    for column in ("", "tokens\nper image", "bits\nper pixel", "PSNR\n(dB)", "SSIM", "codes used", "seconds"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    used = f"{results['codes_used']} of {results['codebook_size']}"
    table.add_row(
        "VQ-HiT",
        str(results["tokens_per_image"]),
        f"{results['bits_per_pixel']:.3f}",
        f"{results['psnr']:.2f}",
        f"{results['ssim']:.3f}",
        used,
        f"{results['seconds']:.0f}",
    )
    side = results["thumbnail_px"]
    for name, key, bits in (
        (f"thumbnail {side}x{side}", "thumbnail", 24 * side**2 / results["image_size"] ** 2),
        ("mean colour", "mean_colour", 24 / results["image_size"] ** 2),
    ):
        numbers = (f"{results[f'psnr_{key}']:.2f}", f"{results[f'ssim_{key}']:.3f}")
        table.add_row(name, "-", f"{bits:.3f}", *numbers, "-", "-")
    console.print(table)
    if "steps" in results and results["psnr"] <= max(results["psnr_thumbnail"], results["psnr_mean_colour"]):
        console.print("The tokenizer is not above both baselines: it was not trained long enough.")


def six_crops(photo: Path, model: VQHiT) -> Tensor:
    """Six square crops, two rows of three, that cover most of a landscape photograph: (6, 3, S, S) uint8."""
    image = load_image(photo)
    side = min(image.height / 2, image.width / 3)
    left, top = (image.width - 3 * side) / 2, (image.height - 2 * side) / 2
    boxes = [(left + column * side, top + row * side, side) for row in range(2) for column in range(3)]
    return torch.stack([pil_to_uint8(crop_box(image, box, model.config.image_size)) for box in boxes])


def thumbnail_side(bits: float) -> int:
    """Side in px of the square thumbnail, 24 bits a pixel, whose size comes nearest to `bits`; at least 1."""
    return max(1, round(math.sqrt(bits / 24)))


def baselines(crops: Tensor, bits: float) -> tuple[Tensor, Tensor]:
    """Two things to beat: each crop's mean colour, and a thumbnail of the same number of bits, enlarged bilinearly.

    (B, 3, S, S) uint8 -> two of the same shape. The thumbnail is area-downsampled and kept in 8 bits a channel.
    """
    images, size = from_uint8(crops), crops.shape[-2:]
    mean_colour = to_uint8(images.mean((2, 3), keepdim=True)).expand_as(crops)
    side = thumbnail_side(bits)
    thumbnails = from_uint8(to_uint8(F.interpolate(images, size=(side, side), mode="area")))
    enlarged = F.interpolate(thumbnails, size=size, mode="bilinear", align_corners=False)
    return mean_colour, to_uint8(enlarged)


def _copy_photos(names: tuple[str, ...], folder: Path) -> None:
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ValueError("the demo's photographs come with scikit-image; install it: pip install 'vqhit[demo]'")
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        source = Path(spec.origin).parent / "data" / name
        if not source.is_file():
            raise ValueError(f"{source}: missing; the demo needs a scikit-image that ships this photograph (0.22 does)")
        if not (folder / name).exists():
            write_atomic(folder / name, source.read_bytes())
