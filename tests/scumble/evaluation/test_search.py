"""The search for recipes: what is compared, and what its log says."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from docs.generators import searches
from scumble.attacker.recipes import recipe
from scumble.data.image_sets import write_parquet
from scumble.evaluation import search
from scumble.evaluation.search import SHAPES, fits, main, sources

LOGS = Path("docs/results/records/search")
CHOSEN = ("optimizer", "lr", "loss", "augment", "smoothing", "mixup")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A few small images in place of the data sets."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, shape in (("mnist", (28, 28)), ("fashion_mnist", (28, 28)), ("cifar100", (8, 8, 3))):
        for part in ("train", "test"):
            images = rng.integers(0, 256, (60, *shape), np.uint8)
            write_parquet(root / f"{name}_{part}.parquet", images, np.arange(60) % 10)
    return root


@pytest.fixture(scope="module")
def log(root):
    """What a search with little patience leaves."""
    return searched(root)


def searched(root):
    """The log of a search in `root`, after it ran."""
    words = ["mnist", "--data", str(root), "--victim-epochs", "1", "--queries", "20"]
    done = CliRunner().invoke(main, [*words, "--epochs", "1", "--out", str(root / "out")])
    assert done.exit_code == 0, done.output
    return json.loads((root / "out" / "mnist.json").read_text())


def test_every_candidate_gets_the_same_effort_and_is_in_the_log(log):
    rows = log["candidates"]
    assert {row["image_passes"] for row in rows} == {20}
    labels = [row for row in rows if row["kind"] == "labels"]
    sets, (first, *others) = sources("mnist", 20), fits("mnist")
    assert [row["transfer set"] for row in labels[: len(sets)]] == list(sets)
    assert {row["candidate"] for row in labels[: len(sets)]} == {first}
    assert [row["candidate"] for row in labels[len(sets) :]] == others
    assert [row["candidate"] for row in rows[len(labels) :]] == 2 * ["soft", "centred"]
    assert [row["kind"] for row in rows[len(labels) :]] == 2 * ["soft"] + 2 * ["mixed"]
    assert all(0 <= row["agreement"] <= 1 and row["seconds"] > 0 for row in rows)
    assert log["victim"]["seed"] == search.SEED


def test_fits_are_tried_on_the_best_set_and_losses_with_the_best_fit(log):
    labels = [row for row in log["candidates"] if row["kind"] == "labels"]
    sets = len(sources("mnist", 20))
    best = max(labels[:sets], key=lambda row: row["agreement"])["transfer set"]
    assert {row["transfer set"] for row in log["candidates"][sets:]} == {best}
    found = max(labels, key=lambda row: row["agreement"])["fit"]
    for row in log["candidates"][len(labels) :]:
        assert row["fit"] == found | {"loss": row["candidate"], "smoothing": 0.0}


def test_an_interrupted_search_goes_on(log, root):
    file = root / "out" / "mnist.json"
    half = log | {"candidates": log["candidates"][:9]}
    file.write_text(json.dumps(half))
    again = searched(root)["candidates"]
    assert again[:9] == log["candidates"][:9]  # also their seconds: they did not run
    agreements = [row["agreement"] for row in log["candidates"]]
    assert [row["agreement"] for row in again] == agreements
    assert again[9:] != log["candidates"][9:]
    file.write_text(json.dumps(half | {"victim": {"accuracy": 0.0}}))  # of another victim
    assert searched(root)["candidates"][:9] != log["candidates"][:9]


@pytest.mark.parametrize("victim", SHAPES)
def test_a_transfer_set_has_as_many_images_as_queries(victim):
    for name, source in sources(victim, 20).items():
        parts = [term.rpartition("[")[2].rstrip("]").split(":") for term in source.split(",")]
        assert sum(int(last) - int(first or 0) for first, last in parts) == 20, name


@pytest.mark.parametrize("kind", ["soft", "labels", "mixed"])
@pytest.mark.parametrize("victim", SHAPES)
def test_recipes_are_what_the_committed_search_found(victim, kind):
    rows = json.loads((LOGS / f"{victim}.json").read_text())["candidates"]
    found = max((row for row in rows if row["kind"] == kind), key=lambda row: row["agreement"])
    fields = recipe(f"{victim}-{kind}").fit
    defaults = {name: getattr(search.ADAMW, name) for name in CHOSEN}
    assert {name: fields.get(name, defaults[name]) for name in CHOSEN} == {
        name: found["fit"][name] for name in CHOSEN
    }


def test_the_page_has_what_the_logs_say():
    page = searches.PAGE.read_text()
    assert page == searches.replaced(page), "run python -m docs.generators.searches"
