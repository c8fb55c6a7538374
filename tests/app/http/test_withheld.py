"""Withheld answers over the public port: what clients see, and what their budgets count."""

import shutil
import time

import numpy as np
import orjson
import pytest

from app.access.keys import KeyFile, write_keys
from app.inference.bundle import Bundle, write_card
from app.inference.defense_artifacts import DefenseArtifacts
from scumble.training.codebook import fit
from tests.app.access.test_admission import IMAGE, ask, row
from tests.pictures import PNG
from tests.tiny import LABELS

ANSWERS = ["codebook", {"form": "pooled", "cells": 2}]
ALL, NOTHING = ({"on": on, "loss": 0.5, "answers": ANSWERS} for on in ("boundary", "gate"))


def withholding(models, folder):
    """A model folder whose bundle withholds every image at the boundary, and none at the gate."""
    shutil.copytree(models / "tiny", folder / "tiny")
    rng = np.random.default_rng(0)
    forms = fit(rng.dirichlet(np.ones(len(LABELS)), 200), rng.integers(0, len(LABELS), 200))
    gate = {
        "losses": [0.01, 0.5],
        "thresholds": {"top": [[2, 2]], "energy": [[-1e3, -1e3]], "energy+top": [[-1e3, 2]] * 2},
        "weight": 0,
        "whitener": None,
        "shares": {},
    }
    for precision in ("float32", "int8"):
        (folder / "tiny" / f"gate.{precision}.json").write_bytes(orjson.dumps(gate))
        (folder / "tiny" / f"codebook.{precision}.json").write_bytes(orjson.dumps({"forms": forms}))
    write_card(
        folder / "tiny", Bundle(folder / "tiny").card.model_dump(exclude={"files", "format"})
    )
    assert DefenseArtifacts(Bundle(folder / "tiny")).gate().best == "energy"
    return folder


@pytest.fixture(scope="module")
def calibrated(models, tmp_path_factory):
    """Such a folder."""
    return withholding(models, tmp_path_factory.mktemp("calibrated"))


@pytest.fixture
def open_client(make_client, calibrated, tmp_path):
    """`open_client(keys, **settings)` -> a client of a service of that bundle."""

    def make(*keys, **settings):
        if keys:
            settings["keys_file"] = tmp_path / "keys.json"
            write_keys(settings["keys_file"], KeyFile(keys=keys))
        return make_client(
            **{"model_dir": calibrated, "secret": "a-key-of-16-bytes", "workers": 1, **settings}
        )

    return make


def predictions(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["predictions"]


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_an_abstained_answer_says_so(open_client, engine, precision):
    client = open_client(defense="withhold", defense_params=ALL, engine=engine, precision=precision)
    for found in predictions(client.post("/v1/predict", files=[IMAGE] * 2)):
        assert found["abstained"] is True
        assert found["probabilities"] == pytest.approx([1 / len(LABELS)] * len(LABELS))
    (found,) = predictions(client.post("/v1/predict?top_k=2", files=[IMAGE]))
    assert found["abstained"] is True
    assert [choice["probability"] for choice in found["top"]] == pytest.approx([0.25, 0.25])
    answer = client.post("/v2/models/tiny/infer", content=PNG, headers={
        "Content-Type": "application/octet-stream", "Inference-Header-Content-Length": "0",
    })  # fmt: skip
    rows = np.frombuffer(answer.content[-4 * len(LABELS) :], "<f4")
    np.testing.assert_allclose(rows, 1 / len(LABELS), rtol=1e-6)


def test_an_answer_that_is_not_withheld_is_as_ever(open_client):
    client = open_client(defense="withhold", defense_params=NOTHING)
    plain = open_client(defense="codebook", defense_params=ANSWERS[1])
    served, expected = (c.post("/v1/predict", files=[IMAGE]) for c in (client, plain))
    assert predictions(served) == predictions(expected)


def test_a_key_has_its_own_and_its_form_of_output(open_client):
    withhold = {"defense": "withhold", "defense_params": ALL}
    client = open_client(
        row("plain"),
        row("withheld", **withhold),
        row("label", **withhold, output={"form": "label"}),
        row("passes", defense="withhold", defense_params=NOTHING),
    )
    assert "abstained" not in predictions(ask(client, "plain"))[0]
    assert "abstained" not in predictions(ask(client, "passes"))[0]
    for key in ("withheld", "label"):
        (found,) = predictions(ask(client, key))
        assert found["abstained"] is True
        assert found["probabilities"] == pytest.approx([0.25] * 4)


def test_a_keyed_answer_looks_like_any_other(open_client):
    params = ALL | {"withheld": "keyed"}
    client = open_client(
        row("keyed", defense="withhold", defense_params=params, limits={"total_clean": 5}),
        row("clean", defense="codebook", defense_params=ANSWERS[1], limits={"total_clean": 5}),
    )
    keyed, again, clean = (ask(client, key) for key in ("keyed", "keyed", "clean"))
    assert predictions(keyed) == predictions(again)
    assert predictions(keyed)[0].keys() == predictions(clean)[0].keys()
    assert set(keyed.headers) == set(clean.headers)
    assert "ratelimit" not in keyed.headers


def test_the_audit_log_counts_what_was_withheld(open_client, tmp_path):
    keys = (
        row("withheld", defense="withhold", defense_params=ALL),
        row("passes", defense="withhold", defense_params=NOTHING),
    )
    client = open_client(*keys, audit_file=tmp_path / "audit", audit_on_failure="closed")
    for key, n in (("withheld", 2), ("passes", 1)):
        assert ask(client, key, n).status_code == 200
    (file,) = tmp_path.glob("audit.worker-*")
    lines = map(orjson.loads, file.read_bytes().splitlines())
    found = [(e["client"], e.get("withheld")) for e in lines if e["kind"] == "prediction"]
    assert found == [("withheld", 2), ("passes", None)]


def test_what_is_withheld_is_not_counted_as_an_answer(open_client):
    limits = {"total_clean": 3, "total_images": 100}
    client = open_client(
        row("withheld", defense="withhold", defense_params=ALL, limits=limits),
        row("passes", defense="withhold", defense_params=NOTHING, limits=limits),
    )
    for _ in range(5):
        answer = ask(client, "withheld", 2)
        end = time.monotonic() + 5
        while answer.status_code == 429 and time.monotonic() < end:  # the refund comes after
            answer = ask(client, "withheld", 2)
        assert answer.status_code == 200
    assert answer.headers["RateLimit"] == '"total";r=90'
    assert ask(client, "passes", 2).status_code == 200
    refused = ask(client, "passes", 2)
    assert refused.status_code == 429
    assert "budget of answers exceeded" in refused.json()["detail"]
    assert ask(client, "passes").status_code == 200
    assert ask(client, "passes").status_code == 429
