"""Withheld answers: which, what stands in their place, and the same in graph and numpy."""

import numpy as np
import pytest
from onnx import checker
from scipy import stats

from app.inference import engines
from app.inference.graph import defended, parse, with_l1_output
from app.inference.pipeline import Composer, Fused
from app.inference.score_graph import ScoredEngine
from scumble.defenses import DefenseError, make
from scumble.defenses.evidence import ABSTAINED, ANSWERED, DRAWN, Evidence
from scumble.defenses.gate import Gate
from scumble.defenses.scores import Whitener, energy
from tests.scumble.defenses.test_scores import GEMM, SOFTMAX, network, normal

CLASSES = 4
WHITENER = Whitener(normal(1, 5)[0], normal(3, 5, seed=1))
LOSSES = np.array([0.01, 0.5])


class Shelf:
    """A bundle's parts, with a gate for `network(GEMM, SOFTMAX)` on normal inputs."""

    version = "made-up 1"

    def gate(self):
        cuts = {"top": [0.3, 0.5], "energy": [1, 2], "residual": [-9, -4], "vim": [-1, 0.7]}
        rows = {name: np.array([row], float) for name, row in cuts.items()}
        for name in ("energy", "residual", "vim"):
            rows[f"{name}+top"] = np.array([cuts[name], cuts["top"]], float)
        shares = {"classwise": {"2": np.tile([0.25, 0.75], (CLASSES, 1))}}
        return Gate(LOSSES, rows, 0.7, WHITENER, shares)

    def codebook(self):
        low, high = np.full((CLASSES, CLASSES), 0.15), np.full((CLASSES, CLASSES), 0.01)
        np.fill_diagonal(low, 0.55)
        np.fill_diagonal(high, 0.97)
        rows = np.stack([low, high], axis=1)
        return {"classwise": {"2": {"borders": [[0.8]] * CLASSES, "rows": rows.tolist()}}}


ANSWERS = ["codebook", {"cells": 2}]


def withhold(**params):
    return make(
        "withhold", bundle=Shelf(), secret=b"secret", **{"answers": ANSWERS, "loss": 0.2, **params}
    )


def ends(n=300, seed=0):
    """Inputs of the network, its clean rows, and all evidence, by numpy."""
    x = normal(n, 5, seed=seed) * np.float32(2)
    features = np.maximum(x, 0)
    logits = features @ WEIGHTS
    odds = np.exp(logits - logits.max(1, keepdims=True))
    clean = (odds / odds.sum(1, keepdims=True)).astype(np.float32)
    return x, clean, Evidence(clean.max(1), energy(logits), WHITENER.residual(features))


WEIGHTS = normal(5, 4, seed=2)
MODEL = network(GEMM, SOFTMAX, more={"w": WEIGHTS})
KINDS = [
    {"on": on, "score": score}
    for on in ("gate", "both")
    for score in ("auto", "energy", "residual", "vim")
] + [{"on": "boundary"}]


def pictures(n=300, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 1), np.uint8)


def load(model, engine="onnxruntime"):
    return engines.load(engine, model, threads=1, precision="float32")


