"""Files of any kind become RGB images or a one-line error; the range conversions are exact."""

import hashlib
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.pictures import golden_pictures
from vqhit import images
from vqhit.images import ImageError, load_image


def test_all_256_levels_survive_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    floats = images.from_uint8(levels)
    assert (floats.min(), floats.max()) == (-1, 1)
    assert torch.equal(images.to_uint8(floats), levels)


def test_floats_are_rounded_and_clamped():
    values = torch.tensor([-3.0, -1.0, 0.0, 1 / 127.5 * 0.51, 1.0, 3.0])
    assert images.to_uint8(values).tolist() == [0, 0, 128, 128, 255, 255]
    assert images.to_uint8(torch.tensor([-1 + 0.49 / 127.5, -1 + 0.51 / 127.5])).tolist() == [0, 1]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_formats_of_photographs(tmp_path, picture, suffix):
    path = tmp_path / f"photo.{suffix}"
    picture(30, 20).save(path)
    loaded = load_image(path)
    assert (loaded.mode, loaded.size) == ("RGB", (30, 20))
    np.testing.assert_allclose(np.asarray(loaded, float), np.asarray(picture(30, 20), float), atol=40)


def test_grey_cmyk_palette_and_bilevel(tmp_path, picture):
    for mode, suffix in (("L", "png"), ("CMYK", "jpg"), ("P", "png"), ("1", "png"), ("LA", "png"), ("I;16", "png")):
        image = picture(30, 20).convert("L" if mode == "I;16" else mode)
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image, dtype=np.uint16) * 257)
        image.save(tmp_path / f"{mode[:2]}.{suffix}")
        loaded = load_image(tmp_path / f"{mode[:2]}.{suffix}")
        assert loaded.mode == "RGB"
        if mode in ("L", "LA", "I;16"):
            expected = np.asarray(picture(30, 20).convert("L"))
            np.testing.assert_array_equal(np.asarray(loaded)[..., 0], expected, err_msg=mode)


def test_transparency_is_laid_over_white(tmp_path):
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    image.putpixel((0, 0), (10, 20, 30, 255))
    image.save(tmp_path / "alpha.png")
    loaded = load_image(tmp_path / "alpha.png")
    assert loaded.getpixel((0, 0)) == (10, 20, 30)
    assert loaded.getpixel((3, 3)) == (255, 255, 255)


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: left becomes top
    image.save(tmp_path / "turned.jpg", exif=exif)
    loaded = load_image(tmp_path / "turned.jpg")
    assert loaded.size == (20, 40)
    assert loaded.getpixel((10, 5))[0] > 200
    assert loaded.getpixel((10, 35))[0] < 50


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_as_pil_turns_it(tmp_path, picture, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(12, 7).save(tmp_path / "turned.png", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "turned.png")))
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "turned.png")), expected)


def test_damaged_exif_does_not_cost_the_picture(tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker"
    picture(12, 7).save(tmp_path / "whole.jpg", exif=exif, quality=95)
    data = (tmp_path / "whole.jpg").read_bytes()
    start, length = data.index(b"Exif") + 6, len(exif.tobytes()) - 6
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data)
        for place in rng.integers(start, start + length, 3):
            damaged[place] = rng.integers(0, 256)
        (tmp_path / "damaged.jpg").write_bytes(damaged)
        assert sorted(load_image(tmp_path / "damaged.jpg").size) == [7, 12]


def png_with_short_data():
    """A 64x64 PNG with valid checksums whose pixel data is too short."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\x00")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def huge_jpeg():
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    data = buffer.getvalue()
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", 65000, 65000) + data[start + 4 :]


def half_jpeg():
    buffer = io.BytesIO()
    Image.effect_noise((128, 128), 80).save(buffer, "JPEG")
    return buffer.getvalue()[:2000]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.jpg", b""),
        ("page.jpg", b"<!DOCTYPE html><html><body>404</body></html>"),
        ("half.jpg", half_jpeg()),
        ("short.png", png_with_short_data()),
        ("huge.jpg", huge_jpeg()),
        ("drawing.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    ],
)
def test_what_is_no_image_is_named_in_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        load_image(tmp_path / "absent.jpg")
    with pytest.raises(ImageError, match="cannot be decoded"):
        load_image(tmp_path)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (64, 64), (65, 129), (1000, 71), (20, 30), (1, 1), (3, 2000)])
def test_center_crop_takes_any_size(picture, size):
    assert images.center_crop(picture(*size), 64).size == (64, 64)


def adms_center_crop(image, size):
    """What guided-diffusion's center_crop_arr does, in its order, on an RGB picture: an array."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    pixels = np.asarray(image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC))
    top, left = ((side - size) // 2 for side in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("name", list(golden_pictures()))
def test_the_crop_of_odd_sizes_and_modes_has_its_golden_hash(name):
    crops = json.loads((Path(__file__).parent / "fixtures" / "adm_crops.json").read_text())["crops"]
    picture, rgb = golden_pictures()[name]
    assert hashlib.sha256(adms_center_crop(rgb, 64).tobytes()).hexdigest() == crops[name]
    crop = images.pil_to_uint8(images.center_crop(images.to_rgb(picture), 64))
    assert hashlib.sha256(crop.permute(1, 2, 0).numpy().tobytes()).hexdigest() == crops[name]


def test_a_very_long_picture_does_not_need_the_memory_of_its_full_enlargement():
    crop = images.center_crop(Image.new("RGB", (2, 60_000), "red"), 256)
    assert crop.size == (256, 256)
    assert crop.getpixel((128, 128)) == (255, 0, 0)


def test_grid_places_originals_above_reconstructions():
    black, white = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.full((3, 8, 8), 255, dtype=torch.uint8)
    grid = images.compare_grid([(black, white)] * 3, columns=2, enlarge=2)
    assert grid.size == (4 + 2 * 20, 4 + 4 * 20)
    assert grid.getpixel((6, 6)) == (0, 0, 0)
    assert grid.getpixel((6, 26)) == (255, 255, 255)
