import json
import resource
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scumble.data.image_sets import Dataset, DatasetError, load, require
from tests.pictures import encoded, picture

DATA = Path(__file__).parents[4] / "shared" / "data"


def tracks(n=6, frames=5):
    return [f"00001/{t:05}_{f:05}.ppm" for t in range(n) for f in range(frames)]


@pytest.fixture
def write_parquet(tmp_path):
    """`write_parquet(...)` -> a file in the Hugging Face image layout."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")

    def write(pictures, labels, *, names=None, paths=None, name="set_train.parquet"):
        contents = [p if p is None else encoded(p, "WEBP", lossless=True) for p in pictures]
        paths = paths or [f"train/{i}.png" for i in range(len(contents))]
        rows = [{"bytes": c, "path": p} for c, p in zip(contents, paths, strict=True)]
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({"image": pa.array(rows, image), "label": labels})
        if names:
            features = {"image": {"_type": "Image"}, "label": {"names": names}}
            meta = json.dumps({"info": {"features": features}})
            table = table.replace_schema_metadata({"huggingface": meta})
        pq.write_table(table, tmp_path / name, row_group_size=2)
        return str(tmp_path / name)

    return write


def pixels(*pictures):
    return np.stack([np.asarray(p) for p in pictures])


# A Parquet file


def test_parquet_keeps_pixels_labels_and_names(write_parquet):
    pictures = [picture(seed=i) for i in range(5)]
    found = load(write_parquet(pictures, [0, 1, 2, 1, 0], names=["cat", "dog", "frog"]))
    np.testing.assert_array_equal(found.images, pixels(*pictures))
    np.testing.assert_array_equal(found.labels, [0, 1, 2, 1, 0])
    assert (found.images.dtype, found.labels.dtype) == (np.uint8, np.int64)
    assert found.classes == ("cat", "dog", "frog")
    assert found.groups == tuple(f"train/{i}.png" for i in range(5))
    assert repr(found) == "Dataset('set_train', images=(5, 8, 8, 3), classes=3)"
    assert len(found) == 5


def test_parquet_without_names_counts_the_labels(write_parquet):
    assert load(write_parquet([picture()] * 2, [0, 3])).classes == ("0", "1", "2", "3")


def test_parquet_without_paths_knows_no_near_duplicates(write_parquet):
    found = load(write_parquet([picture()] * 2, [0, 1], paths=[None, None]))
    assert found.groups == ("set_train/0", "set_train/1")


def test_a_name_is_looked_for_in_the_root(write_parquet, tmp_path):
    write_parquet([picture()], [0], name="mnist_test.parquet")
    assert load("mnist", "test", root=tmp_path).name == "mnist_test"


def test_a_parquet_file_that_is_no_image_set(write_parquet, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    cases = {
        r"no file '.*none\.parquet'": None,
        r"'.*text\.parquet' is not a Parquet file": b"text",
        r"columns \['a'\]; allowed: image and label": {"a": [1]},
        r"image is binary; allowed: a struct with bytes": {"image": [b"1"], "label": [1]},
        r"label is string; allowed: an integer": {"image": [{"bytes": b"1"}], "label": ["a"]},
        r"label is int64; allowed: .* for each": {
            "image": [{"bytes": b"1"}] * 2,
            "label": [0, None],
        },
        r"row 0 is not a readable image": {"image": [{"bytes": b"text"}], "label": [0]},
        r"'.*', row 1 is not": {"image": [{"bytes": encoded(picture())}, None], "label": [0, 0]},
    }
    for message, content in cases.items():
        path = tmp_path / ("none.parquet" if content is None else "text.parquet")
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            pq.write_table(pa.table(content), path)
        with pytest.raises(DatasetError, match=message):
            load(str(path))


def test_an_empty_parquet_file(write_parquet):
    pa = pytest.importorskip("pyarrow")
    with pytest.raises(DatasetError, match="allowed: an integer for each image"):
        load(write_parquet([], pa.array([], pa.int64())))


def test_labels_without_a_name(write_parquet):
    with pytest.raises(DatasetError, match="labels from 0 to 2 for 2 classes"):
        load(write_parquet([picture()] * 2, [0, 2], names=["a", "b"]))


# A folder


@pytest.fixture
def folder(tmp_path):
    """Two classes, a file that is not a picture, and a class folder without any."""
    root = tmp_path / "pets"
    for name in ("cat", "dog", "none"):
        (root / name).mkdir(parents=True)
    picture(seed=1).save(root / "dog" / "a.png")
    picture(seed=2).save(root / "cat" / "b.BMP")
    picture(seed=3).save(root / "cat" / "c.webp", lossless=True)
    (root / "cat" / "notes.txt").write_text("text")
    return root


def test_folder(folder):
    found = load(str(folder))
    np.testing.assert_array_equal(found.images, pixels(*(picture(seed=s) for s in (2, 3, 1))))
    assert found.classes == ("cat", "dog", "none")
    assert found.labels.tolist() == [0, 0, 1]
    assert len(set(found.groups)) == 3


def test_folder_brings_sizes_to_the_first(folder):
    picture(width=20, height=10).save(folder / "dog" / "z.png")
    assert load(str(folder)).images.shape == (4, 8, 8, 3)


def test_folder_of_more_files_than_may_be_open(folder):
    for i in range(40):
        picture(seed=i).save(folder / "dog" / f"{i}.png")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/dev/fd").iterdir())) + 8, hard))
    try:
        assert len(load(str(folder))) == 43
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_folder_knows_the_tracks_of_traffic_signs(tmp_path):
    for name in tracks(n=2, frames=3):
        path = tmp_path / "signs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture().save(path)
    assert len(set(load(str(tmp_path / "signs")).groups)) == 2


def test_folder_errors(folder, tmp_path):
    with pytest.raises(DatasetError, match=r"'.*cat' has no class folders with \.png, "):
        load(str(folder / "cat"))
    (folder / "dog" / "broken.png").write_bytes(encoded(picture())[:60])
    with pytest.raises(DatasetError, match=r"broken\.png' is not a readable image"):
        load(str(folder))


# Grey and colour


def test_grey_pictures_have_one_channel_however_they_are_stored(write_parquet):
    grey = [picture(mode="L", seed=i) for i in range(2)]
    found = load(write_parquet([grey[0], grey[1].convert("RGB")], [0, 1]))
    np.testing.assert_array_equal(found.images, pixels(*grey)[..., None])
    assert found.images.flags.c_contiguous


def test_one_picture_in_colour_makes_the_set_colour(write_parquet):
    found = load(write_parquet([picture(mode="L"), picture(seed=1)], [0, 1]))
    assert found.images.shape == (2, 8, 8, 3)


# Splits


def made_up(groups):
    n = len(groups)
    images = np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1)
    return Dataset("made up", images, np.arange(n), ("a",), tuple(groups))


@pytest.mark.parametrize("seed", range(5))
def test_split_keeps_tracks_together(write_parquet, seed):
    paths = tracks()
    data = load(write_parquet([picture()] * 30, [1] * 30, paths=paths, name="gtsrb_train.parquet"))
    assert data.images.shape[1:3] == (32, 32)
    assert set(data.groups) == {f"00001/{t:05}" for t in range(6)}
    rest, held = data.split(0.3, seed)
    assert len(held) == 10
    assert len(rest) == 20
    assert not set(rest.groups) & set(held.groups)


def test_split_loses_nothing_and_repeats():
    data = made_up([str(i) for i in range(50)])
    rest, held = data.split(0.2, seed=3)
    assert len(held) == 10
    assert sorted([*rest.labels, *held.labels]) == list(range(50))
    np.testing.assert_array_equal(held.images[:, 0, 0, 0], held.labels)
    np.testing.assert_array_equal(held.labels, data.split(0.2, seed=3)[1].labels)
    assert held.labels.tolist() != data.split(0.2, seed=4)[1].labels.tolist()


@pytest.mark.parametrize(("fraction", "held"), [(0.001, 1), (0.999, 2)])
def test_no_side_of_a_split_is_empty(fraction, held):
    assert len(made_up("abc").split(fraction, seed=0)[1]) == held


def test_split_errors():
    for fraction in (0, 1, -0.5, 2, float("nan")):
        with pytest.raises(DatasetError, match=r"fraction is .*; allowed: between 0 and 1"):
            made_up("abc").split(fraction, seed=0)
    with pytest.raises(DatasetError, match="a single group"):
        made_up("aaa").split(0.5, seed=0)


# Names


def test_names_and_splits_that_do_not_exist(tmp_path):
    with pytest.raises(DatasetError, match=r"no data set 'mnits': .* cifar10, .*mnist, svhn$"):
        load("mnits", root=tmp_path)
    with pytest.raises(DatasetError, match="split is 'val'; allowed: train, test"):
        load("mnist", "val")


@pytest.fixture
def torchvision(monkeypatch):
    """`torchvision(name, make)` -> a stand-in for torchvision whose data set `name` is `make`."""

    def install(name, make):
        package, sets = (types.ModuleType(f"torchvision{part}") for part in ("", ".datasets"))
        package.datasets = sets
        setattr(sets, name, make)
        for module in (package, sets):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    return install


class Labelled(list):
    classes = ("no", 1)


def test_torchvision(torchvision, tmp_path):
    seen = []

    def make(root, *, train, download):
        seen.append((root, train, download))
        return Labelled([(picture(seed=1), 1), (picture(seed=2), 0)])

    torchvision("MNIST", make)
    found = load("mnist", "test", root=tmp_path)
    assert seen == [(tmp_path, False, True)]
    np.testing.assert_array_equal(found.images, pixels(picture(seed=1), picture(seed=2)))
    assert (found.name, found.classes, found.labels.tolist()) == (
        "mnist_test",
        ("no", "1"),
        [1, 0],
    )
    assert found.groups == ("mnist/0", "mnist/1")


def test_torchvision_names_its_classes_by_number_where_it_has_no_names(torchvision, tmp_path):
    torchvision("SVHN", lambda root, *, split, download: [(picture(), 2)])
    assert load("svhn", root=tmp_path).classes == ("0", "1", "2")


def test_torchvision_gtsrb_has_tracks(torchvision, tmp_path):
    signs = Labelled([(picture(), 0)] * 4)
    signs._samples = [(f"/cache/{name}", 0) for name in tracks(n=2, frames=2)]
    torchvision("GTSRB", lambda root, *, split, download: signs)
    assert (
        load("gtsrb", root=tmp_path).groups
        == ("/cache/00001/00000",) * 2 + ("/cache/00001/00001",) * 2
    )


@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError("no route")], ids=repr)
def test_torchvision_without_network(torchvision, tmp_path, error):
    def make(root, *, train, download):
        raise error

    torchvision("CIFAR10", make)
    with pytest.raises(DatasetError, match=r"'cifar10' cannot be downloaded into '.*': no route"):
        load("cifar10", root=tmp_path)


# The packed sets


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [("mnist", (5999, 28, 28, 1), 10), ("gtsrb", (4012, 32, 32, 3), 43)],
)
def test_packed_sets(name, shape, classes):
    found = load(name, "test", root=DATA)
    assert found.images.shape == shape
    assert len(found.classes) == classes
    assert set(found.labels.tolist()) == set(range(classes))


def test_the_digits_are_there_without_a_download():
    train, test = load("digits", "train"), load("digits", "test")
    assert (len(train), len(test)) == (1348, 449)
    assert train.images.shape[1:] == (28, 28, 1)
    assert not set(train.groups) & set(test.groups)


# A decoder of one's own


def test_files_are_read_one_after_the_other(tmp_path):
    """The second file is rewritten while the first is decoded, and its new content is read."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(encoded(picture()))

    def decoder(content):
        (tmp_path / "b" / "x.png").write_bytes(b"new")
        return np.full((2, 2, 1), len(content) == 3, np.uint8)

    found = load(str(tmp_path), decoder=decoder)
    assert found.images[:, 0, 0, 0].tolist() == [0, 1]
    assert found.images.shape == (2, 2, 2, 1)


