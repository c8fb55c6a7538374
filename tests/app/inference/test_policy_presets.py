"""The policies that a bundle can serve; the console, `scumble check` and tools show the same."""

import pytest

from app.admin.console.facts import about
from app.inference.assembly import configure_defense
from app.inference.bundle import open_bundle
from app.inference.policy_presets import policy_presets, recommended_policy
from app.inference.policy_warnings import REASONS, policy_hint
from app.settings import default_model_dir, load_settings
from scumble.defenses import configure
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
        ("mnist", "withhold"),
        ("mnist-outliers", "withhold"),
        ("gtsrb", "withhold"),
        ("gtsrb-outliers", "withhold"),
        ("cifar10", "codebook"),  # catches 17 % of CIFAR-100 at a loss of 2 %
        ("cifar100", "codebook"),
    ],
)
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_withhold_is_recommended_where_the_gate_catches_foreign_images(name, expected, precision):
    assert recommended_policy(open_bundle(MODELS, name).card, precision).defense == expected


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
