"""Owners' images reach training and measuring as they reach the service."""

import numpy as np
import pytest
from PIL import Image

from app.inference.bundle import Card, InputShape, Preprocessing
from app.inference.decode import decode
from scumble.data.image_sets import DatasetError, class_numbers, load
from scumble.training.measure import batch_size, decoder_of, fitted, open_set
from tests.pictures import encoded, picture

LABELS = ["ant", "bee", "cow"]
EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06" + bytes(6)
FITS = [
    Preprocessing(),
    Preprocessing(fit="crop", ratio=0.8, interpolation="bicubic"),
    Preprocessing(fit="resize_crop", shorter=24),
    Preprocessing(fit="letterbox", fill=9, alpha="black"),
]


def card(preprocessing=None, channels=3, labels=LABELS) -> Card:
    return Card(
        format="scumble-bundle/1",
        name="own",
        version="1",
        labels=labels,
        input=InputShape(height=20, width=16, channels=channels),
        preprocessing=preprocessing or Preprocessing(),
        files={},
    )


def files() -> dict[str, bytes]:
    wide = Image.fromarray(np.arange(41 * 23, dtype=np.uint16).reshape(23, 41) * 69)
    return {
        "a.png": encoded(picture(41, 23)),
        "b.jpg": encoded(picture(41, 23), "JPEG", exif=EXIF),
        "c.png": encoded(wide),
        "d.png": encoded(picture(30, 30, "RGBA")),
        "e.webp": encoded(picture(19, 44), "WEBP", exif=EXIF),
        "f.jpg": encoded(picture(25, 60).convert("CMYK"), "JPEG"),
        "g.png": encoded(picture(30, 30, "P"), transparency=7),
        "h.jpg": encoded(picture(5, 5).resize((1300, 900)), "JPEG"),
        "i.png": encoded(picture(33, 21, "L")),
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set" / "bee").mkdir(parents=True)
    for name, content in files().items():
        (tmp_path / "set" / "bee" / name).write_bytes(content)
    return tmp_path / "set"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("fit", FITS, ids=lambda fit: fit.fit)
def test_every_file_has_the_pixels_that_the_service_sees(folder, fit, channels):
    own = card(fit, channels)
    found = open_set(str(folder), "train", None, own)
    for pixels, content in zip(found.images, files().values(), strict=True):
        expected = decode(content, own.input, fit, 10**8)
        np.testing.assert_array_equal(pixels, expected)
    assert found.labels.tolist() == [1] * len(files())


def test_a_set_without_a_card_has_the_pixels_of_a_card_that_stretches(folder):
    """What `scumble train` learns from is what its bundle will see."""
    found = load(str(folder)).images
    shape = InputShape(height=23, width=41, channels=3)
    for name, pixels, content in zip(files(), found, files().values(), strict=True):
        if name != "h.jpg":  # the service reduces it while it decodes
            expected = decode(content, shape, Preprocessing(), 10**8)
            np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("kind", ["PPM", "BMP"])
def test_formats_that_the_service_does_not_take_are_read_alike(kind):
    source = picture(41, 23)
    own = card()
    found = decoder_of(own)(encoded(source, kind))
    expected = decode(encoded(source), own.input, own.preprocessing, 10**8)
    np.testing.assert_array_equal(found, expected)


def test_a_broken_file_is_named(folder):
    (folder / "bee" / "z.png").write_bytes(encoded(picture())[:50])
    with pytest.raises(DatasetError, match=r"z\.png' is not a readable image: .*cut off"):
        open_set(str(folder), "train", None, card())


@pytest.mark.parametrize(
    ("classes", "numbers"),
    [
        (["ant", "bee", "cow"], [0, 1, 2]),
        (["cow", "ant", "bee"], [2, 0, 1]),
        (["Cow ", "bee"], [2, 1]),
        (["0", "1", "2"], [0, 1, 2]),
        (["00002", "00000"], [2, 0]),
        (["2"], [2]),
        (["Ameise", "Biene", "Kuh"], [0, 1, 2]),
        (["1", "2", "3"], [0, 1, 2]),
    ],
)
def test_classes_are_found_by_name_then_by_number_then_in_order(classes, numbers):
    assert class_numbers("x", classes, LABELS) == numbers


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        (["ant", "dog"], LABELS),
        (["Ameise", "Biene"], LABELS),
        (["7", "8"], LABELS),
        (["a", "b", "c", "d"], LABELS),
        (["crane", "bee"], ["crane", "bee", "Crane"]),
    ],
)
def test_other_classes_are_refused(classes, labels):
    with pytest.raises(DatasetError, match=f"{len(classes)} classes, the network {len(labels)}"):
        class_numbers("x", classes, labels)


def test_numbered_folders_are_matched_by_their_numbers_and_not_as_text(tmp_path):
    """Sorted as text, 10 comes before 2."""
    for k in range(12):
        (tmp_path / str(k)).mkdir()
        (tmp_path / str(k) / "x.png").write_bytes(encoded(Image.new("RGB", (4, 4), (k, 0, 0))))
    for labels in ([str(k) for k in range(12)], [f"sign {k}" for k in range(12)]):
        found = open_set(str(tmp_path), "train", None, card(labels=labels))
        assert found.labels.tolist() == found.images[:, 0, 0, 0].tolist() == list(range(12))


def test_images_in_memory_are_fitted_alike(folder):
    own = card(FITS[1])
    stored = load(str(folder))
    found = fitted(stored, own).images
    for pixels, source in zip(found, stored.images, strict=True):
        content = encoded(Image.fromarray(source))
        np.testing.assert_array_equal(pixels, decode(content, own.input, FITS[1], 10**8))


def test_a_batch_has_as_many_levels_whatever_the_size_of_its_images():
    assert batch_size((32, 32, 3)) == 250
    assert batch_size((224, 224, 3)) == 5
    assert batch_size((2000, 2000, 3)) == 1
