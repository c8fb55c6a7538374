"""Transfer sets: terms, variants, and sets that a program draws."""

import numpy as np
import pytest
from PIL import Image

from scumble.attacker import transfer
from scumble.data.image_sets import DatasetError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of 12 noisy pictures in two class folders."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for kind in ("one", "two"):
        (root / kind).mkdir()
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(
                root / kind / f"{i}.png"
            )
    return str(root)


@pytest.mark.parametrize(
    ("terms", "images"),
    [
        ("{0}", 12),
        ("{0}[:5]", 5),
        ("{0}[4:6]", 2),
        ("{0}[9:]", 3),
        ("{0}@outlines[:5]", 5),
        ("{0}, {0}@blended, {0}@posterised[:1]", 25),
        ("{0}, digits:test[:7]", 19),
        ("{0}[:2],fractal[:3],noise[:4]", 9),
        ("{0}[:2],texture[20000:20003]", 5),
        ("{0}[:1],strokes[:2],shapes[:3]", 6),
    ],
)
def test_terms_are_put_together(terms, images, folder):
    found = transfer.data(terms.format(folder), "train", None)
    assert found.images.shape == (images, 8, 8, 3)
    assert found.images.dtype == np.uint8
    assert len(found.labels) == len(found.groups) == images
    assert found.labels.max() < len(found.classes)


def test_parts_do_not_overlap(folder):
    first = transfer.data(f"{folder}[:5]", "train", None).images
    rest = transfer.data(f"{folder}[5:]", "train", None).images
    whole = transfer.data(folder, "train", None).images
    np.testing.assert_array_equal(np.concatenate([first, rest]), whole)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ("{0}@sepia", "is 'sepia'; allowed: outlines, posterised, blended"),
        ("{0}[20:30]", "has no images"),
        ("noise[100000:100001]", "has no images: noise has 100000"),
        ("noise[5:5]", "has no images"),
        ("{0},nowhere", "no data set 'nowhere'"),
    ],
)
def test_what_cannot_be_read_is_said(terms, message, folder):
    with pytest.raises(DatasetError, match=message):
        transfer.data(terms.format(folder), "train", None)


@pytest.mark.parametrize("name", transfer.POOLS)
def test_drawn_pictures_are_varied_and_the_same_each_time(name):
    found = transfer.drawn(name, 30)
    again = transfer.drawn(name, 20)
    np.testing.assert_array_equal(found.images[:20], again.images)
    assert found.images.shape == (30, 32, 32, 3)
    assert len(np.unique(found.images.reshape(30, -1), axis=0)) == 30
    assert found.images.std() > 20


def test_parts_of_a_drawn_set_are_those_of_the_whole():
    whole = transfer.drawn("noise", 510).images
    for first, last in ((490, 510), (500, 505)):
        part = transfer.drawn("noise", last, first)
        np.testing.assert_array_equal(part.images, whole[first:last])
        assert part.groups[0] == f"noise/{first}"


def test_strokes_are_thin_and_half_of_them_white_on_black():
    images = transfer.drawn("strokes", 200).images
    corner = images[:, 0, 0]
    plain = (corner == 0).all(1)
    assert 0.4 < plain.mean() < 0.6
    inked = images[plain].mean((1, 2, 3)) / 255
    assert (inked > 0.005).all()
    assert np.median(inked) < 0.3
    # nothing is drawn over the edge of the picture
    edges = np.concatenate(
        [images[plain][:, [0, -1]].reshape(-1), images[plain][:, :, [0, -1]].reshape(-1)]
    )
    assert (edges > 0).mean() < 0.02


def test_shapes_have_one_colour_in_the_middle_and_several_around_it():
    images = transfer.drawn("shapes", 200).images.astype(int)
    colours = [len(np.unique(image.reshape(-1, 3), axis=0)) for image in images]
    assert min(colours) > 50  # a ground out of focus
    along = np.abs(np.diff(images[:, 16], axis=1)).sum(2)
    assert ((along == 0).mean(1) > 0.2).mean() > 0.7  # plain areas
    assert (along.max(1) > 60).mean() > 0.7  # and edges


def test_outlines_are_light_edges_on_black():
    square = np.zeros((1, 9, 9, 1), np.uint8)
    square[0, 3:, :] = 200
    edges = transfer.outlines(square)[0, :, 4, 0]
    assert edges.tolist() == [0, 0, 200, 200, 0, 0, 0, 0, 0]


def test_posterised_pictures_have_four_levels():
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    assert sorted(set(transfer.posterised(ramp).ravel())) == [0, 85, 170, 255]
