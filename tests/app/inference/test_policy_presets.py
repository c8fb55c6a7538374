"""The policies that a bundle can serve; the console, `scumble check` and tools show the same."""

import pytest

from app.admin.console.facts import about
from app.inference.assembly import configure_defense
from app.inference.bundle import MeasuredCopy, open_bundle
from app.inference.policy_presets import WORTH, hinders, policy_presets, recommended_policy
from app.inference.policy_warnings import REASONS, policy_hint
from app.settings import default_model_dir, load_settings
from scumble.defenses import configure
from scumble.evaluation.claims import TIE
from scumble.training.policy_table import policies_of

MODELS = default_model_dir()
BUNDLES = sorted(path.parent.name for path in MODELS.glob("*/card.json"))
PRECISIONS = ("float32", "bf16", "int8")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", BUNDLES)
def test_console_hint_and_table_recommend_the_same_policy(name, precision):
    settings = load_settings(model_dir=MODELS, model=name, precision=precision)
    bundle = open_bundle(MODELS, name)
    recommended = recommended_policy(bundle.card, precision)
    shown = about(settings, MODELS)["presets"]
    assert [each["defense"] for each in shown if each["recommended"]] == [recommended.defense]
    hint = policy_hint(bundle.card, precision, configure("none", {}))
    assert hint == REASONS[recommended.defense]
    assert hint.startswith(recommended.defense)
    policy = configure_defense(settings, bundle, recommended.defense, recommended.params)
    assert repr(policy) in policies_of(settings, bundle)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mnist", "codebook"),  # drawn images get past its gate
        ("mnist-outliers", "codebook"),
        ("gtsrb", "withhold"),
        ("gtsrb-outliers", "withhold"),
        ("cifar10", "codebook"),  # catches 17 % of CIFAR-100 at a loss of 2 %
        ("cifar100", "codebook"),
    ],
)
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_withhold_is_recommended_where_its_gate_hinders_attackers(name, expected, precision):
    assert recommended_policy(open_bundle(MODELS, name).card, precision).defense == expected


@pytest.mark.parametrize(
    ("withhold", "label", "expected"),
    [
        ([], [], True),
        ([0.3], [], True),
        ([], [0.6], True),
        ([0.3], [0.6], True),
        ([0.57], [0.6], True),
        ([0.59], [0.6], False),  # a tie
        ([0.7], [0.6], False),
        ([0.3, 0.59], [0.6, 0.5], False),  # the best of both precisions counts
    ],
)
def test_a_gate_hinders_if_its_best_copy_is_worse_than_that_from_labels(withhold, label, expected):
    card = open_bundle(MODELS, "mnist").card
    params = card.recommended["withhold"]
    common = {"attacker": "knockoff", "queries": 100, "served": 1.0, "seeds": 1}
    copies = [
        MeasuredCopy(precision=precision, defense=name, params=used, copied=copied, **common)
        for name, used, shares in (
            ("withhold", params, withhold),
            ("withhold", {"loss": 0.5}, [0.99]),  # not the recommended one
            ("label", {}, label),
            ("none", {}, [0.1]),
        )
        for precision, copied in zip(("float32", "int8"), shares, strict=False)
    ]
    assert hinders(card.model_copy(update={"copies": copies})) is expected


def test_a_worthwhile_difference_is_what_the_results_call_one():
    assert WORTH == TIE


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", BUNDLES)
def test_a_bundle_can_serve_each_of_its_presets(name, precision):
    settings = load_settings(model_dir=MODELS, model=name, precision=precision)
    bundle = open_bundle(MODELS, name)
    for preset in policy_presets(bundle.card, precision):
        configure_defense(settings, bundle, preset.defense, preset.params)


def test_parameters_are_the_card_s_and_defaults_where_it_has_none():
    card = open_bundle(MODELS, "mnist").card
    presets = {each.defense: each.params for each in policy_presets(card, "int8")}
    assert list(presets) == ["none", "dcp", "label", "codebook", "withhold"]
    assert presets["dcp"] == card.recommended["dcp"]
    assert presets["withhold"] == card.recommended["withhold"]
    without = card.model_copy(update={"recommended": {}})
    presets = {each.defense: each.params for each in policy_presets(without, "int8")}
    assert (presets["dcp"], presets["withhold"]) == ({"beta": 1.2}, {"loss": 0.01})
