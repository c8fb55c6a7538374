"""PNG files of pixels, and what they are read back as."""

import io

import numpy as np
import pytest
from PIL import Image

from scumble.data.image_sets import load, write_parquet
from scumble.png import encode_png, to_image

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3)])
@pytest.mark.parametrize("level", [-1, 0, 1])
def test_a_png_file_holds_the_same_pixels(shape, level):
    pixels = RNG.integers(0, 256, shape, np.uint8)
    read = np.asarray(Image.open(io.BytesIO(encode_png(pixels, level))))
    np.testing.assert_array_equal(read, pixels.reshape(read.shape))


def test_pixels_need_not_be_contiguous():
    pixels = RNG.integers(0, 256, (3, 7, 5), np.uint8).transpose(2, 1, 0)
    np.testing.assert_array_equal(np.asarray(to_image(pixels)), pixels)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_parquet_file_is_read_back_as_written(channels, tmp_path):
    images = RNG.integers(0, 256, (4, 6, 5, channels), np.uint8)
    write_parquet(tmp_path / "set.parquet", images, [2, 0, 1, 2], ["a.png", "b.png", "c.png", "d"])
    found = load(str(tmp_path / "set.parquet"))
    np.testing.assert_array_equal(found.images, images)
    assert found.labels.tolist() == [2, 0, 1, 2]
    assert found.groups == ("a.png", "b.png", "c.png", "d")
