"""What `python -m loadtest.abuse` calls a failure; the run itself takes a minute."""

import pytest

from loadtest.abuse import verdict
from loadtest.pages import DOCS, promises, read, within

THEFT = {"budget": 10, "images_served": 10, "answers": {"200": 4, "429": 8}}
KEYS = {"answers": {"401": 30}, "series_added": 0, "p_value": {"first character": 0.4}}


def test_all_is_well():
    assert verdict({"theft": THEFT, "wrong_keys": KEYS}) == []


@pytest.mark.parametrize(
    ("theft", "keys"),
    [
        ({"images_served": 11}, {}),
        ({"images_served": 9}, {}),
        ({"answers": {"200": 4, "500": 1}}, {}),
        ({}, {"answers": {"401": 29, "200": 1}}),
        ({}, {"series_added": 1}),
        ({}, {"p_value": {"first character": 0.4, "last character": 0.0001}}),
    ],
)
def test_what_must_not_be(theft, keys):
    assert len(verdict({"theft": THEFT | theft, "wrong_keys": KEYS | keys})) == 1


def test_the_threat_model_has_the_committed_figures():
    page = (DOCS / "explanation" / "threat-model.md").read_text()
    documents = [read(name) for name in ("chaos.json", "abuse.json", "fuzz.json", "bombs.json")]
    assert all(documents)
    assert within(page, promises(*documents)) == page, "run: python -m loadtest.pages"
