"""Mild shifts keep the form of images, change them a little, and are the same for a seed."""

import numpy as np
import pytest

from scumble.data.digits import digits
from scumble.data.shifts import PIXELS, SHIFTS, shift


@pytest.fixture(scope="module")
def images():
    return digits().images[:20]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", SHIFTS)
def test_a_shift_is_mild_and_drawn_by_its_seed(images, name, channels):
    images = images.repeat(channels, axis=3)
    found = shift(name, images)
    assert (found.shape, found.dtype) == (images.shape, np.uint8)
    assert (found != images).any(axis=(1, 2, 3)).all()
    assert (shift(name, images) == found).all()
    if name not in ("blur", "jpeg"):  # nothing to draw
        assert (shift(name, images, seed=1) != found).any()
    same = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(images, found, strict=True)]
    assert np.mean(same) > 0.5


def test_a_moved_image_is_moved_by_one_or_two_pixels():
    image = np.zeros((1, 9, 9, 1), np.uint8)
    image[0, 4, 4] = 255
    for seed in range(20):
        ((_, y, x, _),) = np.argwhere(shift("move", image, seed))
        assert 0 < max(abs(y - 4), abs(x - 4)) <= PIXELS
