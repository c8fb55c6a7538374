import pytest

from app.access.keys import Key, KeyFile, write_keys
from app.admin.api_description import OPENAPI_FILE, leave_description
from app.admin.console.facts import KNOBS, client_policies, measured_copies, offered, policy
from app.errors import Unprocessable
from app.inference.bundle import open_bundle
from app.settings import default_model_dir, load_settings


def key(name, number, **fields):
    return Key(
        id=f"{number:08x}",
        sha256=f"{number:064x}",
        client=name,
        created="2026-01-01T00:00:00+00:00",
        **fields,
    )


def test_each_client_has_the_policies_of_its_valid_keys(tmp_path):
    path = tmp_path / "keys.json"
    keys = (
        key("acme", 1, defense="dcp", defense_params={"beta": 1.2}),
        key("acme", 2, defense="label", output={"form": "label"}),
        key("acme", 3, defense="none", revoked="2026-01-02T00:00:00+00:00"),
        key("plain", 4),
    )
    write_keys(path, KeyFile(keys=keys))
    assert client_policies(path) == {
        "acme": ["dcp (beta 1.2)", "label, label"],
        "plain": ["as served"],
    }


def test_a_file_of_keys_that_cannot_be_read_shows_no_policies(tmp_path):
    assert client_policies(tmp_path / "none.json") == client_policies(None) == {}


@pytest.mark.parametrize(
    ("precision", "stored"), [("float32", "float32"), ("bf16", "float32"), ("int8", "int8")]
)
def test_copies_are_those_of_the_served_precision(precision, stored):
    card = open_bundle(default_model_dir(), "mnist").card
    found = measured_copies(load_settings(model="mnist", precision=precision), card)
    assert {copy["precision"] for copy in found} == {stored}
    assert {"none", "label", "dcp"} <= {copy["defense"] for copy in found}
    assert measured_copies(load_settings(), card.model_copy(update={"copies": []})) == []


def test_defenses_that_the_bundle_was_not_calibrated_for_are_not_offered():
    card = open_bundle(default_model_dir(), "mnist").card
    files = {name: digest for name, digest in card.files.items() if "gate" not in name}
    without = card.model_copy(update={"files": files})
    settings = load_settings(precision="int8", defense="withhold", defense_params={"loss": 0.02})
    rows = {row["name"]: row for row in offered(settings, card)}
    assert rows["withhold"]["start"] == 0.02
    assert {row["name"] for row in offered(load_settings(), without)} == rows.keys() - {"withhold"}


@pytest.mark.parametrize(
    ("loss", "low", "step"), [(0.01, 0.001, 0.001), (0.0025, 0.001, 1e-4), (0.0005, 0.0005, 1e-4)]
)
def test_the_slider_of_the_active_policy_can_stand_at_its_value(loss, low, step):
    card = open_bundle(default_model_dir(), "mnist").card
    settings = load_settings(defense="withhold", defense_params={"loss": loss})
    (row,) = [row for row in offered(settings, card) if row["name"] == "withhold"]
    assert (row["start"], row["low"]) == (loss, low)
    assert row["step"] == pytest.approx(step)


@pytest.mark.parametrize("name", sorted(KNOBS))
@pytest.mark.parametrize(
    "inner", ["own.py:Own", "chain", "mad", "withhold", "", None, {}, ["own.py:Own"]]
)
def test_the_page_loads_no_file_and_no_defense_that_it_does_not_offer(name, inner):
    with pytest.raises(Unprocessable, match="allowed: dcp, "):
        policy(load_settings(), name, {"answers": [inner, {}]})


def test_withhold_answers_with_what_the_page_offers():
    params = {"loss": 0.01, "answers": ["codebook", {"cells": 4}]}
    assert policy(load_settings(), "withhold", params) == ("withhold", params)
    with pytest.raises(Unprocessable, match=r"defense is 'own.py:Own'"):
        policy(load_settings(), "own.py:Own", {})


def test_the_first_worker_leaves_the_description(tmp_path):
    leave_description(tmp_path, lambda: {"openapi": "3.1.0"})
    leave_description(tmp_path, lambda: {"openapi": "another worker's"})
    assert (tmp_path / OPENAPI_FILE).read_bytes() == b'{"openapi":"3.1.0"}'
    assert [path.name for path in tmp_path.iterdir()] == [OPENAPI_FILE]
