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
def log(tmp_path_factory):
    """What a search leaves, with a few small images and little patience."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, shape in (("mnist", (28, 28)), ("fashion_mnist", (28, 28)), ("cifar100", (8, 8, 3))):
        for part in ("train", "test"):
            images = rng.integers(0, 256, (60, *shape), np.uint8)
            write_parquet(root / f"{name}_{part}.parquet", images, np.arange(60) % 10)
    words = ["mnist", "--data", str(root), "--victim-epochs", "1", "--queries", "20"]
    done = CliRunner().invoke(main, [*words, "--epochs", "1", "--out", str(root / "out")])
    assert done.exit_code == 0, done.output
    return json.loads((root / "out" / "mnist.json").read_text())


def test_every_candidate_gets_the_same_effort_and_is_in_the_log(log):
    rows = log["candidates"]
    assert {row["image_passes"] for row in rows} == {20}
    labels = [row for row in rows if row["kind"] == "labels"]
    first = [row["candidate"] for row in labels if row["transfer set"] == "published"]
    assert first == list(fits("mnist"))
    assert [row["transfer set"] for row in labels[len(first) :]] == list(sources("mnist", 20))[1:]
    assert [row["candidate"] for row in rows[len(labels) :]] == ["soft", "centred"]
    assert all(0 <= row["agreement"] <= 1 and row["seconds"] > 0 for row in rows)
    assert log["victim"]["seed"] == search.SEED


def test_sets_and_losses_are_tried_with_the_fit_that_was_best_before(log):
    labels = [row for row in log["candidates"] if row["kind"] == "labels"]
    count = len(fits("mnist"))
    best = max(labels[:count], key=lambda row: row["agreement"])
    assert all(row["fit"] == best["fit"] for row in labels[count:])
    pooled = max(labels, key=lambda row: row["agreement"])["transfer set"]
    for row in log["candidates"][len(labels) :]:
        changed = {"loss": row["candidate"], "smoothing": 0.0}
        assert row["fit"] == best["fit"] | changed
        assert row["transfer set"] == pooled


@pytest.mark.parametrize("victim", SHAPES)
def test_a_transfer_set_has_as_many_images_as_queries(victim):
    for name, source in sources(victim, 20).items():
        parts = [term.rpartition("[")[2].rstrip("]").split(":") for term in source.split(",")]
        assert sum(int(last) - int(first or 0) for first, last in parts) == 20, name


@pytest.mark.parametrize("kind", ["soft", "labels"])
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
