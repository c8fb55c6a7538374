"""What an operator is told about a policy before users notice."""

import numpy as np
import pytest

from app.inference.bundle import Accuracy, Bundle, Sent, Templated
from app.inference.policy_warnings import policy_hint, policy_warnings
from scumble.defenses import configure
from scumble.defenses.withhold import Withhold
from tests.tiny import make_bundle


def warnings(tmp_path, defense, rows, *, params=None, accuracy=0.97):
    """The warnings about a defense of a model that gives these rows in its self-test."""
    labels = [f"c{k}" for k in range(rows.shape[1])]
    card = Bundle(make_bundle(tmp_path, labels=labels)).card
    figure = accuracy and Accuracy(value=accuracy, images=100, data="made up")
    card = card.model_copy(update={"accuracy": {"float32": figure} if figure else {}})
    clean = rows.astype(np.float32)
    return list(policy_warnings(card, "float32", clean, configure(defense, params or {})))


TRAINED = np.eye(4)[[0, 1, 2, 3, 0, 1]] * 0.6 + 0.1
STRONG = {"beta": 1.2}
WEAK = {"beta": 0.6}


@pytest.mark.parametrize(
    ("defense", "params", "accuracy", "sentence"),
    [
        ("dcp", WEAK, 0.97, "leaves answers more confident than 0.63 clean, and this model is"),
        ("dcp", WEAK, None, "leaves answers more confident than 0.63 clean: most answers stay"),
        ("chain", {"steps": [["dcp", WEAK], ["round", {"decimals": 2}]]}, 0.97, "0.63 clean"),
        ("dcp", {"beta": 0.0}, 0.97, "changed none of the self-test's answers"),
        ("top_k", {"k": 4}, 0.97, "changed none of the self-test's answers"),
    ],
)
def test_a_policy_that_does_nothing_is_named(tmp_path, defense, params, accuracy, sentence):
    found = warnings(tmp_path, defense, TRAINED, params=params, accuracy=accuracy)
    assert any(sentence in each for each in found)


@pytest.mark.parametrize(
    ("defense", "params"), [("none", {}), ("dcp", STRONG), ("label", {}), ("top_k", {"k": 2})]
)
def test_a_policy_that_does_something_is_not(tmp_path, defense, params):
    assert warnings(tmp_path, defense, TRAINED, params=params) == []


@pytest.mark.parametrize(
    ("params", "warned"), [(STRONG, True), (STRONG | {"keep_top1": True}, False)]
)
def test_dcp_on_many_classes_is_named_unless_the_label_is_kept(tmp_path, params, warned):
    found = warnings(tmp_path, "dcp", np.eye(100)[:6] * 0.6 + 0.004, params=params)
    assert any("dcp on 100 classes changes the label" in each for each in found) is warned


SENT = Sent(
    input="x",
    datatype="FP32",
    layout="NCHW",
    output="y",
    answers="probabilities",
    fingerprint="0" * 64,
)
CALIBRATED = ("codebook", "gate")


def fitted_card(folder, fitted, precision, caught=None):
    """The card of a bundle with these files of `scumble calibrate`.

    Args:
        folder: the bundle's.
        fitted: names of the files.
        precision: theirs.
        caught: share of each foreign set that is withheld at a loss of 2 %; None without any set.
    """
    card = Bundle(make_bundle(folder)).card
    files = card.files | {f"{name}.{precision}.json": "" for name in fitted}
    sets = {f"set{i}": share for i, share in enumerate(caught or [])}
    report = {"foreign": {name: {} for name in sets}, precision: {"energy+top": {"0.02": sets}}}
    return card.model_copy(update={"files": files, "auxiliary": {"gate": report}})


SHARP, BLUNT = [0.5, 1.0], [0.49, 1.0]


