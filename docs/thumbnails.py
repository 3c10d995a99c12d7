"""PSNR and SSIM of thumbnails, the least that a tokenizer must beat: python docs/thumbnails.py DATA [SIDE_PX]...

Each image, center-cropped to 64 px, is area-downsampled to SIDE_PX, rounded to 8 bits a channel, enlarged bilinearly.
"""

import sys

import torch

from vqhit.data import CenterCrops
from vqhit.demo import baselines
from vqhit.metrics import psnr, ssim
from vqhit.sources import SourceConfig, evenly_spaced, open_source

IMAGES, SIZE = 2000, 64


def main(data, sides):
    """Print one line for each side, over the images that `vqhit eval --limit 2000` takes."""
    source = open_source(SourceConfig(path=data), split="validation")
    crops = CenterCrops(source, SIZE)
    read = [crops[index].image for index in evenly_spaced(len(source), IMAGES)]
    images = torch.stack([image for image in read if image.numel()])
    for side in sides:
        _, thumbnails = baselines(images, bits=24 * side**2)
        pairs = list(zip(images.split(100), thumbnails.split(100), strict=True))
        means = [float(torch.cat([measure(*pair) for pair in pairs]).mean()) for measure in (psnr, ssim)]
        print(f"{side}x{side} px, {24 * side**2} bits: {means[0]:.2f} dB, SSIM {means[1]:.3f}, {len(images)} images")


if __name__ == "__main__":
    if len(sys.argv) < 2 or not all(side.isdecimal() and 1 <= int(side) <= SIZE for side in sys.argv[2:]):
        sys.exit(f"usage: python docs/thumbnails.py DATA [SIDE_PX]... (sides from 1 to {SIZE})")
    main(sys.argv[1], [int(side) for side in sys.argv[2:]] or [8, 10])
