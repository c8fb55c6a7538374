from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from scumble.data.digits import SHOWN, digits, main

COMMITTED = Path(__file__).parents[3] / "docs" / "digits"


@pytest.fixture(scope="module")
def data():
    pytest.importorskip("sklearn")
    return digits()


def test_digits_have_the_form_of_mnist(data):
    assert data.images.shape == (1797, 28, 28, 1)
    assert data.images.dtype == np.uint8
    assert data.labels.dtype == np.int64
    assert data.classes == tuple("0123456789")
    assert len(set(data.groups)) == len(data)
    assert (data.images.max(axis=(1, 2, 3)) == 255).all()
    assert (data.images[:, [0, -1]] == 0).all()
    assert np.bincount(data.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_digits_are_centred_by_mass(data):
    ink = data.images[..., 0].astype(float)
    middle = ink.sum(axis=1) @ np.arange(28) / ink.sum(axis=(1, 2))
    assert np.abs(middle - 13.5).max() < 1.5
    assert np.median(np.abs(middle - 13.5)) < 0.5


def test_the_committed_pictures_are_what_the_function_makes(data, tmp_path):
    result = CliRunner().invoke(main, [str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    made = sorted((tmp_path / "new").iterdir())
    assert [f.name for f in made] == sorted(f.name for f in COMMITTED.iterdir())
    for file in made:
        # The pixels are compared, because the bytes depend on the version of zlib.
        new, old = Image.open(file), Image.open(COMMITTED / file.name)
        assert (old.mode, old.size) == ("L", (28, 28))
        np.testing.assert_array_equal(np.asarray(new), np.asarray(old))


def test_the_committed_pictures_are_named_after_their_digits(data):
    assert {digit: int(data.labels[row]) for digit, row in SHOWN.items()} == {d: d for d in SHOWN}
