"""Fitting a codebook: cells, rows, and the command that writes them into a bundle."""

import shlex

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from app.inference.bundle import CODEBOOK_FILE, GATE_FILE, Bundle, InputShape
from app.inference.defense_artifacts import DefenseArtifacts
from scumble.data.digits import digits
from scumble.data.image_sets import write_parquet
from scumble.defenses import DefenseError, make
from scumble.training.bundle_export import export_bundle
from scumble.training.calibrate import calibrate
from scumble.training.codebook import ahead, borders_of, calibrated, classwise, fit, pooled, rising
from scumble.training.confidence import calibration_error, ranking

pytestmark = pytest.mark.torch

SHAPE = InputShape(height=28, width=28, channels=1)
CARD = {
    "name": "own",
    "version": "1",
    "labels": [str(k) for k in range(10)],
    "training": {"set": "digits"},
}


def some(n=4000, classes=5, seed=0):
    """Rows and labels of an over-confident network."""
    rng = np.random.default_rng(seed)
    logits = 4 * rng.standard_normal((n, classes))
    true = np.exp(logits / 2)
    true /= true.sum(1, keepdims=True)
    rows = np.exp(logits - logits.max(1, keepdims=True))
    labels = (true.cumsum(1) > rng.random((n, 1))).argmax(1)
    return rows / rows.sum(1, keepdims=True), labels


def test_cells_lie_between_their_values():
    values = np.repeat([0.5, 0.7, 0.9, 0.999], 10)
    borders = borders_of(values, 4)
    assert ((borders > values[9:-1:10]) & (borders < values[10::10])).all()
    assert borders_of(values, 1).shape == (0,)


@pytest.mark.parametrize("cells", [1, 2, 4, 8])
def test_more_cells_are_nearer_to_the_network(cells):
    probs, labels = some()
    forms = fit(probs, labels)

    class Shelf:
        def codebook(self):
            return forms

    for form in ("classwise", "pooled"):
        served = make("codebook", form=form, cells=cells, bundle=Shelf())(probs, None)
        gap = np.abs(served - probs).sum(1).mean()
        if cells > 1:
            coarse = make("codebook", form=form, cells=cells // 2, bundle=Shelf())(probs, None)
            assert gap < np.abs(coarse - probs).sum(1).mean()
        assert (served.argmax(1) == probs.argmax(1)).all()


def test_calibrated_cells_say_how_often_the_network_is_right():
    probs, labels = some()
    forms = fit(probs, labels)

    class Shelf:
        def codebook(self):
            return forms

    fresh, truth = some(seed=1)
    served = make("codebook", form="calibrated", cells=8, bundle=Shelf())(fresh, None)
    assert calibration_error(served, truth) < 0.03 < calibration_error(fresh, truth)


def test_few_rows_of_a_class_give_no_cells_of_its_own():
    probs, labels = some(n=60)
    assert classwise(probs, 8) is None
    assert "8" not in fit(probs, labels).get("classwise", {})
    assert pooled(probs, 8).rows.shape == (1, 8, 1)


def test_equal_rows_still_make_a_codebook():
    probs = np.tile([0.5, 0.5], (40, 1))
    probs[20:] = [0, 1]
    found = classwise(probs, 4)
    assert (found.rows[0, :, 0] > found.rows[0, :, 1]).all()
    assert np.isfinite(calibrated(probs, np.zeros(40, int), 4).rows).all()


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9)), min_size=1, max_size=12))
def test_rising_never_falls_and_keeps_the_mean(pairs):
    share, weights = np.array(pairs, float).T
    weights = np.maximum(weights, 1)
    found = rising(share, weights)
    assert (np.diff(found) >= -1e-12).all()
    assert np.dot(found, weights) == pytest.approx(np.dot(share, weights))


def test_the_own_class_is_put_ahead():
    row = ahead(np.array([0.4, 0.4, 0.2]), 0)
    assert row.argmax() == 0
    assert row.sum() == pytest.approx(1)


