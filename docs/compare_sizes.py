"""PSNR of models on other image sizes than their own: python docs/compare_sizes.py SIZE[,SIZE]... MODEL...

Center crops of photographs that ship inside scikit-image, the mean over them; a dash where a model takes no such size.
"""

import sys
from pathlib import Path

import skimage

from vqhit import VQHiT
from vqhit.images import to_uint8
from vqhit.metrics import psnr
from vqhit.tables import print_table

PHOTOS = ("chelsea.png", "coffee.png", "astronaut.png", "motorcycle_left.png", "rocket.jpg", "hubble_deep_field.jpg")


def main(sizes, names):
    """Print one table."""
    folder = Path(skimage.__file__).parent / "data"
    photos = [folder / name for name in PHOTOS if (folder / name).is_file()]
    rows = []
    for name in names:
        model, row = VQHiT.from_pretrained(name), {"model": name}
        for size in sizes:
            row[f"{size} px"] = "-"
            if model.config.sizes.allow(size):
                images = model.preprocess(photos, size)
                reconstructions = model.reconstruct(images, micro_batch=1)
                row[f"{size} px"] = f"{float(psnr(to_uint8(images), to_uint8(reconstructions)).mean()):.2f}"
        rows.append(row)
    print_table(f"PSNR (dB), {len(photos)} photographs", rows)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python docs/compare_sizes.py SIZE[,SIZE]... MODEL...")
    main([int(size) for size in sys.argv[1].split(",")], sys.argv[2:])
