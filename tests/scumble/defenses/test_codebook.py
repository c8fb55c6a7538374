"""The codebook: rows by their definition, the same in a graph, and what it refuses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.inference import engines
from app.inference.graph import defended
from scumble.defenses import DefenseError, make
from scumble.defenses.codebook import Codebook, find
from tests.scumble.defenses.test_nodes import rows_through

K, SIZES = 3, (1, 2, 4)
BORDERS = {1: [], 2: [0.8], 4: [0.6, 0.8, 0.97]}


def own_rows(c, cells):
    """Rows of class c, the more certain the higher the cell."""
    tops = np.linspace(0.5, 0.99, cells)
    rows = np.empty((cells, K))
    for j, top in enumerate(tops):
        rows[j] = (1 - top) * np.roll([0, 0.75, 0.25], c)
        rows[j, c] = top
    return rows.tolist()


FORMS = {
    "classwise": {
        str(m): {
            "borders": [[b - c / 100 for b in BORDERS[m]] for c in range(K)],
            "rows": [own_rows(c, m) for c in range(K)],
        }
        for m in SIZES
    },
    "pooled": {
        str(m): {"borders": [BORDERS[m]], "rows": [[[t] for t in np.linspace(0.4, 0.99, m)]]}
        for m in SIZES
    },
}
FORMS["calibrated"] = FORMS["pooled"]


class Shelf:
    """A bundle's codebook."""

    def __init__(self, forms=FORMS):
        self.forms = forms

    def codebook(self):
        return self.forms


def by_definition(form, cells, row):
    """One row in plain Python."""
    found = FORMS[form][str(cells)]
    row = [float(np.float32(p)) for p in row]
    c = row.index(max(row))
    own = c if form == "classwise" else 0
    j = sum(float(np.float32(b)) < row[c] for b in found["borders"][own])
    if form == "classwise":
        return found["rows"][c][j]
    top = found["rows"][0][j][0]
    return [top if k == c else (1 - top) / (K - 1) for k in range(K)]


def some_rows(n=200, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    rows = rng.dirichlet([0.4] * K, n).astype(dtype)
    rows[:4] = [[0.8, 0.1, 0.1], [0.1, 0.79, 0.11], [0.5, 0.5, 0], [0, 0, 1]]  # at borders, a tie
    return rows


every_form = pytest.mark.parametrize("form", FORMS)
every_size = pytest.mark.parametrize("cells", SIZES)


@every_form
@every_size
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_are_those_of_class_and_cell(form, cells, dtype):
    rows = some_rows(dtype=dtype)
    served = make("codebook", form=form, cells=cells, bundle=Shelf())(rows, None)
    assert served.dtype == dtype
    expected = [by_definition(form, cells, row) for row in rows]
    np.testing.assert_allclose(served, expected, atol=1e-7)


@every_form
@every_size
@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_a_graph_serves_the_same(form, cells, engine):
    rows = some_rows()
    defense = make("codebook", form=form, cells=cells, bundle=Shelf())
    load = engines.load(engine, defended(rows_through(K), defense), threads=1, precision="float32")
    np.testing.assert_allclose(load(rows), defense(rows, None), atol=1e-6)


@every_form
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_it_tells_the_class_and_the_cell_and_no_more(form, seed):
    rows = some_rows(64, seed)
    served = make("codebook", form=form, cells=4, bundle=Shelf())(rows, None)
    assert (served.argmax(1) == rows.argmax(1)).all()
    assert len(np.unique(served, axis=0)) <= K * 4


def test_auto_takes_class_wise_rows_where_there_are_some():
    assert make("codebook", bundle=Shelf()).form == "classwise"
    few = {**FORMS, "classwise": {"1": FORMS["classwise"]["1"]}}
    assert make("codebook", bundle=Shelf(few)).form == "pooled"
    assert repr(make("codebook", bundle=Shelf(few))) == "Codebook(cells=4, form='pooled')"


def broken(**changes):
    whole = FORMS["classwise"]["2"]
    return {"classwise": {"2": {**whole, **changes}}}


@pytest.mark.parametrize(
    ("forms", "params", "words"),
    [
        ({}, {}, "no pooled codebook with 4 cells; available: none"),
        (FORMS, {"form": "pooled", "cells": 3}, "3 cells; available: classwise: 1, 2, 4; pooled"),
        (FORMS, {"cells": 0}, "cells must be an integer from 1 to 16, got 0"),
        (FORMS, {"cells": 2.0}, "cells must be an integer"),
        (FORMS, {"form": "best"}, "form must be one of 'auto', 'classwise'"),
        (broken(borders=[[0.5, 0.4]] * K), {"cells": 2}, r"borders \(3, 2\) for rows \(3, 2, 3\)"),
        (broken(rows=[[[0.5, 0.5]] * 2] * K), {"cells": 2}, r"rows \(3, 2, 2\)"),
        (broken(rows=[[[0.2, 0.5, 0.3]] * 2] * K), {"cells": 2}, "largest for their own class"),
        (broken(rows=[[[np.nan] * K] * 2] * K), {"cells": 2}, "malformed"),
        (broken(rows="x"), {"cells": 2}, "malformed"),
        (broken(rows=[[1]]), {"cells": 2}, "allowed"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused(forms, params, words):
    with pytest.raises(DefenseError, match=words):
        make("codebook", bundle=Shelf(forms), **params)


def test_descending_borders_are_refused():
    forms = {
        "pooled": {"4": {"borders": [[0.9, 0.5, 0.6]], "rows": [[[0.5], [0.6], [0.7], [0.8]]]}}
    }
    with pytest.raises(DefenseError, match="ascending"):
        find(forms, "pooled", 4)


def test_without_a_bundle_it_says_what_it_needs():
    with pytest.raises(DefenseError, match="needs the codebook of a bundle"):
        make("codebook")
    with pytest.raises(DefenseError, match="make it with a bundle"):
        Codebook()(some_rows(), None)


def test_rows_of_other_classes_are_refused():
    with pytest.raises(ValueError, match="3 classes; the rows have 4"):
        make("codebook", form="classwise", bundle=Shelf())(np.full((1, 4), 0.25), None)
