"""Differentiable augmentations against the official code with its own random numbers."""

import numpy as np
import pytest
import torch

from tests.parity import golden
from vqhit.augment import Draws, augment, draw

COLOR, SHIFT, CUTOUT = ["brightness", "saturation", "contrast"], ["shift_y", "shift_x"], ["cutout_y", "cutout_x"]
CASES = {
    "color": COLOR,
    "translation": SHIFT,
    "cutout": CUTOUT,
    "all": COLOR + SHIFT + CUTOUT,
    "rect": SHIFT + CUTOUT,
}


@pytest.mark.parametrize("case", CASES)
def test_the_recorded_draws_give_the_recorded_images(case):
    numbers = golden("diff_augment.npz")
    draws = {name: torch.tensor(numbers[f"{case}/draw{n}"]).flatten() for n, name in enumerate(CASES[case])}
    images = torch.tensor(numbers[f"{case}/x"]).permute(0, 3, 1, 2)
    found = augment(images, Draws(**draws)).permute(0, 2, 3, 1)
    np.testing.assert_allclose(found, numbers[f"{case}/out"], atol=1e-6)


def test_draws_cover_the_official_ranges_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    draws = draw(20000, 16, 9, generator=generator)
    for name in COLOR:
        values = getattr(draws, name)
        assert 0 <= values.min() < 0.01
        assert 0.99 < values.max() < 1
    ranges = {"shift_y": (-2, 2), "shift_x": (-1, 1), "cutout_y": (0, 16), "cutout_x": (0, 8)}
    for name, (low, high) in ranges.items():
        assert sorted(getattr(draws, name).unique().tolist()) == list(range(low, high + 1)), name


def test_only_the_kinds_asked_for_are_drawn():
    draws = draw(2, 8, 8, ["translation"], generator=torch.Generator().manual_seed(0))
    assert draws.brightness is None
    assert draws.cutout_x is None
    assert draws.shift_x is not None


def test_the_generator_decides_the_draws():
    first, second = (draw(5, 8, 8, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.contrast, second.contrast)
    assert torch.equal(first.cutout_y, second.cutout_y)


def test_images_get_gradients():
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    draws = draw(3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x: augment(x, draws), images)
