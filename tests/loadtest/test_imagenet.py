"""The benchmark of a network of 1,000 classes: its photos, its figures, its part of the page."""

import io

import numpy as np
import pytest
from PIL import Image

from app.inference.bundle import Bundle, Preprocessing, write_card
from app.inference.decode import decode
from loadtest import imagenet, pages, photos
from loadtest.bench import Rounds
from loadtest.peers import classifier
from tests.pictures import encoded, picture
from tests.tiny import make_bundle


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.png"
    path.write_bytes(encoded(picture(90, 60)))
    return path


@pytest.fixture
def card(tmp_path):
    """Of a network whose pictures are cropped."""
    folder = make_bundle(tmp_path)
    known = Bundle(folder).card.model_dump(exclude={"files", "format"})
    rule = Preprocessing(fit="crop", ratio=0.875, interpolation="bicubic")
    return write_card(folder, {**known, "preprocessing": rule.model_dump()})


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_large_photo_has_its_size_and_a_sensors_noise(tmp_path, kind):
    source = tmp_path / "even.png"
    source.write_bytes(encoded(Image.new("RGB", (90, 60), (120, 130, 140))))
    data = photos.photo(source, 160, 120, kind)
    found = Image.open(io.BytesIO(data))
    assert (found.format, found.size) == (kind, (160, 120))
    assert 3 < np.asarray(found.convert("L")).std() < 5
    assert photos.photo(source, 160, 120, kind) == data


def test_crops_are_the_same_at_each_call(source, card):
    one, other = (np.stack(list(photos.crops([source, source], card, 3))) for _ in range(2))
    assert one.shape == (6, card.input.height, card.input.width, card.input.channels)
    np.testing.assert_array_equal(one, other)
    assert len(np.unique(one.reshape(6, -1), axis=0)) == 6


def test_no_photo_is_fetched_again(tmp_path):
    for name in (*photos.SHOWN, *photos.OTHERS):
        (tmp_path / name).write_bytes(b"there")
    photos.fetch(tmp_path)
    assert {file.read_bytes() for file in tmp_path.iterdir()} == {b"there"}


def test_other_servers_see_what_scumble_sees_in_full(source, card, tmp_path):
    """So that a difference of their answers is one of the reduced decoding alone."""
    onnx = tmp_path / card.name / "float32.onnx"
    for size, kind in (((90, 61), "PNG"), ((61, 90), "JPEG")):
        data = photos.photo(source, *size, kind)
        ours = decode(data, card.input, card.preprocessing, 10_000)
        np.testing.assert_array_equal(classifier.decode(data, onnx), ours)


def test_each_server_is_sent_the_file():
    bodies = {what: what.encode() for what in imagenet.FILES}
    kinds = {post.content_type for post in imagenet.posts("scumble", bodies).values()}
    assert kinds == {"image/jpeg", "image/png", "image/webp"}
    for name in ("scumble", *imagenet.OTHER_SERVERS):
        for what, post in imagenet.posts(name, bodies).items():
            assert bodies[what] in post.body


def test_withheld_answers_have_no_label(card):
    rows = np.eye(len(card.labels))[:2]
    assert imagenet.labels_of(rows, card) == card.labels[:2]
    assert imagenet.labels_of(rows, card, np.array([0, 1])) == [card.labels[0], "(withheld)"]


def figures():
    """Two rounds; the machine is half as fast in the second."""
    found = Rounds()
    for slow in (1, 2):
        for what in imagenet.FILES:
            for name, rps in (("scumble", 60), ("plain", 10), ("litserve", 15)):
                for key, value in (
                    ("rps", rps / slow),
                    ("p50", 1000 * slow / rps),
                    ("p99", 2000 * slow / rps),
                    ("errors", 0),
                    ("gap", 1e-4 * slow),
                    ("same", 1),
                ):
                    found.add(f"{name} {what} {key}", value)
    return found


