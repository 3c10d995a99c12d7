"""Draw how a generator's samples change in training: python docs/samples_over_time.py PICTURE.png RUN_DIR STEP...

A row for each step, cut out of the grid that the run wrote there; the columns are the same noise throughout.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vqhit.images import image_grid
from vqhit.recipe import RunConfig

GAP_PX, COLUMNS = 4, 8  # of the grids


def main(picture, run_dir, steps):
    """Write the picture."""
    size = RunConfig.from_yaml(run_dir / "config.yaml").model.image_size
    rows = []
    for step in steps:
        path = run_dir / "grids" / f"step_{step:09d}.png"
        if not path.exists():
            sys.exit(f"{path}: no such grid; train.grid_every says at which steps there is one")
        grid = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
        lefts = [GAP_PX + column * (size + GAP_PX) for column in range(COLUMNS)]
        rows.append([grid[:, GAP_PX : GAP_PX + size, left : left + size] for left in lefts])
    image_grid(rows, enlarge=max(1, 128 // size)).save(picture)
    print(f"rows from above: steps {', '.join(map(str, steps))}")


if __name__ == "__main__":
    if len(sys.argv) < 4 or not sys.argv[1].endswith(".png") or not all(step.isdecimal() for step in sys.argv[3:]):
        sys.exit("usage: python docs/samples_over_time.py PICTURE.png RUN_DIR STEP...")
    main(sys.argv[1], Path(sys.argv[2]), [int(step) for step in sys.argv[3:]])
