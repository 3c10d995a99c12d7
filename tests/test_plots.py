"""The picture of a codebook's usage shows each code once."""

import pytest
import torch
from PIL import Image

from vqhit.codebook import CodebookUsage
from vqhit.plots import codebook_histogram, histogram_bins, speed_bars


@pytest.mark.parametrize("counts", [[0, 3, 3, 900, 17], [5, 5, 5, 5], [0, 0, 0], [1]])
def test_every_usage_makes_a_picture(tmp_path, counts):
    usage = CodebookUsage(len(counts))
    usage.counts = torch.tensor(counts)
    codebook_histogram(usage, tmp_path / "codes.png")
    with Image.open(tmp_path / "codes.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 500
    assert [path.name for path in tmp_path.iterdir()] == ["codes.png"]


def test_bars_and_dead_codes_are_all_codes():
    counts = torch.tensor([0, 0, 1, 2, 1000, 1000, 1024]).double()
    chosen = counts[counts > 0]
    heights, _ = torch.histogram(chosen, histogram_bins(chosen))
    assert heights.sum() == 5
    assert sorted(heights[heights > 0].tolist()) == [1, 1, 1, 2]


def test_every_comparison_of_speeds_makes_a_picture(tmp_path):
    rows = [
        {
            "contender": name,
            "images_per_s": speed,
            "images_per_s_lowest": speed / 2,
            "images_per_s_highest": speed,
            "relative": speed,
        }
        for name, speed in (("taming eager", 1.0), ("vqhit eager", 3.5))
    ]
    heights = []
    for groups in ({"decode, float32": rows}, {"decode, float32": rows, "encode, float32": rows[:1]}):
        speed_bars(groups, tmp_path / "new" / "bench.png", "a model")
        with Image.open(tmp_path / "new" / "bench.png") as picture:
            assert picture.format == "PNG"
            heights.append(picture.height)
    assert heights[0] < heights[1]