def test_a_decoder_reads_the_rows_of_a_parquet_file(write_parquet):
    pictures = [picture(seed=i) for i in range(70)]
    found = load(
        write_parquet(pictures, [0] * 70),
        decoder=lambda content: np.full((1, 1, 3), len(content) % 256, np.uint8),
    )
    sizes = [len(encoded(p, "WEBP", lossless=True)) % 256 for p in pictures]
    assert found.images[:, 0, 0, 0].tolist() == sizes


def test_class_folders_are_in_natural_order(tmp_path):
    for name in ("10", "9", "a2", "a10", "02"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(encoded(picture()))
    assert load(str(tmp_path)).classes == ("a2", "a10", "02", "9", "10")


def test_a_folder_of_images_alone_is_unlabelled_where_that_is_enough(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encoded(picture(seed=i)))
    found = load(str(tmp_path), unlabelled=True)
    assert (found.labelled, len(found), found.classes) == (False, 3, ())
    with pytest.raises(DatasetError, match="has no class folders"):
        load(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="has no images and no class folders"):
        load(str(tmp_path / "empty"), unlabelled=True)


def test_a_set_without_a_test_part_is_split_by_a_fixed_draw(tmp_path, write_parquet):
    levels = [Image.new("L", (4, 4), level) for level in range(70)]
    write_parquet(levels, [level % 7 for level in range(70)], name="cifar100_train.parquet")
    parts = {split: load("cifar100-split", split, root=tmp_path) for split in ("train", "test")}
    assert {split: part.name for split, part in parts.items()} == {
        "train": "cifar100-split_train", "test": "cifar100-split_test",
    }  # fmt: skip
    levels = {split: sorted(part.images[:, 0, 0, 0].tolist()) for split, part in parts.items()}
    assert levels["test"] == [3, 4, 12, 16, 33, 41, 49, 50, 54, 63]
    assert sorted(levels["train"] + levels["test"]) == list(range(70))
    require("cifar100-split", "test", root=tmp_path)