@pytest.mark.parametrize(
    ("defense", "fitted", "caught", "hint"),
    [
        ("none", (), None, "label keeps the label; after scumble calibrate, codebook"),
        ("none", ("codebook",), None, "codebook keeps the label and a confidence"),
        ("none", CALIBRATED, None, "codebook keeps the label and a confidence"),
        ("none", CALIBRATED, BLUNT, "codebook keeps the label and a confidence"),
        ("none", CALIBRATED, SHARP, "withhold keeps the label and a confidence"),
        ("dcp", (), None, "label keeps the label; after scumble calibrate, codebook"),
        ("dcp", CALIBRATED, SHARP, "withhold keeps the label and a confidence"),
        ("label", (), None, "scumble calibrate fits withhold"),
        ("label", ("codebook",), None, "scumble calibrate fits withhold"),
        ("label", CALIBRATED, None, "scumble calibrate --foreign SET tells how many"),
        ("chain", (), None, "scumble calibrate fits withhold"),
        ("label", CALIBRATED, SHARP, "withhold keeps the label and a confidence"),
    ],
)
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_hint_names_what_is_recommended(tmp_path, defense, fitted, caught, hint, precision):
    card = fitted_card(tmp_path, fitted, precision, caught)
    params = {"dcp": STRONG, "chain": {"steps": [["label", {}], ["round", {"decimals": 1}]]}}
    policy = configure(defense, params.get(defense, {}))
    assert policy_hint(card, precision, policy).startswith(hint)


def test_a_gate_that_lets_foreign_images_pass_is_not_hinted_at(tmp_path):
    card = fitted_card(tmp_path, CALIBRATED, "int8", BLUNT)
    assert policy_hint(card, "int8", configure("label", {})) is None


def test_withhold_is_not_hinted_at_in_bfloat16_which_has_no_thresholds(tmp_path):
    card = fitted_card(tmp_path, CALIBRATED, "float32", SHARP)
    assert policy_hint(card, "bf16", configure("none", {})).startswith("codebook keeps")
    assert policy_hint(card, "bf16", configure("label", {})) is None


def test_what_is_recommended_gets_no_hint(tmp_path):
    card = Bundle(make_bundle(tmp_path)).card
    assert policy_hint(card, "int8", Withhold()) is None


@pytest.mark.parametrize(
    ("upstream", "hinted"),
    [
        (Templated(template="0" * 64, answers="probabilities"), False),
        (Templated(template="0" * 64, answers="logits"), True),
        (SENT, False),
        (SENT.model_copy(update={"logits": "z"}), True),
        (SENT.model_copy(update={"answers": "logits"}), True),
    ],
    ids=["API", "API with logits", "V2", "V2 with other logits", "V2 with logits"],
)
def test_withhold_is_hinted_at_only_where_the_upstream_gives_logits(tmp_path, upstream, hinted):
    card = Bundle(make_bundle(tmp_path)).card.model_copy(update={"upstream": upstream})
    found = policy_hint(card, "float32", configure("label", {}))
    assert (found is not None) is hinted


def one_surer(count, most):
    """Six rows of `count` classes, whose largest value is `most`."""
    rows = np.full((6, count), 1 / count)
    rows[3] = (1 - most) / (count - 1)
    rows[3, 0] = most
    return rows


# classes; the largest answer of untrained networks of torchvision, and of one that learnt something
LARGEST = [
    (2, 0.54, 0.7),
    (3, 0.38, 0.5),
    (10, 0.12, 0.3),
    (43, 0.026, 0.051),
    (1000, 0.0011, 0.01),
]


@pytest.mark.parametrize(("count", "untrained", "trained"), LARGEST)
def test_untrained_weights_are_named_and_trained_ones_are_not(tmp_path, count, untrained, trained):
    card = Bundle(make_bundle(tmp_path)).card
    card = card.model_copy(update={"labels": [f"c{k}" for k in range(count)]})
    named = {
        most: list(policy_warnings(card, "float32", one_surer(count, most), configure("none", {})))
        for most in (untrained, trained, 0.999)
    }
    (sentence,) = named.pop(untrained)
    assert f"hardly differ from 1/{count} on the self-test; are its weights trained?" in sentence
    assert named == {trained: [], 0.999: []}
