"""Twelve pictures of odd sizes and of all modes, made by arithmetic alone, each beside the RGB that it stands for."""

import numpy as np
from PIL import Image


def _values(width, height, channels):
    x, y, c = np.meshgrid(np.arange(width), np.arange(height), np.arange(channels), indexing="xy")
    smooth = (x * 255 // width + y * 127 // height + 60 * c) % 256
    return ((3 * smooth + (7 * x + 13 * y + 29 * c + x * y) % 256) // 4).astype(np.uint8)


def _rgb(width, height):
    return Image.fromarray(_values(width, height, 3))


def _grey(width, height):
    return _values(width, height, 1)[..., 0]


def _over_white(rgba):
    """Alpha over white, by PIL."""
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def golden_pictures():
    """Name -> (picture of some mode, the same as RGB)."""
    grey = Image.fromarray(_grey(91, 67))
    deep = (_grey(75, 131).astype(np.uint16) * 257).astype(np.uint16)
    transparent = Image.fromarray(_values(83, 77, 4))
    shade = Image.fromarray(_values(101, 65, 2), "LA")
    palette = Image.fromarray(_grey(129, 97) // 16, "P")
    palette.putpalette([value * 37 % 256 for value in range(48)])
    clear = palette.copy()
    clear.info["transparency"] = 3
    cyan = Image.fromarray(_values(71, 69, 4), "CMYK")
    pictures = {
        "rgb, larger than twice the crop": (_rgb(301, 203), None),
        "rgb, four times as tall": (_rgb(97, 409), None),
        "rgb, smaller than the crop": (_rgb(37, 53), None),
        "rgb, a line": (_rgb(200, 1), None),
        "rgb, the crop's own size": (_rgb(64, 64), None),
        "rgb, one px more than twice": (_rgb(129, 129), None),
        "grey": (grey, grey.convert("RGB")),
        "16-bit grey": (Image.fromarray(deep), Image.fromarray((deep // 257).astype(np.uint8)).convert("RGB")),
        "transparent": (transparent, _over_white(transparent)),
        "grey, transparent": (shade, _over_white(shade.convert("RGBA"))),
        "palette, one colour transparent": (clear, _over_white(clear.convert("RGBA"))),
        "cmyk": (cyan, cyan.convert("RGB")),
    }
    return {name: (picture, picture if rgb is None else rgb) for name, (picture, rgb) in pictures.items()}
