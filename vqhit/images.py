"""Files, PIL images, uint8 and float tensors: safe decoding, crops, the two range conversions, grids.

uint8 images are (3, H, W) or (B, 3, H, W); float images lie in [-1, 1].
"""

import warnings
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif"})


class ImageError(ValueError):
    """A file that cannot be read as an image; the message names it and says why."""


def load_image(path: Path | str) -> Image.Image:
    """Read a JPEG, PNG, WebP, BMP or GIF file of any mode as an RGB image, turned as its EXIF tag says.

    Of an animation the first frame is read. Raises `ImageError` for anything that does not decode, a picture above
    PIL's size limit (a decompression bomb) included.
    """
    return _open(path, str(path))


def decode_image(data: bytes, name: str) -> Image.Image:
    """Read the bytes of an image file as `load_image` does; `name` is what to call it in an error."""
    return _open(BytesIO(data), name)


def _open(file: Path | str | BytesIO, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large pictures, odd metadata: the pixels decide
            with Image.open(file, formats=FORMATS) as image:
                return to_rgb(image)
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not an image in a format that is read ({', '.join(FORMATS)})") from None
    except Exception as error:  # PIL's decoders raise almost any type on a damaged file
        raise ImageError(f"{name}: the image cannot be decoded ({' '.join(str(error).split())})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode -> RGB: EXIF rotation applied, transparency laid over white, 16-bit grey scaled to 8."""
    image.load()
    if (turn := _EXIF_TURNS.get(_orientation(image))) is not None:
        image = image.transpose(turn)
    if image.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


# EXIF orientation -> what turns the stored picture upright; 1 is upright.
_EXIF_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def is_upright(image: Image.Image) -> bool:
    """Whether an opened file's EXIF tag leaves its picture as it is stored."""
    return _orientation(image) not in _EXIF_TURNS


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 where there is none or where the EXIF block is damaged, which loses no pixels."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged block raises almost any type
        return 1
    return value if isinstance(value, int) else 1


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's center crop to `size` x `size` px: halve with a box filter, resize bicubically, cut the middle out.

    Equal to `center_crop_arr` of openai/guided-diffusion, the crop that most published reconstruction scores use.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    short = min(image.size)
    if max(image.size) > 64 * short:  # enlarged whole, a strip of a few pixels' height would fill the memory
        width, height = (min(side, 64 * short) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    scale = size / short
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def crop_box(image: Image.Image, box: tuple[float, float, float], size: int) -> Image.Image:
    """Cut the square (left, top, side), in px and fractions of px, and resize it to `size` px (antialiased bicubic)."""
    left, top, side = box
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def pil_to_uint8(image: Image.Image) -> Tensor:
    """RGB PIL image -> (3, H, W) uint8."""
    planes = bytearray().join(image.tobytes("raw", band) for band in "RGB")  # a third of a permutation's time
    return torch.frombuffer(planes, dtype=torch.uint8).view(3, image.height, image.width)


def uint8_to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) uint8 -> RGB PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def from_uint8(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Float in [-1, 1] -> uint8 0..255, clamped and rounded (never truncated); the inverse of `from_uint8`.

    Raises `ValueError` if the images are not floating point.
    """
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; allowed: floating point in [-1, 1]")
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def image_grid(rows: Sequence[Sequence[Tensor]], gap_px: int = 4, enlarge: int = 1) -> Image.Image:
    """Lay out rows of (3, H, W) uint8 images of one size on white, each enlarged by a whole factor."""
    height, width = (side * enlarge for side in rows[0][0].shape[1:])
    columns = max(len(row) for row in rows)
    canvas = Image.new(
        "RGB", (columns * (width + gap_px) + gap_px, len(rows) * (height + gap_px) + gap_px), color="white"
    )
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            tile = uint8_to_pil(image).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(tile, (gap_px + x * (width + gap_px), gap_px + y * (height + gap_px)))
    return canvas


def rows_of(images: Iterable[Tensor], columns: int = 8) -> list[list[Tensor]]:
    """Share images out among rows of `columns`, for `image_grid`."""
    many = list(images)
    return [many[start : start + columns] for start in range(0, len(many), columns)]


def compare_grid(pairs: Sequence[tuple[Tensor, Tensor]], columns: int = 8, enlarge: int = 1) -> Image.Image:
    """Originals above their reconstructions, `columns` pairs to a row; both (3, H, W) uint8."""
    rows: list[list[Tensor]] = []
    for start in range(0, len(pairs), columns):
        chunk = pairs[start : start + columns]
        rows += [[original for original, _ in chunk], [reconstruction for _, reconstruction in chunk]]
    return image_grid(rows, enlarge=enlarge)