def test_ratios_are_those_of_the_rounds_and_the_best_server_counts():
    found = figures()
    theirs = dict(imagenet.server_figures(found, "plain", imagenet.FILES))[imagenet.LAST]
    assert theirs["scumble_over_it_rps"] == 6
    assert theirs["scumble_over_it_p99"] == pytest.approx(0.167)
    assert theirs["gap"] == 2e-4
    assert theirs["same_label"]
    best = dict(imagenet.targets(found, ["plain", "litserve"]))
    assert best == {"large rps over the best": 4, "large p99 over the best": 0.25}
    assert dict(imagenet.targets(found, [])) == {}


def test_a_round_without_an_answer_has_no_ratio():
    found = figures()
    found.values[f"litserve {imagenet.LAST} rps"][1] = 0.0
    silent = dict(imagenet.server_figures(found, "litserve", imagenet.FILES))
    assert "scumble_over_it_rps" not in silent[imagenet.LAST]
    assert silent[imagenet.FIRST]["scumble_over_it_rps"] == 4
    assert dict(imagenet.targets(found, ["plain", "litserve"]))["large rps over the best"] == 6


def document():
    names = ["scumble", "plain", "litserve"]
    found = figures()
    policy = {"changed": 0.8, "withheld": 0.0, "l1": 0.75}
    return {
        "command": "c",
        "cores": 2,
        "processor": "p",
        "files": dict.fromkeys(imagenet.FILES, 2_000_000),
        "photos": [{"photo": "cat", "float32": "tabby", "int8": "tabby", "dcp": "shoe"}],
        "crops": {"images": 240, "pictures": 8},
        "defenses": {
            "dcp": {**policy, "us": 20.0},
            "label": {**policy, "l1": 1.25, "us": 10.0},
            "codebook": {**policy, "us": 30.0},
            "mad_reference": {"us": 2000.0},
            "grad2_reference": {"us": 4000.0},
        },
        "per_second": {"model_only": {"1": 100.0, "32": 110.0}},
        "service": dict.fromkeys(pages.IMAGENET_SERVICE, 1.5),
        "servers": {
            name: dict(imagenet.server_figures(found, name, imagenet.FILES)) for name in names
        },
        "targets": dict(imagenet.targets(found, names[1:])),
    }


def test_the_page_has_the_figures_and_judges_the_targets():
    text = "\n".join(pages.imagenet_parts(document()))
    assert "beside other work" not in text
    assert "over the best other server | ≥ 3 | 4 | yes |" in text
    assert "| slowest published defense over `dcp` | ≥ 37 | 200 | yes |" in text
    assert "| 12 megapixels, JPEG | 2,000 | scumble |" in text
    assert "|  |  | plain | 7.5 | 150 / 300 | 6.00 / 0.17 | 0 |" in text
    assert "| `dcp` | 80.0% | 0.0% | 0.750 | 20 | 1.0 |" in text
    assert "| `grad2`, as published |  |  |  | 4,000 | 200.0 |" in text
    assert "an L1 of at most 0.15. It is 0.750, and 1.250 from labels only" in text
    assert "MobileNetV2" not in text
    both = "\n".join(pages.imagenet_parts(document(), document() | {"command": "other"}))
    assert "`other`, [imagenet-mobilenet.json](" in both
    assert both.count("| 12 megapixels, JPEG | 2,000 | scumble |") == 2
    tried = document() | {"command": "c --quick"}
    tried["servers"]["litserve"][imagenet.LAST] |= {"rps": 0.0}
    text = "\n".join(pages.imagenet_parts(tried))
    assert "beside other work" in text
    assert "|  |  | litserve | 0.0 | no answer in time |" in text
    assert "| cat | tabby | tabby | shoe |" in pages.photo_labels(document())


def test_the_committed_labels_are_those_of_the_committed_figures():
    text = (pages.DOCS / "how-to" / "training.md").read_text()
    found = pages.read("imagenet.json")
    assert pages.within(text, pages.photo_labels(found)) == text, "run: python -m loadtest.pages"