@pytest.mark.parametrize("params", KINDS, ids=str)
def test_an_image_is_withheld_where_a_score_is_below_its_threshold(params):
    defense = withhold(**params)
    _, clean, evidence = ends()
    rows, marks = defense.answer(clean, None, evidence)
    cut = dict(zip(("energy", "residual", "vim"), ([1, 2], [-9, -4], [-1, 0.7]), strict=True))
    values = {
        "energy": evidence.energy,
        "residual": -evidence.residual,
        "vim": evidence.energy - 0.7 * evidence.residual,
    }
    below = np.zeros(len(clean), bool)
    if params["on"] != "boundary":
        score = "vim" if params["score"] == "auto" else params["score"]
        below |= values[score] < np.interp(0.2, LOSSES, cut[score])
    if params["on"] != "gate":
        below |= evidence.top < np.interp(0.2, LOSSES, [0.3, 0.5])
    assert 0 < below.mean() < 1
    assert (marks == np.where(below, ABSTAINED, ANSWERED)).all()
    assert (rows[below] == 1 / CLASSES).all()
    answered = make(*ANSWERS[:1], bundle=Shelf(), **ANSWERS[1])(clean, None)
    assert (rows[~below] == answered[~below]).all()


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("params", KINDS, ids=str)
def test_the_graph_gives_what_numpy_gives(params, engine):
    defense = withhold(**params)
    x, clean, evidence = ends()
    rows, marks = defense.answer(clean, None, evidence)
    near = np.zeros(len(x), bool)
    for measure, cut in zip(
        defense.measures, defense.gate.at(defense.measures, defense.loss), strict=True
    ):
        near |= np.abs(defense.gate.measure(measure, evidence) - cut) < 1e-4
    report = load(with_l1_output(MODEL, defense), engine)(x)
    assert report.shape == (len(x), CLASSES + 2)
    np.testing.assert_allclose(report[~near, :CLASSES], rows[~near], atol=1e-6)
    assert (report[~near, -1] == (marks[~near] == ABSTAINED)).all()
    file = parse(defended(MODEL, defense))
    checker.check_model(file, full_check=True)
    assert [output.name for output in file.graph.output] == ["probabilities", "abstained"]


@pytest.mark.parametrize("output", [["label", {}], ["top_k", {"k": 2}], ["round", {"decimals": 1}]])
def test_what_is_abstained_stays_uniform_behind_every_other_defense(output):
    _, clean, evidence = ends()
    step = ["withhold", {"answers": ANSWERS, "loss": 0.2}]
    chain = make("chain", steps=[step, output], bundle=Shelf())
    rows, marks = chain.answer(clean, None, evidence)
    assert chain.withholds
    assert chain.needs == {"energy", "residual"}
    assert (rows[marks == ABSTAINED] == 1 / CLASSES).all()
    assert (rows[marks == ANSWERED].max(1) >= 0.5).all()
    if output[0] == "label":
        found = load(with_l1_output(MODEL, chain))(ends()[0])
        assert (found[:, -1] == (marks == ABSTAINED)).mean() > 0.99


def test_a_step_in_front_does_not_change_what_is_withheld():
    _, clean, evidence = ends()
    alone = withhold(on="boundary").answer(clean, None, evidence)
    step = ["withhold", {"on": "boundary", "answers": ["none", {}], "loss": 0.2}]
    chain = make("chain", steps=[ANSWERS, step], bundle=Shelf())
    rows, marks = chain.answer(clean, None, evidence)
    assert (marks == alone.marks).all()
    assert (rows == alone.rows).all()


def keyed(**params):
    return withhold(on="gate", withheld="keyed", **params)


def test_keyed_rows_are_rows_of_the_codebook_and_tell_nothing_of_the_network():
    _, clean, evidence = ends()
    images = pictures()
    rows, marks = keyed().answer(clean, images, evidence)
    drawn = marks == DRAWN
    assert 0.05 < drawn.mean() < 0.95
    shelf = {
        tuple(row)
        for row in np.float32(Shelf().codebook()["classwise"]["2"]["rows"]).reshape(-1, CLASSES)
    }
    assert {tuple(row) for row in rows} <= shelf
    # The same images with other clean rows: the same draws.
    other = keyed().answer(clean[::-1].copy(), images, evidence).rows
    assert (other[drawn] == rows[drawn]).all()
    assert (rows[drawn].argmax(1) == clean[drawn].argmax(1)).mean() < 0.5


def test_draws_are_uniform_over_classes_and_as_sure_as_own_images():
    n = 4000
    clean = np.full((n, CLASSES), 0.25, np.float32)
    foreign = Evidence(clean[:, 0], np.zeros(n, np.float32), np.full(n, 99, np.float32))
    rows, marks = keyed().answer(clean, pictures(n), foreign)
    assert (marks == DRAWN).all()
    counts = np.bincount(rows.argmax(1), minlength=CLASSES)
    assert stats.chisquare(counts).pvalue > 0.01
    assert stats.binomtest(int((rows.max(1) > 0.9).sum()), n, 0.75).pvalue > 0.01


