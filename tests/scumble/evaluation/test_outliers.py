"""Outliers: what the network learns to be unsure of is nothing that attackers ask about."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from scumble.attacker import transfer
from scumble.data.image_sets import Dataset, DatasetError, load, write_parquet
from scumble.evaluation import outliers
from scumble.evaluation.plans import LARGER, OUTLINED

NAMES = ("apple", *sorted(outliers.TAUGHT), "willow", "zebra")


def photos(names=NAMES) -> Dataset:
    """Two pictures of each class."""
    labels = np.repeat(np.arange(len(names)), 2)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8, 3), np.uint8)
    return Dataset("cifar100", images, labels, names, tuple(map(str, range(len(labels)))))


def with_names(path, data):
    """Write `data` with the names of its classes."""
    write_parquet(path, data.images, data.labels)
    names = {"info": {"features": {"label": {"names": data.classes}}}}
    table = pq.read_table(path).replace_schema_metadata({"huggingface": json.dumps(names)})
    pq.write_table(table, path)


def sources(terms: str) -> set[str]:
    return {transfer.parsed(term)["name"] for term in terms.split(",")}


@pytest.mark.parametrize("name", outliers.TERMS)
def test_no_outlier_is_of_a_set_that_attackers_ask_about(name):
    asked = set().union(*(sources(pool) for pool in outliers.pools(name)))
    assert not asked & sources(outliers.TERMS[name])


@pytest.mark.parametrize("name", outliers.TERMS)
def test_drawn_outliers_are_behind_those_that_attackers_get_by_name(name):
    drawn = [transfer.parsed(term) for term in outliers.TERMS[name].split(",")]
    drawn = [term for term in drawn if term["name"] in transfer.POOLS]
    assert len(drawn) == 3
    assert all(int(term["first"]) >= transfer.DRAWN for term in drawn)


def test_the_pools_of_the_plans_are_known():
    assert {OUTLINED, LARGER, "strokes", "strokes[:60000]"} <= outliers.pools("mnist")
    assert outliers.pools("gtsrb") == {
        "cifar10",
        "cifar10,cifar10@outlines",
        "cifar10[:10000],cifar10@outlines[10000:20000]",
        "shapes",
        "shapes[:60000]",
    }
    assert not outliers.pools("cifar10")


def test_half_of_the_classes_are_outliers_and_the_other_half_is_not():
    assert len(outliers.TAUGHT) == 50
    taught, rest = outliers.halves(photos())
    assert {taught.classes[k] for k in taught.labels} == outliers.TAUGHT
    assert {rest.classes[k] for k in rest.labels} == {"apple", "willow", "zebra"}
    with pytest.raises(DatasetError, match="cifar100 has no class 'aquarium_fish'; needed: CIFAR"):
        outliers.halves(photos(NAMES[2:]))


def test_an_outlier_in_a_pool_is_refused():
    found = photos()
    outliers.check_apart(found.subset(np.arange(50)), found.subset(np.arange(50, 100)))
    with pytest.raises(DatasetError, match="3 outliers of 'cifar100' are in 'cifar100', about"):
        outliers.check_apart(found.subset(np.arange(50)), found.subset(np.arange(47, 100)))


def test_both_halves_are_written(tmp_path, monkeypatch):
    monkeypatch.setitem(outliers.TERMS, "cifar10", "noise[20000:20004]")
    with_names(tmp_path / "cifar100_train.parquet", photos())
    done = CliRunner().invoke(
        outliers.main, ["cifar10", "--data", str(tmp_path), "--out", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    assert load(str(tmp_path / "cifar10.parquet")).images.shape == (104, 8, 8, 3)
    assert len(load(str(tmp_path / "cifar10-foreign.parquet"))) == 6