def test_ranking_counts_pairs():
    answers = np.array([[0.9, 0.1], [0.6, 0.4], [0.6, 0.4], [0.2, 0.8]])
    labels = np.array([0, 0, 1, 1])
    # pairs (right, wrong): .9 > .6, .6 = .6, .8 > .6
    assert ranking(answers, labels) == pytest.approx((1 + 0.5 + 1) / 3)
    assert ranking(answers, answers.argmax(1)) is None


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model folder whose bundle `own` reads digits, before it is calibrated."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))
    data, _ = digits().split(0.5, seed=0)
    x = torch.from_numpy(data.images.transpose(0, 3, 1, 2) / np.float32(255))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(30):
        loss = nn.functional.cross_entropy(net(x), torch.from_numpy(data.labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    export_bundle(net, folder / "own", SHAPE, CARD)
    return folder


def noise(folder):
    """A file of images that show nothing."""
    images = np.random.default_rng(0).integers(0, 256, (200, 20, 30, 3), np.uint8)
    write_parquet(folder / "noise.parquet", images, [0] * len(images))
    return folder / "noise.parquet"


def test_the_command_writes_codebook_and_gate_and_says_what_they_cost(models, tmp_path):
    bundle = Bundle(models / "own")
    with pytest.raises(DefenseError, match="scumble calibrate own"):
        make("codebook", bundle=DefenseArtifacts(bundle))
    words = ["own", "--own", "digits", "--foreign", str(noise(tmp_path))]  # the card names the set
    words += ["--models", str(models)]
    done = CliRunner().invoke(calibrate, words)
    assert done.exit_code == 0, done.output
    assert "float32 pooled 4" in done.output
    shown = done.output[done.output.index("images of --test, float32") :]
    assert [name in shown for name in ("labels changed", "Withhold(", "DCP(")] == [True] * 3

    bundle = Bundle(models / "own")
    made = bundle.card.auxiliary["codebook"]
    assert made["command"] == shlex.join(["scumble", "calibrate", *words])
    assert made["own"]["images"] != made["test"]["images"]
    assert set(made["float32"]) >= {"none", "label", "pooled 4", "calibrated 8"}
    assert all(row["kept"] == 1 for row in made["float32"].values())
    assert set(bundle.card.files) >= {CODEBOOK_FILE["float32"]}
    assert CODEBOOK_FILE["int8"] not in bundle.card.files  # it has no int8 form

    found = bundle.card.auxiliary["gate"]["float32"]
    assert set(found) == {"top", "energy", "residual", "vim", "vim+top"}
    assert found["vim"]["0.05"]["noise"] == 1
    assert found["vim"]["0.01"]["own"] <= found["vim"]["0.05"]["own"] < 0.1
    assert found["vim"]["0.01"]["own"] <= found["vim"]["0.05"]["own"]
    assert all(text in done.output for text in ("vim+top", "5% │ noise"))
    gate = DefenseArtifacts(bundle).gate()
    assert gate.whitener.mean.shape == (28 * 28,)
    assert gate.shares["pooled"]["4"].sum() == pytest.approx(1)
    with pytest.raises(DefenseError, match="too coarse for thresholds; allowed: float32, int8"):
        DefenseArtifacts(bundle, precision="bf16").gate()

    p = np.full((1, 10), 0.02)
    p[0, 3] = 0.82
    served = make("codebook", bundle=DefenseArtifacts(bundle))(p, None)
    assert served.argmax() == 3

    again = CliRunner().invoke(calibrate, words)
    assert again.exit_code == 0
    assert Bundle(models / "own").card == bundle.card  # the same images, the same codebook


def test_a_new_network_takes_the_old_codebook_away(models):
    export_bundle(nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10)), models / "own", SHAPE, CARD)
    assert not {*CODEBOOK_FILE.values(), *GATE_FILE.values()} & set(
        Bundle(models / "own").card.files
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["none"], "no model 'none'"),
        (["own", "--own", "nowhere"], "no data set 'nowhere'"),
        (["own", "--own", "digits", "--test", "nowhere"], "no data set 'nowhere'"),
    ],
)
def test_what_is_not_there_is_one_sentence(models, words, sentence):
    done = CliRunner().invoke(calibrate, [*words, "--models", str(models)])
    assert done.exit_code == 1
    assert sentence in done.output
    assert "Traceback" not in done.output
