"""Draw what models make of photographs: python docs/compare_models.py PICTURE.png MODEL...

The first row holds crops of photographs that ship inside scikit-image, the others the reconstructions of each model.
"""

import sys
from pathlib import Path

import skimage
import torch

from vqhit import VQHiT
from vqhit.demo import six_crops
from vqhit.images import from_uint8, image_grid, to_uint8

# Photograph and which of its six crops, two rows of three.
SHOWN = {"chelsea.png": (0, 1, 4), "coffee.png": (1, 4, 5), "astronaut.png": (1, 4), "motorcycle_left.png": (0, 4)}


def main(picture, models):
    """Write the picture and name its rows."""
    loaded = [VQHiT.from_pretrained(model) for model in models]
    if len(sizes := {model.config.image_size for model in loaded}) > 1:
        sys.exit(f"the models' images are {sorted(sizes)} px; they must be of one size")
    folder = Path(skimage.__file__).parent / "data"
    crops = torch.cat([six_crops(folder / name, loaded[0])[list(which)] for name, which in SHOWN.items()])
    reconstructions = [to_uint8(model.reconstruct(from_uint8(crops))) for model in loaded]
    image_grid([list(row) for row in (crops, *reconstructions)], enlarge=2).save(picture)
    for number, name in enumerate(("photographs", *models), start=1):
        print(f"row {number}: {name}")


if __name__ == "__main__":
    if len(sys.argv) < 3 or not sys.argv[1].endswith(".png"):
        sys.exit("usage: python docs/compare_models.py PICTURE.png MODEL...")
    main(sys.argv[1], sys.argv[2:])
