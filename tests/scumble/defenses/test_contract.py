"""What holds for every defense, over one table. A defense without a row here fails the suite."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import scumble.defenses
from scumble.defenses import TABLE, Defense, DefenseError, KeepTop1, available, configure, make
from scumble.defenses.gate import Gate
from tests.strategies import images, probs


class Pictured:
    """Auxiliary networks that find a row in each picture: its channels are the classes."""

    def auxiliary(self, file, output):
        sharpness = 2.0 + len(file)  # so that they differ

        def row(inputs):
            channels = (1, 2) if inputs.dtype == np.uint8 else (2, 3)
            level = inputs.mean(axis=channels, dtype=np.float64)
            level = level / 255 if inputs.dtype == np.uint8 else level
            if output == "scores":
                return np.cos(1e4 * level).astype(np.float32)
            odds = np.exp(sharpness * np.sin(1e4 * level))
            return (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32)

        return row

    version = "pictured 1"

    def gate(self):
        return Gate(np.array([0.1, 0.5]), {"top": np.array([[0.4, 0.7]])})

    def codebook(self):
        return {
            "pooled": {
                "4": {
                    "borders": [[0.6, 0.8, 0.97]],
                    "rows": [[[0.997 + j / 1000] for j in range(4)]],
                }
            }
        }


class Row(NamedTuple):
    """One defense at one setting."""

    name: str
    params: dict[str, Any]
    zero: dict[str, Any] | None  # the parameters at which nothing happens; None: there are none
    keeps_top1: bool  # the clean arg-max stays a maximum of the answer
    needs_images: bool = False

    def make(self, **more):
        return make(self.name, secret=b"test", bundle=Pictured(), **self.params, **more)


HALF = {"on": "boundary", "loss": 0.5, "answers": ["none", {}]}
ROWS = [
    Row("none", {}, {}, True),
    Row("dcp", {"beta": 0.7}, {"beta": 0}, False),
    Row("dcp", {"beta": 1.5, "gamma": 0.1}, {"beta": 0.5, "gamma": 0}, False),
    Row("dcp", {"beta": 1, "mode": "lee2018"}, {"beta": 0, "mode": "lee2018"}, False),
    Row("dcp", {"beta": 10, "gamma": 10, "nu": 1e6, "mode": "lee2018"}, None, False),
    Row("reverse_sigmoid", {"beta": 0.64}, {"beta": 0}, False),
    Row("reverse_sigmoid", {"beta": 1.28, "odds": "lee2018"}, {"beta": 0}, False),
    Row("reverse_sigmoid", {"beta": 10, "gamma": 10, "odds": "lee2018"}, None, False),
    Row("adaptive_misinformation", {"tau": 0.6}, {"tau": 0, "nu": 1e6}, False, True),
    Row("adaptive_misinformation", {"tau": 2, "nu": 1}, None, False, True),
    Row("random", {"epsilon": 0.5}, {"epsilon": 0}, False),
    Row("random", {"epsilon": 2}, None, False),
    Row("mad", {"epsilon": 0.5}, {"epsilon": 0}, False, True),
    Row("mad", {"epsilon": 2}, None, False, True),
    Row("mad", {"epsilon": 1, "keep": "argmax"}, {"epsilon": 0, "keep": "argmax"}, True, True),
    Row("grad2", {"epsilon": 0.5}, {"epsilon": 0}, False, True),
    Row("grad2", {"epsilon": 2}, None, False, True),
    Row("modelguard_w", {"epsilon": 1}, {"epsilon": 0}, True),
    Row("round", {"decimals": 2}, None, False),
    Row("round", {"decimals": 8}, None, False),
    Row("top_k", {"k": 3}, {"k": 200}, True),
    Row("label", {}, None, True),
    Row("codebook", {"form": "pooled"}, None, True),
    Row("withhold", HALF, HALF | {"loss": 0}, False),
    Row("withhold", HALF | {"answers": ["label", {}], "withheld": "keyed"}, None, False, True),
    Row(
        "chain",
        {
            "steps": [
                ["dcp", {"beta": 1.0}],
                ["random", {"epsilon": 0.1}],
                ["round", {"decimals": 2}],
            ]
        },
        {"steps": [["dcp", {"beta": 0}], ["random", {"epsilon": 0}], ["none", {}]]},
        False,
    ),
    Row(
        "chain",
        {"steps": [["grad2", {"epsilon": 0.2}], ["mad", {"epsilon": 0.3, "keep_top1": True}]]},
        {"steps": [["grad2", {"epsilon": 0}], ["mad", {"epsilon": 0}]]},
        False,
        True,
    ),
]
GUARDED = [row for row in ROWS if row.name != "withhold"]  # which keep_top1 would undo
DEFENSES = [(row.make(), row.needs_images) for row in ROWS]
DEFENSES += [(row.make(keep_top1=True), row.needs_images) for row in GUARDED]

every_defense = pytest.mark.parametrize(
    ("defense", "needs_images"), DEFENSES, ids=[repr(defense) for defense, _ in DEFENSES]
)
examples = settings(max_examples=15)


@pytest.fixture(autouse=True, scope="module")
def arithmetic_is_sound():
    with np.errstate(all="raise", under="ignore"):
        yield


def eps(p):
    return np.finfo(p.dtype).eps


def some_images(p, seed=0):
    """uint8 (N, 3, 2, K), as many channels as classes; see `Pictured`."""
    return np.random.default_rng(seed).integers(0, 256, (len(p), 3, 2, p.shape[1]), np.uint8)


def draw_images(data, p, needed):
    if not needed:
        return data.draw(images(len(p)))
    pixels = some_images(p, data.draw(st.integers(0, 2**32 - 1)))
    planar = pixels.transpose(0, 3, 1, 2).astype(np.float32, order="C") / np.float32(255)
    return data.draw(st.sampled_from([pixels, planar]))


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_table_has_a_row_for_every_defense():
    assert {row.name for row in ROWS} == set(available())


HELPERS = {
    "__init__",
    "auxiliary_network",
    "pseudorandom_rows",
    "base",
    "evidence",
    "gate",
    "keep_top1",
    "parameters",
    "scores",
    "user_file",
}


def test_every_file_is_in_the_table():
    folder = Path(scumble.defenses.__file__).parent
    files = {path.stem for path in folder.glob("*.py")}
    assert files - HELPERS == set(available())


@every_defense
@examples
@given(data=st.data())
def test_answer_is_a_distribution_and_inputs_stay(defense, needs_images, data):
    p = data.draw(probs())
    x = draw_images(data, p, needs_images)
    p_before, x_before = p.copy(), None if x is None else x.copy()

    y = defense(p, x)

    assert y.shape == p.shape
    assert y.dtype == p.dtype
    assert np.isfinite(y).all()
    assert (y >= 0).all()
    np.testing.assert_allclose(y.sum(axis=1, dtype=np.float64), 1, rtol=0, atol=32 * eps(p))
    assert same_bits(p, p_before)
    assert x is None or same_bits(x, x_before)


@every_defense
@examples
@given(data=st.data())
def test_row_depends_on_itself_alone(defense, needs_images, data):
    p = data.draw(probs())
    n = len(p)
    x = draw_images(data, p, needs_images)
    y = defense(p, x)

    def answer(at):
        return defense(p[at], None if x is None else x[at])

    assert same_bits(answer(slice(None)), y)
    order = np.random.default_rng(0).permutation(n)
    assert same_bits(answer(order), y[order])
    for i in range(n):
        assert same_bits(answer(slice(i, i + 1)), y[i : i + 1])
        assert same_bits(answer(slice(i, None)), y[i:])


KEYED = [row for row in ROWS if TABLE[row.name].keyed and not row.needs_images]


@pytest.mark.parametrize("row", KEYED, ids=str)
@examples
@given(p=probs(), seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(["f4", "f8"]))
def test_every_form_of_an_image_gets_the_same_draw(row, p, seed, dtype):
    """Or as many answers as an image has spellings could be averaged."""
    rng = np.random.default_rng(seed)
    pixels = rng.choice(np.array([0, 1, 127, 128, 254, 255], np.uint8), (len(p), 3, 5, 2))
    exact = pixels.transpose(0, 3, 1, 2).astype(dtype) / np.dtype(dtype).type(255)
    below_a_level = rng.uniform(-1e-3, 1e-3, exact.shape).astype(dtype)
    negative = np.where((exact == 0) & (rng.random(exact.shape) < 0.5), -exact, exact)
    y = row.make()(p, pixels)
    for form in (
        pixels[:, :, ::-1].copy()[:, :, ::-1],  # another layout in memory
        exact,
        np.asfortranarray(exact),
        negative,
        exact + below_a_level,
        (exact + below_a_level).clip(0, 1),
    ):
        assert same_bits(row.make()(p, form), y)


@pytest.mark.parametrize("row", [row for row in ROWS if row.zero is not None], ids=str)
@examples
@given(p=probs())
def test_zero_strength_is_the_identity(row, p):
    y = make(row.name, bundle=Pictured(), **row.zero)(p, some_images(p))
    np.testing.assert_allclose(y, p, rtol=32 * eps(p), atol=0)


@pytest.mark.parametrize("row", [row for row in ROWS if row.keeps_top1], ids=str)
@examples
@given(p=probs())
def test_top1_stays_a_maximum(row, p):
    y = row.make()(p, some_images(p))
    at = np.arange(len(p)), p.argmax(axis=1)
    assert (y[at] == y.max(axis=1)).all()


@pytest.mark.parametrize("row", GUARDED, ids=str)
@settings(max_examples=100)
@given(p=probs())
def test_guard_keeps_the_argmax(row, p):
    y = row.make(keep_top1=True)(p, some_images(p))
    assert (y.argmax(axis=1) == p.argmax(axis=1)).all()


@pytest.mark.parametrize("row", GUARDED, ids=str)
@examples
@given(p=probs(min_k=2, dtypes=(np.float64,)))
def test_guard_gives_up_no_more_than_it_must(row, p):
    x = some_images(p)
    free, guarded = row.make()(p, x), row.make(keep_top1=True)(p, x)
    top = p.argmax(axis=1)
    at = np.arange(len(p)), top
    kept = free.argmax(axis=1) == top
    assert same_bits(guarded[kept], free[kept])
    # Elsewhere the guard stops where the first other class draws level.
    others = guarded.copy()
    others[at] = 0
    lead = guarded[at] - others.max(axis=1)
    assert (lead[~kept] <= 1e-14).all()


@every_defense
def test_no_rows_give_no_rows(defense, needs_images):
    p = np.empty((0, 4), np.float32)
    y = defense(p, some_images(p) if needs_images else None)
    assert y.shape == (0, 4)
    assert y.dtype == np.float32


@every_defense
def test_prints_as_its_constructor_call(defense, needs_images):
    del needs_images
    names = {kind.__name__: kind for kind in TABLE.values()} | {"KeepTop1": KeepTop1}
    again = eval(repr(defense), {"__builtins__": {}}, names)  # noqa: S307 # our own repr
    assert repr(again) == repr(defense)
    assert hash(defense) == hash(defense)
    assert "secret" not in repr(defense)
    assert "test" not in repr(defense)


def test_whole_numbers_pass_for_floats():
    assert make("dcp", beta=1, nu=500) == make("dcp", beta=1.0, nu=500.0)
    assert make("dcp", beta=np.float32(0.5)) == make("dcp", beta=0.5)


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("dpc", {}, ["'dpc'", "none, dcp, "]),
        (["dcp"], {}, ["['dcp']", "none, dcp, "]),
        ("none", {"beta": 1}, ["none", "'beta'", "keep_top1"]),
        ("dcp", {"beta": 1, "betta": 1}, ["'betta'", "beta, gamma, nu, mode, keep_top1"]),
        ("dcp", {"gamma": 0.2}, ["dcp", "'beta'"]),
        ("dcp", {"beta": -0.1}, ["beta", "-0.1", "from 0 to 10"]),
        ("dcp", {"beta": 10.1}, ["beta", "10.1", "from 0 to 10"]),
        ("dcp", {"beta": 10**400}, ["beta", "from 0 to 10"]),
        ("dcp", {"beta": True}, ["beta", "True", "number"]),
        ("dcp", {"beta": "1"}, ["beta", "'1'", "number"]),
        ("dcp", {"beta": None}, ["beta", "None", "number"]),
        ("dcp", {"beta": float("nan")}, ["beta", "nan", "number"]),
        ("dcp", {"beta": 1, "gamma": float("inf")}, ["gamma", "inf", "number"]),
        ("dcp", {"beta": 1, "nu": 0}, ["nu", "from 1 to 1e+06"]),
        ("dcp", {"beta": 1, "mode": "lee"}, ["mode", "'lee'", "'reference', 'lee2018'"]),
        ("dcp", {"beta": 1, "mode": ["lee"]}, ["mode", "['lee']"]),
        ("dcp", {"beta": 1, "keep_top1": 1}, ["keep_top1", "1", "true or false"]),
        ("reverse_sigmoid", {"beta": 1, "odds": 3}, ["odds", "3", "'clamped', 'lee2018'"]),
        ("adaptive_misinformation", {}, ["adaptive_misinformation", "'tau'"]),
        ("adaptive_misinformation", {"tau": -1}, ["tau", "-1", "from 0 to 2"]),
        ("adaptive_misinformation", {"tau": 1, "nu": 0}, ["nu", "from 1 to 1e+06"]),
        ("codebook", {}, ["Codebook", "codebook of a bundle", "DefenseArtifacts"]),
        ("mad", {"epsilon": 1}, ["MAD", "surrogate.onnx", "DefenseArtifacts"]),
        ("mad", {"epsilon": 1, "keep": "top"}, ["keep", "'top'", "'none', 'argmax'"]),
        ("mad", {"epsilon": 1, "network": 1}, ["'network'", "epsilon, keep, keep_top1"]),
        ("grad2", {"epsilon": 2.5}, ["epsilon", "2.5", "from 0 to 2"]),
        ("chain", {"steps": [["grad2", {"epsilon": 1}]]}, ["step 1", "surrogate.onnx"]),
        ("random", {"epsilon": 2.5}, ["epsilon", "2.5", "from 0 to 2"]),
        ("random", {"epsilon": 1, "secret": "a"}, ["'secret'", "epsilon, keep_top1"]),
        ("round", {"decimals": 0}, ["decimals", "0", "from 1 to 8"]),
        ("round", {"decimals": 2.0}, ["decimals", "2.0", "integer"]),
        ("round", {"decimals": True}, ["decimals", "True", "integer"]),
        ("top_k", {"k": 0}, ["k", "0", "integer"]),
        ("withhold", {}, ["Withhold", "thresholds of a bundle", "DefenseArtifacts"]),
        ("withhold", {"on": "all"}, ["on", "'all'", "'gate', 'boundary', 'both'"]),
        ("withhold", {"loss": 0.6}, ["loss", "0.6", "from 0 to 0.5"]),
        ("withhold", {"score": "top"}, ["score", "'top'", "'auto', 'energy', 'residual', 'vim'"]),
        ("withhold", {"withheld": "lied"}, ["withheld", "'lied'", "'abstained', 'keyed'"]),
        ("chain", {"steps": []}, ["steps", "[]"]),
        ("chain", {"steps": "dcp"}, ["steps", "'dcp'"]),
        ("chain", {"steps": ["dcp"]}, ["step 1", "'dcp'"]),
        ("chain", {"steps": [["none", {}], ["dcp", {"beta": 99}]]}, ["step 2", "beta", "99"]),
        ("chain", {"steps": [["none", {"bundle": 1}]]}, ["step 1", "'bundle'"]),
        ("chain", {"steps": [["chain", {"steps": []}]]}, ["step 1", "steps"]),
    ],
)
def test_refusal_says_what_and_what_is_allowed(name, params, words):
    with pytest.raises(DefenseError) as refusal:
        configure(name, params)
    for word in words:
        assert word in str(refusal.value)


def test_secret_of_another_type_is_refused_unprinted():
    with pytest.raises(DefenseError, match="secret must be bytes, got str") as refusal:
        make("random", epsilon=1, secret="hunter2")
    assert "hunter2" not in str(refusal.value)


def test_constructed_chain_takes_defenses_only():
    with pytest.raises(DefenseError, match="steps"):
        scumble.defenses.Chain(steps=[["dcp", {"beta": 1.0}]])


@dataclass(frozen=True, kw_only=True)
class Probe(Defense):
    """Keeps what it is built with."""

    keyed = True
    seen: tuple

    def __call__(self, probs, inputs):
        return probs

    @classmethod
    def build(cls, bundle, **params):
        return cls(seen=(bundle, params["secret"]))

    @classmethod
    def parameters(cls):
        return ()


def test_bundle_and_secret_reach_a_step_of_a_chain():
    probe = f"{__file__}:Probe"
    chain = make("chain", steps=[[probe, {}]], bundle="bundle", secret=b"key")
    assert chain.steps[0].seen == ("bundle", b"key")