def test_a_draw_is_the_same_for_every_form_and_other_for_another_secret_or_version():
    n = 400
    clean = np.full((n, CLASSES), 0.25, np.float32)
    foreign = Evidence(clean[:, 0], np.zeros(n, np.float32), np.full(n, 99, np.float32))
    images = pictures(n)
    rows = keyed().answer(clean, images, foreign).rows
    floats = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
    for form in (
        images[:, :, ::-1].copy()[:, :, ::-1],
        floats,
        np.where(floats == 0, -0.0, floats),
    ):
        assert (keyed().answer(clean, form, foreign).rows == rows).all()

    class Newer(Shelf):
        version = "made-up 2"

    params = {"answers": ANSWERS, "loss": 0.2, "on": "gate", "withheld": "keyed"}
    for other in (
        make("withhold", bundle=Shelf(), secret=b"another", **params),
        make("withhold", bundle=Newer(), secret=b"secret", **params),
    ):
        same = (other.answer(clean, images, foreign).rows == rows).all(1).mean()
        assert same < 0.4  # of 4 classes and 2 cells by chance: 0.16


def test_labels_can_be_drawn_as_well():
    _, clean, evidence = ends()
    rows, marks = keyed(answers=["label", {}]).answer(clean, pictures(), evidence)
    assert (rows.max(1) == 1).all()
    assert (marks == DRAWN).any()


def test_all_of_no_loss_is_answered():
    _, clean, evidence = ends()
    rows, marks = withhold(loss=0, answers=["none", {}]).answer(clean, None, evidence)
    assert (rows == clean).all()
    assert not marks.any()


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"answers": ["dcp", {"beta": 1}], "withheld": "keyed"}, "allowed: codebook or label"),
        ({"answers": ["codebook", {"cells": 4}]}, "no classwise codebook|no pooled codebook"),
        ({"answers": "codebook"}, "answers must be"),
        ({"answers": ["magic", {}]}, "unknown defense 'magic'"),
        ({"loss": 0.001}, r"allowed by the bundle: 0, or 0\.01 to 0\.5"),
        ({"keep_top1": True}, "keep_top1 would answer what the defense withholds"),
    ],
)
def test_refusals_say_what_is_allowed(params, words):
    with pytest.raises(DefenseError, match=words):
        withhold(**params)


def test_missing_evidence_and_images_are_refused():
    _, clean, _ = ends()
    with pytest.raises(ValueError, match="vim needs the score energy"):
        withhold(on="gate")(clean, None)
    with pytest.raises(ValueError, match="needs the images"):
        withhold(on="boundary", withheld="keyed")(clean, None)


def test_a_pipeline_says_what_is_withheld():
    """In the graph where it can be, behind the engine where not; for each client its own."""
    defense = withhold()
    x, clean, evidence = ends(8)
    compose = Composer(load, defense, fusible=True, whitener=lambda: WHITENER)
    composed = compose(MODEL, x[:1], 8)
    assert isinstance(composed.fused, Fused)
    expected = defense.answer(clean, None, evidence)
    for answers in (
        composed.fused(x),
        composed.unfused(x),
        composed.unfused.by_client(x, [(3, None), (5, defense)]),
    ):
        assert (answers.marks == expected.marks).all()
        np.testing.assert_allclose(answers.probabilities, expected.rows, atol=1e-6)
    mixed = composed.unfused.by_client(x, [(3, make("none")), (5, None)])
    assert not mixed.marks[:3].any()
    assert (mixed.marks[3:] == expected.marks[3:]).all()
    assert composed.unfused.by_client(x, [(8, make("none"))]).marks is None


def test_scores_are_loaded_when_a_key_first_needs_them():
    x, clean, _ = ends(4)
    pipeline = Composer(load, make("none"), fusible=True, whitener=lambda: WHITENER)(MODEL, x, 4)
    unfused = pipeline.unfused
    assert isinstance(unfused.scores, ScoredEngine)
    assert not unfused.scores.made
    evidence = unfused.evidence(x, clean, withhold().needs)
    assert unfused.scores.made
    np.testing.assert_allclose(evidence.energy, ends(4)[2].energy, rtol=1e-5)
    assert unfused.by_client(x, [(4, withhold())]).marks is not None
